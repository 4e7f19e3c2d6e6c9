// The inner product of everything quantised: T activation rows against one block of 16 weight rows, 8 at a time.
#pragma once

#include "kernels.h"
#include "simd_avx2.h"

namespace {

// Sums of four products of unsigned (at most 15) and signed bytes in each 32-bit lane.
inline __m256i dot_small(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}

// The same of signed bytes: the sign moves from w to x, as 2 * 255 * 127 would overflow 16 bits.
inline __m256i dot_signed(__m256i acc, __m256i w, __m256i x) {
    return dot_small(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

constexpr int abreast(int) { return 1; }

template <int KIND, int T, int S>
void tile(const uint8_t* w_block, int64_t, int64_t scales_at, int64_t mins_at, const uint8_t* x_tile, int groups,
          int group, float* out) {
    static_assert(S == 1, "one block at a time: 16 registers");
    const auto *scales = (const uint16_t*)(w_block + scales_at), *mins = (const uint16_t*)(w_block + mins_at);
    const __m256i low = _mm256_set1_epi8(15), offset = _mm256_set1_epi8((char)0x80);
    for (int half = 0; half < 2; half++) {
        const uint8_t *w = w_block + 32 * half, *x = x_tile;
        __m256 total[T];
        for (int t = 0; t < T; t++) total[t] = _mm256_setzero_ps();
        for (int g = 0; g < groups; g++) {
            const float* scale = (const float*)x;
            const int32_t* sums = (const int32_t*)(x + 4 * T);
            const float* scaled_sums = (const float*)(x + 8 * T);
            const int32_t* words = (const int32_t*)(x + 12 * T);
            x += (12 + group) * T;
            __m256i acc[T];
            for (int t = 0; t < T; t++)
                acc[t] = KIND == INT4 ? _mm256_slli_epi32(_mm256_set1_epi32(sums[t]), 3) : _mm256_setzero_si256();
            for (int v = 0; v < group / (KIND == INT8 ? 4 : 8); v++, w += 64) {
                const __m256i stored = _mm256_loadu_si256((const __m256i*)w);
                if (KIND == INT8) {
                    const __m256i a = _mm256_xor_si256(stored, offset);
                    for (int t = 0; t < T; t++) acc[t] = dot_signed(acc[t], a, _mm256_set1_epi32(words[t]));
                    words += T;
                } else {
                    const __m256i a = _mm256_and_si256(stored, low);
                    const __m256i b = _mm256_and_si256(_mm256_srli_epi16(stored, 4), low);
                    for (int t = 0; t < T; t++) acc[t] = dot_small(acc[t], a, _mm256_set1_epi32(words[t]));
                    for (int t = 0; t < T; t++) acc[t] = dot_small(acc[t], b, _mm256_set1_epi32(words[T + t]));
                    words += 2 * T;
                }
            }
            const __m256 s = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + 16 * g + 8 * half)));
            for (int t = 0; t < T; t++)
                total[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[t]), _mm256_mul_ps(s, _mm256_set1_ps(scale[t])),
                                           total[t]);
            if (KIND == INT4_MIN) {
                const __m256 m = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(mins + 16 * g + 8 * half)));
                for (int t = 0; t < T; t++) total[t] = _mm256_fmadd_ps(m, _mm256_set1_ps(scaled_sums[t]), total[t]);
            }
        }
        for (int t = 0; t < T; t++) _mm256_storeu_ps(out + 16 * t + 8 * half, total[t]);
    }
}

}  // namespace
