/* One vector of float lanes and the few operations the kernels need. A header per instruction set holds its own part,
 * chosen by the flags of the translation unit; the kernels are written once.
 *
 * Each defines SIMD_NAME, LANES, vec and
 *   vset, vload, vstore, vfma(a, b, c) = a b + c, vmax and vmin (b where either is NaN), vabs
 *   vclamp(x, limit) = x within [-limit, limit], vclamp_abs(x, limit) = |x| up to limit; of a NaN it or the limit
 *   vselect_nonnegative(x, a, b) = x >= 0 ? a : b, lane by lane
 *   vload_bf16, vstore_bf16: rounds to nearest even; a NaN stays a NaN
 *   vexp2: 2^x, relative error below 1.2e-7, exact at 0; a NaN passes through
 *   vexp2_product(a, b) = 2^(a b) for |a b| < 126, not NaN
 *   vdecay(a, b): the same for |a b| < 121 and factors of a state, where it counts how far off they are beside 1: at most
 *     3e-7 for a b <= 0; exact at 0
 *   vall_below(p, count, limit): whether the magnitude of p[0 .. count - 1] is below limit, in every lane
 *   FORWARD_DECAYS_FIRST, BACKWARD_DECAYS_FIRST: whether the decays of a chunk are computed before its recurrence, or
 *     within
 *   vreciprocal(x) = 1 / x for x in [1, 2^125]
 *   vadd_sums8(to, v): to[i] += sum of the lanes of v[i], i = 0 .. 7
 *   vprefetch: into the second-level cache */
#ifndef ZIGMA_SIMD_H
#define ZIGMA_SIMD_H

#include <stdint.h>
#include <string.h>

#include "scan.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#define LOG2E 1.44269504088896341f

/* log(1 + w) for w in [0, 1] as w p(w), p of degree 8 fitted for the least relative error (3e-8): the relative
 * error counts, for tiny w is where softplus of a very negative number lives. */
INLINE vec vlog1p(vec w) {
    vec p = vfma(w, vset(5.23269193375e-3f), vset(-2.95052294384e-2f));
    p = vfma(p, w, vset(7.82259366691e-2f));
    p = vfma(p, w, vset(-1.36632445044e-1f));
    p = vfma(p, w, vset(1.91060061537e-1f));
    p = vfma(p, w, vset(-2.48429820584e-1f));
    p = vfma(p, w, vset(3.3319096788e-1f));
    p = vfma(p, w, vset(-4.99994931395e-1f));
    return w * vfma(p, w, vset(9.99999969879e-1f));
}

/* exp(-|x|), from which softplus and the sigmoid are computed without overflow on either side. Far out it stays at
 * exp(-86.5), which is nothing beside 1 and at the end of what a float holds. It may make a number of a NaN: those who use
 * it pass the NaN on by themselves. */
INLINE vec vexp_minus_abs(vec x) { return vexp2_product(vclamp_abs(x, 86.5f), vset(-LOG2E)); }
INLINE vec vsoftplus(vec x, vec exp_minus_abs) { return vmax(vset(0.0f), x) + vlog1p(exp_minus_abs); }
INLINE vec vsigmoid(vec x, vec exp_minus_abs) {
    return vselect_nonnegative(x, vset(1.0f), exp_minus_abs) * vreciprocal(exp_minus_abs + vset(1.0f));
}

/* x sigmoid(x) = x / (1 + exp(-x)). The exponential stops where the sigmoid vanishes on one side and is 1 on the other. */
INLINE vec vexp_minus(vec x) { return vexp2_product(vclamp(x, 86.5f), vset(-LOG2E)); }
INLINE vec vsilu(vec x, vec exp_minus) { return x * vreciprocal(exp_minus + vset(1.0f)); }

/* Rows hold float or bfloat16; count < LANES only in the last vector of a row. */
INLINE vec vload_row(const void *base, int64_t dtype, int64_t offset, int64_t count) {
    if (dtype == ZS_F32) {
        const float *p = (const float *)base + offset;
        if (__builtin_expect(count >= LANES, 1)) return vload(p);
        float tail[LANES] = {0};
        memcpy(tail, p, (size_t)count * sizeof *p);
        return vload(tail);
    }
    const uint16_t *p = (const uint16_t *)base + offset;
    if (__builtin_expect(count >= LANES, 1)) return vload_bf16(p);
    uint16_t tail[LANES] = {0};
    memcpy(tail, p, (size_t)count * sizeof *p);
    return vload_bf16(tail);
}

INLINE void vstore_row(void *base, int64_t dtype, int64_t offset, int64_t count, vec x) {
    if (dtype == ZS_F32) {
        float *p = (float *)base + offset, tail[LANES];
        if (__builtin_expect(count >= LANES, 1)) {
            vstore(p, x);
        } else {
            vstore(tail, x);
            memcpy(p, tail, (size_t)count * sizeof *p);
        }
        return;
    }
    uint16_t *p = (uint16_t *)base + offset, tail[LANES];
    if (__builtin_expect(count >= LANES, 1)) {
        vstore_bf16(p, x);
    } else {
        vstore_bf16(tail, x);
        memcpy(p, tail, (size_t)count * sizeof *p);
    }
}

#endif
