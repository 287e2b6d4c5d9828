/* Vectors of 4 lanes in the compiler's vector extensions: what every x86-64 (SSE2) and every arm64 (NEON) has.
 * Intrinsics only where the extensions have no word for the instruction. */
#ifndef ZIGMA_SIMD_PORTABLE_H
#define ZIGMA_SIMD_PORTABLE_H

#if defined(__SSE2__)
#include <emmintrin.h>
#define SIMD_NAME "sse2"
#define DECAYS_FIRST 1 /* 16 registers do not hold the states and what an exponential needs */
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define SIMD_NAME "neon"
#define DECAYS_FIRST 0
#else
#error "compile this file for x86-64 or arm64"
#endif
#define FORWARD_DECAYS_FIRST DECAYS_FIRST
#define BACKWARD_DECAYS_FIRST DECAYS_FIRST

#define LANES 4
typedef float vec __attribute__((vector_size(16)));
typedef int32_t vbits __attribute__((vector_size(16))); /* also what comparisons give: all ones where true */
typedef uint32_t vwords __attribute__((vector_size(16)));
typedef uint16_t vhalves __attribute__((vector_size(8)));

INLINE vec vset(float x) { return (vec){x, x, x, x}; }
INLINE vec vload(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE void vstore(float *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec vselect(vbits mask, vec a, vec b) { return (vec)(((vbits)a & mask) | ((vbits)b & ~mask)); }
INLINE vec vabs(vec x) { return (vec)((vbits)x & 0x7fffffff); }
INLINE vec vselect_nonnegative(vec x, vec a, vec b) { return vselect(x >= vset(0.0f), a, b); }

#if defined(__SSE2__)
INLINE vec vfma(vec a, vec b, vec c) { return a * b + c; } /* rounded twice */
INLINE vec vmax(vec a, vec b) { return _mm_max_ps(a, b); }
INLINE vec vmin(vec a, vec b) { return _mm_min_ps(a, b); }
INLINE vec vunzip_even(vec a, vec b) { return _mm_shuffle_ps(a, b, 0x88); }
INLINE vec vunzip_odd(vec a, vec b) { return _mm_shuffle_ps(a, b, 0xdd); }
INLINE vbits vround(vec x) { return (vbits)_mm_cvtps_epi32(x); }
#else
INLINE vec vfma(vec a, vec b, vec c) { return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE vec vmax(vec a, vec b) { return vselect(a > b, a, b); } /* fmax gives NaN where either is one */
INLINE vec vmin(vec a, vec b) { return vselect(a < b, a, b); }
INLINE vec vunzip_even(vec a, vec b) { return (vec)vuzp1q_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vec vunzip_odd(vec a, vec b) { return (vec)vuzp2q_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vbits vround(vec x) { return (vbits)vcvtnq_s32_f32((float32x4_t)x); }
#endif

INLINE vec vclamp(vec x, float limit) { return vmin(vset(limit), vmax(vset(-limit), x)); }
INLINE vec vclamp_abs(vec x, float limit) { return vmin(vset(limit), vabs(x)); }

INLINE vec vload_bf16(const uint16_t *p) {
    vhalves halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, vwords) << 16);
}

INLINE void vstore_bf16(uint16_t *p, vec x) {
    vwords bits = (vwords)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    const vec nan = (vec)(vwords){0x7fc00000, 0x7fc00000, 0x7fc00000, 0x7fc00000};
    vhalves halves = __builtin_convertvector((vwords)vselect(x == x, (vec)rounded, nan) >> 16, vhalves);
    memcpy(p, &halves, sizeof halves);
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
    x = vmin(vset(127.0f), vmax(vset(-126.0f), x));
    vbits i = vround(x);
    return (vec)((vbits)vexp2_fraction(x - __builtin_convertvector(i, vec)) + (i << 23));
}

/* No clamps, and the sum with 1.5 * 2^23 has i in its low bits. */
INLINE vec vexp2_product(vec a, vec b) {
    const vec shift = vset(12582912.0f);
    vec x = a * b, sum = x + shift;
    return (vec)((vwords)vexp2_fraction(x - (sum - shift)) + ((vwords)sum << 23));
}

INLINE vec vdecay(vec a, vec b) { return vexp2_product(a, b); }

INLINE int vall_below(const float *p, int64_t count, vec limit) {
    vbits below = limit == limit;
    for (int64_t k = 0; k < count; k += LANES) below &= vabs(vload(p + k)) < limit;
    return (below[0] & below[1] & below[2] & below[3]) != 0;
}

INLINE vec vreciprocal(vec x) { return vset(1.0f) / x; }

INLINE vec vsum4(vec a, vec b, vec c, vec d) {
    vec ab = vunzip_even(a, b) + vunzip_odd(a, b), cd = vunzip_even(c, d) + vunzip_odd(c, d);
    return vunzip_even(ab, cd) + vunzip_odd(ab, cd);
}

INLINE void vadd_sums8(float *to, const vec v[8]) {
    vstore(to, vload(to) + vsum4(v[0], v[1], v[2], v[3]));
    vstore(to + 4, vload(to + 4) + vsum4(v[4], v[5], v[6], v[7]));
}

INLINE void vprefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

#endif
