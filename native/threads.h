/* Threads of one call: those of the host's OpenMP runtime where they are lent, or our own, which are created, joined
 * and gone before the call returns. Nothing of ours survives a fork, and several callers do not meet. */
#ifndef ZIGMA_THREADS_H
#define ZIGMA_THREADS_H

#include <stddef.h>
#include <stdint.h>

typedef void (*zs_task)(void *context, int64_t task, float *workspace);

/* GOMP_parallel of libgomp, and of the runtimes that take its place: runs work(data) on a team of `threads`, the caller
 * among them, and returns when all are through. */
typedef void (*zs_team)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* From now on the calls of this process, not those of its forks, run on the host's team; NULL: on our own threads. The
 * host's threads are there already and spin for a while after each of its own loops: threads beside them would share
 * their processors with them. */
void zs_lend_team(zs_team team);

/* Runs task 0 .. tasks - 1, each once, on up to `threads` threads, each with its own workspace. `team`: how many the host
 * uses. A lent team is always as large as the host's own, for a runtime ends threads that a smaller one leaves out; who
 * is too many returns at once. Returns ZS_OK or ZS_NO_MEMORY. A thread that cannot be created is done without. */
int zs_parallel(int64_t threads, int64_t team, int64_t tasks, int64_t workspace_floats, zs_task run, void *context);

/* Threads worth having for so many inner-loop elements. */
int64_t zs_useful_threads(int64_t wanted, int64_t elements);

/* Asks for large pages, for memory that is fresh and about to be written whole. */
void zs_huge_pages(void *memory, int64_t bytes);

/* 64-byte aligned memory; NULL when there is none. */
void *zs_allocate(size_t bytes);
void zs_release(void *memory);

#endif
