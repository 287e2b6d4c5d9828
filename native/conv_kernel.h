/* Gather, depthwise causal convolution and SiLU on some units of channels, in chunks of steps like the scan. */
#ifndef ZIGMA_CONV_KERNEL_H
#define ZIGMA_CONV_KERNEL_H

#include "rows.h"

/* One vector of channels over one chunk, each array [step][LANES]; x begins k - 1 steps before the chunk, dp ends as
 * many after it. */
typedef struct {
    float x[(CHUNK + ZS_MAX_CONV_WIDTH - 1) * LANES], dp[(CHUNK + ZS_MAX_CONV_WIDTH - 1) * LANES];
    float p[CHUNK * LANES], e[CHUNK * LANES];
} conv_steps;

typedef struct {
    int64_t start, steps, missing; /* missing: steps of x before the first token */
    int64_t in[CHUNK + ZS_MAX_CONV_WIDTH - 1], out[CHUNK];
} conv_place;

static conv_place enter_conv_chunk(const zs_conv_args *a, int64_t chunk) {
    conv_place p = {.start = chunk * CHUNK};
    p.steps = min64(CHUNK, a->length - p.start);
    const int64_t first = p.start - (a->width - 1);
    p.missing = first < 0 ? -first : 0;
    for (int64_t k = p.missing; k < p.steps + a->width - 1; k++) p.in[k] = a->order ? a->order[first + k] : first + k;
    for (int64_t k = 0; k < p.steps; k++) p.out[k] = p.start + k;
    return p;
}

/* x, the convolution p and exp(-|p|) of one vector. */
INLINE void convolve(int64_t width, const conv_job *job, const conv_place *at, int64_t batch, int64_t channel,
                     int64_t count, conv_steps *w) {
    memset(w->x, 0, (size_t)(at->missing * LANES) * sizeof(float));
    load_steps(&job->args->x, batch, at->in + at->missing, at->steps + width - 1 - at->missing, channel, count,
               w->x + at->missing * LANES);
    vec bias = vload(job->bias_packed + channel);
    for (int64_t k = 0; k < at->steps; k++) {
        vec sum = bias;
        for (int64_t j = 0; j < width; j++)
            sum = vfma(vload(w->x + (k + j) * LANES), vload(job->weight_packed + j * job->padded + channel), sum);
        vstore(w->p + k * LANES, sum);
        vstore(w->e + k * LANES, vexp_minus_abs(sum));
    }
}

/* Forward takes the rows of a unit one step after the other, 512 bytes of each: the vectors of a step are independent of
 * each other. Each row is read once, and kept for the k - 1 steps after it: the result may be written over x. */
enum { CONV_AHEAD = 4 };
typedef struct {
    float x[CHUNK + ZS_MAX_CONV_WIDTH - 1][UNIT_CHANNELS];
} conv_rows;

/* before: the k - 1 rows before the chunk, and on return the last k - 1 of it. `next`: the first channel of the unit that
 * comes after this one. */
INLINE void convolve_unit(int64_t width, int64_t dtype, const conv_job *job, const conv_place *at, int64_t batch,
                          int64_t first, int64_t channels, int64_t next, conv_rows *rows, float *before) {
    const zs_conv_args *a = job->args;
    const float *weight = job->weight_packed + first, *bias = job->bias_packed + first;
    const int64_t *in = at->in + width - 1, padded = job->padded, steps = at->steps;
    const int64_t size = (dtype == MIXED ? a->x.dtype : dtype) == ZS_F32 ? 4 : 2;
    memcpy(rows->x, before, (size_t)(width - 1) * sizeof rows->x[0]);
    for (int64_t k = 0; k < steps; k++) {
        const int64_t later = k + CONV_AHEAD - steps;
        const char *ahead = later < 0 ? address(&a->x, batch, in[k + CONV_AHEAD], first)
                                      : address(&a->x, batch, in[min64(later, steps - 1)], next);
        const int64_t from = row_offset(&a->x, batch, in[k]) + first, to = row_offset(&a->out, batch, at->out[k]) + first;
        for (int64_t c = 0; c < channels; c += LANES) {
            vec x = load_known(dtype, &a->x, from + c, channels - c);
            vec sum = vload(bias + c);
            vprefetch(ahead + c * size);
            vstore(rows->x[k + width - 1] + c, x);
            for (int64_t j = 0; j < width - 1; j++)
                sum = vfma(vload(rows->x[k + j] + c), vload(weight + j * padded + c), sum);
            sum = vfma(x, vload(weight + (width - 1) * padded + c), sum);
            store_known(dtype, &a->out, to + c, channels - c, vsilu(sum, vexp_minus(sum)));
        }
    }
    memcpy(before, rows->x + at->steps, (size_t)(width - 1) * sizeof rows->x[0]);
}

static void conv_forward(const conv_job *job, int64_t batch, int64_t unit, int64_t units, float *workspace) {
    const zs_conv_args *a = job->args;
    const int64_t begin = unit * UNIT_CHANNELS, end = min64(a->channels, begin + units * UNIT_CHANNELS);
    const int64_t dtype = dtype_of_all((const zs_rows *const[]){&a->x, &a->out}, 2);
    conv_rows *rows = (conv_rows *)workspace;
    float *befores = (float *)(rows + 1); /* [unit][k - 1][UNIT_CHANNELS] */
    memset(befores, 0, (size_t)((a->width - 1) * units * UNIT_CHANNELS) * sizeof(float));
    for (int64_t chunk = 0; chunk < (a->length + CHUNK - 1) / CHUNK; chunk++) {
        const conv_place at = enter_conv_chunk(a, chunk);
        for (int64_t first = begin; first < end; first += UNIT_CHANNELS) {
            const int64_t channels = min64(UNIT_CHANNELS, end - first);
            const int64_t next = first + UNIT_CHANNELS < end ? first + UNIT_CHANNELS : begin;
            float *before = befores + (first - begin) * (a->width - 1);
            const int usual = a->width == 4 && channels % LANES == 0;
            if (usual && dtype == ZS_F32)
                convolve_unit(4, ZS_F32, job, &at, batch, first, channels, next, rows, before);
            else if (usual && dtype == ZS_BF16)
                convolve_unit(4, ZS_BF16, job, &at, batch, first, channels, next, rows, before);
            else
                convolve_unit(a->width, MIXED, job, &at, batch, first, channels, next, rows, before);
        }
    }
}

/* dp = d_out silu'(p),  d_x at step s = sum over m of dp_{s+m} w_{k-1-m},  d_w_j = sum over s of dp_s x_{s-(k-1)+j}.
 * Chunks run backwards; `carry` holds dp of the k - 1 steps after the chunk. */
INLINE void conv_backward_vector(int64_t width, const conv_job *job, const conv_place *at, int64_t batch,
                                 int64_t channel, int64_t count, conv_steps *w, float *carry) {
    convolve(width, job, at, batch, channel, count, w);
    load_steps(&job->args->d_out, batch, at->out, at->steps, channel, count, w->dp);
    memcpy(w->dp + at->steps * LANES, carry, (size_t)((width - 1) * LANES) * sizeof(float));
    float *dw = job->weight_partial + batch * (width + 1) * job->padded + channel; /* rows of `padded`, bias last */
    vec dbias = vload(dw + width * job->padded);
    for (int64_t k = 0; k < at->steps * LANES; k += LANES) {
        vec p = vload(w->p + k), gate = vsigmoid(p, vload(w->e + k));
        vec dp = vload(w->dp + k) * gate * vfma(p, vset(1.0f) - gate, vset(1.0f));
        vstore(w->dp + k, dp);
        dbias = dbias + dp;
    }
    vstore(dw + width * job->padded, dbias);
    for (int64_t j = 0; j < width; j++) {
        vec sum = vload(dw + j * job->padded);
        for (int64_t k = 0; k < at->steps; k++)
            sum = vfma(vload(w->dp + k * LANES), vload(w->x + (k + j) * LANES), sum);
        vstore(dw + j * job->padded, sum);
    }
    for (int64_t k = 0; k < at->steps; k++) {
        vec dx = vset(0.0f);
        for (int64_t m = 0; m < width; m++)
            dx = vfma(vload(w->dp + (k + m) * LANES),
                      vload(job->weight_packed + (width - 1 - m) * job->padded + channel), dx);
        vstore(w->p + k * LANES, dx);
    }
    store_steps(&job->args->d_x, batch, at->in + width - 1, at->steps, channel, count, w->p);
    memcpy(carry, w->dp, (size_t)((width - 1) * LANES) * sizeof(float));
}

static void conv_backward(const conv_job *job, int64_t batch, int64_t unit, int64_t units, float *workspace) {
    const zs_conv_args *a = job->args;
    const int64_t first = unit * UNIT_CHANNELS, last = min64(a->channels, first + units * UNIT_CHANNELS);
    conv_steps *steps = (conv_steps *)workspace;
    float *carries = (float *)(steps + 1); /* [vector][k - 1][LANES] */
    memset(carries, 0, (size_t)((a->width - 1) * units * UNIT_CHANNELS) * sizeof(float));
    for (int64_t chunk = (a->length + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        conv_place at = enter_conv_chunk(a, chunk);
        for (int64_t channel = first; channel < last; channel += LANES) {
            float *carry = carries + (channel - first) * (a->width - 1);
            if (a->width == 4)
                conv_backward_vector(4, job, &at, batch, channel, a->channels - channel, steps, carry);
            else
                conv_backward_vector(a->width, job, &at, batch, channel, a->channels - channel, steps, carry);
        }
    }
}

static int64_t conv_workspace(const conv_job *job, int64_t units, int backward) {
    const size_t size = backward ? sizeof(conv_steps) : sizeof(conv_rows);
    return (int64_t)(size / sizeof(float)) + (job->args->width - 1) * units * UNIT_CHANNELS;
}

#endif
