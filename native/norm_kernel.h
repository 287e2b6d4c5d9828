/* Between two mixers, row by row: add what the last one gave, normalise, modulate. One pass over memory in place of
 * five, and the rows are gathered on the way, so that the mixer finds its tokens in scan order. */
#ifndef ZIGMA_NORM_KERNEL_H
#define ZIGMA_NORM_KERNEL_H

#include "rows.h"

INLINE float sum_lanes(vec x) {
    float lanes[LANES];
    vstore(lanes, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The row after this one, to be asked for; the base's in place of what is not there. */
typedef struct {
    const char *start;
    int64_t size; /* of an element */
} row_ahead;

INLINE row_ahead look_for(const zs_norm_args *a, const zs_rows *t, int64_t batch, int64_t next) {
    const zs_rows *there = t->data ? t : &a->base;
    return (row_ahead){address(there, batch, next, 0), there->dtype == ZS_F32 ? 4 : 2};
}

/* x = base + gate mix + residual, into `x` (padded with zeros) and out.total; returns the sum of x. dtype: of base, mix
 * and gate, as load_known takes it; the residual and the total have their own. */
INLINE float add_row(int64_t dtype, const zs_norm_args *a, int64_t batch, int64_t from, int64_t to, int64_t next,
                     float *x) {
    const int64_t base = row_offset(&a->base, batch, from), total = row_offset(&a->total, batch, to);
    const int64_t mix = row_offset(&a->mix, batch, from), residual = row_offset(&a->residual, batch, from);
    const int64_t gate = row_offset(&a->gate, batch, 0);
    const row_ahead ahead[3] = {look_for(a, &a->base, batch, next), look_for(a, &a->mix, batch, next),
                                look_for(a, &a->residual, batch, next)};
    vec sum = vset(0.0f);
    for (int64_t c = 0; c < a->width; c += LANES) {
        const int64_t count = dtype == MIXED ? a->width - c : LANES;
        for (int i = 0; i < 3; i++) vprefetch(ahead[i].start + c * ahead[i].size);
        vec v = load_known(dtype, &a->base, base + c, count);
        if (a->mix.data) {
            vec m = load_known(dtype, &a->mix, mix + c, count);
            if (a->gate.data)
                v = vfma(load_known(dtype, &a->gate, gate + c, count), m, v);
            else
                v = v + m;
        }
        if (a->residual.data) v = v + vload_row(a->residual.data, a->residual.dtype, residual + c, count);
        vstore(x + c, v);
        sum = sum + v;
        if (a->total.data) vstore_row(a->total.data, a->total.dtype, total + c, count, v);
    }
    return sum_lanes(sum);
}

/* The sum over the width of (x - mean)^2; lanes beyond the width do not count. Four sums, for each addition waits for the
 * one before it. */
INLINE float sum_squares(const zs_norm_args *a, const float *x, float mean) {
    vec sums[4] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    int64_t c = 0;
    for (; c + 4 * LANES <= a->width; c += 4 * LANES) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; i++) {
            vec v = vload(x + c + i * LANES) - vset(mean);
            sums[i] = vfma(v, v, sums[i]);
        }
    }
    for (; c + LANES <= a->width; c += LANES) {
        vec v = vload(x + c) - vset(mean);
        sums[0] = vfma(v, v, sums[0]);
    }
    float rest = 0;
    for (; c < a->width; c++) rest += (x[c] - mean) * (x[c] - mean);
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

INLINE void norm_row(int64_t dtype, const zs_norm_args *a, int64_t batch, int64_t row, float *x) {
    const int64_t after = min64(row + 1, a->length - 1), next = a->gather ? a->gather[after] : after;
    const float sum = add_row(dtype, a, batch, a->gather ? a->gather[row] : row, row, next, x);
    const float mean = a->layer_norm ? sum / (float)a->width : 0.0f;
    const float scale = 1.0f / __builtin_sqrtf(sum_squares(a, x, mean) / (float)a->width + (float)a->eps);
    const int64_t normed = row_offset(&a->normed, batch, row), modulated = row_offset(&a->modulated, batch, row);
    const int64_t by = row_offset(&a->scale, batch, 0), shift = row_offset(&a->shift, batch, 0);
    for (int64_t c = 0; c < a->width; c += LANES) {
        const int64_t count = dtype == MIXED ? a->width - c : LANES;
        vec u = (vload(x + c) - vset(mean)) * vset(scale);
        if (a->weight) u = u * vload_row(a->weight, ZS_F32, c, count);
        if (a->bias) u = u + vload_row(a->bias, ZS_F32, c, count);
        if (a->normed.data) store_known(dtype, &a->normed, normed + c, count, u);
        if (!a->modulated.data) continue;
        u = vfma(u, load_known(dtype, &a->scale, by + c, count), u);
        u = u + load_known(dtype, &a->shift, shift + c, count);
        store_known(dtype, &a->modulated, modulated + c, count, u);
    }
}

/* NORM_ROWS rows of one batch entry; workspace holds one row. */
static void norm_rows(const zs_norm_args *a, int64_t batch, int64_t block, float *workspace) {
    const int64_t first = block * NORM_ROWS, last = min64(a->length, first + NORM_ROWS);
    const zs_rows *const rows[] = {&a->base, &a->mix, &a->gate, &a->scale, &a->shift, &a->normed, &a->modulated};
    const int64_t dtype = a->width % LANES ? MIXED : dtype_of_all(rows, 7);
    if (dtype == ZS_F32) {
        for (int64_t row = first; row < last; row++) norm_row(ZS_F32, a, batch, row, workspace);
    } else if (dtype == ZS_BF16) {
        for (int64_t row = first; row < last; row++) norm_row(ZS_BF16, a, batch, row, workspace);
    } else {
        for (int64_t row = first; row < last; row++) norm_row(MIXED, a, batch, row, workspace);
    }
}

INLINE void accumulate(float *to, vec x) { vstore(to, vload(to) + x); }

INLINE vec row_or_zero(const zs_rows *t, int64_t offset, int64_t count) {
    return t->data ? vload_row(t->data, t->dtype, offset, count) : vset(0.0f);
}

/* With xhat = (x - mean) s, s = 1 / sqrt(mean square + eps), u = xhat w + b, m = u (1 + scale) + shift:
 *   du = d_normed + d_modulated (1 + scale),    g = du w
 *   dx = d_total + s (g - xhat mean(g xhat) - [LayerNorm] mean(g))
 * x is computed again; g takes the place of xhat's neighbour in the workspace. */
INLINE void norm_row_backward(const zs_norm_args *a, int64_t batch, int64_t row, int64_t padded, float *x, float *sums) {
    const int64_t from = a->gather ? a->gather[row] : row;
    const float sum = add_row(MIXED, a, batch, from, row, from, x);
    const float mean = a->layer_norm ? sum / (float)a->width : 0.0f;
    const float s = 1.0f / __builtin_sqrtf(sum_squares(a, x, mean) / (float)a->width + (float)a->eps);
    float *g = x + padded, *d_gate = sums, *d_scale = d_gate + padded, *d_shift = d_scale + padded;
    float *d_weight = d_shift + padded, *d_bias = d_weight + padded;
    const int64_t by = row_offset(&a->scale, batch, 0);
    vec sum_g = vset(0.0f), sum_gx = vset(0.0f);
    for (int64_t c = 0; c < a->width; c += LANES) { /* beyond the width g and the gradients are zero */
        const int64_t count = a->width - c;
        vec xhat = (vload(x + c) - vset(mean)) * vset(s), u = xhat;
        vec w = a->weight ? vload_row(a->weight, ZS_F32, c, count) : vset(1.0f);
        vec du = row_or_zero(&a->d_normed, row_offset(&a->d_normed, batch, row) + c, count);
        if (a->d_modulated.data) {
            vec dm = row_or_zero(&a->d_modulated, row_offset(&a->d_modulated, batch, row) + c, count);
            u = u * w;
            if (a->bias) u = u + vload_row(a->bias, ZS_F32, c, count);
            accumulate(d_scale + c, dm * u);
            accumulate(d_shift + c, dm);
            du = vfma(dm, row_or_zero(&a->scale, by + c, count), du + dm);
        }
        accumulate(d_weight + c, du * xhat);
        accumulate(d_bias + c, du);
        vec gradient = du * w;
        sum_g = sum_g + gradient;
        sum_gx = vfma(gradient, xhat, sum_gx);
        vstore(x + c, xhat);
        vstore(g + c, gradient);
    }
    const float mean_g = a->layer_norm ? sum_lanes(sum_g) / (float)a->width : 0.0f;
    const float mean_gx = sum_lanes(sum_gx) / (float)a->width;
    const int64_t gate = row_offset(&a->gate, batch, 0), mix = row_offset(&a->mix, batch, from);
    for (int64_t c = 0; c < a->width; c += LANES) {
        const int64_t count = a->width - c;
        vec dx = (vload(g + c) - vfma(vload(x + c), vset(mean_gx), vset(mean_g))) * vset(s);
        dx = dx + row_or_zero(&a->d_total, row_offset(&a->d_total, batch, row) + c, count);
        vstore_row(a->d_x.data, a->d_x.dtype, row_offset(&a->d_x, batch, from) + c, count, dx);
        if (a->d_residual.data)
            vstore_row(a->d_residual.data, a->d_residual.dtype, row_offset(&a->d_residual, batch, from) + c, count, dx);
        if (!a->d_mix.data) continue;
        vec d_mix = dx;
        if (a->gate.data) {
            d_mix = dx * vload_row(a->gate.data, a->gate.dtype, gate + c, count);
            accumulate(d_gate + c, dx * vload_row(a->mix.data, a->mix.dtype, mix + c, count));
        }
        vstore_row(a->d_mix.data, a->d_mix.dtype, row_offset(&a->d_mix, batch, from) + c, count, d_mix);
    }
}

/* The same rows backward; workspace holds two rows, `sums` (zeroed) this block's NORM_SUMS rows. */
static void norm_rows_backward(const zs_norm_args *a, int64_t batch, int64_t block, float *workspace, float *sums) {
    const int64_t last = min64(a->length, (block + 1) * NORM_ROWS), padded = (a->width + LANES - 1) / LANES * LANES;
    for (int64_t row = block * NORM_ROWS; row < last; row++)
        norm_row_backward(a, batch, row, padded, workspace, sums);
}

#endif
