/* The selective scan on some units of channels.
 *
 * Time is cut into chunks of CHUNK steps. Forward reads the rows of a unit, 512 bytes of each, and then carries one
 * vector of LANES channels after the other through all steps of the chunk with its states in registers, while the rows
 * of the next unit come from memory. The state at the start of a chunk is all that backward needs in order to
 * recompute the chunk. */
#ifndef ZIGMA_SCAN_KERNEL_H
#define ZIGMA_SCAN_KERNEL_H

#include "rows.h"

typedef struct {
    int64_t batch, first, vectors;  /* first channel, vectors of channels */
    int64_t start, steps;           /* of the chunk */
    int64_t in[CHUNK], out[CHUNK];  /* rows of the chunk's steps */
} place;

static place enter_units(const scan_job *job, int64_t batch, int64_t unit, int64_t units) {
    place p = {.batch = batch, .first = unit * UNIT_CHANNELS};
    p.vectors = (min64(job->args->channels - p.first, units * UNIT_CHANNELS) + LANES - 1) / LANES;
    return p;
}

static void enter_chunk(place *p, const zs_scan_args *a, int64_t chunk) {
    p->start = chunk * CHUNK;
    p->steps = min64(CHUNK, a->length - p->start);
    for (int64_t k = 0; k < p->steps; k++) {
        p->in[k] = a->input_order ? a->input_order[p->start + k] : p->start + k;
        p->out[k] = a->output_order ? a->output_order[p->start + k] : p->start + k;
    }
}

static float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* The chunk's B or C as float [step][padded n], zero beyond n; the kernels broadcast its elements. */
static void load_chunk(const scan_job *job, const zs_rows *t, const place *p, float *to) {
    const int64_t n = job->args->states;
    memset(to, 0, (size_t)(p->steps * job->states) * sizeof(float));
    for (int64_t k = 0; k < p->steps; k++, to += job->states) {
        int64_t offset = row_offset(t, p->batch, p->in[k]);
        if (t->dtype == ZS_F32) {
            memcpy(to, (const float *)t->data + offset, (size_t)n * sizeof(float));
        } else {
            for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(((const uint16_t *)t->data)[offset + i]);
        }
    }
}

/* Where a unit reads at each step, for the unit before it to ask for. */
enum { ROWS_AHEAD = 3 };
typedef struct {
    const char *rows[CHUNK][ROWS_AHEAD];
} ahead;

static void look_ahead(const zs_scan_args *a, const place *p, int64_t channel, ahead *next) {
    const zs_rows *z = a->z.data ? &a->z : &a->out;
    for (int64_t k = 0; k < CHUNK; k++) {
        const int64_t at = min64(k, p->steps - 1);
        next->rows[k][0] = address(&a->delta, p->batch, p->in[at], channel);
        next->rows[k][1] = address(&a->u, p->batch, p->in[at], channel);
        next->rows[k][2] = address(z, p->batch, p->out[at], channel);
    }
}

/* Whether no |dt A log2(e)| of a vector of channels is beyond what vdecay and vexp2_product take. */
static int decays_are_small(const scan_job *job, const float *dt, int64_t size, int64_t channel) {
    return vall_below(dt, size, vload(job->dt_limit + channel));
}

/* How exp(dt A) is computed: for any product, for a small one (above), or faster and a little less exact for such a one:
 * in forward, but not in backward, where dA sums up what it is off by. */
typedef enum { ANY, SMALL, FAST } exponential;
INLINE vec decay_of(exponential how, vec t, vec a) {
    return how == FAST ? vdecay(t, a) : how == SMALL ? vexp2_product(t, a) : vexp2(t * a);
}

/* decays: exp(dt_k A) as [step][BLOCK], for one chunk of one vector of channels and BLOCK of its n states. */
INLINE void compute_decays(int64_t steps, int small, const float *A, const float *dt, float *decays) {
    const int64_t stride = BLOCK * LANES;
    for (int64_t i = 0; i < BLOCK; i++) {
        vec a = vload(A + i * LANES);
        float *to = decays + i * LANES;
        if (small) {
#pragma GCC unroll 4
            for (int64_t k = 0; k < steps; k++) vstore(to + k * stride, decay_of(SMALL, vload(dt + k * LANES), a));
        } else {
            for (int64_t k = 0; k < steps; k++) vstore(to + k * stride, decay_of(ANY, vload(dt + k * LANES), a));
        }
    }
}

/* How many exponentials stand before the steps that use them. The longer they wait for each other, the more of them an
 * out-of-order processor has to hold; but 16 registers have room for few. */
enum { AT_ONCE = FORWARD_DECAYS_FIRST || LANES < 8 ? 1 : LANES / 2 };

/* s_k = exp(dt_k A) s_{k-1} + dt_k B_k u_k and y_k += <s_k, C_k>, over one chunk of one vector of channels and
 * BLOCK of its n states. The decays are given if FORWARD_DECAYS_FIRST. At each step the rows of the next unit are asked
 * for, `line` bytes from their start: between the exponentials there is time to wait for memory. */
INLINE void recur(exponential how, int64_t n, int64_t steps, const float *A, const float *B, const float *C,
                  const float *dt, const float *dtu, const float *decays, float *state, float *y, const ahead *next,
                  int64_t line) {
    vec s[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) s[i] = vload(state + i * LANES);
    for (int64_t k = 0; k < steps; k++) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), sum = vload(y + k * LANES);
        for (int64_t i = 0; i < ROWS_AHEAD; i++) vprefetch(next->rows[k][i] + line);
#pragma GCC unroll 8
        for (int64_t from = 0; from < BLOCK; from += AT_ONCE) {
            vec decay[AT_ONCE];
#pragma GCC unroll 8
            for (int64_t j = 0; j < AT_ONCE; j++) {
                const int64_t i = from + j;
                decay[j] = FORWARD_DECAYS_FIRST ? vload(decays + (k * BLOCK + i) * LANES)
                                                : decay_of(how, t, vload(A + i * LANES));
            }
#pragma GCC unroll 8
            for (int64_t j = 0; j < AT_ONCE; j++) {
                const int64_t i = from + j;
                s[i] = vfma(decay[j], s[i], x * vset(B[k * n + i]));
                sum = vfma(s[i], vset(C[k * n + i]), sum);
            }
        }
        vstore(y + k * LANES, sum);
    }
    for (int64_t i = 0; i < BLOCK; i++) vstore(state + i * LANES, s[i]);
}

/* The vectors of a unit over one chunk, those of each as [step][LANES]. */
enum { VECTORS = UNIT_CHANNELS / LANES, STEPS = CHUNK * LANES };
typedef struct {
    float dt[VECTORS][STEPS], dtu[VECTORS][STEPS], y[VECTORS][STEPS], decays[STEPS * BLOCK];
    float bias[VECTORS][LANES], D[VECTORS][LANES];
    ahead next;
} forward_steps;

/* Vectors that go through softplus and the gate together, each operation for all of them before the next: what each
 * waits for is long, and only what an out-of-order processor has in sight fills the time. */
enum { GROUP = LANES == 16 ? 8 : 4 };

/* dt, dt u and D u of `group` vectors from the v-th on, at step k. */
INLINE void open_vectors(int64_t dtype, int64_t group, const scan_job *job, const place *p, int64_t k, int64_t first,
                         int64_t v, forward_steps *w) {
    const zs_scan_args *a = job->args;
    vec t[GROUP], e[GROUP];
#pragma GCC unroll 8
    for (int64_t i = 0; i < group; i++) {
        const int64_t channel = first + (v + i) * LANES, count = a->channels - channel;
        t[i] = load_known(dtype, &a->delta, row_offset(&a->delta, p->batch, p->in[k]) + channel, count) + vload(w->bias[v + i]);
    }
    if (a->delta_softplus) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < group; i++) e[i] = vexp_minus_abs(t[i]);
#pragma GCC unroll 8
        for (int64_t i = 0; i < group; i++) t[i] = vsoftplus(t[i], e[i]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < group; i++) {
        const int64_t channel = first + (v + i) * LANES, count = a->channels - channel;
        vec u = load_known(dtype, &a->u, row_offset(&a->u, p->batch, p->in[k]) + channel, count);
        vstore(w->dt[v + i] + k * LANES, t[i]);
        vstore(w->dtu[v + i] + k * LANES, t[i] * u);
        vstore(w->y[v + i] + k * LANES, vload(w->D[v + i]) * u);
    }
}

/* y silu(z), or y, to the output. */
INLINE void close_vectors(int64_t dtype, int64_t group, const scan_job *job, const place *p, int64_t k, int64_t first,
                          int64_t v, forward_steps *w) {
    const zs_scan_args *a = job->args;
    vec y[GROUP], z[GROUP], e[GROUP];
#pragma GCC unroll 8
    for (int64_t i = 0; i < group; i++) y[i] = vload(w->y[v + i] + k * LANES);
    if (a->z.data) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < group; i++) {
            const int64_t channel = first + (v + i) * LANES, count = a->channels - channel;
            z[i] = load_known(dtype, &a->z, row_offset(&a->z, p->batch, p->out[k]) + channel, count);
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < group; i++) e[i] = vexp_minus(z[i]);
#pragma GCC unroll 8
        for (int64_t i = 0; i < group; i++) y[i] = y[i] * vsilu(z[i], e[i]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < group; i++) {
        const int64_t channel = first + (v + i) * LANES, count = a->channels - channel;
        store_known(dtype, &a->out, row_offset(&a->out, p->batch, p->out[k]) + channel, count, y[i]);
    }
}

/* What is done with the vectors of a unit step by step: before its recurrence, or after. */
typedef enum { OPEN, CLOSE } side;

INLINE void pass_vectors(side which, int64_t dtype, int64_t group, const scan_job *job, const place *p, int64_t k,
                         int64_t first, int64_t v, forward_steps *w) {
    if (which == OPEN)
        open_vectors(dtype, group, job, p, k, first, v, w);
    else
        close_vectors(dtype, group, job, p, k, first, v, w);
}

INLINE void pass_steps(side which, int64_t dtype, const scan_job *job, const place *p, int64_t first, int64_t vectors,
                       forward_steps *w) {
    for (int64_t k = 0; k < p->steps; k++) {
        int64_t v = 0;
        for (; v + GROUP <= vectors; v += GROUP) pass_vectors(which, dtype, GROUP, job, p, k, first, v, w);
        for (; v < vectors; v++) pass_vectors(which, dtype, 1, job, p, k, first, v, w);
    }
}

/* Units of float and of bfloat16 have a compilation each, for so many vectors as most have: no question and no loop at
 * every step. */
INLINE void pass_unit(side which, int64_t dtype, const scan_job *job, const place *p, int64_t first, int64_t vectors,
                      forward_steps *w) {
    if (dtype == ZS_F32 && vectors == VECTORS)
        pass_steps(which, ZS_F32, job, p, first, VECTORS, w);
    else if (dtype == ZS_BF16 && vectors == VECTORS)
        pass_steps(which, ZS_BF16, job, p, first, VECTORS, w);
    else
        pass_steps(which, MIXED, job, p, first, vectors, w);
}

static void forward_states(const scan_job *job, const place *p, int64_t channel, const float *B, const float *C,
                           float *state, float *dt, const float *dtu, float *y, float *decays, const ahead *next,
                           int64_t line) {
    const int64_t n = job->states, steps = p->steps;
    const int small = decays_are_small(job, dt, steps * LANES, channel);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const float *A = job->A_packed + channel * n + i * LANES;
        if (FORWARD_DECAYS_FIRST) compute_decays(steps, small, A, dt, decays);
        /* Each call is compiled for its own exponential; where the decays are given there is one call. */
        float *s = state + i * LANES;
        if (small || FORWARD_DECAYS_FIRST)
            recur(FAST, n, steps, A, B + i, C + i, dt, dtu, decays, s, y, next, line);
        else
            recur(ANY, n, steps, A, B + i, C + i, dt, dtu, decays, s, y, next, line);
    }
}

/* dtype: of all rows, or MIXED; also where the last vector is not whole. */
static void forward_unit(const scan_job *job, const place *p, int64_t first, int64_t vectors, int64_t dtype,
                         const float *B, const float *C, float *state, forward_steps *w) {
    const zs_scan_args *a = job->args;
    const int64_t size = dtype == ZS_BF16 ? 2 : 4; /* MIXED: too far for some, and they are only asked for */
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t channel = first + v * LANES;
        vstore(w->bias[v], load_channels(a->delta_bias, channel, a->channels - channel));
        vstore(w->D[v], load_channels(a->D, channel, a->channels - channel));
    }
    pass_unit(OPEN, dtype, job, p, first, vectors, w);
    for (int64_t v = 0; v < vectors; v++)
        forward_states(job, p, first + v * LANES, B, C, state + v * LANES * job->states, w->dt[v], w->dtu[v], w->y[v],
                       w->decays, &w->next, v * LANES * size);
    pass_unit(CLOSE, dtype, job, p, first, vectors, w);
}

static int64_t checkpoint_offset(const scan_job *job, int64_t batch, int64_t chunk, int64_t channel) {
    return ((batch * job->chunks + chunk) * job->padded + channel) * job->states;
}

static void scan_forward(const scan_job *job, int64_t batch, int64_t unit, int64_t units, float *workspace) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states;
    float *state = workspace, *B = state + units * UNIT_CHANNELS * n, *C = B + CHUNK * n;
    forward_steps *steps = (forward_steps *)(C + CHUNK * n);
    const int64_t dtype = dtype_of_all((const zs_rows *const[]){&a->u, &a->delta, &a->z, &a->out}, 4);
    place p = enter_units(job, batch, unit, units), following = p;
    memset(state, 0, (size_t)(p.vectors * LANES * n) * sizeof(float));
    enter_chunk(&following, a, 0);
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        p = following;
        if (chunk + 1 < job->chunks) enter_chunk(&following, a, chunk + 1);
        load_chunk(job, &a->B, &p, B);
        load_chunk(job, &a->C, &p, C);
        if (a->checkpoints)
            memcpy(a->checkpoints + checkpoint_offset(job, batch, chunk, p.first), state,
                   (size_t)(p.vectors * LANES * n) * sizeof(float));
        for (int64_t v = 0; v < p.vectors; v += VECTORS) {
            const int64_t first = p.first + v * LANES, vectors = min64(VECTORS, p.vectors - v);
            if (v + VECTORS < p.vectors)
                look_ahead(a, &p, first + UNIT_CHANNELS, &steps->next);
            else
                look_ahead(a, &following, p.first, &steps->next);
            const int whole = first + vectors * LANES <= a->channels;
            forward_unit(job, &p, first, vectors, whole ? dtype : MIXED, B, C, state + v * LANES * n, steps);
        }
    }
}

#endif
