// Softmax over a vocabulary, row by row: its peak, its sum and its values are three passes over a row that lies in the
// cache, where torch's operations pass six times over all rows.
#pragma once

#include <algorithm>

#include "attention.h"
#include "elementwise.h"

namespace {

// sums[i]: the logarithm of the sum of exponentials of row i of x [n, width]. out, where given: exp(x - sums[i]) * by[i].
void softmax(const void* x, int64_t type, const float* by, int64_t n, int64_t width, void* out, float* sums, int threads) {
    if (n * width < SMALL) threads = 1;
    const int64_t whole = width / 16 * 16;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i * width;
        alignas(64) float last[16];  // what fills no vector, and what adds nothing
        std::fill(last, last + 16, LOWEST);
        if (whole < width) load_group(x, type, at + whole, width - whole, width - whole, last);
        F tops = load(last);
        for (int64_t c = 0; c < whole; c += 16) tops = max(tops, load_any(x, type, at + c));
        const float top = highest(tops);
        double total = sum(exp(sub(load(last), set1(top))));
        for (int64_t c = 0; c < whole; c += 512) {
            F part = zero();  // short, as float32 loses what is added to much more
            for (int64_t j = c; j < least(whole, c + 512); j += 16)
                part = add(part, exp(sub(load_any(x, type, at + j), set1(top))));
            total += sum(part);
        }
        sums[i] = top + (float)std::log(total);
        if (!out) continue;
        for (int64_t c = 0; c < whole; c += 16)
            put(out, type, at + c, mul(exp(sub(load_any(x, type, at + c), set1(sums[i]))), set1(by[i])));
        store(last, mul(exp(sub(load(last), set1(sums[i]))), set1(by[i])));
        put_group(out, type, at + whole, width - whole, last);
    }
}

}  // namespace
