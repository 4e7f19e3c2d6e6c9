// The inner product of everything quantised: T activation rows against one block of 16 weight rows.
#pragma once

#include "kernels.h"
#include "simd_portable.h"

namespace {

constexpr int abreast(int) { return 1; }

template <int KIND, int T, int S>
void tile(const uint8_t* w, int64_t, int64_t scales_at, int64_t mins_at, const uint8_t* x, int groups, int group,
          float* out) {
    static_assert(S == 1, "one block at a time");
    const auto *scales = (const uint16_t*)(w + scales_at), *mins = (const uint16_t*)(w + mins_at);
    F total[T] = {};
    for (int g = 0; g < groups; g++) {
        const float* scale = (const float*)x;
        const int32_t* sums = (const int32_t*)(x + 4 * T);
        const float* scaled_sums = (const float*)(x + 8 * T);
        const int8_t* bytes = (const int8_t*)(x + 12 * T);
        x += (12 + group) * T;
        int32_t acc[T][16];
        for (int t = 0; t < T; t++)
            for (int j = 0; j < 16; j++) acc[t][j] = KIND == INT4 ? 8 * sums[t] : 0;
        for (int v = 0; v < group / (KIND == INT8 ? 4 : 8); v++, w += 64) {
            for (int t = 0; t < T; t++) {
                const int8_t *first = bytes + 4 * t, *second = bytes + 4 * (T + t);
                for (int j = 0; j < 16; j++)
                    for (int b = 0; b < 4; b++) {
                        const int stored = w[4 * j + b];
                        if (KIND == INT8)
                            acc[t][j] += (stored - 128) * first[b];
                        else
                            acc[t][j] += (stored & 15) * first[b] + (stored >> 4) * second[b];
                    }
            }
            bytes += (KIND == INT8 ? 4 : 8) * T;
        }
        const F s = load_half(scales + 16 * g);
        for (int t = 0; t < T; t++) {
            const F product = each([&](int j) { return (float)acc[t][j]; });
            total[t] = fma(product, mul(s, set1(scale[t])), total[t]);
            if (KIND == INT4_MIN) total[t] = fma(load_half(mins + 16 * g), set1(scaled_sums[t]), total[t]);
        }
    }
    for (int t = 0; t < T; t++) store(out + 16 * t, total[t]);
}

}  // namespace
