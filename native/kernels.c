/* The kernels of one instruction set: compiled once for each (see build.py), VARIANT names the table that library.c
 * picks at run time. */
#include "kernels.h"

#include "conv_kernel.h"
#include "norm_kernel.h"
#include "scan_backward.h"

static void pack_A(scan_job *job) {
    const int64_t n = job->args->states;
    for (int64_t c = 0; c < job->args->channels; c++) {
        const float *from = job->args->A + c * n;
        float *to = job->A_packed + c / LANES * LANES * job->states + c % LANES;
        for (int64_t i = 0; i < n; i++) to[i * LANES] = from[i] * LOG2E;
    }
    for (int64_t c = 0; c < job->padded; c += LANES) {
        vec largest = vset(0.0f), poison = vset(0.0f); /* NaN where A is not finite, which vmax may lose */
        for (int64_t i = 0; i < job->states; i++) {
            const vec x = vload(job->A_packed + c * job->states + i * LANES);
            largest = vmax(largest, vabs(x));
            poison = poison + x * vset(0.0f);
        }
        vstore(job->dt_limit + c, vset(120.0f) / largest + poison);
    }
}

static void exp2_array(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES)
        vstore_row(y, ZS_F32, i, count - i, vexp2(vload_row(x, ZS_F32, i, count - i)));
}

static void decays_array(const float *x, float *y, int64_t count) {
    const vec one = vset(1.0f);
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int64_t j = i; j < i + 4 * LANES; j += LANES) vstore(y + j, vdecay(vload(x + j), one));
    for (; i < count; i += LANES)
        vstore_row(y, ZS_F32, i, count - i, vdecay(vload_row(x, ZS_F32, i, count - i), one));
}

const zs_kernels VARIANT = {
    .name = SIMD_NAME,
    .lanes = LANES,
    .pack_A = pack_A,
    .scan_workspace = scan_workspace,
    .scan_forward = scan_forward,
    .scan_backward = scan_backward,
    .conv_workspace = conv_workspace,
    .conv_forward = conv_forward,
    .conv_backward = conv_backward,
    .norm_rows = norm_rows,
    .norm_rows_backward = norm_rows_backward,
    .exp2 = exp2_array,
    .decays = decays_array,
};
