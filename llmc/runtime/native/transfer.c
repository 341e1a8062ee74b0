#include <stddef.h>
#include <string.h>

#include "llmc.h"
#include "pool.h"
#include "sync.h"

typedef struct {
  char *destination;
  const char *source;
  uint64_t bytes;
} Transfer;

/* Where the share of `task` begins: whole pages, so that two threads do not touch one first. */
static uint64_t share(uint64_t bytes, int32_t task, int32_t tasks) {
  if (task == tasks) return bytes;
  return (uint64_t)((unsigned __int128)bytes * (unsigned)task / (unsigned)tasks) / 4096 * 4096;
}

static void copy(Pool *pool, void *context, int32_t task, int32_t tasks) {
  (void)pool;
  Transfer *t = context;
  uint64_t begin = share(t->bytes, task, tasks), end = share(t->bytes, task + 1, tasks);
  if (end > begin) memcpy(t->destination + begin, t->source + begin, end - begin);
}

void llmc_copy(void *pool, void *destination, const void *source, uint64_t bytes) {
  Transfer transfer = {destination, source, bytes};
  llmc_pool_run(pool, copy, &transfer);
}

typedef uint64_t Vector __attribute__((vector_size(32), aligned(1), may_alias));

/* Eight streams at once: one keeps too few lines in flight, and would be no bound for kernels that read several. */
enum { STREAMS = 8 };

static void read_all(Pool *pool, void *context, int32_t task, int32_t tasks) {
  (void)pool;
  Transfer *t = context;
  uint64_t begin = share(t->bytes, task, tasks), end = share(t->bytes, task + 1, tasks);
  uint64_t each = (end - begin) / STREAMS / 128 * 128;
  Vector a = {0}, b = {0}, c = {0}, d = {0};
  for (uint64_t i = 0; i < each; i += 128)
    for (int s = 0; s < STREAMS; s++) {
      const Vector *v = (const Vector *)(t->source + begin + (uint64_t)s * each + i);
      a ^= v[0];
      b ^= v[1];
      c ^= v[2];
      d ^= v[3];
    }
  a ^= b ^ c ^ d;
  __asm__ volatile("" : : "m"(a)); /* the sum is wanted */
}

double llmc_read_bandwidth(void *pool, const void *data, uint64_t bytes) {
  Transfer transfer = {NULL, data, bytes};
  uint64_t start = llmc_nanoseconds();
  llmc_pool_run(pool, read_all, &transfer);
  uint64_t elapsed = llmc_nanoseconds() - start;
  return (double)bytes * 1e9 / (double)(elapsed > 0 ? elapsed : 1);
}
