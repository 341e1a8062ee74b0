/* Waiting on a word of memory: spinning for a bounded time, then sleeping in the kernel. */
#ifndef LLMC_SYNC_H
#define LLMC_SYNC_H

#include <stdatomic.h>
#include <stdint.h>

/* A word that threads wait on, and how many of them are asleep: nobody asleep, no system call to wake them. */
typedef struct {
  _Alignas(64) atomic_int value;
  atomic_int sleepers;
} Signal;

/* All of `count` threads meet here, again and again. */
typedef struct {
  _Alignas(64) atomic_int arrived;
  Signal phase;
  int count;
} Barrier;

/* Returns once signal->value differs from `seen`; sleeps after `spin_nanoseconds`. The nanoseconds that it took, 0 where
 * that was too short to look at the clock. */
int64_t llmc_signal_wait(Signal *signal, int seen, int64_t spin_nanoseconds);

/* Adds one to the value and wakes the sleepers. */
void llmc_signal_raise(Signal *signal);

int64_t llmc_barrier_wait(Barrier *barrier, int64_t spin_nanoseconds);

uint64_t llmc_nanoseconds(void);

#endif
