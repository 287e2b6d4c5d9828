#define _GNU_SOURCE
#include "threads.h"

#include "platform.h"
#include "scan.h"

enum { MAX_THREADS = 256, ELEMENTS_PER_THREAD = 1 << 18 };

typedef struct {
    zs_task run;
    void *context;
    int64_t tasks, workspace_bytes;
    int64_t next;    /* atomic: the task to take next */
    int64_t workers; /* atomic: threads that found memory and took part */
} crew;

void *zs_allocate(size_t bytes) { return allocate_aligned(bytes ? bytes : 64); }

void zs_huge_pages(void *memory, int64_t bytes) { use_huge_pages(memory, bytes); }
void zs_release(void *memory) { release_aligned(memory); }

int64_t zs_useful_threads(int64_t wanted, int64_t elements) {
    int64_t useful = elements / ELEMENTS_PER_THREAD;
    if (useful > wanted) useful = wanted;
    if (useful > MAX_THREADS) useful = MAX_THREADS;
    return useful < 1 ? 1 : useful;
}

ZS_THREAD_FUNCTION(work, shared) {
    crew *c = shared;
    float *workspace = zs_allocate((size_t)c->workspace_bytes);
    if (!workspace) return ZS_THREAD_RESULT;
    __atomic_add_fetch(&c->workers, 1, __ATOMIC_RELAXED);
    /* States decay towards zero: flush denormals, which some CPUs handle a hundred times slower. */
    const uint64_t control = flush_denormals();
    for (;;) {
        int64_t task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (task >= c->tasks) break;
        c->run(c->context, task, workspace);
    }
    restore_denormals(control);
    zs_release(workspace);
    return ZS_THREAD_RESULT;
}

int zs_parallel(int64_t threads, int64_t tasks, int64_t workspace_floats, zs_task run, void *context) {
    crew c = {.run = run, .context = context, .tasks = tasks, .workspace_bytes = workspace_floats * 4};
    zs_thread helpers[MAX_THREADS];
    int64_t started = 0;
    if (threads > tasks) threads = tasks;
    if (threads > 1) {
        zs_signals before;
        block_signals(&before);
        while (started < threads - 1 && start_thread(&helpers[started], work, &c)) started++;
        restore_signals(&before);
    }
    work(&c);
    for (int64_t i = 0; i < started; i++) join_thread(helpers[i]);
    return c.workers > 0 || tasks == 0 ? ZS_OK : ZS_NO_MEMORY;
}
