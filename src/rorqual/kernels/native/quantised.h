// Products of 4- and 8-bit weights with activations rounded to 8 bits, for one row or hundreds.
//
// A row of activations is rounded in the weights' own groups, each with its scale. All sums within a group are whole
// numbers and groups are added in order, so a row's result is the same whatever rows it is computed with.
#pragma once

#include <utility>

#include "scratch.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t SMALL = 1 << 16;  // weights x rows below which waking other threads costs more than it saves

inline int64_t groups_of(const Weights& w) { return (w.width + w.group - 1) / w.group; }
inline int64_t value_bytes(const Weights& w) {
    if (w.kind == FLOATS) return LANES * 4 * w.width;
    return LANES * groups_of(w) * w.group * (w.kind == INT8 ? 2 : 1) / 2;
}
inline int64_t scale_bytes(const Weights& w) { return w.kind == FLOATS ? 0 : LANES * 2 * groups_of(w); }
inline int64_t block_bytes(const Weights& w) { return value_bytes(w) + scale_bytes(w) * (w.kind == INT4_MIN ? 2 : 1); }
inline int64_t blocks_of(const Weights& w) { return (w.rows + LANES - 1) / LANES; }
inline int64_t row_bytes(const Weights& w) { return w.kind == FLOATS ? 4 * w.width : groups_of(w) * (12 + w.group); }

inline F load_any(const void* x, int64_t type, int64_t i) {
    return type == BFLOAT16 ? load_bf16((const uint16_t*)x + i) : load((const float*)x + i);
}

inline float one(const void* x, int64_t type, int64_t i) {
    if (type == FLOAT32) return ((const float*)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t*)x)[i] << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// A group of at most 128 values, zeros behind the last.
inline void load_group(const void* x, int64_t type, int64_t from, int64_t count, int64_t group, float* out) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(out + i, load_any(x, type, from + i));
    for (; i < count; i++) out[i] = one(x, type, from + i);
    for (; i < group; i++) out[i] = 0;
}

// One row as the tile of one row: for each group its scale, its negated sum, scale * sum, and its bytes; or as it is.
inline void quantise_row(const Weights& w, const void* x, int64_t type, int64_t from, uint8_t* out) {
    if (w.kind == FLOATS) return load_group(x, type, from, w.width, w.width, (float*)out);
    float wide[128];
    for (int64_t g = 0; g < groups_of(w); g++, out += 12 + w.group) {
        load_group(x, type, from + g * w.group, least(w.group, w.width - g * w.group), w.group, wide);
        F peaks = zero(), poison = zero();
        for (int i = 0; i < w.group; i += 16) {
            peaks = max(peaks, abs(load(wide + i)));
            poison = fma(load(wide + i), zero(), poison);  // NaN where a value is NaN or infinite, else 0
        }
        const float peak = highest(peaks), scale = peak / 127.0f + sum(poison);
        const F inverse = set1(peak > 0 ? 127.0f / peak : 0.0f);
        int8_t* bytes = (int8_t*)out + 12;
        int32_t total = 0;
        for (int i = 0; i < w.group; i += 16) store_int8(bytes + i, mul(load(wide + i), inverse));
        for (int i = 0; i < w.group; i++) total += bytes[i];
        const float scaled = scale * (float)total;
        total = -total;
        std::memcpy(out, &scale, 4);
        std::memcpy(out + 4, &total, 4);
        std::memcpy(out + 8, &scaled, 4);
    }
}

// Rows of one each, interleaved word by word into a tile of `count`.
inline void pack_tile(const Weights& w, const uint8_t* const* rows, int count, uint8_t* out) {
    const int64_t all = row_bytes(w) / 4;
    for (int t = 0; t < count; t++) {
        const uint32_t* from = (const uint32_t*)rows[t];
        uint32_t* to = (uint32_t*)out + t;
        for (int64_t i = 0; i < all; i++) to[i * count] = from[i];
    }
}

// Weights that are wide already: S blocks, `stride` bytes apart, against T rows interleaved → out [S][T][16].
template <int T, int S>
void tile_floats(const uint8_t* w, int64_t stride, int64_t, int64_t, const uint8_t* x, int width, int, float* out) {
    const float* in = (const float*)x;
    F total[S][T];
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++) total[s][t] = zero();
    for (int k = 0; k < width; k++, in += T)
        for (int s = 0; s < S; s++) {
            const F row = load((const float*)(w + s * stride) + LANES * k);
            for (int t = 0; t < T; t++) total[s][t] = fma(set1(in[t]), row, total[s][t]);
        }
    for (int s = 0; s < S; s++)
        for (int t = 0; t < T; t++) store(out + LANES * (s * T + t), total[s][t]);
}

using Tile = void (*)(const uint8_t*, int64_t, int64_t, int64_t, const uint8_t*, int, int, float*);

// The tile of a kind for `count` rows: one block, or as many as are computed side by side.
template <int KIND, int... T>
constexpr Tile choose(int count, bool wide, std::integer_sequence<int, T...>) {
    constexpr Tile narrow[] = {tile<KIND, T + 1, 1>...}, all[] = {tile<KIND, T + 1, abreast(T + 1)>...};
    return (wide ? all : narrow)[count - 1];
}

template <int... T>
constexpr Tile choose_floats(int count, bool wide, std::integer_sequence<int, T...>) {
    constexpr Tile narrow[] = {tile_floats<T + 1, 1>...}, all[] = {tile_floats<T + 1, abreast(T + 1)>...};
    return (wide ? all : narrow)[count - 1];
}

inline Tile tile_of(int64_t kind, int count, bool wide) {
    constexpr auto heights = std::make_integer_sequence<int, ROWS>();
    if (kind == FLOATS) return choose_floats(count, wide, heights);
    if (kind == INT4) return choose<INT4>(count, wide, heights);
    if (kind == INT4_MIN) return choose<INT4_MIN>(count, wide, heights);
    return choose<INT8>(count, wide, heights);
}

constexpr int MOST_SUMS = ROWS > 8 ? ROWS : 8;  // rows x blocks of one tile

// Blocks [first, end) of `w` against `count` rows packed as one tile; `put(block, out [count][16])` takes each.
template <typename Put>
inline void block_products(const Weights& w, int64_t first, int64_t end, const uint8_t* x, int count, Put put) {
    alignas(64) float out[MOST_SUMS * LANES];
    const int64_t stride = block_bytes(w), scales_at = value_bytes(w), mins_at = scales_at + scale_bytes(w);
    const int64_t wide = abreast(count);
    for (int64_t b = first; b < end;) {
        const int64_t blocks = end - b >= wide ? wide : 1;
        tile_of(w.kind, count, blocks > 1)(w.data + b * stride, stride, scales_at, mins_at, x, (int)groups_of(w),
                                           (int)w.group, out);
        for (int64_t i = 0; i < blocks; i++, b++) put(b, out + i * count * LANES);
    }
}

// Rows [first, first + count) of some order of rows, to be computed together.
struct Span {
    int64_t first;
    int count;
};

// `rows` rows in tiles of nearly equal height: 13 are 7 and 6, not 12 and 1.
inline int64_t cut(int64_t first, int64_t rows, Span* spans) {
    const int64_t pieces = (rows + ROWS - 1) / ROWS;
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t begin = rows * i / pieces, end = rows * (i + 1) / pieces;
        spans[i] = {first + begin, (int)(end - begin)};
    }
    return pieces;
}

inline void put(const float* block, float* to, int64_t outputs) {
    if (outputs >= LANES)
        store(to, load(block));
    else
        for (int64_t j = 0; j < outputs; j++) to[j] = block[j];
}

inline void add_to(float* to, float by, const float* block, int64_t outputs) {
    if (outputs >= LANES)
        store(to, fma(set1(by), load(block), load(to)));
    else
        for (int64_t j = 0; j < outputs; j++) to[j] += by * block[j];
}

// y[i, m, :] = W[m] x[i, m, :], or x[i, :] for one matrix. x_stride: values from one row i to the next; within it the
// inputs of matrix m follow those of m - 1.
struct Product {
    Weights w;
    int64_t matrices;
    const void* x;
    int64_t x_stride;
    float* y;
};

constexpr int SIDE_BY_SIDE = 3;  // queries, keys and values

// Products that wait for nothing but their inputs, as one piece of work: each by itself ends with a thread that waits.
void products(const Product* all, int count, int64_t x_type, int64_t n, int threads) {
    static thread_local Scratch rows_kept, tiles_kept, spans_kept;
    int64_t row[SIDE_BY_SIDE], base[SIDE_BY_SIDE + 1] = {}, chunk[SIDE_BY_SIDE], first[SIDE_BY_SIDE + 1] = {}, work = 0;
    const int64_t wide = abreast((int)least(n, ROWS));
    for (int p = 0; p < count; p++) {
        const Weights& w = all[p].w;
        const int64_t total = all[p].matrices * blocks_of(w);
        row[p] = row_bytes(w);
        base[p + 1] = base[p] + up_to(all[p].matrices * n * row[p], 64);
        chunk[p] = up_to(most(1, least(n > ROWS ? 4 : 16, total / (4 * threads))), wide);
        first[p + 1] = first[p] + (total + chunk[p] - 1) / chunk[p];
        work += all[p].matrices * w.rows * w.width * n;
    }
    uint8_t *rows = rows_kept.take<uint8_t>(base[count]), *tiles = tiles_kept.take<uint8_t>(base[count]);
    Span* spans = spans_kept.take<Span>(n);
    const int64_t pieces = cut(0, n, spans);
    if (work < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        for (int p = 0; p < count; p++) {
            const Product& a = all[p];
#pragma omp for nowait
            for (int64_t i = 0; i < a.matrices * n; i++)
                quantise_row(a.w, a.x, x_type, i % n * a.x_stride + i / n * a.w.width, rows + base[p] + i * row[p]);
        }
#pragma omp barrier
        if (n > 1) {
            for (int p = 0; p < count; p++) {
#pragma omp for nowait
                for (int64_t i = 0; i < all[p].matrices * pieces; i++) {
                    const Span s = spans[i % pieces];
                    const uint8_t* from[ROWS];
                    const int64_t at = i / pieces * n + s.first;
                    for (int t = 0; t < s.count; t++) from[t] = rows + base[p] + (at + t) * row[p];
                    pack_tile(all[p].w, from, s.count, tiles + base[p] + at * row[p]);
                }
            }
#pragma omp barrier
        }
        const uint8_t* packed = n > 1 ? tiles : rows;
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < first[count]; c++) {
            int p = 0;
            while (c >= first[p + 1]) p++;
            const Product& a = all[p];
            const int64_t blocks = blocks_of(a.w), begin = (c - first[p]) * chunk[p];
            const int64_t end = least(a.matrices * blocks, begin + chunk[p]);
            for (int64_t i = 0; i < pieces; i++)
                for (int64_t b = begin, m = b / blocks; b < end; m++) {
                    const Span s = spans[i];
                    const int64_t stop = least(end, (m + 1) * blocks);
                    block_products(a.w, b, stop, packed + base[p] + (m * n + s.first) * row[p], s.count,
                                   [&](int64_t at, const float* out) {
                                       const int64_t o = (at - m * blocks) * LANES;
                                       for (int t = 0; t < s.count; t++)
                                           put(out + t * LANES, a.y + ((s.first + t) * a.matrices + m) * a.w.rows + o,
                                               a.w.rows - o);
                                   });
                    b = stop;
                }
        }
    }
}

void linear(const Weights& w, const void* x, int64_t x_type, int64_t x_stride, int64_t n, int64_t matrices, float* y,
            int threads) {
    const Product one = {w, matrices, x, x_stride, y};
    products(&one, 1, x_type, n, threads);
}

inline F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// What a call of `experts` knows about its tokens: (token, slot) pairs sorted by expert, and tiles over them.
struct Plan {
    int64_t *pairs, *starts, *spans_from;  // spans_from [E + 1]: an expert's tiles
    Span* spans;
    int64_t* used;
    int64_t count = 0;  // experts that have tokens
};

inline Plan plan(Scratch& memory, const int64_t* ids, int64_t pairs, int64_t experts) {
    int64_t* base = memory.take<int64_t>(pairs + 3 * (experts + 1) + 2 * pairs);
    Plan p{base, base + pairs, base + pairs + experts + 1, nullptr, base + pairs + 2 * (experts + 1)};
    p.spans = (Span*)(base + pairs + 3 * (experts + 1));
    for (int64_t e = 0; e <= experts; e++) p.starts[e] = 0;
    for (int64_t i = 0; i < pairs; i++) p.starts[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) p.starts[e + 1] += p.starts[e];
    int64_t* next = p.spans_from;  // borrowed as a cursor before it gets its own values
    for (int64_t e = 0; e < experts; e++) next[e] = p.starts[e];
    for (int64_t i = 0; i < pairs; i++) p.pairs[next[ids[i]]++] = i;
    int64_t tiles = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int64_t rows = p.starts[e + 1] - p.starts[e];
        p.spans_from[e] = tiles;
        if (rows) p.used[p.count++] = e;
        tiles += cut(p.starts[e], rows, p.spans + tiles);
    }
    p.spans_from[experts] = tiles;
    return p;
}

// y[i] = sum over the k experts of row i of weight * down(silu(gate x) * up x), added in the order of expert numbers.
// up: for each expert the blocks of the gate's f rows, then of the up projection's. down: rows of the hidden size.
void experts(const Weights& up, const Weights& down, const void* x, int64_t x_type, const int64_t* ids,
             const float* weights, int64_t n, int64_t k, int64_t count, float* y, int threads) {
    static thread_local Scratch plan_kept, rows_kept, tiles_kept, inner_kept, inner_rows_kept, inner_tiles_kept;
    const int64_t pairs = n * k, hidden = down.rows, inner = down.width;
    const int64_t row = row_bytes(up), inner_row = row_bytes(down);
    const int64_t inner_blocks = (inner + LANES - 1) / LANES, padded = inner_blocks * LANES;
    const int64_t hidden_blocks = blocks_of(down);
    const Plan p = plan(plan_kept, ids, pairs, count);
    uint8_t *rows = rows_kept.take<uint8_t>(n * row), *tiles = tiles_kept.take<uint8_t>(pairs * row);
    float* h = inner_kept.take<float>(pairs * padded);
    uint8_t* inner_rows = inner_rows_kept.take<uint8_t>(pairs * inner_row);
    uint8_t* inner_tiles = inner_tiles_kept.take<uint8_t>(pairs * inner_row);
    const int64_t all_spans = p.spans_from[count];
    // Neighbouring blocks of one expert lie behind each other in memory: hand them out in runs.
    const int64_t wide = abreast((int)least(n, ROWS));
    const int64_t run = up_to(most(1, least(8, inner_blocks * p.count / (8 * threads))), wide);
    const int64_t runs = (inner_blocks + run - 1) / run;
    const int64_t down_run = up_to(most(1, least(4, hidden_blocks / (8 * threads))), wide);
    if (pairs * hidden * inner * 3 < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float gates[8 * ROWS * LANES];  // of a run
        const uint8_t* from[ROWS];
#pragma omp for
        for (int64_t i = 0; i < n; i++) quantise_row(up, x, x_type, i * up.width, rows + i * row);
#pragma omp for
        for (int64_t s = 0; s < all_spans; s++) {
            const Span span = p.spans[s];
            for (int t = 0; t < span.count; t++) from[t] = rows + p.pairs[span.first + t] / k * row;
            pack_tile(up, from, span.count, tiles + span.first * row);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p.count * runs; task++) {
            const int64_t e = p.used[task / runs], first = task % runs * run;
            const int64_t blocks = least(inner_blocks - first, run);
            for (int64_t s = p.spans_from[e]; s < p.spans_from[e + 1]; s++) {
                const Span span = p.spans[s];
                const uint8_t* packed = tiles + span.first * row;
                const int64_t gate = e * 2 * inner_blocks + first, value = gate + inner_blocks;
                block_products(up, gate, gate + blocks, packed, span.count, [&](int64_t b, const float* out) {
                    std::memcpy(gates + (b - gate) * ROWS * LANES, out, span.count * LANES * sizeof(float));
                });
                block_products(up, value, value + blocks, packed, span.count, [&](int64_t b, const float* out) {
                    const float* own = gates + (b - value) * ROWS * LANES;
                    for (int t = 0; t < span.count; t++)
                        store(h + (span.first + t) * padded + (first + b - value) * LANES,
                              mul(silu(load(own + t * LANES)), load(out + t * LANES)));
                });
            }
        }
#pragma omp for
        for (int64_t i = 0; i < pairs; i++) quantise_row(down, h, FLOAT32, i * padded, inner_rows + i * inner_row);
#pragma omp for
        for (int64_t s = 0; s < all_spans; s++) {
            const Span span = p.spans[s];
            for (int t = 0; t < span.count; t++) from[t] = inner_rows + (span.first + t) * inner_row;
            pack_tile(down, from, span.count, inner_tiles + span.first * inner_row);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < hidden_blocks; first += down_run) {
            const int64_t begin = first * LANES, end = least(hidden, begin + down_run * LANES);
            for (int64_t i = 0; i < n; i++) std::memset(y + i * hidden + begin, 0, (end - begin) * sizeof(float));
            for (int64_t u = 0; u < p.count; u++) {
                const int64_t e = p.used[u];
                const int64_t base = e * hidden_blocks, stop = base + least(hidden_blocks, first + down_run);
                for (int64_t s = p.spans_from[e]; s < p.spans_from[e + 1]; s++) {
                    const Span span = p.spans[s];
                    const uint8_t* packed = inner_tiles + span.first * inner_row;
                    block_products(down, base + first, stop, packed, span.count, [&](int64_t b, const float* out) {
                        for (int t = 0; t < span.count; t++) {
                            const int64_t pair = p.pairs[span.first + t], o = (b - base) * LANES;
                            add_to(y + pair / k * hidden + o, weights[pair], out + t * LANES, hidden - o);
                        }
                    });
                }
            }
        }
    }
}

// y[i, :] = row ids[i] of `w`, widened: scale * (value - zero), or scale * value + min.
void rows(const Weights& w, const int64_t* ids, int64_t n, float* y) {
    const int64_t groups = groups_of(w);
    for (int64_t i = 0; i < n; i++) {
        const uint8_t* block = w.data + ids[i] / LANES * block_bytes(w);
        const int64_t lane = ids[i] % LANES;
        const uint16_t *scales = (const uint16_t*)(block + value_bytes(w)), *mins = scales + LANES * groups;
        for (int64_t g = 0; g < groups; g++) {
            float scale[16], low[16] = {};
            store(scale, load_half(scales + LANES * g));
            if (w.kind == INT4_MIN) store(low, load_half(mins + LANES * g));
            const int64_t from = g * w.group, count = least(w.group, w.width - from);
            for (int64_t j = 0; j < count; j++) {
                const int64_t at = from + j, word = w.kind == INT8 ? at / 4 : at / 8;
                const uint8_t stored = block[64 * word + 4 * lane + at % 4];
                const int value = w.kind == INT8 ? stored - 128 : at % 8 < 4 ? stored & 15 : stored >> 4;
                const float wide = (float)(w.kind == INT4 ? value - 8 : value) * scale[lane];
                y[i * w.width + at] = w.kind == INT4_MIN ? wide + low[lane] : wide;
            }
        }
    }
}

}  // namespace
