/* Vectors of 16 lanes: AVX-512 F, BW, DQ, VL; and with ZEN4 defined also BF16, for AMD's processors, which add in units
 * of their own beside those that multiply. */
#ifndef ZIGMA_SIMD_AVX512_H
#define ZIGMA_SIMD_AVX512_H

#include <immintrin.h>

#if defined(ZEN4)
#define SIMD_NAME "zen4"
#else
#define SIMD_NAME "avx512"
#endif
#define LANES 16
#define FORWARD_DECAYS_FIRST 0
#define BACKWARD_DECAYS_FIRST 0
typedef __m512 vec;

INLINE vec vset(float x) { return _mm512_set1_ps(x); }
INLINE vec vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vmin(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec vabs(vec x) { return _mm512_abs_ps(x); }
/* The operand of the smaller magnitude, with the sign of x or none */
INLINE vec vclamp(vec x, float limit) { return _mm512_range_ps(x, vset(limit), 0x2); }
INLINE vec vclamp_abs(vec x, float limit) { return _mm512_range_ps(x, vset(limit), 0xa); }
/* x >= 0 ? a : b, lane by lane */
INLINE vec vselect_nonnegative(vec x, vec a, vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ), b, a);
}

INLINE vec vload_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}

#if defined(ZEN4)
INLINE void vstore_bf16(uint16_t *p, vec x) { /* rounds so by itself; denormals to zero, as the kernels do anyhow */
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
#else
INLINE void vstore_bf16(uint16_t *p, vec x) { /* round to nearest even; a NaN stays a NaN */
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
#endif

/* 2^(i/32), i = 0 ... 31, in two registers: times low up to i = 14, times high from there. */
#define POWERS(low, high)                                                                                             \
    {                                                                                                                 \
        _mm512_setr_ps(low * 1.0, low * 1.0218971486541166, low * 1.0442737824274138,                                 \
                       low * 1.0671404006768237, low * 1.0905077326652577, low * 1.1143867425958924,                  \
                       low * 1.1387886347566916, low * 1.1637248587775775, low * 1.189207115002721,                   \
                       low * 1.215247359980469, low * 1.241857812073484, low * 1.2690509571917332,                    \
                       low * 1.2968395546510096, low * 1.3252366431597413, low * 1.3542555469368927,                  \
                       high * 1.383909881963832),                                                                     \
        _mm512_setr_ps(high * 1.4142135623730951, high * 1.4451808069770467, high * 1.4768261459394993,               \
                       high * 1.5091644275934228, high * 1.5422108254079407, high * 1.5759808451078865,               \
                       high * 1.6104903319492543, high * 1.6457554781539649, high * 1.681792830507429,                \
                       high * 1.7186192981224779, high * 1.7562521603732995, high * 1.7947090750031072,               \
                       high * 1.8340080864093424, high * 1.8741676341103, high * 1.9152065613971474,                  \
                       high * 1.9571441241754002),                                                                    \
    }

/* 2^(a b): x = a b = f + r with f a multiple of 1/32, |r| <= 1/64; the fraction of f picks 2^(i/32) from a table in two
 * registers, 2^r = 1 + r (c1 + c2 r) (relative error 5.3e-8), and scalef puts in the integer part, saturating to 0 and
 * infinity by itself. Fewer multiplications than a polynomial alone, and they are what the kernels wait for. The
 * product is never rounded, so that r of one beyond all bounds is no small number: for those take vexp2(a * b). */
INLINE vec vexp2_product(vec a, vec b) {
    const vec table[2] = POWERS(1.0, 1.0);
    const vec shift = vset(393216.0f); /* 1.5 * 2^18: the sum's last bit is worth 1/32 */
    vec sum = vfma(a, b, shift), f = sum - shift, r = _mm512_fmsub_ps(a, b, f);
    vec power = _mm512_permutex2var_ps(table[0], _mm512_castps_si512(sum), table[1]);
    vec p = vfma(r, vset(0.240226508f), vset(0.69315733f)) * r;
    return _mm512_scalef_ps(vfma(p, power, power), f);
}

INLINE vec vexp2(vec x) { return vexp2_product(x, vset(1.0f)); }

/* The same for factors of a state: 2^r = c ((r + b)^2 + d), b = 1/log(2), with c in the table. Off by what r + b, of a
 * fixed magnitude, loses: at most 2.2e-7 beside 1, where vexp2_product is off by 1e-7. The exponentials are what a scan
 * waits for. */
#if defined(ZEN4)
/* Three operations for the units that multiply in place of five, and four for those that add, which have scalef as well.
 * a b is rounded, to 6e-8 of its size. */
INLINE vec vdecay(vec a, vec b) {
    const vec table[2] = POWERS(0.24022731f, 0.24022731f);
    const vec shift = vset(393216.0f); /* as above */
    vec x = a * b, sum = x + shift, f = sum - shift, root = (x + vset(1.44271171f)) - f;
    vec power = _mm512_permutex2var_ps(table[0], _mm512_castps_si512(sum), table[1]);
    return _mm512_scalef_ps(vfma(root, root, vset(2.08130693f)) * power, f);
}
#else
/* One instruction less. f is f - b from the start: b is no multiple of 1/32, so no constant gives f - b by a
 * subtraction; a factor just below 1 of the whole sum does, exact at f = 0. scalef takes the integer part of f - b, which
 * is one or two less than that of f, as the table knows. */
INLINE vec vdecay(vec a, vec b) {
    const vec table[2] = POWERS(4 * 0.24022731f, 2 * 0.24022731f);
    const vec shift = vset(305863.0f); /* between 2^18 and 2^19, as above; b = 305863 / 2^23 + 1.40625 */
    vec sum = vfma(a, b, shift), f = _mm512_fmsub_ps(sum, vset(0x1.fffffcp-1f), vset(305863.0f + 1.40625f));
    vec power = _mm512_permutex2var_ps(table[0], _mm512_castps_si512(sum), table[1]);
    vec root = _mm512_fmsub_ps(a, b, f);
    return _mm512_scalef_ps(vfma(root, root, vset(2.08130693f)) * power, f);
}
#endif

INLINE int vall_below(const float *p, int64_t count, vec limit) {
    __mmask16 below = 0xffff;
    for (int64_t k = 0; k < count; k += LANES)
        below &= _mm512_cmp_ps_mask(vabs(vload(p + k)), limit, _CMP_LT_OQ);
    return below == 0xffff;
}

/* 1 / x for x in [1, 2^125] */
INLINE vec vreciprocal(vec x) {
    vec r = _mm512_rcp14_ps(x);
    return vfma(_mm512_fnmadd_ps(x, r, vset(1.0f)), r, r);
}

/* Adds the sum of the lanes of v[i] to to[i]: each step adds pairs of lanes and merges two vectors. */
INLINE void vadd_sums8(float *to, const vec v[8]) {
    vec pair[4], quad[2];
    for (int i = 0; i < 4; i++)
        pair[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    vec eight = _mm512_shuffle_f32x4(quad[0], quad[1], 0x88) + _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd);
    eight = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15), eight);
    _mm256_storeu_ps(to, _mm256_loadu_ps(to) + (_mm512_castps512_ps256(eight) + _mm512_extractf32x8_ps(eight, 1)));
}

INLINE void vprefetch(const void *p) { _mm_prefetch(p, _MM_HINT_T1); }

#endif
