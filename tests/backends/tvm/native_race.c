// A program for the thread sanitizer: several threads step one pool, another has its own; then one forks.
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "llmc.h"

enum { N = 1000, STEPS = 200, THREADS = 3, STRIDE = 12 };

static void increment(int32_t task, int32_t tasks, const int32_t *dims, void *a, void *b) {
  int32_t *x = a, *y = b;
  for (int32_t i = dims[0] * task / tasks; i < dims[0] * (task + 1) / tasks; i++) y[i] = x[i] + 1;
}

static void copy(int32_t task, int32_t tasks, const int32_t *dims, void *a, void *b) {
  int32_t *x = a, *y = b;
  for (int32_t i = dims[0] * task / tasks; i < dims[0] * (task + 1) / tasks; i++) y[i] = x[i];
}

static void reverse(int32_t task, int32_t tasks, const int32_t *dims, void *a, void *b) {
  int32_t *x = a, *y = b;
  for (int32_t i = dims[0] * task / tasks; i < dims[0] * (task + 1) / tasks; i++) x[i] = y[dims[0] - 1 - i];
}

// Adds 2 to `a`, by way of `b` and `c`: of which each task has its own in a step of N tokens when `each_tokens` is N.
static int step(void *pool, int32_t *a, int32_t *b, int32_t (*c)[2][N], int32_t each_tokens) {
  enum { WHOLE = LLMC_BARRIER | LLMC_EACH };
  const Launch launches[] = {{0, 2, 0, WHOLE}, {2, 2, 2, WHOLE}, {1, 2, 4, LLMC_BARRIER},
                             {0, 2, 6, WHOLE}, {2, 2, 8, WHOLE}, {1, 2, 10, LLMC_BARRIER}};
  void *const kernels[] = {(void *)increment, (void *)reverse, (void *)copy};
  void *args[THREADS][STRIDE];
  for (int i = 0; i < THREADS; i++) {
    int32_t *p = c[i][0], *q = c[i][1];
    void *const table[STRIDE] = {a, p, p, q, b, q, b, p, p, q, a, q};
    memcpy(args[i], table, sizeof table);
  }
  const int32_t dims[4] = {N, 0, 0, 0};
  uint64_t nanoseconds[6];
  return llmc_step(pool, launches, 6, kernels, &args[0][0], STRIDE, each_tokens, dims, nanoseconds);
}

static void *drive(void *pool) {
  static _Thread_local int32_t a[N], b[N], c[THREADS][2][N];
  for (int i = 0; i < STEPS; i++) {
    if (step(pool, a, b, c, i % 3 ? N : N - 1)) return pool;
    if (i % 50 == 0) usleep(2000);
  }
  for (int i = 0; i < N; i++)
    if (a[i] != 2 * STEPS) return pool;
  return NULL;
}

int main(void) {
  void *pools[2] = {llmc_pool_create(3), llmc_pool_create(2)};
  pthread_t threads[4];
  int failed = 0;
  for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, drive, pools[i == 3]);
  for (int i = 0; i < 4; i++) {
    void *result;
    pthread_join(threads[i], &result);
    failed |= result != NULL;
  }
  llmc_pool_destroy(pools[0]);
  llmc_pool_destroy(pools[1]);
  puts(failed ? "wrong" : "right");
  return failed;
}
