// Products of weights as they are, float or bfloat16, with a few rows: reading the weights is all that counts.
#pragma once

#include "scratch.h"

namespace {

constexpr int DENSE_ROWS = 4;  // weight rows at a time

inline float tail(const void* w, int64_t w_type, int64_t w_at, const float* x, int64_t from, int64_t width) {
    float total = 0;
    for (int64_t c = from; c < width; c++) total += one(w, w_type, w_at + c) * x[c];
    return total;
}

template <bool HALF, int X>
void dense_rows(const void* w, int64_t w_at, int64_t width, const float* const* x, int rows, float out[][X]) {
    F acc[DENSE_ROWS][X];
    for (int r = 0; r < DENSE_ROWS; r++)
        for (int i = 0; i < X; i++) acc[r][i] = zero();
    const int64_t whole = width / 16 * 16;
    int64_t at[DENSE_ROWS];
    for (int r = 0; r < DENSE_ROWS; r++) at[r] = w_at + (r < rows ? r : rows - 1) * width;
    for (int64_t c = 0; c < whole; c += 16)
        for (int r = 0; r < DENSE_ROWS; r++) {
            const F a = HALF ? load_bf16((const uint16_t*)w + at[r] + c) : load((const float*)w + at[r] + c);
            for (int i = 0; i < X; i++) acc[r][i] = fma(a, load(x[i] + c), acc[r][i]);
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < X; i++)
            out[r][i] = sum(acc[r][i]) + tail(w, HALF ? BFLOAT16 : FLOAT32, at[r], x[i], whole, width);
}

template <bool HALF>
void dense_block(const void* w, int64_t w_at, int64_t width, const float* x, int64_t x_stride, int64_t n, int rows,
                 float* y, int64_t y_stride) {
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        float out[DENSE_ROWS][2];
        const float* in[2] = {x + i * x_stride, x + (i + 1) * x_stride};
        dense_rows<HALF, 2>(w, w_at, width, in, rows, out);
        for (int r = 0; r < rows; r++) y[i * y_stride + r] = out[r][0], y[(i + 1) * y_stride + r] = out[r][1];
    }
    if (i == n) return;
    float out[DENSE_ROWS][1];
    const float* in[1] = {x + i * x_stride};
    dense_rows<HALF, 1>(w, w_at, width, in, rows, out);
    for (int r = 0; r < rows; r++) y[i * y_stride + r] = out[r][0];
}

// y[i, m, :] = W[m] x[i, m, :]; W[m] are `rows` rows of `width`, matrix_stride values apart.
void dense(const void* w, int64_t w_type, const void* x, int64_t x_type, int64_t x_stride, int64_t n, int64_t rows,
           int64_t width, int64_t matrices, int64_t matrix_stride, float* y, int threads) {
    static thread_local Scratch wide_kept;
    const int64_t padded = up_to(width, 16);
    float* wide = wide_kept.take<float>(n * matrices * padded);
    for (int64_t i = 0; i < n; i++)
        for (int64_t m = 0; m < matrices; m++)
            load_group(x, x_type, i * x_stride + m * width, width, padded, wide + (i * matrices + m) * padded);
    const int64_t pieces = (rows + DENSE_ROWS - 1) / DENSE_ROWS;
    if (rows * width * matrices * n < SMALL) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t task = 0; task < pieces * matrices; task++) {
        const int64_t m = task / pieces, o = task % pieces * DENSE_ROWS;
        const int some = (int)least(DENSE_ROWS, rows - o);
        const float* in = wide + m * padded;
        float* to = y + m * rows + o;
        if (w_type == BFLOAT16)
            dense_block<true>(w, m * matrix_stride + o * width, width, in, matrices * padded, n, some, to, matrices * rows);
        else
            dense_block<false>(w, m * matrix_stride + o * width, width, in, matrices * padded, n, some, to, matrices * rows);
    }
}

}  // namespace
