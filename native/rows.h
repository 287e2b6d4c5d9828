/* Rows of a (b, l, channels) tensor: one vector of LANES channels of up to CHUNK steps at a time. */
#ifndef ZIGMA_ROWS_H
#define ZIGMA_ROWS_H

#include "kernels.h"
#include "simd.h"

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t row_offset(const zs_rows *t, int64_t batch, int64_t row) {
    return batch * t->batch_stride + row * t->row_stride;
}
INLINE const char *address(const zs_rows *t, int64_t batch, int64_t row, int64_t channel) {
    return (const char *)t->data + (row_offset(t, batch, row) + channel) * (t->dtype == ZS_F32 ? 4 : 2);
}

/* One vector of channels of each row of the chunk, as float [step][LANES]. The next vector is asked for at the same
 * time: rows far apart and taken a vector at a time are a pattern that no hardware prefetcher follows. */
INLINE void load_steps(const zs_rows *t, int64_t batch, const int64_t *rows, int64_t steps, int64_t channel,
                       int64_t count, float *to) {
    if (t->dtype == ZS_F32 && count >= LANES) {
        const float *base = (const float *)t->data + batch * t->batch_stride + channel;
        for (int64_t k = 0; k < steps; k++) {
            const float *from = base + rows[k] * t->row_stride;
            vprefetch(from + LANES);
            vstore(to + k * LANES, vload(from));
        }
        return;
    }
    for (int64_t k = 0; k < steps; k++)
        vstore(to + k * LANES, vload_row(t->data, t->dtype, row_offset(t, batch, rows[k]) + channel, count));
}

INLINE void store_steps(const zs_rows *t, int64_t batch, const int64_t *rows, int64_t steps, int64_t channel,
                        int64_t count, const float *from) {
    if (t->dtype == ZS_F32 && count >= LANES) {
        float *base = (float *)t->data + batch * t->batch_stride + channel;
        for (int64_t k = 0; k < steps; k++) {
            float *to = base + rows[k] * t->row_stride;
            vprefetch(to + LANES);
            vstore(to, vload(from + k * LANES));
        }
        return;
    }
    for (int64_t k = 0; k < steps; k++)
        vstore_row(t->data, t->dtype, row_offset(t, batch, rows[k]) + channel, count, vload(from + k * LANES));
}

/* What a kernel is compiled for: rows that all have one dtype, ZS_F32 or ZS_BF16, taken in whole vectors; or any. */
enum { MIXED = -1 };

/* The dtype of all of these that are there, or MIXED. */
static int64_t dtype_of_all(const zs_rows *const *rows, int64_t count) {
    int64_t dtype = MIXED;
    for (int64_t i = 0; i < count; i++) {
        if (!rows[i]->data) continue;
        if (dtype != MIXED && dtype != rows[i]->dtype) return MIXED;
        dtype = rows[i]->dtype;
    }
    return dtype;
}

/* One vector of a row, `offset` elements from the first. dtype: as above, known to the compiler; then it is whole. */
INLINE vec load_known(int64_t dtype, const zs_rows *t, int64_t offset, int64_t count) {
    return dtype == MIXED ? vload_row(t->data, t->dtype, offset, count) : vload_row(t->data, dtype, offset, LANES);
}

INLINE void store_known(int64_t dtype, const zs_rows *t, int64_t offset, int64_t count, vec x) {
    if (dtype == MIXED)
        vstore_row(t->data, t->dtype, offset, count, x);
    else
        vstore_row(t->data, dtype, offset, LANES, x);
}

INLINE vec load_channels(const float *values, int64_t channel, int64_t count) {
    return values ? vload_row(values, ZS_F32, channel, count) : vset(0.0f);
}

#endif
