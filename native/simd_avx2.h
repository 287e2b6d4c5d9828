/* Vectors of 8 lanes: AVX2 and FMA. */
#ifndef ZIGMA_SIMD_AVX2_H
#define ZIGMA_SIMD_AVX2_H

#include <immintrin.h>

#define SIMD_NAME "avx2"
#define LANES 8
#define DECAYS_FIRST 1 /* 16 registers do not hold the states and what an exponential needs */
typedef __m256 vec;

INLINE vec vset(float x) { return _mm256_set1_ps(x); }
INLINE vec vload(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec vfma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec vabs(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
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

/* 2^r for |r| <= 1/2: 1 + r q(r), q of degree 4, fitted for the least relative error (9.2e-8). The constant term is
 * exactly 1: decays close to 1 compound over thousands of steps, so the error has to vanish at 0. */
INLINE vec vexp2_fraction(vec r) {
    vec q = vfma(r, vset(1.3264726863e-3f), vset(9.67151266306e-3f));
    q = vfma(q, r, vset(5.55073374436e-2f));
    q = vfma(q, r, vset(2.40222420849e-1f));
    q = vfma(q, r, vset(6.93146977598e-1f));
    return vfma(q, r, vset(1.0f));
}

/* x = i + r. The exponent is added as an integer and must stay normal: results outside [2^-126, 2^127] saturate there.
 * Operands of min and max are ordered so that a NaN passes through; its i has no low bits, whatever its payload. */
INLINE vec vexp2(vec x) {
    x = _mm256_min_ps(vset(127.0f), _mm256_max_ps(vset(-126.0f), x));
    __m256i i = _mm256_cvtps_epi32(x);
    vec power = vexp2_fraction(x - _mm256_cvtepi32_ps(i));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), _mm256_slli_epi32(i, 23)));
}

/* 2^(a b) where |a b| < 126 is known: no clamps, and the sum with 1.5 * 2^23 has i in its low bits. */
INLINE vec vexp2_product(vec a, vec b) {
    const vec shift = vset(12582912.0f);
    vec sum = vfma(a, b, shift);
    vec power = vexp2_fraction(_mm256_fmsub_ps(a, b, sum - shift));
    __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(sum), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
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
