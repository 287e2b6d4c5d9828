#define _GNU_SOURCE
#include "threads.h"

#include "platform.h"
#include "scan.h"

enum { MAX_THREADS = 256 };

/* What a thread has to do for it to be worth its start: a thread of a team is awake or close to it, one of our own is
 * made and woken, and waited for. */
enum { ELEMENTS_IN_TEAM = 1 << 16, ELEMENTS_PER_START = 1 << 20 };

typedef struct {
    zs_task run;
    void *context;
    int64_t threads, tasks, workspace_bytes;
    int64_t seats;   /* atomic: threads that came, whether there was room for them or not */
    int64_t next;    /* atomic: the task to take next */
    int64_t workers; /* atomic: threads that found memory and took part */
} crew;

/* A team does not survive a fork: the child's runtime believes in threads that are gone, and would wait for them. */
static zs_team lent;
static int64_t lent_to;

void zs_lend_team(zs_team team) {
    lent_to = current_process();
    lent = team;
}

static zs_team team_of_host(void) { return lent && lent_to == current_process() ? lent : NULL; }

void *zs_allocate(size_t bytes) { return allocate_aligned(bytes ? bytes : 64); }

void zs_huge_pages(void *memory, int64_t bytes) { use_huge_pages(memory, bytes); }
void zs_release(void *memory) { release_aligned(memory); }

int64_t zs_useful_threads(int64_t wanted, int64_t elements) {
    int64_t useful = elements / (team_of_host() ? ELEMENTS_IN_TEAM : ELEMENTS_PER_START);
    if (useful > wanted) useful = wanted;
    if (useful > MAX_THREADS) useful = MAX_THREADS;
    return useful < 1 ? 1 : useful;
}

static void work(void *shared) {
    crew *c = shared;
    if (__atomic_fetch_add(&c->seats, 1, __ATOMIC_RELAXED) >= c->threads) return;
    float *workspace = zs_allocate((size_t)c->workspace_bytes);
    if (!workspace) return;
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
}

ZS_THREAD_FUNCTION(help, shared) {
    work(shared);
    return ZS_THREAD_RESULT;
}

static void work_with_helpers(crew *c) {
    zs_thread helpers[MAX_THREADS];
    int64_t started = 0;
    zs_signals before;
    block_signals(&before);
    while (started < c->threads - 1 && start_thread(&helpers[started], help, c)) started++;
    restore_signals(&before);
    work(c);
    for (int64_t i = 0; i < started; i++) join_thread(helpers[i]);
}

int zs_parallel(int64_t threads, int64_t team, int64_t tasks, int64_t workspace_floats, zs_task run, void *context) {
    crew c = {.run = run, .context = context, .threads = threads < tasks ? threads : tasks, .tasks = tasks,
              .workspace_bytes = workspace_floats * 4};
    const zs_team host = team_of_host();
    if (c.threads <= 1) {
        c.threads = 1;
        work(&c);
    } else if (host) {
        host(work, &c, (unsigned)team, 0);
    } else {
        work_with_helpers(&c);
    }
    return c.workers > 0 || tasks == 0 ? ZS_OK : ZS_NO_MEMORY;
}
