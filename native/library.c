/* Entry points of the native library: checks, threads, packing of the parameters and the final sums over units. */

#include <stdlib.h>
#include <string.h>

#include "instruction_sets.h"
#include "threads.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

EXPORT int64_t zs_abi_version(void) { return ZS_ABI_VERSION; }

EXPORT int64_t zs_structure_size(int64_t which) {
    const size_t sizes[] = {sizeof(zs_scan_args), sizeof(zs_conv_args), sizeof(zs_norm_args)};
    return (int64_t)sizes[which];
}

EXPORT const char *zs_instruction_set(const char *name) {
    const zs_kernels *kernels = find_kernels(name);
    return kernels ? kernels->name : NULL;
}

/* y = 2^x. as_decays: how many times to compute it as the scan does where |x| < 120; 0 is once, for any x. */
EXPORT int64_t zs_exp2(const char *instruction_set, const float *x, float *y, int64_t count, int64_t as_decays) {
    const zs_kernels *kernels = find_kernels(instruction_set);
    if (!kernels) return ZS_UNSUPPORTED;
    if (!as_decays) kernels->exp2(x, y, count);
    for (int64_t time = 0; time < as_decays; time++) kernels->decays(x, y, count);
    return ZS_OK;
}

/* Fresh memory that is about to be written whole: one page fault for 2 MB in place of 512, where the system can. */
EXPORT void zs_use_huge_pages(void *memory, int64_t bytes) { zs_huge_pages(memory, bytes); }

EXPORT void zs_lend_threads(zs_team team) { zs_lend_team(team); }

/* ---- helpers ---- */

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t units_of(int64_t channels) { return (channels + UNIT_CHANNELS - 1) / UNIT_CHANNELS; }

/* An order has to visit every row once: a row left out would never be written. */
static int check_order(const int64_t *order, int64_t length) {
    if (!order) return ZS_OK;
    uint8_t small[1024], *seen = length <= (int64_t)sizeof small ? small : malloc((size_t)length);
    if (!seen) return ZS_NO_MEMORY;
    memset(seen, 0, (size_t)length);
    int status = ZS_OK;
    for (int64_t k = 0; k < length && status == ZS_OK; k++) {
        if (order[k] < 0 || order[k] >= length || seen[order[k]])
            status = ZS_BAD_ORDER;
        else
            seen[order[k]] = 1;
    }
    if (seen != small) free(seen);
    return status;
}

static float *floats(int64_t count) { return zs_allocate((size_t)count * sizeof(float)); }
static float *zeros(int64_t count) {
    float *p = floats(count);
    if (p) memset(p, 0, (size_t)count * sizeof(float));
    return p;
}

static void store_row(const zs_rows *t, int64_t batch, int64_t row, int64_t count, const float *from) {
    const int64_t offset = batch * t->batch_stride + row * t->row_stride;
    if (t->dtype == ZS_F32) {
        memcpy((float *)t->data + offset, from, (size_t)count * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count; i++) { /* to bfloat16, to nearest even */
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        bits = from[i] != from[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        ((uint16_t *)t->data)[offset + i] = (uint16_t)bits;
    }
}

/* How units are dealt out: a task takes `units` of them, of one batch entry. */
typedef struct {
    int64_t threads, units, tasks, tasks_per_entry;
} division;

static int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/* As many units to a task as let the thread with the most to do have as little as possible: the longer the pieces of rows
 * that a task reads together, the less it waits for memory. But what it carries from chunk to chunk, `carried` floats
 * per channel, has to stay in the second-level cache. */
static division divide(int64_t threads, int64_t batch, int64_t units, int64_t carried) {
    enum { CACHED_FLOATS = 1 << 16 };
    division d = {.threads = threads, .units = 1};
    int64_t least = INT64_MAX;
    for (int64_t n = min64(units, CACHED_FLOATS / (UNIT_CHANNELS * (carried + 1))); n > 0; n--) {
        const int64_t busiest = parts_of(batch * parts_of(units, n), threads) * n;
        if (busiest < least) {
            least = busiest;
            d.units = n;
        }
    }
    d.tasks_per_entry = parts_of(units, d.units);
    d.tasks = batch * d.tasks_per_entry;
    return d;
}

/* ---- scan ---- */

typedef struct {
    const zs_kernels *kernels;
    scan_job job;
    division division;
} scan_run;

static void forward_task(void *context, int64_t task, float *workspace) {
    scan_run *run = context;
    const division *d = &run->division;
    const int64_t batch = task / d->tasks_per_entry, unit = task % d->tasks_per_entry * d->units;
    run->kernels->scan_forward(&run->job, batch, unit, d->units, workspace);
}

static void backward_task(void *context, int64_t task, float *workspace) {
    scan_run *run = context;
    const division *d = &run->division;
    const int64_t batch = task / d->tasks_per_entry, unit = task % d->tasks_per_entry * d->units;
    run->kernels->scan_backward(&run->job, batch, unit, d->units, workspace);
}

/* dB and dC of one batch entry: the units' partial sums added in order of unit. */
static void sum_rows(const scan_job *job, int64_t batch) {
    const zs_scan_args *a = job->args;
    const int64_t n = a->states, sheet = a->length * 2 * n;
    for (int64_t k = 0; k < a->length; k++) {
        int64_t row = a->input_order ? a->input_order[k] : k;
        const float *from = job->BC_partial + batch * job->units * sheet + k * 2 * n;
        float sum[2 * ZS_MAX_STATES];
        memcpy(sum, from, (size_t)(2 * n) * sizeof(float));
        for (int64_t unit = 1; unit < job->units; unit++)
            for (int64_t i = 0; i < 2 * n; i++) sum[i] += from[unit * sheet + i];
        store_row(&a->d_B, batch, row, n, sum);
        store_row(&a->d_C, batch, row, n, sum + n);
    }
}

/* dA, dD and d_delta_bias: sums over the batch in its order. */
static void sum_parameters(const scan_run *run) {
    const scan_job *job = &run->job;
    const zs_scan_args *a = job->args;
    const int64_t lanes = run->kernels->lanes, sheet = job->padded * job->states;
    for (int64_t batch = 1; batch < a->batch; batch++)
        for (int64_t i = 0; i < sheet; i++) job->A_partial[i] += job->A_partial[batch * sheet + i];
    for (int64_t c = 0; c < a->channels; c++)
        for (int64_t i = 0; i < a->states; i++)
            a->d_A[c * a->states + i] = job->A_partial[(c / lanes * job->states + i) * lanes + c % lanes];
    for (int64_t c = 0; c < a->channels; c++) {
        float D = 0, bias = 0;
        for (int64_t batch = 0; batch < a->batch; batch++) {
            D += job->D_partial[batch * job->padded + c];
            bias += job->bias_partial[batch * job->padded + c];
        }
        if (a->d_D) a->d_D[c] = D;
        if (a->d_delta_bias) a->d_delta_bias[c] = bias;
    }
}

static int64_t scan_threads(const zs_scan_args *a) {
    return zs_useful_threads(a->threads, a->batch * a->length * a->channels * a->states);
}

static int open_scan(scan_run *run, const zs_scan_args *a, const char *instruction_set) {
    run->kernels = find_kernels(instruction_set);
    if (!run->kernels || a->states > ZS_MAX_STATES) return ZS_UNSUPPORTED;
    int status = check_order(a->input_order, a->length);
    if (status == ZS_OK) status = check_order(a->output_order, a->length);
    if (status != ZS_OK) return status;
    scan_job *job = &run->job;
    const int64_t lanes = run->kernels->lanes;
    *job = (scan_job){.args = a,
                      .units = units_of(a->channels),
                      .chunks = (a->length + CHUNK - 1) / CHUNK,
                      .padded = round_up(a->channels, lanes),
                      .states = round_up(a->states, BLOCK)};
    run->division = divide(scan_threads(a), a->batch, job->units, job->states);
    job->A_packed = zeros(job->padded * (job->states + 1));
    if (!job->A_packed) return ZS_NO_MEMORY;
    job->dt_limit = job->A_packed + job->padded * job->states;
    run->kernels->pack_A(job);
    return ZS_OK;
}

/* Size of `checkpoints`; -1 if the instruction set is not available here. */
EXPORT int64_t zs_checkpoint_floats(const char *instruction_set, int64_t batch, int64_t length, int64_t channels,
                                    int64_t states) {
    const zs_kernels *kernels = find_kernels(instruction_set);
    if (!kernels) return -1;
    return batch * ((length + CHUNK - 1) / CHUNK) * round_up(channels, kernels->lanes) *
           round_up(states, BLOCK);
}

EXPORT int64_t zs_scan_forward(const char *instruction_set, const zs_scan_args *a) {
    scan_run run;
    int status = open_scan(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    const division *d = &run.division;
    status = zs_parallel(d->threads, a->threads, d->tasks, run.kernels->scan_workspace(&run.job, d->units, 0),
                         forward_task, &run);
    zs_release(run.job.A_packed);
    return status;
}

EXPORT int64_t zs_scan_backward(const char *instruction_set, const zs_scan_args *a) {
    scan_run run;
    int status = open_scan(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    scan_job *job = &run.job;
    const division *d = &run.division;
    job->BC_partial = floats(a->batch * job->units * a->length * 2 * a->states);
    job->A_partial = zeros(a->batch * job->padded * job->states);
    job->D_partial = zeros(a->batch * job->padded);
    job->bias_partial = zeros(a->batch * job->padded);
    status = ZS_NO_MEMORY;
    if (job->BC_partial && job->A_partial && job->D_partial && job->bias_partial)
        status = zs_parallel(d->threads, a->threads, d->tasks, run.kernels->scan_workspace(job, d->units, 1),
                             backward_task, &run);
    if (status == ZS_OK) {
        for (int64_t batch = 0; batch < a->batch; batch++) sum_rows(job, batch);
        sum_parameters(&run);
    }
    zs_release(job->bias_partial);
    zs_release(job->D_partial);
    zs_release(job->A_partial);
    zs_release(job->BC_partial);
    zs_release(job->A_packed);
    return status;
}

/* ---- convolution ---- */

typedef struct {
    const zs_kernels *kernels;
    conv_job job;
    division division;
} conv_run;

static void conv_forward_task(void *context, int64_t task, float *workspace) {
    conv_run *run = context;
    const division *d = &run->division;
    const int64_t batch = task / d->tasks_per_entry, unit = task % d->tasks_per_entry * d->units;
    run->kernels->conv_forward(&run->job, batch, unit, d->units, workspace);
}

static void conv_backward_task(void *context, int64_t task, float *workspace) {
    conv_run *run = context;
    const division *d = &run->division;
    const int64_t batch = task / d->tasks_per_entry, unit = task % d->tasks_per_entry * d->units;
    run->kernels->conv_backward(&run->job, batch, unit, d->units, workspace);
}

static int64_t conv_threads(const zs_conv_args *a) {
    return zs_useful_threads(a->threads, a->batch * a->length * a->channels * (a->width + 2));
}

static int open_conv(conv_run *run, const zs_conv_args *a, const char *instruction_set) {
    run->kernels = find_kernels(instruction_set);
    if (!run->kernels || a->width > ZS_MAX_CONV_WIDTH) return ZS_UNSUPPORTED;
    int status = check_order(a->order, a->length);
    if (status != ZS_OK) return status;
    conv_job *job = &run->job;
    *job = (conv_job){.args = a, .units = units_of(a->channels)};
    run->division = divide(conv_threads(a), a->batch, job->units, a->width);
    job->padded = round_up(a->channels, run->kernels->lanes);
    job->weight_packed = zeros((a->width + 1) * job->padded);
    if (!job->weight_packed) return ZS_NO_MEMORY;
    job->bias_packed = job->weight_packed + a->width * job->padded;
    for (int64_t j = 0; j < a->width; j++)
        for (int64_t c = 0; c < a->channels; c++) job->weight_packed[j * job->padded + c] = a->weight[c * a->width + j];
    if (a->bias) memcpy(job->bias_packed, a->bias, (size_t)a->channels * sizeof(float));
    return ZS_OK;
}

EXPORT int64_t zs_conv_forward(const char *instruction_set, const zs_conv_args *a) {
    conv_run run;
    int status = open_conv(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    const division *d = &run.division;
    status = zs_parallel(d->threads, a->threads, d->tasks, run.kernels->conv_workspace(&run.job, d->units, 0),
                         conv_forward_task, &run);
    zs_release(run.job.weight_packed);
    return status;
}

static void sum_conv_parameters(const conv_job *job) {
    const zs_conv_args *a = job->args;
    const int64_t sheet = (a->width + 1) * job->padded;
    for (int64_t batch = 1; batch < a->batch; batch++)
        for (int64_t i = 0; i < sheet; i++) job->weight_partial[i] += job->weight_partial[batch * sheet + i];
    for (int64_t c = 0; c < a->channels; c++) {
        for (int64_t j = 0; j < a->width; j++) a->d_weight[c * a->width + j] = job->weight_partial[j * job->padded + c];
        if (a->d_bias) a->d_bias[c] = job->weight_partial[a->width * job->padded + c];
    }
}

EXPORT int64_t zs_conv_backward(const char *instruction_set, const zs_conv_args *a) {
    conv_run run;
    int status = open_conv(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    const division *d = &run.division;
    run.job.weight_partial = zeros(a->batch * (a->width + 1) * run.job.padded);
    status = ZS_NO_MEMORY;
    if (run.job.weight_partial)
        status = zs_parallel(d->threads, a->threads, d->tasks, run.kernels->conv_workspace(&run.job, d->units, 1),
                             conv_backward_task, &run);
    if (status == ZS_OK) sum_conv_parameters(&run.job);
    zs_release(run.job.weight_partial);
    zs_release(run.job.weight_packed);
    return status;
}

/* ---- normalisation ---- */

typedef struct {
    const zs_kernels *kernels;
    const zs_norm_args *args;
    int64_t blocks, padded;
    float *partial; /* [b][blocks][NORM_SUMS][padded] */
} norm_run;

static void norm_task(void *context, int64_t task, float *workspace) {
    norm_run *run = context;
    run->kernels->norm_rows(run->args, task / run->blocks, task % run->blocks, workspace);
}

static void norm_backward_task(void *context, int64_t task, float *workspace) {
    norm_run *run = context;
    run->kernels->norm_rows_backward(run->args, task / run->blocks, task % run->blocks, workspace,
                                     run->partial + task * NORM_SUMS * run->padded);
}

static int open_norm(norm_run *run, const zs_norm_args *a, const char *instruction_set) {
    *run = (norm_run){.kernels = find_kernels(instruction_set), .args = a};
    if (!run->kernels) return ZS_UNSUPPORTED;
    run->blocks = (a->length + NORM_ROWS - 1) / NORM_ROWS;
    run->padded = round_up(a->width, run->kernels->lanes);
    return check_order(a->gather, a->length);
}

EXPORT int64_t zs_norm_forward(const char *instruction_set, const zs_norm_args *a) {
    norm_run run;
    int status = open_norm(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    return zs_parallel(zs_useful_threads(a->threads, a->batch * a->length * a->width * 2), a->threads,
                       a->batch * run.blocks, run.padded, norm_task, &run);
}

/* Adds rows first ... first + count of the partial sums number `which` to a row of the result. */
static void sum_blocks(const norm_run *run, int64_t which, int64_t first, int64_t count, float *to) {
    if (!to) return;
    memset(to, 0, (size_t)run->args->width * sizeof(float));
    for (int64_t block = first; block < first + count; block++) {
        const float *from = run->partial + (block * NORM_SUMS + which) * run->padded;
        for (int64_t c = 0; c < run->args->width; c++) to[c] += from[c];
    }
}

EXPORT int64_t zs_norm_backward(const char *instruction_set, const zs_norm_args *a) {
    norm_run run;
    int status = open_norm(&run, a, instruction_set);
    if (status != ZS_OK) return status;
    run.partial = zeros(a->batch * run.blocks * NORM_SUMS * run.padded);
    if (!run.partial) return ZS_NO_MEMORY;
    status = zs_parallel(zs_useful_threads(a->threads, a->batch * a->length * a->width * 4), a->threads,
                         a->batch * run.blocks, 2 * run.padded, norm_backward_task, &run);
    if (status == ZS_OK) {
        float *each[] = {a->d_gate, a->d_scale, a->d_shift};
        for (int64_t which = 0; which < 3; which++)
            for (int64_t b = 0; each[which] && b < a->batch; b++)
                sum_blocks(&run, which, b * run.blocks, run.blocks, each[which] + b * a->width);
        sum_blocks(&run, 3, 0, a->batch * run.blocks, a->d_weight);
        sum_blocks(&run, 4, 0, a->batch * run.blocks, a->d_bias);
    }
    zs_release(run.partial);
    return status;
}
