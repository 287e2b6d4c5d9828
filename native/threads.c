#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <xmmintrin.h>

#include "scan.h"

enum { MAX_THREADS = 256, ELEMENTS_PER_THREAD = 1 << 18 };

typedef struct {
    zs_task run;
    void *context;
    int64_t tasks, workspace_bytes;
    int64_t next;    /* atomic: the task to take next */
    int64_t workers; /* atomic: threads that found memory and took part */
} crew;

void *zs_allocate(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}

void zs_release(void *memory) { free(memory); }

int64_t zs_useful_threads(int64_t wanted, int64_t elements) {
    int64_t useful = elements / ELEMENTS_PER_THREAD;
    if (useful > wanted) useful = wanted;
    if (useful > MAX_THREADS) useful = MAX_THREADS;
    return useful < 1 ? 1 : useful;
}

static void *work(void *shared) {
    crew *c = shared;
    float *workspace = zs_allocate((size_t)c->workspace_bytes);
    if (!workspace) return NULL;
    __atomic_add_fetch(&c->workers, 1, __ATOMIC_RELAXED);
    /* States decay towards zero: flush denormals, which some CPUs handle a hundred times slower. */
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);
    for (;;) {
        int64_t task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED);
        if (task >= c->tasks) break;
        c->run(c->context, task, workspace);
    }
    _mm_setcsr(control);
    zs_release(workspace);
    return NULL;
}

int zs_parallel(int64_t threads, int64_t tasks, int64_t workspace_floats, zs_task run, void *context) {
    crew c = {.run = run, .context = context, .tasks = tasks, .workspace_bytes = workspace_floats * 4};
    pthread_t helpers[MAX_THREADS];
    int64_t started = 0;
    if (threads > tasks) threads = tasks;
    if (threads > 1) {
        sigset_t all, before; /* signals belong to the host's threads */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (started < threads - 1 && !pthread_create(&helpers[started], NULL, work, &c)) started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    work(&c);
    for (int64_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);
    return c.workers > 0 || tasks == 0 ? ZS_OK : ZS_NO_MEMORY;
}
