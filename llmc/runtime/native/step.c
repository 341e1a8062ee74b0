#include <stddef.h>

#include "llmc.h"
#include "pool.h"
#include "sync.h"

/* Pointers of a kernel with n of them: as types, and as values. */
#define POINTERS1 void *
#define POINTERS2 POINTERS1, void *
#define POINTERS3 POINTERS2, void *
#define POINTERS4 POINTERS3, void *
#define POINTERS5 POINTERS4, void *
#define POINTERS6 POINTERS5, void *
#define POINTERS7 POINTERS6, void *
#define POINTERS8 POINTERS7, void *
#define POINTERS9 POINTERS8, void *
#define POINTERS10 POINTERS9, void *
#define POINTERS11 POINTERS10, void *
#define POINTERS12 POINTERS11, void *
#define POINTERS13 POINTERS12, void *
#define POINTERS14 POINTERS13, void *
#define POINTERS15 POINTERS14, void *
#define POINTERS16 POINTERS15, void *
#define POINTERS17 POINTERS16, void *
#define POINTERS18 POINTERS17, void *
#define POINTERS19 POINTERS18, void *
#define POINTERS20 POINTERS19, void *
#define POINTERS21 POINTERS20, void *
#define POINTERS22 POINTERS21, void *
#define POINTERS23 POINTERS22, void *
#define POINTERS24 POINTERS23, void *
#define VALUES1 a[0]
#define VALUES2 VALUES1, a[1]
#define VALUES3 VALUES2, a[2]
#define VALUES4 VALUES3, a[3]
#define VALUES5 VALUES4, a[4]
#define VALUES6 VALUES5, a[5]
#define VALUES7 VALUES6, a[6]
#define VALUES8 VALUES7, a[7]
#define VALUES9 VALUES8, a[8]
#define VALUES10 VALUES9, a[9]
#define VALUES11 VALUES10, a[10]
#define VALUES12 VALUES11, a[11]
#define VALUES13 VALUES12, a[12]
#define VALUES14 VALUES13, a[13]
#define VALUES15 VALUES14, a[14]
#define VALUES16 VALUES15, a[15]
#define VALUES17 VALUES16, a[16]
#define VALUES18 VALUES17, a[17]
#define VALUES19 VALUES18, a[18]
#define VALUES20 VALUES19, a[19]
#define VALUES21 VALUES20, a[20]
#define VALUES22 VALUES21, a[21]
#define VALUES23 VALUES22, a[22]
#define VALUES24 VALUES23, a[23]

#define CASE(n) \
  case n: ((void (*)(int32_t, int32_t, const int32_t *, POINTERS##n))kernel)(task, tasks, dims, VALUES##n); break;

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
  int32_t args_stride, each_tokens;
  const int32_t *dims;
  uint64_t *nanoseconds, last;
} Step;

static void walk(Pool *pool, void *context, int32_t task, int32_t tasks) {
  Step *step = context;
  int each = tasks > 1 && step->dims[0] <= step->each_tokens;
  void *const *args = step->args + (each ? (ptrdiff_t)task * step->args_stride : 0);
  for (int32_t i = 0; i < step->count; i++) {
    const Launch *l = &step->launches[i];
    int whole = each && (l->flags & LLMC_EACH);
    call(step->kernels[l->kernel], l->arg_count, whole ? 0 : task, whole ? 1 : tasks, step->dims, args + l->first_arg);
    if (i + 1 == step->count) break; /* the job's own end is the last barrier */
    if ((l->flags & LLMC_BARRIER) && !whole) llmc_pool_barrier(pool, task);
    if (task == 0 && step->nanoseconds != NULL) {
      uint64_t now = llmc_nanoseconds();
      step->nanoseconds[i] = now - step->last;
      step->last = now;
    }
  }
}

int llmc_step(void *pool, const Launch *launches, int32_t count, void *const *kernels, void *const *args,
              int32_t args_stride, int32_t each_tokens, const int32_t *dims, uint64_t *nanoseconds) {
  for (int32_t i = 0; i < count; i++)
    if (launches[i].arg_count < 0 || launches[i].arg_count > LLMC_MAX_ARGS) return 1;
  if (count <= 0) return 0;
  uint64_t start = nanoseconds != NULL ? llmc_nanoseconds() : 0;
  Step step = {launches, count, kernels, args, args_stride, each_tokens, dims, nanoseconds, start};
  llmc_pool_run(pool, walk, &step);
  if (nanoseconds != NULL) nanoseconds[count - 1] = llmc_nanoseconds() - step.last;
  return 0;
}
