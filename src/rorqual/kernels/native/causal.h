// Causal attention of whole rows in float32, and its gradient: blocks of queries against blocks of keys, products of
// blocks at the speed of matrix multiplication, scores never whole in memory (FlashAttention, arXiv 2205.14135).
//
// A query sees the keys before and at its own place, of these the first `shared` ones and those from `start` on: whole rows,
// documents packed into one, and several continuations of one beginning. Widths are multiples of 16.
#pragma once

#include "attention.h"

#include <cmath>
#include <type_traits>

namespace {

constexpr int BLOCK = 48;  // queries, and keys, of a block

// c [m, n] (+)= sum over r < depth of a[m * row + r * step] * b[r * b_row + n], for M rows and 16 N columns.
template <int M, int N>
inline void corner(const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, int64_t depth, float* c,
                   int64_t c_row, bool adds) {
    F total[M][N];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = adds ? load(c + m * c_row + 16 * n) : zero();
    for (int64_t r = 0; r < depth; r++, a += step, b += b_row) {
        F columns[N];
        for (int n = 0; n < N; n++) columns[n] = load(b + 16 * n);
        for (int m = 0; m < M; m++) {
            const F x = set1(a[m * row]);
            for (int n = 0; n < N; n++) total[m][n] = fma(x, columns[n], total[m][n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(c + m * c_row + 16 * n, total[m][n]);
}

// The same for any rows and a multiple of 16 columns.
inline void multiply(int64_t rows, int64_t columns, const float* a, int64_t row, int64_t step, const float* b,
                     int64_t b_row, int64_t depth, float* c, int64_t c_row, bool adds) {
    constexpr int M = SUMS / 2;
    int64_t m = 0;
    for (int64_t taken; m < rows; m += taken) {
        taken = rows - m >= M ? M : rows - m >= 4 && M > 4 ? 4 : 1;
        for (int64_t n = 0; n < columns;) {
            const bool two = columns - n >= 32;
            auto run = [&](auto some) {
                if (two)
                    corner<some, 2>(a + m * row, row, step, b + n, b_row, depth, c + m * c_row + n, c_row, adds);
                else
                    corner<some, 1>(a + m * row, row, step, b + n, b_row, depth, c + m * c_row + n, c_row, adds);
            };
            if (taken == M)
                run(std::integral_constant<int, M>());
            else if (taken == 4)
                run(std::integral_constant<int, 4>());
            else
                run(std::integral_constant<int, 1>());
            n += two ? 32 : 16;
        }
    }
}

// [keys, width] → for each block of keys [width][BLOCK], zeros behind the last key.
inline void transpose(const float* from, int64_t token, int64_t keys, int64_t padded, int64_t width, float* to) {
    for (int64_t k = 0; k < padded; k += 16)
        for (int64_t c = 0; c < width; c++) {
            float* row = to + (k / BLOCK * width + c) * BLOCK + k % BLOCK;
            for (int64_t j = 0; j < 16; j++) row[j] = k + j < keys ? from[(k + j) * token + c] : 0.0f;
        }
}

inline const float* at(const Heads& x, int64_t batch, int64_t head, int64_t token) {
    return (const float*)x.data + batch * x.batch + head * x.head + token * x.token;
}

// Which keys the queries [first, end) see: up to their own place, [0, shared) and [start, own place].
struct Sight {
    const CausalCall& call;
    int64_t batch, offset;
    Sight(const CausalCall& c, int64_t batch) : call(c), batch(batch), offset(c.keys - c.queries) {}
    int64_t shared(int64_t i) const { return call.shared ? call.shared[batch * call.queries + i] : 0; }
    int64_t start(int64_t i) const { return call.start ? call.start[batch * call.queries + i] : 0; }
    bool any(int64_t first, int64_t end, int64_t key) const {  // of the keys [key, key + BLOCK)
        if (key > offset + end - 1) return false;
        if (!call.start) return true;
        for (int64_t i = first; i < end; i++)
            if (key <= offset + i && (key < shared(i) || key + BLOCK > start(i))) return true;
        return false;
    }
    // Scores [BLOCK] of query i and the keys from `key` on that it does not see become -infinity.
    void bar(int64_t i, int64_t key, float* scores) const {
        const int64_t own = offset + i, from = least(start(i), own), to = shared(i);
        if (key + BLOCK - 1 > own)
            for (int64_t j = most(0, own + 1 - key); j < BLOCK; j++) scores[j] = -INFINITY;
        if (key < from && key + BLOCK > to)
            for (int64_t j = most(0, to - key); j < least(BLOCK, from - key); j++) scores[j] = -INFINITY;
    }
};

inline int64_t padded_keys(const CausalCall& c) { return up_to(c.keys, BLOCK); }

// scores [queries][BLOCK] of a block of queries and one of keys.
inline void block_scores(const CausalCall& c, const Sight& sight, const float* q, int64_t first, int64_t count,
                         const float* across, int64_t key, float* scores) {
    multiply(count, BLOCK, q, c.q.token, 1, across + key * c.width, BLOCK, c.width, scores, BLOCK, false);
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < BLOCK; j += 16)
            store(scores + i * BLOCK + j, mul(load(scores + i * BLOCK + j), set1(c.scale)));
        sight.bar(first + i, key, scores + i * BLOCK);
    }
}

// out [B, T, H, value_width], sums [B, H, T]: each query's logarithm of the sum of exponentials, for the gradient.
void causal(const CausalCall& c, float* out, float* sums, int threads) {
    static thread_local Scratch across_kept;
    const int64_t groups = c.heads / c.kv_heads, padded = padded_keys(c), pairs = c.batch * c.kv_heads;
    const int64_t blocks = (c.queries + BLOCK - 1) / BLOCK;
    const int64_t together = most(1, least(pairs, (1 << 23) / (c.width * padded)));  // key heads, in 32 MB
    float* across = across_kept.take<float>(together * c.width * padded);
    if (c.batch * c.heads * c.queries * c.keys < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch mine_kept;
        float *scores = mine_kept.take<float>(BLOCK * (BLOCK + c.value_width + 2)), *found = scores + BLOCK * BLOCK;
        float *top = found + BLOCK * c.value_width, *sum_of = top + BLOCK;
        for (int64_t from = 0; from < pairs; from += together) {
            const int64_t some = least(together, pairs - from), rows = some * groups;
#pragma omp for schedule(dynamic, 1)
            for (int64_t p = 0; p < some; p++)
                transpose(at(c.k, (from + p) / c.kv_heads, (from + p) % c.kv_heads, 0), c.k.token, c.keys, padded, c.width,
                          across + p * c.width * padded);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < rows * blocks; task++) {
                // the last blocks see most keys: they come first, so that threads end together
                const int64_t block = blocks - 1 - task / rows, pair = task % rows / groups, first = block * BLOCK;
                const int64_t b = (from + pair) / c.kv_heads, h = (from + pair) % c.kv_heads * groups + task % groups;
                const int64_t count = least(BLOCK, c.queries - first);
                const Sight sight(c, b);
                const float* q = at(c.q, b, h, first);
                for (int64_t i = 0; i < BLOCK; i++) top[i] = LOWEST, sum_of[i] = 0;
                std::memset(found, 0, BLOCK * c.value_width * sizeof(float));
                for (int64_t key = 0; key < c.keys; key += BLOCK) {
                    if (!sight.any(first, first + count, key)) continue;
                    block_scores(c, sight, q, first, count, across + pair * c.width * padded, key, scores);
                    for (int64_t i = 0; i < count; i++) {
                        float* s = scores + i * BLOCK;
                        F peaks = set1(top[i]);
                        for (int64_t j = 0; j < BLOCK; j += 16) peaks = max(peaks, load(s + j));
                        const float peak = highest(peaks);
                        F total = zero();
                        for (int64_t j = 0; j < BLOCK; j += 16) {
                            const F e = exp(sub(load(s + j), set1(peak)));
                            store(s + j, e);
                            total = add(total, e);
                        }
                        const float shrink = peak == top[i] ? 1.0f : std::exp(top[i] - peak);
                        sum_of[i] = sum_of[i] * shrink + sum(total);
                        top[i] = peak;
                        rescale(found + i * c.value_width, shrink, c.value_width);
                    }
                    multiply(count, c.value_width, scores, BLOCK, 1, at(c.v, b, h / groups, key), c.v.token,
                             least(BLOCK, c.keys - key), found, c.value_width, true);
                }
                for (int64_t i = 0; i < count; i++) {
                    float* to = out + ((b * c.queries + first + i) * c.heads + h) * c.value_width;
                    const F by = set1(sum_of[i] == 0 ? 0.0f : 1.0f / sum_of[i]);
                    for (int64_t x = 0; x < c.value_width; x += 16) store(to + x, mul(load(found + i * c.value_width + x), by));
                    sums[(b * c.heads + h) * c.queries + first + i] = sum_of[i] == 0 ? INFINITY : top[i] + std::log(sum_of[i]);
                }
            }
        }
    }
}

// The gradient by queries [B, T, H, width], keys [B, S, K, width] and values [B, S, K, value_width], from that of the
// output and what `causal` gave.
void causal_back(const CausalCall& c, const Heads& grad, const float* out, const float* sums, float* dq, float* dk,
                 float* dv, int threads) {
    const int64_t groups = c.heads / c.kv_heads, padded = padded_keys(c), pairs = c.batch * c.kv_heads;
    const int64_t both = c.width + c.value_width;
    if (c.batch * c.heads * c.queries * c.keys < SMALL) threads = 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t pair = 0; pair < pairs; pair++) {
        static thread_local Scratch mine_kept;
        float* across = mine_kept.take<float>(2 * padded * both + BLOCK * (2 * BLOCK + 1 + c.width));
        float *values_across = across + padded * c.width, *keys_grad = values_across + padded * c.value_width;
        float *values_grad = keys_grad + padded * c.width, *weights = values_grad + padded * c.value_width;
        float *slopes = weights + BLOCK * BLOCK, *dots = slopes + BLOCK * BLOCK, *found = dots + BLOCK;
        const int64_t b = pair / c.kv_heads, kv = pair % c.kv_heads;
        const Sight sight(c, b);
        transpose(at(c.k, b, kv, 0), c.k.token, c.keys, padded, c.width, across);
        transpose(at(c.v, b, kv, 0), c.v.token, c.keys, padded, c.value_width, values_across);
        std::memset(keys_grad, 0, padded * both * sizeof(float));
        for (int64_t h = kv * groups; h < (kv + 1) * groups; h++)
            for (int64_t first = 0; first < c.queries; first += BLOCK) {
                const int64_t count = least(BLOCK, c.queries - first);
                const float *q = at(c.q, b, h, first), *g = at(grad, b, h, first);
                const float* sum_of = sums + (b * c.heads + h) * c.queries + first;
                for (int64_t i = 0; i < count; i++)
                    dots[i] = dot(g + i * grad.token, out + ((b * c.queries + first + i) * c.heads + h) * c.value_width,
                                  c.value_width);
                std::memset(found, 0, BLOCK * c.width * sizeof(float));
                for (int64_t key = 0; key < c.keys; key += BLOCK) {
                    if (!sight.any(first, first + count, key)) continue;
                    const int64_t seen = least(BLOCK, c.keys - key);
                    block_scores(c, sight, q, first, count, across, key, weights);
                    multiply(count, BLOCK, g, grad.token, 1, values_across + key * c.value_width, BLOCK, c.value_width, slopes, BLOCK, false);
                    for (int64_t i = 0; i < count; i++)
                        for (int64_t j = i * BLOCK; j < (i + 1) * BLOCK; j += 16) {
                            const F p = exp(sub(load(weights + j), set1(sum_of[i])));
                            store(weights + j, p);
                            store(slopes + j, mul(mul(p, sub(load(slopes + j), set1(dots[i]))), set1(c.scale)));
                        }
                    multiply(seen, c.value_width, weights, 1, BLOCK, g, grad.token, count,
                             values_grad + key * c.value_width, c.value_width, true);
                    multiply(seen, c.width, slopes, 1, BLOCK, q, c.q.token, count, keys_grad + key * c.width, c.width, true);
                    multiply(count, c.width, slopes, BLOCK, 1, at(c.k, b, kv, key), c.k.token, seen, found, c.width, true);
                }
                for (int64_t i = 0; i < count; i++)
                    std::memcpy(dq + ((b * c.queries + first + i) * c.heads + h) * c.width, found + i * c.width,
                                c.width * sizeof(float));
            }
        for (int64_t k = 0; k < c.keys; k++) {
            std::memcpy(dk + ((b * c.keys + k) * c.kv_heads + kv) * c.width, keys_grad + k * c.width,
                        c.width * sizeof(float));
            std::memcpy(dv + ((b * c.keys + k) * c.kv_heads + kv) * c.value_width, values_grad + k * c.value_width,
                        c.value_width * sizeof(float));
        }
    }
}

}  // namespace
