/* One vector of float lanes and the few operations the kernels need, for AVX-512 (16 lanes) and AVX2 + FMA
 * (8 lanes). A variant is chosen by the flags of the translation unit; the kernels are written once. */
#ifndef ZIGMA_SIMD_H
#define ZIGMA_SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "scan.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define LANES 16
typedef __m512 vec;

INLINE vec vset(float x) { return _mm512_set1_ps(x); }
INLINE vec vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vabs(vec x) { return _mm512_abs_ps(x); }
/* x >= 0 ? a : b, lane by lane */
INLINE vec vselect_nonnegative(vec x, vec a, vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), b, a);
}

INLINE vec vload_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

INLINE void vstore_bf16(uint16_t *p, vec x) { /* round to nearest even; a NaN stays a NaN */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

/* 2^x: x = f + r with f a multiple of 1/32 and |r| <= 1/64; the fraction of f picks 2^(i/32) from a table in two
 * registers, 2^r = 1 + r (c1 + c2 r) (relative error 5.3e-8), and scalef puts in the integer part, saturating to 0 and
 * infinity by itself. Fewer multiplications than the polynomial below, and they are what the kernels wait for. */
INLINE vec vexp2(vec x) {
    const vec table[2] = {
        _mm512_setr_ps(1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
                       1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f,
                       1.38390994f),
        _mm512_setr_ps(1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f,
                       1.64575553f, 1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f,
                       1.91520655f, 1.95714414f),
    };
    const vec shift = vset(393216.0f); /* 1.5 * 2^18: the sum's last bit is worth 1/32 */
    vec sum = x + shift, f = sum - shift, r = x - f;
    vec power = _mm512_permutex2var_ps(table[0], _mm512_castps_si512(sum), table[1]);
    vec p = vfma(r, vset(0.240226508f), vset(0.69315733f)) * r;
    return _mm512_scalef_ps(vfma(p, power, power), f);
}

/* 1 / x for x in [1, 2] */
INLINE vec vreciprocal(vec x) {
    vec r = _mm512_rcp14_ps(x);
    return vfma(_mm512_fnmadd_ps(x, r, vset(1.0f)), r, r);
}

/* Sums of the lanes of v[0] ... v[7], in this order: each step adds pairs of lanes and merges two vectors. */
INLINE __m256 vsum8(const vec v[8]) {
    vec pair[4], quad[2];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    vec eight = _mm512_shuffle_f32x4(quad[0], quad[1], 0x88) + _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd);
    eight = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15), eight);
    return _mm512_castps512_ps256(eight) + _mm512_extractf32x8_ps(eight, 1);
}

INLINE void vprefetch(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }

#elif defined(__AVX2__) && defined(__FMA__)

#define LANES 8
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

/* 2^x: x = i + r with |r| <= 1/2, and 2^r = 1 + r q(r), q of degree 4, fitted for the least relative error
 * (9.2e-8). The constant term is exactly 1: decays close to 1 compound over thousands of steps, so the error has to
 * vanish at 0. The exponent is added as an integer and must stay normal: results outside [2^-126, 2^127] saturate
 * there. Operands of min and max are ordered so that a NaN passes through. */
INLINE vec vexp2(vec x) {
    x = _mm256_min_ps(vset(127.0f), _mm256_max_ps(vset(-126.0f), x));
    vec i = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - i;
    vec q = vfma(r, vset(1.3264726863e-3f), vset(9.67151266306e-3f));
    q = vfma(q, r, vset(5.55073374436e-2f));
    q = vfma(q, r, vset(2.40222420849e-1f));
    q = vfma(q, r, vset(6.93146977598e-1f));
    q = vfma(q, r, vset(1.0f));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(i), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(q), exponent));
}

INLINE vec vreciprocal(vec x) { return vset(1.0f) / x; }

INLINE __m256 vsum8(const vec v[8]) {
    vec pair[4], quad[2];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
        __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
    return _mm256_permute2f128_ps(quad[0], quad[1], 0x20) + _mm256_permute2f128_ps(quad[0], quad[1], 0x31);
}

INLINE void vprefetch(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }

#else
#error "compile this file for AVX-512 (F, BW, DQ, VL) or for AVX2 and FMA"
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

/* exp(-|x|), from which softplus and the sigmoid are computed without overflow on either side */
INLINE vec vexp_minus_abs(vec x) { return vexp2(vabs(x) * vset(-LOG2E)); }
INLINE vec vsoftplus(vec x, vec exp_minus_abs) { return vmax(x, vset(0.0f)) + vlog1p(exp_minus_abs); }
INLINE vec vsigmoid(vec x, vec exp_minus_abs) {
    return vselect_nonnegative(x, vset(1.0f), exp_minus_abs) * vreciprocal(exp_minus_abs + vset(1.0f));
}

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
