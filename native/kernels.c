/* The kernels of one instruction set: compiled once for each (see build.py), VARIANT names the table that library.c
 * picks at run time. */
#include "kernels.h"

#include "conv_kernel.h"
#include "norm_kernel.h"
#include "scan_kernel.h"

static void exp2_array(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        vstore_row(y, ZS_F32, i, count - i, vexp2(vload_row(x, ZS_F32, i, count - i)));
}

const zs_kernels VARIANT = {
    .name = SIMD_NAME,
    .lanes = LANES,
    .scan_workspace = scan_workspace,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .conv_workspace = conv_workspace,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .norm_rows = norm_rows,
    .norm_rows_backward = norm_rows_backward,
    .exp2 = exp2_array,
};
