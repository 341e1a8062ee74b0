// The thread pool. It pins nothing, spins for a bounded time and then sleeps on a futex, survives fork, and runs one
// job at a time: concurrent callers wait for each other.
#define _GNU_SOURCE
#include "llmc.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// glibc 2.34 moved the threads into libc under a new version; asking for the old one keeps packages loadable from 2.28.
#if defined(__x86_64__)
#define OLD_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLD_GLIBC "GLIBC_2.17"
#endif
#ifdef OLD_GLIBC
__asm__(".symver pthread_create, pthread_create@" OLD_GLIBC);
__asm__(".symver pthread_join, pthread_join@" OLD_GLIBC);
__asm__(".symver pthread_attr_setstacksize, pthread_attr_setstacksize@" OLD_GLIBC);
#endif

enum { STACK_BYTES = 8 << 20, MAX_THREADS = 1024 };
// Some 0.3 ms: longer than the host's work between two steps, shorter than a scheduler's time slice.
enum { SPINS = 20000 };

typedef struct {
  Pool *pool;
  int task;
} Worker;

struct Pool {
  _Alignas(64) _Atomic uint32_t generation;  // counts jobs; workers sleep on it
  _Atomic uint32_t idle;                     // how many workers sleep
  _Alignas(64) _Atomic uint32_t arrived;     // tasks at the barrier
  _Alignas(64) _Atomic uint32_t phase;       // counts barriers; tasks sleep on it
  _Atomic uint32_t waiting;                  // how many tasks sleep
  _Alignas(64) _Atomic int pid;              // the process whose threads these are; 0 while they are being started
  pthread_mutex_t lock;                      // one job at a time
  Job job;
  void *data;
  bool stop;
  int threads, spins;
  Worker *workers;
  pthread_t *handles;
};

int allowed_threads(void);

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

uint64_t now_nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// Returns once *word != old.
static void wait_for_change(_Atomic uint32_t *word, uint32_t old, _Atomic uint32_t *sleepers, int spins) {
  for (int i = 0; i < spins; i++) {
    if (atomic_load_explicit(word, memory_order_acquire) != old) return;
    relax();
  }
  // A waker changes the word before it looks for sleepers, a sleeper says so before the kernel compares the word:
  // one of the two sees the other.
  atomic_fetch_add(sleepers, 1);
  while (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
  atomic_fetch_sub(sleepers, 1);
}

static void change(_Atomic uint32_t *word, _Atomic uint32_t *sleepers) {
  atomic_fetch_add(word, 1);
  if (atomic_load(sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void pool_barrier(Pool *pool) {
  if (pool->threads == 1) return;
  uint32_t phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
  if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == (uint32_t)pool->threads) {
    atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
    change(&pool->phase, &pool->waiting);
  } else {
    wait_for_change(&pool->phase, phase, &pool->waiting, pool->spins);
  }
}

static void *work(void *argument) {
  Worker *worker = argument;
  Pool *pool = worker->pool;
  for (uint32_t seen = 0;;) {
    wait_for_change(&pool->generation, seen, &pool->idle, pool->spins);
    seen++;  // a job ends only when every worker has done it, so none is ever missed
    if (pool->stop) return NULL;
    pool->job(pool, worker->task, pool->threads, pool->data);
    pool_barrier(pool);
  }
}

static void begin(Pool *pool, Job job, void *data) {
  pool->job = job;
  pool->data = data;
  change(&pool->generation, &pool->idle);
}

static void join(Pool *pool, int started) {
  pool->stop = true;
  begin(pool, NULL, NULL);
  for (int i = 1; i < started; i++) pthread_join(pool->handles[i], NULL);
}

// Starts the workers, in a new pool or in the child of a fork, where they do not exist.
static bool start(Pool *pool) {
  atomic_store(&pool->generation, 0);
  atomic_store(&pool->idle, 0);
  atomic_store(&pool->arrived, 0);
  atomic_store(&pool->phase, 0);
  atomic_store(&pool->waiting, 0);
  pthread_mutex_init(&pool->lock, NULL);
  pool->stop = false;
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, &before);  // signals are the caller's
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  int started = 1;
  for (; started < pool->threads; started++) {
    pool->workers[started] = (Worker){pool, started};
    if (pthread_create(&pool->handles[started], &attributes, work, &pool->workers[started])) break;
  }
  pthread_attr_destroy(&attributes);
  sigprocmask(SIG_SETMASK, &before, NULL);
  if (started < pool->threads) {
    join(pool, started);
    return false;
  }
  return true;
}

Pool *llmc_pool_create(int threads) {
  int allowed = allowed_threads();
  if (threads <= 0) threads = allowed;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
  if (!pool) return NULL;
  *pool = (Pool){.threads = threads};
  pool->spins = threads <= allowed ? SPINS : 0;  // more threads than processors: spinning would keep the others away
  pool->workers = calloc((size_t)threads, sizeof(Worker));
  pool->handles = calloc((size_t)threads, sizeof(pthread_t));
  if (pool->workers && pool->handles && start(pool)) {
    atomic_store(&pool->pid, getpid());
    return pool;
  }
  free(pool->workers);
  free(pool->handles);
  free(pool);
  return NULL;
}

void llmc_pool_destroy(Pool *pool) {
  if (!pool) return;
  if (atomic_load(&pool->pid) == getpid()) {
    pthread_mutex_lock(&pool->lock);
    join(pool, pool->threads);
    pthread_mutex_unlock(&pool->lock);
  }
  free(pool->workers);
  free(pool->handles);
  free(pool);
}

int llmc_pool_threads(const Pool *pool) { return pool->threads; }

// In a forked child the workers are gone and the lock may be held by nobody: the first caller makes both anew.
static bool revive(Pool *pool) {
  int self = getpid(), owner = atomic_load(&pool->pid);
  while (owner != self) {
    if (owner != 0 && atomic_compare_exchange_strong(&pool->pid, &owner, 0)) {
      bool alive = start(pool);
      if (!alive) {  // not enough threads for this process: the caller alone
        pool->threads = 1;
        alive = start(pool);
      }
      atomic_store(&pool->pid, self);
      return alive;
    }
    relax();
    owner = atomic_load(&pool->pid);
  }
  return true;
}

int pool_run(Pool *pool, Job job, void *data) {
  if (!revive(pool)) return -1;
  pthread_mutex_lock(&pool->lock);
  if (pool->threads > 1) begin(pool, job, data);
  job(pool, 0, pool->threads, data);
  pool_barrier(pool);
  pthread_mutex_unlock(&pool->lock);
  return 0;
}
