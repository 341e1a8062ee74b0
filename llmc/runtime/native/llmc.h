/* The native half of a package: a thread pool, and the walker of a step's kernels.
 *
 * Linked with a package's kernels into one shared library, which Python binds with ctypes. There is no global state and
 * nothing runs at load: everything belongs to a pool, so copies of this library in one process do not meet.
 */
#ifndef LLMC_H
#define LLMC_H

#include <stdint.h>

#define LLMC_EXPORT __attribute__((visibility("default")))

/* One kernel run: which one, its `arg_count` pointers from args[first_arg] on, and flags.
 *
 * LLMC_BARRIER: all tasks wait for each other after it. LLMC_EACH: in a step of few tokens every task runs it whole, for
 * itself, into memory of its own, and nobody waits: a microsecond of arithmetic done by all costs less than a barrier. */
typedef struct {
  int32_t kernel, arg_count, first_arg, flags;
} Launch;

enum { LLMC_BARRIER = 1, LLMC_EACH = 2 };

enum { LLMC_MAX_ARGS = 24, LLMC_MAX_THREADS = 512 };

/* A pool of `threads` threads, the caller of a step being the first; threads <= 0: as many as the process may use.
 * Fewer when the system refuses them (see llmc_pool_threads). NULL: no memory. Threads are pinned nowhere. */
LLMC_EXPORT void *llmc_pool_create(int threads);

/* Ends the threads. In a process forked from the one that made the pool there are none to end. */
LLMC_EXPORT void llmc_pool_destroy(void *pool);

LLMC_EXPORT int llmc_pool_threads(void *pool);

/* How many threads a process may use well: one for each core of its affinity, cut to its cgroup's CPU quota, at least 1.
 * `root` goes before /proc and /sys; "" outside tests. */
LLMC_EXPORT int llmc_available_threads(const char *root);

/* Runs launches 0..count in order; `dims` goes to every kernel, dims[0] counts the step's tokens.
 *
 * `args` holds a table of `args_stride` pointers for each of the pool's threads; the tables differ in what a LLMC_EACH
 * launch writes. Up to `each_tokens` tokens, task t reads table t, and LLMC_EACH launches are run as (task 0 of 1) by
 * every task. In longer steps, and where one thread works alone, all tasks share table 0 and every launch.
 *
 * `nanoseconds` is NULL, or gets the time of each launch including its barrier, as the caller's clock has it. Calls on
 * one pool take turns. Returns 0; 1: a launch has too many arguments; nothing has run. */
LLMC_EXPORT int llmc_step(void *pool, const Launch *launches, int32_t count, void *const *kernels, void *const *args,
                          int32_t args_stride, int32_t each_tokens, const int32_t *dims, uint64_t *nanoseconds);

/* memcpy by all threads. */
LLMC_EXPORT void llmc_copy(void *pool, void *destination, const void *source, uint64_t bytes);

/* Bytes per second at which all threads together read `data` once. */
LLMC_EXPORT double llmc_read_bandwidth(void *pool, const void *data, uint64_t bytes);

/* "llmc-native <version of this interface> <instruction set>" */
LLMC_EXPORT const char *llmc_build(void);

#endif
