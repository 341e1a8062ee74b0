/* The thread pool, as the other files of this folder see it. */
#ifndef LLMC_POOL_H
#define LLMC_POOL_H

#include <stdint.h>

typedef struct Pool Pool;

/* A share of a job: `task` of `tasks`. All tasks of a job run at the same time, so they may wait for each other. */
typedef void (*Job)(Pool *pool, void *context, int32_t task, int32_t tasks);

/* Runs a job on all threads of the pool; the caller does task 0. Returns when all tasks are done. */
void llmc_pool_run(Pool *pool, Job job, void *context);

/* All tasks of the running job wait for each other. */
void llmc_pool_barrier(Pool *pool, int32_t task);

#endif
