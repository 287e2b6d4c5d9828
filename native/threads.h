/* Threads of one call: created, joined and gone before the call returns, so nothing survives a fork and several
 * callers do not meet. */
#ifndef ZIGMA_THREADS_H
#define ZIGMA_THREADS_H

#include <stddef.h>
#include <stdint.h>

typedef void (*zs_task)(void *context, int64_t task, float *workspace);

/* Runs task 0 .. tasks - 1, each once, on up to `threads` threads, each with its own workspace.
 * Returns ZS_OK or ZS_NO_MEMORY. A thread that cannot be created is done without. */
int zs_parallel(int64_t threads, int64_t tasks, int64_t workspace_floats, zs_task run, void *context);

/* Threads worth starting for so many inner-loop elements: starting one costs some 20 microseconds. */
int64_t zs_useful_threads(int64_t wanted, int64_t elements);

/* Asks for large pages, for memory that is fresh and about to be written whole. */
void zs_huge_pages(void *memory, int64_t bytes);

/* 64-byte aligned memory; NULL when there is none. */
void *zs_allocate(size_t bytes);
void zs_release(void *memory);

#endif
