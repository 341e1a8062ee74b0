// Kernels in C for tests of the pool and the step walker.
#include <stdint.h>
#include <unistd.h>

static void share(int32_t task, int32_t tasks, int32_t n, int32_t *from, int32_t *to) {
  *from = (int32_t)((int64_t)n * task / tasks);
  *to = (int32_t)((int64_t)n * (task + 1) / tasks);
}

// b[i] = a[i] + 1, for dims[0] elements.
void increment(int32_t task, int32_t tasks, const int32_t *dims, int32_t *a, int32_t *b) {
  int32_t from, to;
  share(task, tasks, dims[0], &from, &to);
  for (int32_t i = from; i < to; i++) b[i] = a[i] + 1;
}

// a = b reversed: every task reads what others wrote.
void reverse(int32_t task, int32_t tasks, const int32_t *dims, int32_t *a, int32_t *b) {
  int32_t from, to;
  share(task, tasks, dims[0], &from, &to);
  for (int32_t i = from; i < to; i++) a[i] = b[dims[0] - 1 - i];
}

// Writes its own number into each of its 24 pointers, and the number of tasks after it.
#define I(n) int32_t *p##n
#define W(n) p##n[0] = n, p##n[1] = tasks
void many(int32_t task, int32_t tasks, const int32_t *dims, I(0), I(1), I(2), I(3), I(4), I(5), I(6), I(7), I(8), I(9),
          I(10), I(11), I(12), I(13), I(14), I(15), I(16), I(17), I(18), I(19), I(20), I(21), I(22), I(23)) {
  (void)dims;
  if (task != 0) return;
  W(0), W(1), W(2), W(3), W(4), W(5), W(6), W(7), W(8), W(9), W(10), W(11);
  W(12), W(13), W(14), W(15), W(16), W(17), W(18), W(19), W(20), W(21), W(22), W(23);
}

// Which task of how many this is.
void count(int32_t task, int32_t tasks, const int32_t *dims, int32_t *out) {
  (void)dims;
  out[0] = task, out[1] = tasks;
}

// out[task] = tiny * 0.5, which is subnormal.
void subnormal(int32_t task, int32_t tasks, const int32_t *dims, const float *tiny, float *out) {
  (void)tasks, (void)dims;
  out[task] = *(const volatile float *)tiny * 0.5f;
}

// Not kernels: the caller's own treatment of subnormals.
void flush_subnormals(void) { __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040); }
void keep_subnormals(void) { __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() & ~0x8040u); }
uint32_t float_state(void) { return __builtin_ia32_stmxcsr(); }

void slow(int32_t task, int32_t tasks, const int32_t *dims) {
  (void)tasks, (void)dims;
  if (task == tasks - 1) usleep(20000);
}
