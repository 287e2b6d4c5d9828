/* Interface of the native selective scan: plain C, loaded with ctypes (zigma/selective_scan/native_library.py
 * mirrors the structures below field by field; raise ZS_ABI_VERSION on both sides when one changes).
 *
 * Shapes: b batch, l length, d channels, n states per channel, k convolution width. */
#ifndef ZIGMA_SCAN_H
#define ZIGMA_SCAN_H

#include <stdint.h>

#define ZS_ABI_VERSION 3

enum { ZS_F32 = 0, ZS_BF16 = 1 };
enum { ZS_OK = 0, ZS_BAD_ORDER = 1, ZS_NO_MEMORY = 2, ZS_UNSUPPORTED = 3 };
enum { ZS_MAX_STATES = 256, ZS_MAX_CONV_WIDTH = 16 };

/* A (b, l, width) tensor whose last dimension is contiguous; strides in elements. data NULL: absent. */
typedef struct {
    void *data;
    int64_t batch_stride, row_stride;
    int64_t dtype;
} zs_rows;

typedef struct {
    int64_t batch, length, channels, states;
    int64_t delta_softplus, threads;
    /* Step k reads u, delta, B, C at row input_order[k] and z at row output_order[k], and writes out there.
     * NULL stands for 0, 1, 2, ... */
    const int64_t *input_order, *output_order;
    const float *A, *D, *delta_bias; /* (d, n), (d), (d); D and delta_bias may be NULL */
    zs_rows u, delta, B, C, z, out;
    float *checkpoints; /* zs_checkpoint_floats() floats: written by forward unless NULL, read by backward */
    /* backward only; d_D, d_delta_bias and d_z may be NULL */
    zs_rows d_out, d_u, d_delta, d_B, d_C, d_z;
    float *d_A, *d_D, *d_delta_bias;
} zs_scan_args;

typedef struct {
    int64_t batch, length, channels, width, threads;
    const int64_t *order;        /* step k reads x at row order[k]; out is in scan order */
    const float *weight, *bias;  /* (d, k), (d); bias may be NULL */
    zs_rows x, out;
    /* backward only; d_bias may be NULL */
    zs_rows d_out, d_x;
    float *d_weight, *d_bias;
} zs_conv_args;

/* x = (base + gate mix + residual) at row gather[k] (NULL: k); normed = norm(x) weight + bias;
 * modulated = normed (1 + scale) + shift. gate, scale and shift are one row for each batch entry (row_stride 0).
 * What has no data is left out: of the inputs mix, gate, residual, weight, bias, of the outputs all. */
typedef struct {
    int64_t batch, length, width, threads;
    int64_t layer_norm; /* 0: RMSNorm */
    double eps;
    const int64_t *gather;
    const float *weight, *bias;
    zs_rows base, mix, gate, residual, scale, shift;
    zs_rows total, normed, modulated;
    /* backward only: the gradients of the outputs (NULL: zero), and where those of the inputs go (NULL: nowhere).
     * d_x is that of base and residual, d_mix of mix; the others are (b, d) and (d) sums. */
    zs_rows d_total, d_normed, d_modulated, d_x, d_residual, d_mix;
    float *d_gate, *d_scale, *d_shift, *d_weight, *d_bias;
} zs_norm_args;

#endif
