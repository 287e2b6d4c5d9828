/* Vectors of 8 lanes: AVX2 and FMA. */
#ifndef ZIGMA_SIMD_AVX2_H
#define ZIGMA_SIMD_AVX2_H

#include <immintrin.h>

#define SIMD_NAME "avx2"
#define LANES 8
#define FORWARD_DECAYS_FIRST 0
#define BACKWARD_DECAYS_FIRST 1 /* 16 registers do not hold two rows of states and what an exponential needs */
typedef __m256 vec;

INLINE vec vset(float x) { return _mm256_set1_ps(x); }
INLINE vec vload(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec vmin(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec vabs(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vec vclamp(vec x, float limit) { return vmin(vset(limit), vmax(vset(-limit), x)); }
INLINE vec vclamp_abs(vec x, float limit) { return vmin(vset(limit), vabs(x)); }
INLINE vec vselect_nonnegative(vec x, vec a, vec b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ));
}

INLINE vec vload_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}

INLINE void vstore_bf16(uint16_t *p, vec x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((void *)p, _mm256_castsi256_si128(packed));
}

/* 2^(a b) where |a b| < 126 is known: a b = f + r with f a multiple of 1/8, |r| <= 1/16. The low bits of `sum` are 8 f:
 * the last three pick the mantissa of 2^f from a table in a register, less what they themselves add to it when all of
 * them are shifted into the exponent. 2^r = 1 + r q(r), q of degree 2, fitted for the least relative error (2.7e-8). The
 * constant term is exactly 1: decays close to 1 compound over thousands of steps, so the error has to vanish at 0. */
INLINE vec vexp2_product(vec a, vec b) {
    const __m256 table = _mm256_castsi256_ps(_mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3,
                                                               0x3f75672a, 0x3f7744fd, 0x3f7ac0c7));
    const vec shift = vset(1572864.0f); /* 1.5 * 2^20: the sum's last bit is worth 1/8 */
    vec sum = vfma(a, b, shift), r = _mm256_fmsub_ps(a, b, sum - shift);
    __m256i bits = _mm256_castps_si256(sum);
    __m256i mantissa = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, bits));
    vec power = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, _mm256_slli_epi32(bits, 20)));
    vec q = vfma(vfma(r, vset(0.0554962233f), vset(0.24025768f)), r, vset(0.693147242f));
    return vfma(r * q, power, power);
}

/* The exponent is added as an integer and must stay normal: results outside [2^-126, 2^127] saturate there. Operands of
 * min and max are ordered so that a NaN passes through. */
INLINE vec vexp2(vec x) {
    return vexp2_product(_mm256_min_ps(vset(127.0f), _mm256_max_ps(vset(-126.0f), x)), vset(1.0f));
}

/* The same with four products in place of six, and they are what a scan waits for. 2^r = c ((s^2 + d) s + e), s = r + b:
 * the cubic without its square term. b should be 1/log(2) = 1.443, but 1.5 is a multiple of 1/8, so that the subtraction
 * that gave f gives f - b; c is in the table. Fitted with b = 1.5 for the least relative error (1.5e-7) and exactly 1
 * at 0. Off by at most 3e-7 beside 1, for s, of a fixed magnitude, loses something too; vexp2_product by 7e-8. a b is
 * rounded, to 6e-8 of its size, and sums are taken from it: an AMD processor adds in units of their own, beside those
 * that multiply, and a sum does not write over an operand, which a fused product does. */
INLINE vec vdecay(vec a, vec b) {
    const __m256 table = _mm256_castsi256_ps(_mm256_setr_epi32(0x3d5ab14b, 0x3d5e7c65, 0x3d62090e, 0x3d5dcdf9, 0x3d5aa395,
                                                               0x3d58a290, 0x3d57e5d5, 0x3d588abd));
    const vec shift = vset(1572864.0f);
    vec x = a * b, sum = x + shift, s = x - (sum - vset(1572864.0f + 1.5f));
    __m256i bits = _mm256_castps_si256(sum);
    __m256i mantissa = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, bits));
    vec power = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, _mm256_slli_epi32(bits, 20)));
    return vfma(vfma(s, s, vset(6.23240566f)), s, vset(6.00588179f)) * power;
}

/* Whether |p[k]| < limit everywhere, lane by lane; a NaN is not. */
INLINE int vall_below(const float *p, int64_t count, vec limit) {
    vec below = _mm256_cmp_ps(limit, limit, _CMP_EQ_OQ);
    for (int64_t k = 0; k < count; k += LANES)
        below = _mm256_and_ps(below, _mm256_cmp_ps(vabs(vload(p + k)), limit, _CMP_LT_OQ));
    return _mm256_movemask_ps(below) == 0xff;
}

INLINE vec vreciprocal(vec x) { return vset(1.0f) / x; }

INLINE void vadd_sums8(float *to, const vec v[8]) {
    vec pair[4], quad[2];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
    vec sums = _mm256_permute2f128_ps(quad[0], quad[1], 0x20) + _mm256_permute2f128_ps(quad[0], quad[1], 0x31);
    _mm256_storeu_ps(to, _mm256_loadu_ps(to) + sums);
}

INLINE void vprefetch(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }

#endif
