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

/* One vector of channels of one row. plain: it is known to be whole, and float (is_plain). */
INLINE vec load_step(int plain, const zs_rows *t, int64_t batch, int64_t row, int64_t channel, int64_t count) {
    const int64_t offset = row_offset(t, batch, row) + channel;
    if (!plain) return vload_row(t->data, t->dtype, offset, count);
    return vload((const float *)t->data + offset);
}

INLINE void store_step(int plain, const zs_rows *t, int64_t batch, int64_t row, int64_t channel, int64_t count,
                       vec x) {
    const int64_t offset = row_offset(t, batch, row) + channel;
    if (!plain) {
        vstore_row(t->data, t->dtype, offset, count, x);
        return;
    }
    vstore((float *)t->data + offset, x);
}

/* What `plain` asks of a tensor: float, or absent. */
INLINE int is_plain(const zs_rows *t) { return !t->data || t->dtype == ZS_F32; }

INLINE vec load_channels(const float *values, int64_t channel, int64_t count) {
    return values ? vload_row(values, ZS_F32, channel, count) : vset(0.0f);
}

#endif
