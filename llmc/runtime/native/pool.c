#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "llmc.h"
#include "sync.h"

/* These moved into libc.so with a new version name in glibc 2.34; bound by the old name the library loads on 2.28. */
#if defined(__GLIBC__) && defined(__x86_64__)
#define OLD_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define OLD_GLIBC "GLIBC_2.17"
#endif
#ifdef OLD_GLIBC
__asm__(".symver pthread_create, pthread_create@" OLD_GLIBC);
__asm__(".symver pthread_join, pthread_join@" OLD_GLIBC);
__asm__(".symver pthread_attr_setstacksize, pthread_attr_setstacksize@" OLD_GLIBC);
#endif

/* Kernels keep their scratch on the stack; a host's `ulimit -s` is no reason to run out of it. */
enum { STACK_BYTES = 8 << 20 };

/* How long a thread spins before it sleeps. Between two steps Python samples and prepares the next one; inside a step
 * the others are at most a kernel behind. */
enum { SPIN_BETWEEN_STEPS = 400000, SPIN_IN_STEP = 100000, SPIN_WHEN_CROWDED = 2000 };

/* For how many nanoseconds the caller works alone: see `judge`. */
enum { ALONE_AT_LEAST = 10000000, ALONE_AT_MOST = 400000000 };

struct Pool {
  pthread_mutex_t turn; /* whose job runs */
  int threads;          /* the caller's included */
  int64_t spin_between_steps, spin_in_step;
  int tasks;              /* of the running job: `threads`, or 1 while the caller works alone */
  int64_t waited;         /* nanoseconds for which the caller has waited for the others in this job */
  uint64_t alone_until;   /* the time at which the others are tried again */
  int64_t alone_for;      /* how long the caller works alone after the next bad job */
  Job job;
  void *context;
  atomic_int stopping;
  Signal generation; /* raised for every job */
  Barrier barrier;
  /* Whose threads these are: 2 · pid; 2 · pid + 1 while a forked process makes its own. */
  _Atomic int64_t owner;
  pthread_t workers[LLMC_MAX_THREADS];
  int first_generation; /* what new workers have already seen */
  struct Worker {
    Pool *pool;
    int32_t task;
  } places[LLMC_MAX_THREADS];
};

/* Kernels assume the processor's default treatment of floats: a host that flushes subnormals in one of its threads
 * must not change results, nor make them depend on which thread does what. */
static uint64_t enter_default_floats(void) {
#if defined(__x86_64__)
  uint32_t before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x1f80);
  return before;
#elif defined(__aarch64__)
  uint64_t before, standard = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(before));
  __asm__ volatile("msr fpcr, %0" : : "r"(standard));
  return before;
#else
  return 0;
#endif
}

static void leave_default_floats(uint64_t before) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr((uint32_t)before);
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
  (void)before;
#endif
}

static void run_task(Pool *pool, int32_t task) {
  uint64_t floats = enter_default_floats();
  pool->job(pool, pool->context, task, pool->tasks);
  leave_default_floats(floats);
  llmc_pool_barrier(pool, task);
}

static void *work(void *argument) {
  struct Worker *place = argument;
  Pool *pool = place->pool;
  int seen = pool->first_generation;
  prctl(PR_SET_NAME, "llmc-worker");
  for (;;) {
    llmc_signal_wait(&pool->generation, seen, pool->spin_between_steps);
    seen++;
    if (atomic_load(&pool->stopping)) return NULL;
    run_task(pool, place->task);
  }
}

/* Starts the workers; the pool becomes smaller when the system refuses some. */
static void start_workers(Pool *pool, int wanted) {
  /* Signals are for the host's own threads: a new thread inherits the mask of its maker. */
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, &before);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  pool->first_generation = atomic_load(&pool->generation.value);
  int started = 1;
  for (; started < wanted; started++) {
    pool->places[started] = (struct Worker){pool, started};
    if (pthread_create(&pool->workers[started], &attributes, work, &pool->places[started])) break;
  }
  pthread_attr_destroy(&attributes);
  sigprocmask(SIG_SETMASK, &before, NULL);
  /* Workers read these only after the first job's signal. */
  pool->threads = started;
  pool->barrier.count = started;
}

static void reset(Pool *pool) {
  pthread_mutex_init(&pool->turn, NULL);
  atomic_store(&pool->generation.sleepers, 0);
  atomic_store(&pool->barrier.arrived, 0);
  atomic_store(&pool->barrier.phase.sleepers, 0);
}

/* After a fork there is one thread, and the mutex and the counters are as others left them: begin anew. */
static void own(Pool *pool) {
  int64_t mine = 2 * (int64_t)getpid();
  int64_t owner = atomic_load(&pool->owner);
  while (owner != mine) {
    if (owner != mine + 1 && atomic_compare_exchange_strong(&pool->owner, &owner, mine + 1)) {
      reset(pool);
      start_workers(pool, pool->threads);
      atomic_store(&pool->owner, mine);
      return;
    }
    owner = atomic_load(&pool->owner); /* another thread of this process is at it */
  }
}

void *llmc_pool_create(int threads) {
  int available = llmc_available_threads("");
  if (threads <= 0) threads = available;
  if (threads > LLMC_MAX_THREADS) threads = LLMC_MAX_THREADS;
  Pool *pool = aligned_alloc(64, (sizeof(Pool) + 63) / 64 * 64);
  if (pool == NULL) return NULL;
  memset(pool, 0, sizeof *pool);
  /* With more threads than processors, spinning takes time from the thread that is waited for. */
  int crowded = threads > (int)sysconf(_SC_NPROCESSORS_ONLN) || threads > 2 * available;
  pool->spin_between_steps = crowded ? SPIN_WHEN_CROWDED : SPIN_BETWEEN_STEPS;
  pool->spin_in_step = crowded ? SPIN_WHEN_CROWDED : SPIN_IN_STEP;
  pool->alone_for = ALONE_AT_LEAST;
  reset(pool);
  start_workers(pool, threads);
  atomic_store(&pool->owner, 2 * (int64_t)getpid());
  return pool;
}

void llmc_pool_destroy(void *handle) {
  Pool *pool = handle;
  if (pool == NULL) return;
  if (atomic_load(&pool->owner) == 2 * (int64_t)getpid()) {
    atomic_store(&pool->stopping, 1);
    llmc_signal_raise(&pool->generation);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], NULL);
    pthread_mutex_destroy(&pool->turn);
  }
  free(pool);
}

int llmc_pool_threads(void *pool) { return ((Pool *)pool)->threads; }

/* Where other processes want the processors, two threads may share one and take turns at every barrier: far slower than
 * one thread alone. So when the caller waits for longer than the others' shares would have taken it, it works alone for
 * a while, longer each time. Results do not depend on it: a kernel's results are the same for any number of tasks. */
static void judge(Pool *pool, uint64_t start) {
  uint64_t end = llmc_nanoseconds();
  int64_t elapsed = (int64_t)(end - start), worked = elapsed - pool->waited;
  if (worked * pool->threads >= elapsed) {
    pool->alone_for = ALONE_AT_LEAST;
    return;
  }
  pool->alone_until = end + (uint64_t)pool->alone_for;
  if (pool->alone_for < ALONE_AT_MOST) pool->alone_for *= 2;
}

void llmc_pool_run(Pool *pool, Job job, void *context) {
  own(pool);
  pthread_mutex_lock(&pool->turn);
  uint64_t start = llmc_nanoseconds();
  pool->job = job;
  pool->context = context;
  pool->tasks = start < pool->alone_until ? 1 : pool->threads;
  pool->waited = 0;
  if (pool->tasks > 1) llmc_signal_raise(&pool->generation);
  run_task(pool, 0);
  if (pool->tasks > 1) judge(pool, start);
  pthread_mutex_unlock(&pool->turn);
}

void llmc_pool_barrier(Pool *pool, int32_t task) {
  if (pool->tasks == 1) return;
  int64_t waited = llmc_barrier_wait(&pool->barrier, pool->spin_in_step);
  if (task == 0) pool->waited += waited;
}

const char *llmc_build(void) { return "llmc-native 2 " LLMC_ISA; }
