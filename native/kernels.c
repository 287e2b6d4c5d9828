/* The selective scan on one unit of channels. Compiled once per instruction set (see build.py); VARIANT names
 * the table that library.c picks at run time.
 *
 * Time is cut into chunks of CHUNK steps. Within a chunk each vector of LANES channels is carried through all its
 * steps with its states in registers, then the next vector takes the same rows: memory is read along rows, and
 * the state at the start of a chunk is all that backward needs in order to recompute the chunk. */
#include "kernels.h"
#include "simd.h"


INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct {
    int64_t batch, first, vectors;  /* first channel, vectors of channels */
    int64_t start, steps;           /* of the chunk */
    int64_t in[CHUNK], out[CHUNK];  /* rows of the chunk's steps */
} place;

static place enter_unit(const scan_job *job, int64_t batch, int64_t unit) {
    place p = {.batch = batch, .first = unit * UNIT_CHANNELS};
    p.vectors = (min64(job->args->channels - p.first, UNIT_CHANNELS) + LANES - 1) / LANES;
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

INLINE int64_t row_offset(const zs_rows *t, int64_t batch, int64_t row) {
    return batch * t->batch_stride + row * t->row_stride;
}
INLINE vec load_row(const zs_rows *t, int64_t batch, int64_t row, int64_t channel, int64_t count) {
    return vload_row(t->data, t->dtype, row_offset(t, batch, row) + channel, count);
}
INLINE void store_row(const zs_rows *t, int64_t batch, int64_t row, int64_t channel, int64_t count, vec x) {
    vstore_row(t->data, t->dtype, row_offset(t, batch, row) + channel, count, x);
}

/* Rows are read in order of the walk and a vector at a time, which no hardware prefetcher follows. */
INLINE void prefetch_row(const zs_rows *t, int64_t batch, int64_t row, int64_t channel) {
    if (t->data) vprefetch((const char *)t->data + ((row_offset(t, batch, row) + channel) << (t->dtype == ZS_F32 ? 2 : 1)));
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

INLINE vec load_channels(const float *values, int64_t channel, int64_t count) {
    return values ? vload_row(values, ZS_F32, channel, count) : vset(0.0f);
}

/* delta_raw -> dt; slope = d dt / d delta */
INLINE vec step_size(const zs_scan_args *a, vec raw, vec *slope) {
    if (!a->delta_softplus) {
        if (slope) *slope = vset(1.0f);
        return raw;
    }
    vec e = vexp_minus_abs(raw);
    if (slope) *slope = vsigmoid(raw, e);
    return vsoftplus(raw, e);
}

INLINE void add8(float *to, __m256 x) { _mm256_storeu_ps(to, _mm256_loadu_ps(to) + x); }

/* s_k = exp(dt_k A) s_{k-1} + dt_k B_k u_k and y_k += <s_k, C_k>, over one chunk of one vector of channels and
 * BLOCK of its n states. */
INLINE void recur(int64_t n, int64_t steps, const float *A, const float *B, const float *C, const float *dt,
                  const float *dtu, float *state, float *y) {
    vec s[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) s[i] = vload(state + i * LANES);
    for (int64_t k = 0; k < steps; k++) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), sum[2] = {vload(y + k * LANES), vset(0.0f)};
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK; i++) {
            s[i] = vfma(vexp2(t * vload(A + i * LANES)), s[i], x * vset(B[k * n + i]));
            sum[i & 1] = vfma(s[i], vset(C[k * n + i]), sum[i & 1]);
        }
        vstore(y + k * LANES, sum[0] + sum[1]);
    }
    for (int64_t i = 0; i < BLOCK; i++) vstore(state + i * LANES, s[i]);
}

static void forward_vector(const scan_job *job, const place *p, int64_t channel, int64_t count,
                           const float *B, const float *C, float *state) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states;
    float dt[CHUNK * LANES], dtu[CHUNK * LANES], y[CHUNK * LANES] = {0};
    vec bias = load_channels(a->delta_bias, channel, count), D = load_channels(a->D, channel, count);
    for (int64_t k = 0; k < p->steps; k++) {
        prefetch_row(&a->delta, p->batch, p->in[k], channel + LANES);
        prefetch_row(&a->u, p->batch, p->in[k], channel + LANES);
        prefetch_row(&a->z, p->batch, p->out[k], channel + LANES);
        vec t = step_size(a, load_row(&a->delta, p->batch, p->in[k], channel, count) + bias, NULL);
        vstore(dt + k * LANES, t);
        vstore(dtu + k * LANES, t * load_row(&a->u, p->batch, p->in[k], channel, count));
    }
    for (int64_t i = 0; i < n; i += BLOCK)
        recur(n, p->steps, job->A_packed + channel * n + i * LANES, B + i, C + i, dt, dtu, state + i * LANES, y);
    for (int64_t k = 0; k < p->steps; k++) {
        vec r = vload(y + k * LANES);
        r = vfma(D, load_row(&a->u, p->batch, p->in[k], channel, count), r);
        if (a->z.data) {
            vec z = load_row(&a->z, p->batch, p->out[k], channel, count);
            r = r * z * vsigmoid(z, vexp_minus_abs(z));
        }
        store_row(&a->out, p->batch, p->out[k], channel, count, r);
    }
}

static int64_t checkpoint_offset(const scan_job *job, int64_t batch, int64_t chunk, int64_t channel) {
    return ((batch * job->chunks + chunk) * job->padded + channel) * job->states;
}

static void scan_forward(const scan_job *job, int64_t batch, int64_t unit, float *workspace) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states;
    float *state = workspace, *B = state + UNIT_CHANNELS * n, *C = B + CHUNK * n;
    place p = enter_unit(job, batch, unit);
    memset(state, 0, (size_t)(p.vectors * LANES * n) * sizeof(float));
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        enter_chunk(&p, a, chunk);
        load_chunk(job, &a->B, &p, B);
        load_chunk(job, &a->C, &p, C);
        if (a->checkpoints)
            memcpy(a->checkpoints + checkpoint_offset(job, batch, chunk, p.first), state,
                   (size_t)(p.vectors * LANES * n) * sizeof(float));
        for (int64_t v = 0; v < p.vectors; v++) {
            int64_t channel = p.first + v * LANES, count = a->channels - channel;
            forward_vector(job, &p, channel, count, B, C, state + v * LANES * n);
        }
    }
}

/* The recurrence of `recur` again, for BLOCK states, keeping what backward needs of every step:
 *   decays: exp(dt_k A),  decayed: exp(dt_k A) s_{k-1},  both [step][BLOCK]
 * and adding dC_k = sum over channels of dy_k s_k to dC. */
INLINE void recompute(int64_t n, int64_t steps, const float *A, const float *B, const float *C, const float *dt,
                      const float *dtu, const float *dy, const float *state, float *decays, float *decayed,
                      float *y, float *dC) {
    vec s[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) s[i] = vload(state + i * LANES);
    for (int64_t k = 0; k < steps; k++) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), d = vload(dy + k * LANES);
        vec sum[2] = {vload(y + k * LANES), vset(0.0f)}, to_sum[BLOCK];
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK; i++) {
            vec decay = vexp2(t * vload(A + i * LANES));
            vstore(decays + (k * BLOCK + i) * LANES, decay);
            s[i] = decay * s[i];
            vstore(decayed + (k * BLOCK + i) * LANES, s[i]);
            s[i] = vfma(x, vset(B[k * n + i]), s[i]);
            sum[i & 1] = vfma(s[i], vset(C[k * n + i]), sum[i & 1]);
            to_sum[i] = d * s[i];
        }
        vstore(y + k * LANES, sum[0] + sum[1]);
        add8(dC + k * n, vsum8(to_sum));
    }
}

/* Backward through one chunk, g = dL/ds carried towards earlier steps:
 *   g_k = dy_k C_k + exp(dt_{k+1} A) g_{k+1},   h_k = g_k exp(dt_k A) s_{k-1}
 *   dB_k += sum over channels of g_k dt_k u_k
 *   gB_k += <g_k, B_k>,  hA_k += <h_k, A>,  dA += dt_k h_k
 * On entry and exit `carry` is exp(dt A) g of the later step. A is scaled by log2(e), and so is hA. */
INLINE void recur_backward(int64_t n, int64_t steps, const float *A, const float *B, const float *C,
                           const float *dt, const float *dtu, const float *dy, const float *decays,
                           const float *decayed, float *carry, float *dA, float *dB, float *gB, float *hA) {
    vec g[BLOCK], sum_dA[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) {
        g[i] = vload(carry + i * LANES);
        sum_dA[i] = vload(dA + i * LANES);
    }
    for (int64_t k = steps - 1; k >= 0; k--) {
        vec t = vload(dt + k * LANES), x = vload(dtu + k * LANES), d = vload(dy + k * LANES), to_sum[BLOCK];
        vec sum_gB = vload(gB + k * LANES), sum_hA = vload(hA + k * LANES);
#pragma GCC unroll 8
        for (int64_t i = 0; i < BLOCK; i++) {
            g[i] = vfma(d, vset(C[k * n + i]), g[i]);
            to_sum[i] = g[i] * x;
            sum_gB = vfma(g[i], vset(B[k * n + i]), sum_gB);
            vec h = g[i] * vload(decayed + (k * BLOCK + i) * LANES);
            g[i] = g[i] * vload(decays + (k * BLOCK + i) * LANES);
            sum_hA = vfma(h, vload(A + i * LANES), sum_hA);
            sum_dA[i] = vfma(t, h, sum_dA[i]);
        }
        vstore(gB + k * LANES, sum_gB);
        vstore(hA + k * LANES, sum_hA);
        add8(dB + k * n, vsum8(to_sum));
    }
    for (int64_t i = 0; i < BLOCK; i++) {
        vstore(carry + i * LANES, g[i]);
        vstore(dA + i * LANES, sum_dA[i]);
    }
}

/* One vector of channels over one chunk. All arrays [step][LANES]. */
typedef struct {
    float u[CHUNK * LANES], dt[CHUNK * LANES], slope[CHUNK * LANES], dtu[CHUNK * LANES], dy[CHUNK * LANES];
    float y[CHUNK * LANES], gB[CHUNK * LANES], hA[CHUNK * LANES];
    float decays[CHUNK * BLOCK * LANES], decayed[CHUNK * BLOCK * LANES];
} backward_steps;

INLINE void load_steps(const scan_job *job, const place *p, int64_t channel, int64_t count, backward_steps *w) {
    const zs_scan_args *a = job->args;
    vec bias = load_channels(a->delta_bias, channel, count);
    for (int64_t k = 0; k < p->steps; k++) {
        vec slope, u = load_row(&a->u, p->batch, p->in[k], channel, count);
        vec dt = step_size(a, load_row(&a->delta, p->batch, p->in[k], channel, count) + bias, &slope);
        vec dy = load_row(&a->d_out, p->batch, p->out[k], channel, count);
        if (a->z.data) {
            vec z = load_row(&a->z, p->batch, p->out[k], channel, count);
            dy = dy * z * vsigmoid(z, vexp_minus_abs(z));
        }
        vstore(w->u + k * LANES, u);
        vstore(w->dt + k * LANES, dt);
        vstore(w->slope + k * LANES, slope);
        vstore(w->dtu + k * LANES, dt * u);
        vstore(w->dy + k * LANES, dy);
    }
    memset(w->y, 0, sizeof w->y);
    memset(w->gB, 0, sizeof w->gB);
    memset(w->hA, 0, sizeof w->hA);
}

/* out = (<s, C> + D u) silu(z): the gradient of z. */
INLINE void gate_backward(const zs_scan_args *a, const place *p, int64_t channel, int64_t count, vec D,
                          const backward_steps *w) {
    for (int64_t k = 0; k < p->steps; k++) {
        vec z = load_row(&a->z, p->batch, p->out[k], channel, count), gate = vsigmoid(z, vexp_minus_abs(z));
        vec y = vfma(D, vload(w->u + k * LANES), vload(w->y + k * LANES));
        vec dz = load_row(&a->d_out, p->batch, p->out[k], channel, count) * y * gate;
        store_row(&a->d_z, p->batch, p->out[k], channel, count, dz * vfma(z, vset(1.0f) - gate, vset(1.0f)));
    }
}

static void backward_vector(const scan_job *job, const place *p, int64_t channel, int64_t count, int64_t chunk,
                            const float *B, const float *C, float *dB, float *dC, float *carry, backward_steps *w) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states, at = p->batch * job->padded + channel;
    const float *A = job->A_packed + channel * n;
    const float *start = a->checkpoints + checkpoint_offset(job, p->batch, chunk, channel);
    float *dA = job->A_partial + at * n;
    load_steps(job, p, channel, count, w);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t b = i * LANES;
        recompute(n, p->steps, A + b, B + i, C + i, w->dt, w->dtu, w->dy, start + b, w->decays, w->decayed, w->y, dC + i);
        recur_backward(n, p->steps, A + b, B + i, C + i, w->dt, w->dtu, w->dy, w->decays, w->decayed, carry + b, dA + b,
                       dB + i, w->gB, w->hA);
    }
    vec D = load_channels(a->D, channel, count), dD = vset(0.0f), dbias = vset(0.0f);
    if (a->d_z.data) gate_backward(a, p, channel, count, D, w);
    for (int64_t k = 0; k < p->steps; k++) {
        vec u = vload(w->u + k * LANES), gB = vload(w->gB + k * LANES), dy = vload(w->dy + k * LANES);
        vec du = vfma(D, dy, vload(w->dt + k * LANES) * gB);
        vec ddelta = vfma(vload(w->hA + k * LANES), vset(1.0f / LOG2E), u * gB) * vload(w->slope + k * LANES);
        store_row(&a->d_u, p->batch, p->in[k], channel, count, du);
        store_row(&a->d_delta, p->batch, p->in[k], channel, count, ddelta);
        dbias = dbias + ddelta;
        dD = vfma(dy, u, dD);
    }
    vstore(job->D_partial + at, vload(job->D_partial + at) + dD);
    vstore(job->bias_partial + at, vload(job->bias_partial + at) + dbias);
}

static void scan_backward(const scan_job *job, int64_t batch, int64_t unit, float *workspace) {
    const zs_scan_args *a = job->args;
    const int64_t n = job->states, rows = CHUNK * n;
    float *B = workspace, *C = B + rows, *dB = C + rows, *dC = dB + rows, *carry = dC + rows;
    backward_steps *steps = (backward_steps *)(carry + UNIT_CHANNELS * n);
    place p = enter_unit(job, batch, unit);
    memset(carry, 0, (size_t)(p.vectors * LANES * n) * sizeof(float));
    for (int64_t chunk = job->chunks - 1; chunk >= 0; chunk--) {
        enter_chunk(&p, a, chunk);
        load_chunk(job, &a->B, &p, B);
        load_chunk(job, &a->C, &p, C);
        memset(dB, 0, (size_t)(2 * rows) * sizeof(float));
        for (int64_t v = 0; v < p.vectors; v++) {
            int64_t channel = p.first + v * LANES;
            backward_vector(job, &p, channel, a->channels - channel, chunk, B, C, dB, dC, carry + v * LANES * n, steps);
        }
        /* the unit's own slot: units are added up afterwards, in their order */
        float *to = job->BC_partial + ((batch * job->units + unit) * a->length + p.start) * 2 * a->states;
        for (int64_t k = 0; k < p.steps; k++, to += 2 * a->states) {
            memcpy(to, dB + k * n, (size_t)a->states * sizeof(float));
            memcpy(to + a->states, dC + k * n, (size_t)a->states * sizeof(float));
        }
    }
}

static int64_t scan_workspace(const scan_job *job, int backward) {
    const int64_t n = job->states;
    if (!backward) return UNIT_CHANNELS * n + 2 * CHUNK * n;
    return UNIT_CHANNELS * n + 4 * CHUNK * n + (int64_t)(sizeof(backward_steps) / sizeof(float));
}

/* ---- gather + depthwise causal convolution + SiLU ---- */

INLINE vec conv_row(const conv_job *job, int64_t batch, int64_t step, int64_t channel, int64_t count) {
    const zs_conv_args *a = job->args;
    vec sum = vload(job->bias_packed + channel);
    for (int64_t j = 0; j < a->width; j++) {
        int64_t from = step - (a->width - 1) + j;
        if (from < 0) continue;
        vec x = load_row(&a->x, batch, a->order ? a->order[from] : from, channel, count);
        sum = vfma(x, vload(job->weight_packed + j * job->padded + channel), sum);
    }
    return sum;
}

static void conv_forward(const conv_job *job, int64_t batch, int64_t unit, float *workspace) {
    const zs_conv_args *a = job->args;
    int64_t first = unit * UNIT_CHANNELS, last = min64(a->channels, first + UNIT_CHANNELS);
    (void)workspace;
    for (int64_t step = 0; step < a->length; step++)
        for (int64_t channel = first; channel < last; channel += LANES) {
            int64_t count = a->channels - channel;
            vec p = conv_row(job, batch, step, channel, count);
            store_row(&a->out, batch, step, channel, count, p * vsigmoid(p, vexp_minus_abs(p)));
        }
}

/* dp = d_out silu'(p); d_x at step s = sum over m of dp_{s+m} w_{k-1-m}. The last k rows of dp are kept. */
static void conv_backward(const conv_job *job, int64_t batch, int64_t unit, float *workspace) {
    const zs_conv_args *a = job->args;
    const int64_t k = a->width;
    int64_t first = unit * UNIT_CHANNELS, last = min64(a->channels, first + UNIT_CHANNELS);
    float *ring = workspace; /* [k][UNIT_CHANNELS] */
    float *dw = job->weight_partial + batch * (k + 1) * job->padded;
    memset(ring, 0, (size_t)(k * UNIT_CHANNELS) * sizeof(float));
    for (int64_t step = 0; step < a->length + k - 1; step++)
        for (int64_t channel = first; channel < last; channel += LANES) {
            int64_t count = a->channels - channel, done = step - (k - 1);
            vec dp = vset(0.0f);
            if (step < a->length) {
                vec p = conv_row(job, batch, step, channel, count), gate = vsigmoid(p, vexp_minus_abs(p));
                dp = load_row(&a->d_out, batch, step, channel, count) * gate *
                     vfma(p, vset(1.0f) - gate, vset(1.0f));
                for (int64_t j = 0; j < k; j++) {
                    int64_t from = step - (k - 1) + j;
                    if (from < 0) continue;
                    vec x = load_row(&a->x, batch, a->order ? a->order[from] : from, channel, count);
                    float *at = dw + j * job->padded + channel;
                    vstore(at, vfma(dp, x, vload(at)));
                }
                float *at = dw + k * job->padded + channel;
                vstore(at, vload(at) + dp);
            }
            vstore(ring + step % k * UNIT_CHANNELS + channel - first, dp);
            if (done < 0) continue;
            vec dx = vset(0.0f);
            for (int64_t m = 0; m < k; m++)
                dx = vfma(vload(ring + (done + m) % k * UNIT_CHANNELS + channel - first),
                          vload(job->weight_packed + (k - 1 - m) * job->padded + channel), dx);
            store_row(&a->d_x, batch, a->order ? a->order[done] : done, channel, count, dx);
        }
}

static int64_t conv_workspace(const conv_job *job, int backward) {
    return backward ? job->args->width * UNIT_CHANNELS : 0;
}

static void exp2_array(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        vstore_row(y, ZS_F32, i, count - i, vexp2(vload_row(x, ZS_F32, i, count - i)));
}

const zs_kernels VARIANT = {
#if LANES == 16
    .name = "avx512",
#else
    .name = "avx2",
#endif
    .lanes = LANES,
    .scan_workspace = scan_workspace,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .conv_workspace = conv_workspace,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .exp2 = exp2_array,
};
