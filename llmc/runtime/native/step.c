// The walk: one call for each step, one parallel region, a barrier between launches.
#include "llmc.h"

#include <stddef.h>
#include <string.h>

#ifndef LLMC_ISA
#define LLMC_ISA "generic"
#endif

const char *llmc_build(void) { return "llmc-native 1 " LLMC_ISA; }

typedef struct {
  const Launch *launches;
  int32_t count;
  void *const *kernels;
  void *const *args;
  const int32_t *dims;
  uint64_t *nanoseconds;
} Walk;

// Kernels take (task, tasks, dims, pointers…): one function type for each number of pointers.
#define P0
#define P1 , void *
#define P2 P1 P1
#define P4 P2 P2
#define P8 P4 P4
#define A(i) , p[i]
#define A0
#define A1 A(0)
#define A2 A1 A(1)
#define A3 A2 A(2)
#define A4 A3 A(3)
#define A5 A4 A(4)
#define A6 A5 A(5)
#define A7 A6 A(6)
#define A8 A7 A(7)
#define A9 A8 A(8)
#define A10 A9 A(9)
#define A11 A10 A(10)
#define A12 A11 A(11)
#define A13 A12 A(12)
#define A14 A13 A(13)
#define A15 A14 A(14)
#define A16 A15 A(15)
#define CASE(n, types)                                                              \
  case n:                                                                           \
    ((void (*)(int32_t, int32_t, const int32_t *types))kernel)(task, tasks, dims A##n); \
    break;

enum { MAX_ARGS = 16 };

static void call(void *kernel, int32_t task, int32_t tasks, const int32_t *dims, void *const *p, int32_t count) {
  switch (count) {
    CASE(0, P0)
    CASE(1, P1)
    CASE(2, P2)
    CASE(3, P2 P1)
    CASE(4, P4)
    CASE(5, P4 P1)
    CASE(6, P4 P2)
    CASE(7, P4 P2 P1)
    CASE(8, P8)
    CASE(9, P8 P1)
    CASE(10, P8 P2)
    CASE(11, P8 P2 P1)
    CASE(12, P8 P4)
    CASE(13, P8 P4 P1)
    CASE(14, P8 P4 P2)
    CASE(15, P8 P4 P2 P1)
    CASE(16, P8 P8)
  }
}

static void walk(Pool *pool, int task, int tasks, void *data) {
  const Walk *w = data;
  uint64_t *nanoseconds = task == 0 ? w->nanoseconds : NULL;
  uint64_t start = nanoseconds ? now_nanoseconds() : 0;
  for (int32_t i = 0; i < w->count; i++) {
    const Launch *l = &w->launches[i];
    call(w->kernels[l->kernel], task, tasks, w->dims, w->args + l->first_arg, l->arg_count);
    if (l->barrier && i + 1 < w->count) pool_barrier(pool);  // the region's end is a barrier itself
    if (nanoseconds) {
      uint64_t end = now_nanoseconds();
      nanoseconds[i] = end - start;
      start = end;
    }
  }
}

int llmc_step(Pool *pool, const Launch *launches, int32_t count, void *const *kernels, void *const *args,
              const int32_t *dims, uint64_t *nanoseconds) {
  for (int32_t i = 0; i < count; i++)
    if (launches[i].arg_count < 0 || launches[i].arg_count > MAX_ARGS) return -1;
  Walk w = {launches, count, kernels, args, dims, nanoseconds};
  return pool_run(pool, walk, &w);
}

typedef struct {
  char *destination;
  const char *source;
  uint64_t bytes;
} Copy;

// A share of a range, in whole cache lines but for the last.
static void share(uint64_t bytes, int task, int tasks, uint64_t *from, uint64_t *to) {
  uint64_t lines = (bytes + 63) / 64;
  *from = lines * (uint64_t)task / (uint64_t)tasks * 64;
  *to = lines * (uint64_t)(task + 1) / (uint64_t)tasks * 64;
  if (*to > bytes) *to = bytes;
  if (*from > bytes) *from = bytes;
}

static void copy(Pool *pool, int task, int tasks, void *data) {
  (void)pool;
  Copy *c = data;
  uint64_t from, to;
  share(c->bytes, task, tasks, &from, &to);
  memcpy(c->destination + from, c->source + from, to - from);
}

void llmc_copy(Pool *pool, void *destination, const void *source, uint64_t bytes) {
  Copy c = {destination, source, bytes};
  pool_run(pool, copy, &c);
}

// Four independent sums, so that loads and not additions are the limit.
static void read_share(Pool *pool, int task, int tasks, void *data) {
  (void)pool;
  const Copy *c = data;
  uint64_t from, to, sums[4] = {0, 0, 0, 0};
  share(c->bytes, task, tasks, &from, &to);
  for (uint64_t i = from; i + 128 <= to; i += 128) {
    const uint64_t *words = (const uint64_t *)(c->source + i);
    for (int j = 0; j < 4; j++) sums[j] += words[4 * j] + words[4 * j + 1] + words[4 * j + 2] + words[4 * j + 3];
  }
  volatile uint64_t sink = sums[0] + sums[1] + sums[2] + sums[3];
  (void)sink;
}

double llmc_read_bandwidth(Pool *pool, const void *data, uint64_t bytes) {
  Copy c = {NULL, data, bytes};
  uint64_t start = now_nanoseconds();
  pool_run(pool, read_share, &c);
  uint64_t elapsed = now_nanoseconds() - start;
  return elapsed ? (double)bytes * 1e9 / (double)elapsed : 0.0;
}
