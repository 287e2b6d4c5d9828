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

#endif
