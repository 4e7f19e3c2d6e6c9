// Sixteen floats at a time with AVX-512, and products of bfloat16 pairs.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

using F = __m512;
constexpr bool BF16_PAIRS = true;  // there is an instruction for products of bfloat16 pairs
constexpr int ROWS = 12;           // activation rows of a tile: 12 integer and 12 float accumulators fit 32 registers
constexpr int KEYS = 8;            // keys of an attention tile
constexpr int HEADS = 8;           // heads of a value tile, two vectors wide
constexpr int SUMS = 16;            // vectors that stay in registers while a product is added up

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F swap_pairs(F a) { return _mm512_permute_ps(a, 0xb1); }  // 1, 0, 3, 2, …
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float highest(F a) { return _mm512_reduce_max_ps(a); }

inline F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

inline F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store_bf16(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

inline F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// Rounded to the nearest whole number, which must fit a signed byte.
inline void store_int8(int8_t* p, F x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// a + low(x) * low(y) + high(x) * high(y) in each lane, x and y pairs of bfloat16
inline F fma_pairs(F a, __m512i x, __m512i y) { return _mm512_dpbf16_ps(a, (__m512bh)x, (__m512bh)y); }

// 2^n * p(r) with x = n ln 2 + r; relative error under 3e-7. NaN stays NaN: it is the second operand of max.
inline F exp(F x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const F n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    F r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    F p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

}  // namespace
