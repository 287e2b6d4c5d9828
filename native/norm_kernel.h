/* Between two mixers, row by row: add what the last one gave, normalise, modulate. One pass over memory in place of
 * five, and the rows are gathered on the way, so that the mixer finds its tokens in scan order. */
#ifndef ZIGMA_NORM_KERNEL_H
#define ZIGMA_NORM_KERNEL_H

#include "rows.h"

INLINE float sum_lanes(vec x) {
    float lanes[LANES], sum = 0;
    vstore(lanes, x);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

/* x = base + gate mix + residual, into `x` (padded with zeros) and out.total; returns the sum of x. */
INLINE float add_row(const zs_norm_args *a, int64_t batch, int64_t from, int64_t to, float *x) {
    const int64_t base = row_offset(&a->base, batch, from), total = row_offset(&a->total, batch, to);
    const int64_t mix = row_offset(&a->mix, batch, from), residual = row_offset(&a->residual, batch, from);
    const int64_t gate = row_offset(&a->gate, batch, 0);
    vec sum = vset(0.0f);
    for (int64_t c = 0; c < a->width; c += LANES) {
        const int64_t count = a->width - c;
        vec v = vload_row(a->base.data, a->base.dtype, base + c, count);
        if (a->mix.data) {
            vec m = vload_row(a->mix.data, a->mix.dtype, mix + c, count);
            v = a->gate.data ? vfma(vload_row(a->gate.data, a->gate.dtype, gate + c, count), m, v) : v + m;
        }
        if (a->residual.data) v = v + vload_row(a->residual.data, a->residual.dtype, residual + c, count);
        vstore(x + c, v);
        sum = sum + v;
        if (a->total.data) vstore_row(a->total.data, a->total.dtype, total + c, count, v);
    }
    return sum_lanes(sum);
}

/* The sum over the width of (x - mean)^2; lanes beyond the width do not count. */
INLINE float sum_squares(const zs_norm_args *a, const float *x, float mean) {
    vec sum = vset(0.0f);
    int64_t c = 0;
    for (; c + LANES <= a->width; c += LANES) {
        vec v = vload(x + c) - vset(mean);
        sum = vfma(v, v, sum);
    }
    float rest = 0;
    for (; c < a->width; c++) rest += (x[c] - mean) * (x[c] - mean);
    return sum_lanes(sum) + rest;
}

INLINE void norm_row(const zs_norm_args *a, int64_t batch, int64_t row, float *x) {
    const float sum = add_row(a, batch, a->gather ? a->gather[row] : row, row, x);
    const float mean = a->layer_norm ? sum / (float)a->width : 0.0f;
    const float scale = 1.0f / __builtin_sqrtf(sum_squares(a, x, mean) / (float)a->width + (float)a->eps);
    const int64_t normed = row_offset(&a->normed, batch, row), modulated = row_offset(&a->modulated, batch, row);
    const int64_t by = row_offset(&a->scale, batch, 0), shift = row_offset(&a->shift, batch, 0);
    for (int64_t c = 0; c < a->width; c += LANES) {
        const int64_t count = a->width - c;
        vec u = (vload(x + c) - vset(mean)) * vset(scale);
        if (a->weight) u = u * vload_row(a->weight, ZS_F32, c, count);
        if (a->bias) u = u + vload_row(a->bias, ZS_F32, c, count);
        if (a->normed.data) vstore_row(a->normed.data, a->normed.dtype, normed + c, count, u);
        if (!a->modulated.data) continue;
        u = vfma(u, vload_row(a->scale.data, a->scale.dtype, by + c, count), u);
        u = u + vload_row(a->shift.data, a->shift.dtype, shift + c, count);
        vstore_row(a->modulated.data, a->modulated.dtype, modulated + c, count, u);
    }
}

/* NORM_ROWS rows of one batch entry; workspace holds one row. */
static void norm_rows(const zs_norm_args *a, int64_t batch, int64_t block, float *workspace) {
    const int64_t last = min64(a->length, (block + 1) * NORM_ROWS);
    for (int64_t row = block * NORM_ROWS; row < last; row++) norm_row(a, batch, row, workspace);
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
    const float sum = add_row(a, batch, from, row, x);
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
