#define _GNU_SOURCE
#include "sync.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t llmc_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t llmc_signal_wait(Signal *signal, int seen, int64_t spin_nanoseconds) {
  uint64_t start = 0;
  do {
    for (int i = 0; i < 64; i++) {
      if (atomic_load_explicit(&signal->value, memory_order_acquire) != seen) return start ? (int64_t)(llmc_nanoseconds() - start) : 0;
      pause_briefly();
    }
    if (start == 0) start = llmc_nanoseconds();
  } while ((int64_t)(llmc_nanoseconds() - start) < spin_nanoseconds);
  /* Announced before the value is looked at again, and raised before sleepers are counted: one of the two sees the
   * other. The futex call itself returns at once when the value has changed. */
  atomic_fetch_add(&signal->sleepers, 1);
  while (atomic_load(&signal->value) == seen)
    syscall(SYS_futex, &signal->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
  atomic_fetch_sub(&signal->sleepers, 1);
  return (int64_t)(llmc_nanoseconds() - start);
}

void llmc_signal_raise(Signal *signal) {
  atomic_fetch_add(&signal->value, 1);
  if (atomic_load(&signal->sleepers) > 0) syscall(SYS_futex, &signal->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

int64_t llmc_barrier_wait(Barrier *barrier, int64_t spin_nanoseconds) {
  /* The phase cannot change before this thread has arrived. */
  int phase = atomic_load_explicit(&barrier->phase.value, memory_order_relaxed);
  if (atomic_fetch_add(&barrier->arrived, 1) + 1 < barrier->count)
    return llmc_signal_wait(&barrier->phase, phase, spin_nanoseconds);
  atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
  llmc_signal_raise(&barrier->phase);
  return 0;
}
