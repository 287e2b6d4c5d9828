/* What one instruction-set variant offers to library.c: work on units (a batch entry and UNIT_CHANNELS of its
 * channels). The units do not depend on the instruction set or on the number of threads, and sums over units are taken
 * in a fixed order, so results do not depend on the number of threads either. What does is how many units a task takes
 * side by side: the more, the longer the pieces of rows that are read together. */
#ifndef ZIGMA_KERNELS_H
#define ZIGMA_KERNELS_H

#include "scan.h"

/* CHUNK steps between checkpoints; BLOCK states of a channel are in registers at a time. */
enum { UNIT_CHANNELS = 128, CHUNK = 16, BLOCK = 8, NORM_ROWS = 32 };

typedef struct {
    const zs_scan_args *args;
    int64_t units, chunks;          /* units per batch entry; chunks of the sequence */
    int64_t padded, states;         /* channels and states rounded up to whole vectors and blocks */
    float *A_packed;                /* [padded / lanes][states][lanes], times log2(e) */
    float *dt_limit;                /* [padded]: |dt| below it gives |dt A log2(e)| < 120 for all states;
                                     * NaN, which nothing is below, where A is not finite */
    float *BC_partial;              /* [b][units][l][2][n], sums over the channels of one unit */
    float *A_partial;               /* [b][padded / lanes][states][lanes] */
    float *D_partial, *bias_partial; /* [b][padded] */
} scan_job;

typedef struct {
    const zs_conv_args *args;
    int64_t units, padded;
    float *weight_packed, *bias_packed; /* [k][padded], [padded] */
    float *weight_partial;              /* [b][k + 1][padded], the bias in the last row */
} conv_job;

typedef struct {
    const char *name;
    int64_t lanes; /* channels per vector */
    /* Fills A_packed, given as zeros, and dt_limit. */
    void (*pack_A)(scan_job *);
    /* Units `unit` to `unit + units - 1`, as far as there are that many; workspaces in floats per thread */
    int64_t (*scan_workspace)(const scan_job *, int64_t units, int backward);
    void (*scan_forward)(const scan_job *, int64_t batch, int64_t unit, int64_t units, float *workspace);
    void (*scan_backward)(const scan_job *, int64_t batch, int64_t unit, int64_t units, float *workspace);
    int64_t (*conv_workspace)(const conv_job *, int64_t units, int backward);
    void (*conv_forward)(const conv_job *, int64_t batch, int64_t unit, int64_t units, float *workspace);
    void (*conv_backward)(const conv_job *, int64_t batch, int64_t unit, int64_t units, float *workspace);
    void (*norm_rows)(const zs_norm_args *, int64_t batch, int64_t block, float *workspace);
    void (*norm_rows_backward)(const zs_norm_args *, int64_t batch, int64_t block, float *workspace, float *sums);
    /* 2^x, and the same as a decay, where |x| < 120: for tests of accuracy and for the floor of the scan's time */
    void (*exp2)(const float *x, float *y, int64_t count);
    void (*decays)(const float *x, float *y, int64_t count);
} zs_kernels;

/* Sums that one block of rows adds to, each a padded row: d_gate, d_scale, d_shift, d_weight, d_bias. */
enum { NORM_SUMS = 5 };

#endif
