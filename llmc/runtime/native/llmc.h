// The native part of a package: a thread pool, and the walk over a step's launches. Bound by runtime/native.py.
#ifndef LLMC_H
#define LLMC_H

#include <stdint.h>

#define LLMC_EXPORT __attribute__((visibility("default")))

// One kernel run: args[first_arg .. first_arg + arg_count) are its pointers. With `barrier`, no task goes on to the next
// launch before all have finished this one.
typedef struct {
  int32_t kernel, arg_count, first_arg, barrier;
} Launch;

typedef struct Pool Pool;

// What a thread does inside a parallel region: share `task` of `tasks`.
typedef void (*Job)(Pool *pool, int task, int tasks, void *data);

// threads <= 0: as many as the process may use (affinity and cgroup quota). NULL when threads cannot be started.
LLMC_EXPORT Pool *llmc_pool_create(int threads);
LLMC_EXPORT void llmc_pool_destroy(Pool *pool);
LLMC_EXPORT int llmc_pool_threads(const Pool *pool);

// Runs the launches in one parallel region. `dims` are the step's sizes, `nanoseconds` (or NULL) receives each launch's
// time, its barrier included. 0, or -1 when a launch is malformed.
LLMC_EXPORT int llmc_step(Pool *pool, const Launch *launches, int32_t count, void *const *kernels, void *const *args,
                          const int32_t *dims, uint64_t *nanoseconds);
LLMC_EXPORT void llmc_copy(Pool *pool, void *destination, const void *source, uint64_t bytes);
LLMC_EXPORT double llmc_read_bandwidth(Pool *pool, const void *data, uint64_t bytes);
LLMC_EXPORT const char *llmc_build(void);

// Inside the library: run a job on all threads, the caller being task 0; wait for all tasks of a running job.
int pool_run(Pool *pool, Job job, void *data);
void pool_barrier(Pool *pool);
uint64_t now_nanoseconds(void);

#endif
