#include <stddef.h>

#include "llmc.h"
#include "pool.h"
#include "sync.h"

/* Pointers of a kernel with n of them: as types, and as values. */
#define T1 void *
#define T2 T1, void *
#define T3 T2, void *
#define T4 T3, void *
#define T5 T4, void *
#define T6 T5, void *
#define T7 T6, void *
#define T8 T7, void *
#define T9 T8, void *
#define T10 T9, void *
#define T11 T10, void *
#define T12 T11, void *
#define T13 T12, void *
#define T14 T13, void *
#define T15 T14, void *
#define T16 T15, void *
#define T17 T16, void *
#define T18 T17, void *
#define T19 T18, void *
#define T20 T19, void *
#define T21 T20, void *
#define T22 T21, void *
#define T23 T22, void *
#define T24 T23, void *
#define V1 a[0]
#define V2 V1, a[1]
#define V3 V2, a[2]
#define V4 V3, a[3]
#define V5 V4, a[4]
#define V6 V5, a[5]
#define V7 V6, a[6]
#define V8 V7, a[7]
#define V9 V8, a[8]
#define V10 V9, a[9]
#define V11 V10, a[10]
#define V12 V11, a[11]
#define V13 V12, a[12]
#define V14 V13, a[13]
#define V15 V14, a[14]
#define V16 V15, a[15]
#define V17 V16, a[16]
#define V18 V17, a[17]
#define V19 V18, a[18]
#define V20 V19, a[19]
#define V21 V20, a[20]
#define V22 V21, a[21]
#define V23 V22, a[22]
#define V24 V23, a[23]

#define CASE(n) \
  case n: ((void (*)(int32_t, int32_t, const int32_t *, T##n))kernel)(task, tasks, dims, V##n); break;

static void call(void *kernel, int32_t count, int32_t task, int32_t tasks, const int32_t *dims, void *const *a) {
  switch (count) {
    case 0: ((void (*)(int32_t, int32_t, const int32_t *))kernel)(task, tasks, dims); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    CASE(13) CASE(14) CASE(15) CASE(16) CASE(17) CASE(18) CASE(19) CASE(20) CASE(21) CASE(22) CASE(23) CASE(24)
  }
}

typedef struct {
  const Launch *launches;
  int32_t count;
  void *const *kernels, *const *args;
  const int32_t *dims;
  uint64_t *nanoseconds, last;
} Step;

static void walk(Pool *pool, void *context, int32_t task, int32_t tasks) {
  Step *step = context;
  for (int32_t i = 0; i < step->count; i++) {
    const Launch *l = &step->launches[i];
    call(step->kernels[l->kernel], l->arg_count, task, tasks, step->dims, step->args + l->first_arg);
    if (i + 1 == step->count) break; /* the job's own end is the last barrier */
    if (l->barrier) llmc_pool_barrier(pool);
    if (task == 0 && step->nanoseconds != NULL) {
      uint64_t now = llmc_nanoseconds();
      step->nanoseconds[i] = now - step->last;
      step->last = now;
    }
  }
}

int llmc_step(void *pool, const Launch *launches, int32_t count, void *const *kernels, void *const *args,
              const int32_t *dims, uint64_t *nanoseconds) {
  for (int32_t i = 0; i < count; i++)
    if (launches[i].arg_count < 0 || launches[i].arg_count > LLMC_MAX_ARGS) return 1;
  if (count <= 0) return 0;
  Step step = {launches, count, kernels, args, dims, nanoseconds, nanoseconds != NULL ? llmc_nanoseconds() : 0};
  llmc_pool_run(pool, walk, &step);
  if (nanoseconds != NULL) nanoseconds[count - 1] = llmc_nanoseconds() - step.last;
  return 0;
}
