// Attention of query rows over paged rows of a cache: absorbed MLA (one latent row a token, shared by all heads) and
// grouped-query (a key and a value row for each key head).
//
// Each row's keys are cut into splits of SPLIT. A split is computed by itself and splits are merged in order, whether
// one thread takes them all or many share them: a row's result is the same whatever rows it is computed with.
#pragma once

#include "scratch.h"

namespace {

constexpr int SPLIT = 512;  // keys of a split
constexpr int CHUNK = 64;   // keys between two looks at the running maximum
constexpr int LANE_HEADS = 16;
constexpr float LOWEST = -3.0e38f;  // finite, so that differences of maxima are never NaN

// Where a request's tokens lie, one after the other: without a division for each.
struct Walk {
    const PagedCache& cache;
    const int32_t* block;
    int64_t within;

    Walk(const PagedCache& c, int64_t request, int64_t from)
        : cache(c), block(c.table + request * c.table_width + from / c.block_size), within(from % c.block_size) {}

    const uint8_t* next() {
        if (within == cache.block_size) block++, within = 0;
        return (const uint8_t*)cache.data + (*block * cache.block_size + within++) * cache.stride;
    }
};

// `width` stored values of a row, from value `from` of a part of `part` values → floats, zeros up to `padded`.
inline void widen(int64_t type, const uint8_t* row, int64_t width, int64_t padded, float* out) {
    int64_t i = 0;
    if (type == INT8_ROWS) {
        const int8_t* bytes = (const int8_t*)row;
        const uint8_t* scales = row + width;
        for (int64_t g = 0; g < width; g += 64, scales += 2) {
            uint16_t half[16] = {};
            float s[16];
            std::memcpy(half, scales, 2);
            store(s, load_half(half));
            for (i = g; i + 16 <= least(width, g + 64); i += 16) store(out + i, mul(load_int8(bytes + i), set1(s[0])));
            for (; i < least(width, g + 64); i++) out[i] = (float)bytes[i] * s[0];
        }
    } else {
        for (; i + 16 <= width; i += 16)
            store(out + i, type == BFLOAT16 ? load_bf16((const uint16_t*)row + i) : load((const float*)row + i));
        for (; i < width; i++) {
            const uint32_t bits = type == BFLOAT16 ? (uint32_t)((const uint16_t*)row)[i] << 16 : ((const uint32_t*)row)[i];
            std::memcpy(out + i, &bits, 4);
        }
    }
    for (i = width; i < padded; i++) out[i] = 0;
}

inline float dot(const float* a, const float* b, int64_t width) {
    F total = zero();
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) total = fma(load(a + i), load(b + i), total);
    float out = sum(total);
    for (; i < width; i++) out += a[i] * b[i];
    return out;
}

// Running softmax of 16 heads side by side: maxima, sums, and outputs [16][stride].
struct State {
    float *top, *sum, *out;
};

inline void reset(State s, int live, int64_t stride) {
    for (int j = 0; j < LANE_HEADS; j++) s.top[j] = LOWEST, s.sum[j] = 0;
    std::memset(s.out, 0, live * stride * sizeof(float));
}

inline void rescale(float* out, float by, int64_t stride) {
    if (by == 1.0f) return;
    for (int64_t c = 0; c < stride; c += 16) store(out + c, mul(load(out + c), set1(by)));
}

// a absorbs the later split b.
inline void merge(State a, State b, int live, int64_t stride) {
    const F top = max(load(a.top), load(b.top));
    alignas(64) float keep[16], take[16];
    store(keep, exp(sub(load(a.top), top)));
    store(take, exp(sub(load(b.top), top)));
    store(a.sum, add(mul(load(a.sum), load(keep)), mul(load(b.sum), load(take))));
    store(a.top, top);
    for (int j = 0; j < live; j++) {
        float *to = a.out + j * stride, *from = b.out + j * stride;
        for (int64_t c = 0; c < stride; c += 16)
            store(to + c, fma(load(to + c), set1(keep[j]), mul(load(from + c), set1(take[j]))));
    }
}

// The new maxima given the scores [count][16] of a chunk; outputs and sums so far shrink to them, scores become
// exponentials.
inline void soften(State s, float* scores, int count, int live, int64_t stride, bool to_bf16) {
    F top = load(s.top);
    for (int i = 0; i < count; i++) top = max(top, load(scores + 16 * i));
    alignas(64) float shrink[16];
    const F by = exp(sub(load(s.top), top));
    store(shrink, by);
    F total = mul(load(s.sum), by);
    for (int i = 0; i < count; i++) {
        F p = exp(sub(load(scores + 16 * i), top));
        if (to_bf16) {  // the sum is of the weights as they will be used
            uint16_t rounded[16];
            store_bf16(rounded, p);
            p = load_bf16(rounded);
        }
        store(scores + 16 * i, p);
        total = add(total, p);
    }
    store(s.top, top);
    store(s.sum, total);
    for (int j = 0; j < live; j++) rescale(s.out + j * stride, shrink[j], stride);
}

// The same for heads one by one, each with scores [CHUNK], whose rest is filled up.
inline void soften_each(State s, float* scores, int count, int live, int64_t stride) {
    const int padded = (int)up_to(count, 16);
    for (int j = 0; j < live; j++) {
        float* p = scores + j * CHUNK;
        for (int i = count; i < padded; i++) p[i] = LOWEST;
        F peaks = set1(s.top[j]);
        for (int i = 0; i < padded; i += 16) peaks = max(peaks, load(p + i));
        const float top = highest(peaks);
        alignas(64) float shrink[16];
        store(shrink, exp(set1(s.top[j] - top)));
        F total = zero();
        for (int i = 0; i < padded; i += 16) {
            const F e = exp(sub(load(p + i), set1(top)));
            store(p + i, e);
            total = add(total, e);
        }
        s.top[j] = top;
        s.sum[j] = s.sum[j] * shrink[0] + sum(total);
        rescale(s.out + j * stride, shrink[0], stride);
    }
}

#if defined(__AVX512BF16__)
// Scores of keys of bfloat16: q [width / 2][16] pairs, one key pair broadcast against the pairs of 16 heads. The `next` keys
// are fetched meanwhile: left to the processor, six layers of 16 heads over 8,192 tokens take 6.7 ms a token instead of 5.7.
template <int K>
inline void score_pairs(const uint32_t* q, const void* const* keys, const void* const* next, int64_t width, float scale,
                        float* scores) {
    __m512 acc[K];
    const uint32_t* k[K];
    for (int i = 0; i < K; i++) acc[i] = _mm512_setzero_ps(), k[i] = (const uint32_t*)keys[i];
    for (int64_t from = 0; from < width / 2; from += 16) {
        for (int i = 0; i < K; i++) __builtin_prefetch((const uint32_t*)next[i] + from);
        for (int64_t c = from; c < least(width / 2, from + 16); c++) {
            const __m512i pair = _mm512_loadu_si512(q + 16 * c);
            for (int i = 0; i < K; i++) acc[i] = fma_pairs(acc[i], pair, _mm512_set1_epi32((int)k[i][c]));
        }
    }
    for (int i = 0; i < K; i++) store(scores + 16 * i, mul(acc[i], set1(scale)));
}

// out[h][c] += sum over keys of p[h] * key[c], two keys at a time: their rows interleaved into pairs along the keys.
inline void values_pairs(const float* p, const void* const* keys, int count, int64_t rank, int64_t stride, float* out) {
    alignas(64) uint32_t pairs[CHUNK / 2][16];
    const int steps = (count + 1) / 2;
    for (int s = 0; s < steps; s++) {
        const __m512 second = 2 * s + 1 < count ? load(p + 32 * s + 16) : zero();
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(load(p + 32 * s)), 16);
        const __m512i high = _mm512_and_si512(_mm512_castps_si512(second), _mm512_set1_epi32((int)0xffff0000));
        _mm512_store_si512(pairs[s], _mm512_or_si512(low, high));
    }
    for (int64_t c = 0; c < rank; c += 32)
        for (int h = 0; h < LANE_HEADS; h += HEADS) {
            __m512 a[HEADS], b[HEADS];
            for (int j = 0; j < HEADS; j++) a[j] = b[j] = _mm512_setzero_ps();
            for (int s = 0; s < steps; s++) {
                const uint16_t* first = (const uint16_t*)keys[2 * s] + c;
                const uint16_t* next = (const uint16_t*)keys[2 * s + (2 * s + 1 < count)] + c;
                const __m512i x = _mm512_loadu_si512(first), y = _mm512_loadu_si512(next);
                const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
                for (int j = 0; j < HEADS; j++) {
                    const __m512i weight = _mm512_set1_epi32((int)pairs[s][h + j]);
                    a[j] = fma_pairs(a[j], low, weight);
                    b[j] = fma_pairs(b[j], high, weight);
                }
            }
            // Unpacking left columns 0-3, 8-11, 16-19, 24-27 in a and the others in b.
            const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            for (int j = 0; j < HEADS; j++) {
                float* to = out + (h + j) * stride + c;
                store(to, add(load(to), _mm512_permutex2var_ps(a[j], front, b[j])));
                store(to + 16, add(load(to + 16), _mm512_permutex2var_ps(a[j], back, b[j])));
            }
        }
}
#endif

// The same in float: q [width][16].
template <int K>
inline void score_floats(const float* q, const void* const* keys, int64_t width, float scale, float* scores) {
    F acc[K];
    const float* k[K];
    for (int i = 0; i < K; i++) acc[i] = zero(), k[i] = (const float*)keys[i];
    for (int64_t c = 0; c < width; c++) {
        const F x = load(q + 16 * c);
        for (int i = 0; i < K; i++) acc[i] = fma(x, set1(k[i][c]), acc[i]);
    }
    for (int i = 0; i < K; i++) store(scores + 16 * i, mul(acc[i], set1(scale)));
}

inline void values_floats(const float* p, const void* const* keys, int count, int64_t stride, float* out) {
    for (int64_t c = 0; c < stride; c += 16)
        for (int h = 0; h < LANE_HEADS; h += HEADS) {
            F a[HEADS];
            for (int j = 0; j < HEADS; j++) a[j] = load(out + (h + j) * stride + c);
            for (int s = 0; s < count; s++) {
                const F v = load((const float*)keys[s] + c);
                for (int j = 0; j < HEADS; j++) a[j] = fma(v, set1(p[16 * s + h + j]), a[j]);
            }
            for (int j = 0; j < HEADS; j++) store(out + (h + j) * stride + c, a[j]);
        }
}

// Absorbed MLA: block b of a query row is its heads [16 b, 16 b + 16), side by side.
struct Latent {
    const Queries& queries;
    const PagedCache& cache;
    int64_t rank, width, stride;  // stride: floats of an output row, rank padded to 16
    bool pairs;                   // products of bfloat16 pairs
    bool direct;                  // keys are used where they lie

    Latent(const Queries& q, const PagedCache& c, int64_t rank, int64_t width)
        : queries(q), cache(c), rank(rank), width(width), stride(up_to(rank, 16)) {
        pairs = BF16_PAIRS && c.type != FLOAT32 && width % 2 == 0 && rank % 32 == 0;
        direct = pairs ? c.type == BFLOAT16 : c.type == FLOAT32 && rank % 16 == 0;
    }

    int64_t padded() const { return up_to(width, 16); }
    int64_t blocks() const { return (queries.heads + LANE_HEADS - 1) / LANE_HEADS; }
    int live(int64_t) const { return LANE_HEADS; }
    int64_t scratch_bytes() const { return CHUNK * 64 + (CHUNK + 1) * padded() * 4; }

    void load_query(int64_t row, int64_t block, void* to) const {
        float* q = (float*)to;
        const int64_t head = block * LANE_HEADS;
        std::memset(q, 0, padded() * 64);
        for (int64_t j = 0; j < least(LANE_HEADS, queries.heads - head); j++) {
            const float* from = queries.q + (row * queries.heads + head + j) * width;
            for (int64_t c = 0; c < width; c++)
                if (pairs)
                    ((uint16_t*)to)[(c / 2 * 16 + j) * 2 + c % 2] = round_bf16(from[c]);
                else
                    q[c * 16 + j] = from[c];
        }
    }

    static uint16_t round_bf16(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (x != x) return 0x7fc0;
        return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }

    void attend(int64_t row, int64_t, const void* q, int64_t begin, int64_t end, State s, void* scratch) const {
        float* scores = (float*)scratch;
        float* wide = scores + CHUNK * 16;       // one row of floats
        uint8_t* copies = (uint8_t*)(wide + padded());
        const int64_t request = queries.request[row];
        const void* keys[CHUNK];
        for (int64_t from = begin; from < end; from += CHUNK) {
            const int count = (int)least(CHUNK, end - from);
            Walk walk(cache, request, from);
            for (int i = 0; i < count; i++) {
                keys[i] = walk.next();
                if (!direct) keys[i] = copy((const uint8_t*)keys[i], wide, copies + i * padded() * 4);
            }
            int i = 0;
            for (; i + KEYS <= count; i += KEYS)
                score<KEYS>(q, keys + i, keys + (i + 2 * KEYS <= count ? i + KEYS : i), scores + 16 * i);
            for (; i < count; i++) score<1>(q, keys + i, keys + i, scores + 16 * i);
            soften(s, scores, count, LANE_HEADS, stride, pairs);
#if defined(__AVX512BF16__)
            if (pairs) {
                values_pairs(scores, keys, count, rank, stride, s.out);
                continue;
            }
#endif
            values_floats(scores, keys, count, stride, s.out);
        }
    }

    template <int K>
    void score(const void* q, const void* const* keys, const void* const* next, float* scores) const {
#if defined(__AVX512BF16__)
        if (pairs) return score_pairs<K>((const uint32_t*)q, keys, next, width, queries.scale, scores);
#endif
        score_floats<K>((const float*)q, keys, width, queries.scale, scores);
    }

    const void* copy(const uint8_t* row, float* wide, uint8_t* to) const {
        if (!pairs) {
            widen(cache.type, row, width, padded(), (float*)to);
        } else {
            widen(cache.type, row, width, padded(), wide);
            for (int64_t c = 0; c < padded(); c += 16) store_bf16((uint16_t*)to + c, load(wide + c));
        }
        return to;
    }
};

// Grouped-query: block b of a query row is the query heads of one key head, or 16 of them where there are more.
struct Grouped {
    const Queries& queries;
    const PagedCache &keys, &values;
    int64_t kv_heads, width, stride, group, per_head;  // per_head: blocks of a key head
    int64_t head_bytes;                                // of one head in a row of the cache
    bool direct;

    Grouped(const Queries& q, const PagedCache& k, const PagedCache& v, int64_t kv_heads, int64_t width)
        : queries(q), keys(k), values(v), kv_heads(kv_heads), width(width), stride(up_to(width, 16)) {
        group = q.heads / kv_heads;
        per_head = (group + LANE_HEADS - 1) / LANE_HEADS;
        head_bytes = k.type == FLOAT32 ? 4 * width : k.type == BFLOAT16 ? 2 * width : width + 2 * ((width + 63) / 64);
        direct = k.type != INT8_ROWS && width % 16 == 0;
    }

    int64_t padded() const { return stride; }
    int64_t blocks() const { return kv_heads * per_head; }
    int live(int64_t block) const { return (int)least(LANE_HEADS, group - block % per_head * LANE_HEADS); }
    int64_t first_head(int64_t block) const { return block / per_head * group + block % per_head * LANE_HEADS; }
    int64_t scratch_bytes() const { return CHUNK * 64 + CHUNK * padded() * 4; }

    void load_query(int64_t row, int64_t block, void* to) const {
        std::memset(to, 0, LANE_HEADS * stride * 4);
        for (int j = 0; j < live(block); j++)
            std::memcpy((float*)to + j * stride, queries.q + (row * queries.heads + first_head(block) + j) * width,
                        width * 4);
    }

    void attend(int64_t row, int64_t block, const void* q, int64_t begin, int64_t end, State s, void* scratch) const {
        float *scores = (float*)scratch, *copies = scores + CHUNK * LANE_HEADS;
        const void *of_keys[CHUNK], *of_values[CHUNK];
        const int heads = live(block);
        for (int64_t from = begin; from < end; from += CHUNK) {
            const int count = (int)least(CHUNK, end - from);
            find(keys, row, block, from, count, of_keys);
            find(values, row, block, from, count, of_values);
            const bool half = widen_rows(keys, count, of_keys, copies) == BFLOAT16;
            for (int h = 0; h < heads; h += 4)
                few(heads - h, [&](auto some) {
                    const float* queries = (const float*)q + h * stride;
                    if (half)
                        score<some, true>(queries, of_keys, count, scores + h * CHUNK);
                    else
                        score<some, false>(queries, of_keys, count, scores + h * CHUNK);
                });
            soften_each(s, scores, count, heads, stride);
            widen_rows(values, count, of_values, copies);
            for (int h = 0; h < heads; h += 4)
                few(heads - h, [&](auto some) {
                    if (half)
                        add_values<some, true>(scores + h * CHUNK, of_values, count, s.out + h * stride);
                    else
                        add_values<some, false>(scores + h * CHUNK, of_values, count, s.out + h * stride);
                });
        }
    }

    // `then` of the number of heads as a constant, 4 at most.
    template <class Then>
    static void few(int heads, Then then) {
        if (heads >= 4) return then(std::integral_constant<int, 4>());
        if (heads == 3) return then(std::integral_constant<int, 3>());
        if (heads == 2) return then(std::integral_constant<int, 2>());
        then(std::integral_constant<int, 1>());
    }

    // Where `count` rows of a key head lie. They are fetched at once: rows of a head lie too far apart for the processor
    // to see the next one coming.
    void find(const PagedCache& cache, int64_t row, int64_t block, int64_t from, int count, const void** rows) const {
        Walk walk(cache, queries.request[row], from);
        for (int i = 0; i < count; i++) {
            const uint8_t* at = walk.next() + block / per_head * head_bytes;
            for (int64_t byte = 0; byte < head_bytes; byte += 64) __builtin_prefetch(at + byte);
            rows[i] = at;
        }
    }

    // As they lie, or as floats in `copies`. Returns their type.
    int64_t widen_rows(const PagedCache& cache, int count, const void** rows, float* copies) const {
        for (int i = 0; i < count && !direct; i++) {
            widen(cache.type, (const uint8_t*)rows[i], width, stride, copies + i * stride);
            rows[i] = copies + i * stride;
        }
        return direct ? cache.type : (int64_t)FLOAT32;
    }

    template <bool HALF>
    static F part(const void* row, int64_t c) {
        return HALF ? load_bf16((const uint16_t*)row + c) : load((const float*)row + c);
    }

    // Scores of H heads, each [CHUNK].
    template <int H, bool HALF>
    void score(const float* q, const void* const* keys, int count, float* scores) const {
        for (int i = 0; i < count; i++) {
            F a[H];
            for (int j = 0; j < H; j++) a[j] = zero();
            for (int64_t c = 0; c < stride; c += 16) {
                const F k = part<HALF>(keys[i], c);
                for (int j = 0; j < H; j++) a[j] = fma(k, load(q + j * stride + c), a[j]);
            }
            for (int j = 0; j < H; j++) scores[j * CHUNK + i] = sum(a[j]) * queries.scale;
        }
    }

    template <int H, bool HALF>
    void add_values(const float* p, const void* const* rows, int count, float* out) const {
        constexpr int WIDE = 4 / (H > 2 ? 2 : 1);  // with two keys at a time, sums enough to hide how long each takes
        int64_t c = 0;
        for (; c + 16 * WIDE <= stride; c += 16 * WIDE) add_columns<H, HALF, WIDE>(p, rows, count, c, out + c);
        for (; c < stride; c += 16) add_columns<H, HALF, 1>(p, rows, count, c, out + c);
    }

    template <int H, bool HALF, int WIDE>
    void add_columns(const float* p, const void* const* rows, int count, int64_t c, float* out) const {
        F a[2][H][WIDE];
        for (int j = 0; j < H; j++)
            for (int w = 0; w < WIDE; w++) a[0][j][w] = load(out + j * stride + 16 * w), a[1][j][w] = zero();
        auto take = [&](int s, auto& to) {
            for (int w = 0; w < WIDE; w++) {
                const F v = part<HALF>(rows[s], c + 16 * w);
                for (int j = 0; j < H; j++) to[j][w] = fma(v, set1(p[j * CHUNK + s]), to[j][w]);
            }
        };
        int s = 0;
        for (; s + 2 <= count; s += 2) take(s, a[0]), take(s + 1, a[1]);
        if (s < count) take(s, a[0]);
        for (int j = 0; j < H; j++)
            for (int w = 0; w < WIDE; w++) store(out + j * stride + 16 * w, add(a[0][j][w], a[1][j][w]));
    }
};

// Every (row, block of heads) is a task of its own where there are enough of them; else every split is one, and
// splits are merged at the end. `finish` takes the state of a row's block.
template <class Work, class Finish>
void split_attention(const Work& work, int threads, Finish finish) {
    static thread_local Scratch states_kept;
    const Queries& queries = work.queries;
    int64_t longest = 0;
    for (int64_t i = 0; i < queries.n; i++) longest = most(longest, queries.length[i]);
    const int64_t stride = work.stride, tasks = queries.n * work.blocks();
    const int64_t splits = most(1, (longest + SPLIT - 1) / SPLIT);
    const bool share = tasks < 4 * threads && splits > 1;
    if (tasks * longest * stride < SMALL) threads = 1;
    const int64_t state = 32 + LANE_HEADS * stride;  // floats
    float* states = share ? states_kept.take<float>(tasks * splits * state) : nullptr;
    auto view = [](float* at) { return State{at, at + 16, at + 32}; };
    auto compute = [&](int64_t task, int64_t begin, const void* query, State s, void* scratch) {
        const int64_t row = task / work.blocks(), block = task % work.blocks();
        reset(s, work.live(block), stride);
        work.attend(row, block, query, begin, least(queries.length[row], begin + SPLIT), s, scratch);
    };
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch mine_kept;
        const int64_t query_floats = LANE_HEADS * work.padded();
        float* mine = mine_kept.take<float>(2 * state + query_floats + work.scratch_bytes() / 4);
        float *query = mine + 2 * state, *scratch = query + query_floats;
        if (share) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks * splits; i++) {
                const int64_t task = i / splits, begin = i % splits * SPLIT;
                if (begin && begin >= queries.length[task / work.blocks()]) continue;
                work.load_query(task / work.blocks(), task % work.blocks(), query);
                compute(task, begin, query, view(states + i * state), scratch);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t row = task / work.blocks(), block = task % work.blocks();
            State total = view(share ? states + task * splits * state : mine);
            if (!share) {
                work.load_query(row, block, query);
                compute(task, 0, query, total, scratch);
            }
            for (int64_t begin = SPLIT; begin < queries.length[row]; begin += SPLIT) {
                const State next = view(share ? states + (task * splits + begin / SPLIT) * state : mine + state);
                if (!share) compute(task, begin, query, next, scratch);
                merge(total, next, work.live(block), stride);
            }
            finish(row, block, total);
        }
    }
}

// One head's output; a row that sees no key gives zeros.
inline void write_head(const State& s, int j, int64_t stride, int64_t width, float* to) {
    const float by = s.sum[j] == 0 ? 0 : 1 / s.sum[j];
    for (int64_t c = 0; c < width; c++) to[c] = s.out[j * stride + c] * by;
}

// out [N, H, rank] = softmax(scale * q . rows) . rows[:rank]
void mla(const Queries& queries, const PagedCache& cache, int64_t rank, int64_t width, float* out, int threads) {
    const Latent work(queries, cache, rank, width);
    split_attention(work, threads, [&](int64_t row, int64_t block, State s) {
        const int64_t head = block * LANE_HEADS;
        for (int j = 0; j < least(LANE_HEADS, queries.heads - head); j++)
            write_head(s, j, work.stride, rank, out + (row * queries.heads + head + j) * rank);
    });
}

// out [N, H, width] = softmax(scale * q . keys) . values
void gqa(const Queries& queries, const PagedCache& keys, const PagedCache& values, int64_t kv_heads, int64_t width,
         float* out, int threads) {
    const Grouped work(queries, keys, values, kv_heads, width);
    split_attention(work, threads, [&](int64_t row, int64_t block, State s) {
        for (int j = 0; j < work.live(block); j++)
            write_head(s, j, work.stride, width, out + (row * queries.heads + work.first_head(block) + j) * width);
    });
}

}  // namespace
