// SwiGLU's elementwise part, forward and backward, each in one pass: as torch operations it is three and eight.
#pragma once

#include "elementwise.h"

namespace {

// Below -80 it is as good as nothing, and exp would leave the range. NaN stays: it is the second operand of max.
inline F sigmoid(F x) { return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), max(set1(-80.0f), x))))); }

// out = silu(gate) * up in n rows of `width`, a multiple of 16; `stride` values lie from one row of gate and up to the next.
void gated(const void* gate, const void* up, int64_t type, int64_t stride, int64_t n, int64_t width, void* out,
           int threads) {
    if (n * width < SMALL) threads = 1;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < width; c += 16) {
            const F g = load_any(gate, type, i * stride + c);
            put(out, type, i * width + c, mul(mul(g, sigmoid(g)), load_any(up, type, i * stride + c)));
        }
}

// Gradients by gate and up [n, width], `dstride` values from row to row, for the gradient grad * by[row] of the output
// (by: 1 where null); and, where asked for, the output times by, and each row's sum of grad * output.
void gated_back(const void* gate, const void* up, int64_t type, int64_t stride, const void* grad, const float* by,
                int64_t n, int64_t width, void* dgate, void* dup, int64_t dstride, void* scaled, float* dots,
                int threads) {
    if (n * width < SMALL) threads = 1;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const F b = set1(by ? by[i] : 1.0f);
        F total = zero();
        for (int64_t c = 0; c < width; c += 16) {
            const F g = load_any(gate, type, i * stride + c), u = load_any(up, type, i * stride + c);
            const F s = sigmoid(g), raw = load_any(grad, type, i * width + c), d = mul(raw, b), silu = mul(g, s);
            const F act = mul(silu, u);
            put(dup, type, i * dstride + c, mul(d, silu));
            put(dgate, type, i * dstride + c, mul(mul(d, u), mul(s, fma(g, sub(set1(1.0f), s), set1(1.0f)))));
            if (scaled) put(scaled, type, i * width + c, mul(act, b));
            total = fma(raw, act, total);
        }
        if (dots) dots[i] = sum(total);
    }
}

}  // namespace
