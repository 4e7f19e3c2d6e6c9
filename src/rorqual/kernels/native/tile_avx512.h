// The inner product of everything quantised: T activation rows against one block of 16 weight rows.
#pragma once

#include "kernels.h"
#include "simd_avx512.h"

namespace {

// Blocks computed side by side for T rows. One after the other, a core waits for memory and computes by turns (18 GB/s);
// four streams keep its prefetcher ahead of it (22 GB/s), and each fetches its successor's bytes, as the prefetcher starts
// anew with every block: 19 instead of 13 GB/s where blocks are short. The registers hold 16 sums.
constexpr int abreast(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// x: T rows interleaved as pack_tile leaves them. w: S blocks, `stride` bytes apart; out [S][T][16].
template <int KIND, int T, int S>
void tile(const uint8_t* w, int64_t stride, int64_t scales_at, int64_t mins_at, const uint8_t* x, int groups, int group,
          float* out) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *scales = w + scales_at, *mins = w + mins_at;
    __m512 total[S][T];
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++) total[s][t] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        const float* scale = (const float*)x;
        const int32_t* sums = (const int32_t*)(x + 4 * T);  // negated
        const float* scaled_sums = (const float*)(x + 8 * T);
        const int32_t* words = (const int32_t*)(x + 12 * T);
        x += (12 + group) * T;
        __m512i acc[S][T];
        for (int t = 0; t < T; t++) {
            const __m512i from = KIND == INT4_MIN ? _mm512_setzero_si512()
                                                  : _mm512_slli_epi32(_mm512_set1_epi32(sums[t]), KIND == INT8 ? 7 : 3);
            for (int s = 0; s < S; s++) acc[s][t] = from;
        }
        for (int part = 0; part < group; part += 32) {
            constexpr int VECTORS = KIND == INT8 ? 8 : 4;
            for (int s = S; s < 2 * S; s++)
                for (int v = 0; v < VECTORS; v++)
                    _mm_prefetch((const char*)w + s * stride + 64 * v, _MM_HINT_T1);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) {
                    const __m512i both = _mm512_loadu_si512(w + s * stride + 64 * v);
                    if (KIND == INT8) {
                        for (int t = 0; t < T; t++)
                            acc[s][t] = _mm512_dpbusd_epi32(acc[s][t], both, _mm512_set1_epi32(words[t]));
                        continue;
                    }
                    const __m512i a = _mm512_and_si512(both, low);
                    const __m512i b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                    for (int t = 0; t < T; t++)
                        acc[s][t] = _mm512_dpbusd_epi32(acc[s][t], a, _mm512_set1_epi32(words[t]));
                    for (int t = 0; t < T; t++)
                        acc[s][t] = _mm512_dpbusd_epi32(acc[s][t], b, _mm512_set1_epi32(words[T + t]));
                }
                words += KIND == INT8 ? T : 2 * T;
            }
            w += 64 * VECTORS;
        }
        for (int s = 0; s < S; s++) {
            if (g % 2 == 0) {
                _mm_prefetch((const char*)scales + (s + S) * stride + 32 * g, _MM_HINT_T1);
                if (KIND == INT4_MIN) _mm_prefetch((const char*)mins + (s + S) * stride + 32 * g, _MM_HINT_T1);
            }
            const __m512 by = load_half((const uint16_t*)(scales + s * stride) + 16 * g);
            for (int t = 0; t < T; t++)
                total[s][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[s][t]), _mm512_mul_ps(by, _mm512_set1_ps(scale[t])),
                                              total[s][t]);
            if (KIND == INT4_MIN) {
                const __m512 m = load_half((const uint16_t*)(mins + s * stride) + 16 * g);
                for (int t = 0; t < T; t++)
                    total[s][t] = _mm512_fmadd_ps(m, _mm512_set1_ps(scaled_sums[t]), total[s][t]);
            }
        }
    }
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++) _mm512_storeu_ps(out + 16 * (s * T + t), total[s][t]);
}

}  // namespace
