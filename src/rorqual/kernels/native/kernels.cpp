// Products of quantised weights and decode attention, for one instruction set chosen when this file is compiled:
// -DSUFFIX=_avx512 with AVX-512 VNNI and BF16, _avx2 or _portable otherwise. Python picks a set at run time.
// Plain C interface on data pointers; nothing of torch. Threads come from OpenMP, the same pool that torch uses.
//
// Weight layout: 16 output rows and a group of 32 inputs make a block. Lane j of each 64-byte vector belongs to
// output row j, its four bytes to four neighbouring inputs, so one multiply-add instruction serves 16 outputs and no
// sum crosses lanes. Values are stored with an offset (8 or 128) that is taken back through the sum of the inputs.
//   4 bits: 256 bytes, low nibbles inputs k*8..k*8+3, high nibbles k*8+4..k*8+7 of vector k, then 16 half scales
//   8 bits: 512 bytes, vector k inputs k*4..k*4+3, then 16 half scales

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define WIDE 1
#else
#define WIDE 0
#endif

#define GLUE_(a, b) a##b
#define GLUE(a, b) GLUE_(a, b)
#define API(name) extern "C" __attribute__((visibility("default"))) void GLUE(rq_##name, SUFFIX)

namespace {

constexpr int LANES = 16, GROUP = 32;

inline int64_t block_bytes(int bits) { return (bits == 4 ? 256 : 512) + LANES * 2; }

inline float half_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, out;
    if (exponent == 0) {
        float value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign ? -value : value;
    }
    out = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
    float value;
    std::memcpy(&value, &out, 4);
    return value;
}

// Inputs of one row as signed bytes with a scale and a sum for each group.
struct Rows {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<int32_t> sums;
    int64_t in = 0, groups = 0;
    void resize(int64_t n, int64_t width) {
        in = width;
        groups = width / GROUP;
        values.resize(n * in + 64);
        scales.resize(n * groups);
        sums.resize(n * groups);
    }
    void set(int64_t row, const float* x) {
        int8_t* v = values.data() + row * in;
        for (int64_t g = 0; g < groups; g++) {
            float peak = 0;
            for (int i = 0; i < GROUP; i++) peak = std::max(peak, std::fabs(x[g * GROUP + i]));
            float scale = peak / 127.0f, inverse = peak > 0 ? 127.0f / peak : 0.0f;
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) {
                int8_t q = static_cast<int8_t>(std::nearbyint(x[g * GROUP + i] * inverse));
                v[g * GROUP + i] = q;
                sum += q;
            }
            scales[row * groups + g] = scale;
            sums[row * groups + g] = sum;
        }
    }
};

#if WIDE
template <int BITS, int R>
inline void tile(const uint8_t* w, const Rows& x, const int64_t* rows, float* const* out) {
    constexpr int OFFSET = BITS == 4 ? 8 : 128;
    const int64_t step = block_bytes(BITS);
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[R];
    const int8_t* v[R];
    for (int r = 0; r < R; r++) {
        total[r] = _mm512_setzero_ps();
        v[r] = x.values.data() + rows[r] * x.in;
    }
    for (int64_t g = 0; g < x.groups; g++, w += step) {
        __m512i acc[R];
        for (int r = 0; r < R; r++) acc[r] = _mm512_set1_epi32(-OFFSET * x.sums[rows[r] * x.groups + g]);
        if (BITS == 4) {
            for (int k = 0; k < 4; k++) {
                __m512i packed = _mm512_loadu_si512(w + k * 64);
                __m512i a = _mm512_and_si512(packed, low);
                __m512i b = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
                for (int r = 0; r < R; r++) {
                    int32_t first, second;
                    std::memcpy(&first, v[r] + g * GROUP + k * 8, 4);
                    std::memcpy(&second, v[r] + g * GROUP + k * 8 + 4, 4);
                    acc[r] = _mm512_dpbusd_epi32(acc[r], a, _mm512_set1_epi32(first));
                    acc[r] = _mm512_dpbusd_epi32(acc[r], b, _mm512_set1_epi32(second));
                }
            }
        } else {
            for (int k = 0; k < 8; k++) {
                __m512i a = _mm512_loadu_si512(w + k * 64);
                for (int r = 0; r < R; r++) {
                    int32_t first;
                    std::memcpy(&first, v[r] + g * GROUP + k * 4, 4);
                    acc[r] = _mm512_dpbusd_epi32(acc[r], a, _mm512_set1_epi32(first));
                }
            }
        }
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + step - 32)));
        for (int r = 0; r < R; r++) {
            __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[rows[r] * x.groups + g]));
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r]), both, total[r]);
        }
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out[r], total[r]);
}
#else
template <int BITS, int R>
inline void tile(const uint8_t* w, const Rows& x, const int64_t* rows, float* const* out) {
    constexpr int OFFSET = BITS == 4 ? 8 : 128;
    const int64_t step = block_bytes(BITS);
    float total[R][LANES] = {};
    for (int64_t g = 0; g < x.groups; g++, w += step) {
        const uint16_t* scale = reinterpret_cast<const uint16_t*>(w + step - 32);
        for (int r = 0; r < R; r++) {
            const int8_t* v = x.values.data() + rows[r] * x.in + g * GROUP;
            int32_t acc[LANES];
            for (int j = 0; j < LANES; j++) acc[j] = -OFFSET * x.sums[rows[r] * x.groups + g];
            if (BITS == 4) {
                for (int k = 0; k < 4; k++)
                    for (int j = 0; j < LANES; j++)
                        for (int b = 0; b < 4; b++) {
                            uint8_t packed = w[k * 64 + j * 4 + b];
                            acc[j] += (packed & 15) * v[k * 8 + b] + (packed >> 4) * v[k * 8 + 4 + b];
                        }
            } else {
                for (int k = 0; k < 8; k++)
                    for (int j = 0; j < LANES; j++)
                        for (int b = 0; b < 4; b++) acc[j] += w[k * 64 + j * 4 + b] * v[k * 4 + b];
            }
            float row_scale = x.scales[rows[r] * x.groups + g];
            for (int j = 0; j < LANES; j++) total[r][j] += acc[j] * (half_to_float(scale[j]) * row_scale);
        }
    }
    for (int r = 0; r < R; r++) std::memcpy(out[r], total[r], sizeof total[r]);
}
#endif

template <int BITS>
void rows_of(const uint8_t* w, const Rows& x, const int64_t* rows, float* const* out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) tile<BITS, 8>(w, x, rows + i, out + i);
    for (; i + 4 <= n; i += 4) tile<BITS, 4>(w, x, rows + i, out + i);
    for (; i + 2 <= n; i += 2) tile<BITS, 2>(w, x, rows + i, out + i);
    if (i < n) tile<BITS, 1>(w, x, rows + i, out + i);
}

inline void any_bits(int bits, const uint8_t* w, const Rows& x, const int64_t* rows, float* const* out, int64_t n) {
    bits == 4 ? rows_of<4>(w, x, rows, out, n) : rows_of<8>(w, x, rows, out, n);
}

}  // namespace

// y [n, out] = x [n, in] W^T. W holds out / 16 rows of in / 32 blocks.
API(linear)(const float* x, const uint8_t* w, float* y, int64_t n, int64_t in, int64_t out, int bits) {
    static thread_local Rows kept;
    Rows& q = kept;
    q.resize(n, in);
    const int64_t stride = in / GROUP * block_bytes(bits);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t i = 0; i < n; i++) q.set(i, x + i * in);
#pragma omp for schedule(dynamic, 8)
        for (int64_t o = 0; o < out / LANES; o++) {
            int64_t rows[8];
            float* to[8];
            for (int64_t i = 0; i < n; i += 8) {
                int64_t count = std::min<int64_t>(8, n - i);
                for (int64_t r = 0; r < count; r++) {
                    rows[r] = i + r;
                    to[r] = y + (i + r) * out + o * LANES;
                }
                any_bits(bits, w + o * stride, q, rows, to, count);
            }
        }
    }
}

// Sum over the chosen experts of weight * down(silu(gate x) * up x). x [n, width]; ids, weights [n, k];
// up_w [experts][2 * inner / 16][width / 32] blocks, gate rows first; down_w [experts][width / 16][inner / 32] blocks.
API(experts)(const float* x, const int64_t* ids, const float* weights, const uint8_t* up_w, const uint8_t* down_w,
             float* y, int64_t n, int64_t k, int64_t experts, int64_t width, int64_t inner, int bits) {
    static thread_local Rows kept_x, kept_h;
    static thread_local std::vector<float> gate_up, down;
    static thread_local std::vector<int64_t> start, order;
    Rows &qx = kept_x, &qh = kept_h;
    auto &gu = gate_up, &dn = down;
    auto &from = start, &pairs = order;
    qx.resize(n, width);
    qh.resize(n * k, inner);
    gu.resize(n * k * 2 * inner);
    dn.resize(n * k * width);
    from.assign(experts + 1, 0);
    pairs.resize(n * k);
    for (int64_t i = 0; i < n * k; i++) from[ids[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) from[e + 1] += from[e];
    std::vector<int64_t> at(from.begin(), from.end() - 1), used;
    for (int64_t i = 0; i < n * k; i++) pairs[at[ids[i]]++] = i;
    for (int64_t e = 0; e < experts; e++)
        if (from[e + 1] > from[e]) used.push_back(e);
    const int64_t up_blocks = 2 * inner / LANES, down_blocks = width / LANES;
    const int64_t up_stride = width / GROUP * block_bytes(bits), down_stride = inner / GROUP * block_bytes(bits);
#pragma omp parallel
    {
        std::vector<int64_t> rows;
        std::vector<float*> to;
#pragma omp for
        for (int64_t i = 0; i < n; i++) qx.set(i, x + i * width);
#pragma omp for schedule(dynamic, 16)
        for (int64_t task = 0; task < static_cast<int64_t>(used.size()) * up_blocks; task++) {
            int64_t e = used[task / up_blocks], o = task % up_blocks, count = from[e + 1] - from[e];
            rows.resize(count);
            to.resize(count);
            for (int64_t r = 0; r < count; r++) {
                int64_t pair = pairs[from[e] + r];
                rows[r] = pair / k;
                to[r] = gu.data() + pair * 2 * inner + o * LANES;
            }
            any_bits(bits, up_w + (e * up_blocks + o) * up_stride, qx, rows.data(), to.data(), count);
        }
#pragma omp for
        for (int64_t pair = 0; pair < n * k; pair++) {
            float *gate = gu.data() + pair * 2 * inner, *up = gate + inner;
            for (int64_t i = 0; i < inner; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
            qh.set(pair, gate);
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t task = 0; task < static_cast<int64_t>(used.size()) * down_blocks; task++) {
            int64_t e = used[task / down_blocks], o = task % down_blocks, count = from[e + 1] - from[e];
            to.resize(count);
            for (int64_t r = 0; r < count; r++) to[r] = dn.data() + pairs[from[e] + r] * width + o * LANES;
            any_bits(bits, down_w + (e * down_blocks + o) * down_stride, qh, pairs.data() + from[e], to.data(), count);
        }
#pragma omp for
        for (int64_t i = 0; i < n; i++) {
            float* row = y + i * width;
            std::memset(row, 0, width * sizeof(float));
            for (int64_t j = 0; j < k; j++) {
                const float* part = dn.data() + (i * k + j) * width;
                const float weight = weights[i * k + j];
                for (int64_t c = 0; c < width; c++) row[c] += weight * part[c];
            }
        }
    }
}

namespace {

inline float bf16_to_float(uint16_t h) {
    uint32_t wide = static_cast<uint32_t>(h) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// scores[h][s] of a few keys: q [heads][width] bf16 against rows of bf16
inline void scores_of(const uint16_t* q, const uint16_t* const* keys, int count, int heads, int width, float scale,
                      float* scores, int stride) {
    for (int h = 0; h < heads; h++) {
        const uint16_t* query = q + static_cast<int64_t>(h) * width;
#if WIDE
        int s = 0;
        for (; s + 4 <= count; s += 4) {
            __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int c = 0; c < width; c += 32) {
                __m512bh a = (__m512bh)_mm512_loadu_si512(query + c);
                for (int i = 0; i < 4; i++)
                    acc[i] = _mm512_dpbf16_ps(acc[i], a, (__m512bh)_mm512_loadu_si512(keys[s + i] + c));
            }
            for (int i = 0; i < 4; i++) scores[h * stride + s + i] = _mm512_reduce_add_ps(acc[i]) * scale;
        }
        for (; s < count; s++) {
            __m512 acc = _mm512_setzero_ps();
            for (int c = 0; c < width; c += 32)
                acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(query + c),
                                       (__m512bh)_mm512_loadu_si512(keys[s] + c));
            scores[h * stride + s] = _mm512_reduce_add_ps(acc) * scale;
        }
#else
        for (int s = 0; s < count; s++) {
            float acc = 0;
            for (int c = 0; c < width; c++) acc += bf16_to_float(query[c]) * bf16_to_float(keys[s][c]);
            scores[h * stride + s] = acc * scale;
        }
#endif
    }
}

// out[h][0..rank) += sum over s of p[h][s] * key_s[0..rank)
inline void accumulate(const float* p, int stride, const uint16_t* const* keys, int count, int heads, int rank,
                       float* out) {
#if WIDE
    for (int c = 0; c < rank; c += 64) {
        const int width = std::min(64, rank - c) / 16;
        for (int h = 0; h < heads; h += 4) {
            const int some = std::min(4, heads - h);
            __m512 acc[4][4];
            for (int i = 0; i < some; i++)
                for (int j = 0; j < width; j++) acc[i][j] = _mm512_loadu_ps(out + (h + i) * rank + c + j * 16);
            for (int s = 0; s < count; s++) {
                __m512 value[4];
                for (int j = 0; j < width; j++) {
                    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys[s] + c + j * 16));
                    value[j] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
                }
                for (int i = 0; i < some; i++) {
                    __m512 weight = _mm512_set1_ps(p[(h + i) * stride + s]);
                    for (int j = 0; j < width; j++) acc[i][j] = _mm512_fmadd_ps(weight, value[j], acc[i][j]);
                }
            }
            for (int i = 0; i < some; i++)
                for (int j = 0; j < width; j++) _mm512_storeu_ps(out + (h + i) * rank + c + j * 16, acc[i][j]);
        }
    }
#else
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < count; s++)
            for (int c = 0; c < rank; c++) out[h * rank + c] += p[h * stride + s] * bf16_to_float(keys[s][c]);
#endif
}

constexpr int TILE = 64;  // keys at a time: their rows stay in the second-level cache for both products

}  // namespace

// Absorbed MLA decode over a paged cache of bf16 rows [slots][width], width = rank + rotary, a multiple of 32;
// rank a multiple of 16. q [n, heads, width] float; slots of request i: table[offsets[i] .. offsets[i + 1]).
// out [n, heads, rank] float; a request without keys gives zeros. Each request is cut into `parts` for the threads.
API(mla_decode)(const float* q, const uint16_t* cache, const int64_t* table, const int64_t* offsets, float* out,
                int64_t n, int64_t heads, int64_t rank, int64_t width, float scale, int64_t parts) {
    std::vector<uint16_t> queries(n * heads * width);
    std::vector<float> partial(n * parts * heads * rank), peaks(n * parts * heads), sums(n * parts * heads);
#pragma omp parallel
    {
        std::vector<float> scores(heads * TILE);
#pragma omp for
        for (int64_t i = 0; i < n * heads; i++)
            for (int64_t c = 0; c < width; c++) queries[i * width + c] = float_to_bf16(q[i * width + c]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < n * parts; task++) {
            const int64_t i = task / parts, part = task % parts, length = offsets[i + 1] - offsets[i];
            const int64_t begin = length * part / parts, end = length * (part + 1) / parts;
            float* acc = partial.data() + task * heads * rank;
            float *peak = peaks.data() + task * heads, *sum = sums.data() + task * heads;
            std::memset(acc, 0, heads * rank * sizeof(float));
            std::fill(peak, peak + heads, -INFINITY);
            std::fill(sum, sum + heads, 0.0f);
            const uint16_t* keys[TILE];
            for (int64_t s = begin; s < end; s += TILE) {
                const int count = static_cast<int>(std::min<int64_t>(TILE, end - s));
                for (int j = 0; j < count; j++) keys[j] = cache + table[offsets[i] + s + j] * width;
                scores_of(queries.data() + i * heads * width, keys, count, heads, width, scale, scores.data(), TILE);
                for (int h = 0; h < heads; h++) {
                    float* row = scores.data() + h * TILE;
                    float top = peak[h];
                    for (int j = 0; j < count; j++) top = std::max(top, row[j]);
                    const float shrink = std::exp(peak[h] - top);
                    float total = 0;
                    for (int j = 0; j < count; j++) total += row[j] = std::exp(row[j] - top);
                    if (shrink != 1.0f)
                        for (int64_t c = 0; c < rank; c++) acc[h * rank + c] *= shrink;
                    sum[h] = sum[h] * shrink + total;
                    peak[h] = top;
                }
                accumulate(scores.data(), TILE, keys, count, heads, rank, acc);
            }
        }
#pragma omp for
        for (int64_t row = 0; row < n * heads; row++) {
            const int64_t i = row / heads, h = row % heads;
            float top = -INFINITY, total = 0;
            for (int64_t part = 0; part < parts; part++) top = std::max(top, peaks[(i * parts + part) * heads + h]);
            float* to = out + row * rank;
            std::memset(to, 0, rank * sizeof(float));
            if (top == -INFINITY) continue;
            for (int64_t part = 0; part < parts; part++) {
                const int64_t task = i * parts + part;
                const float weight = std::exp(peaks[task * heads + h] - top);
                total += weight * sums[task * heads + h];
                const float* from = partial.data() + (task * heads + h) * rank;
                for (int64_t c = 0; c < rank; c++) to[c] += weight * from[c];
            }
            for (int64_t c = 0; c < rank; c++) to[c] /= total;
        }
    }
}
