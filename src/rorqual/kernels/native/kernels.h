// What every variant of the library provides. dispatch.cpp picks one table at run time; each variant is compiled
// with its own instruction set from the same sources, everything in it local to its object file.
#pragma once

#include <cstdint>

// How weights are stored; see quantised.py for the layout. FLOATS: 16 rows side by side, in groups of one.
enum Kind { INT4 = 0, INT4_MIN = 1, INT8 = 2, FLOATS = 3 };

// How rows of a cache or of activations are stored. INT8_ROWS: the bytes, then a half scale for each 64 of them.
enum Type { FLOAT32 = 0, BFLOAT16 = 1, INT8_ROWS = 2 };

// One matrix, or E of them behind each other: `rows` outputs (padded to 16) of `width` inputs.
struct Weights {
    const uint8_t* data;
    int64_t rows, width;
    int64_t kind, group;
};

struct PagedCache {
    const void* data;
    int64_t type;
    int64_t stride;       // bytes from one token to the next
    int64_t block_size;   // tokens of a block
    const int32_t* table; // [B, table_width] block numbers
    int64_t table_width;
};

// N query rows; row i belongs to request[i] and sees its first length[i] tokens.
struct Queries {
    const float* q;
    const int32_t *request, *length;
    int64_t n, heads;
    float scale;
};

// What `layers` knows of a model; rorqual/engine/decoder.py fills these in. Each field is 8 bytes.
struct Packed {
    Weights w;
    const float* bias;  // or none
};

struct Pair {
    Weights up, down;  // of one feed-forward, or of all routed experts
};

struct Rows {
    uint8_t* data;
    int64_t type, stride;  // bytes from one token to the next
};

struct Router {
    const float *weight, *bias;  // [experts, hidden]; the bias of the selection, or none
    int64_t experts, chosen, groups, kept_groups;
    int64_t softmax, normalised, scaled;
    double scale;
};

struct Layer {
    const float *in_norm, *post_norm;
    double eps, latent_eps, scale;
    int64_t heads, kv_heads, nope, rotary, rank, interleaved;  // rank 0: grouped-query
    const float *q_low_norm, *kv_norm, *q_norm, *k_norm;
    Packed q_low, q, kv, v, out;  // kv: the latent and rotary key, or the keys
    Packed absorbed_keys, absorbed_values;
    Rows keys, values;  // keys: the latents
    Router router;      // no experts: dense
    Pair mlp, shared;
};

// N rows; row i belongs to request[i], is written to slots[i] and sees its first length[i] tokens.
struct Step {
    int64_t n;
    const float *cosine, *sine;  // [N, rotary / 2]
    const int64_t* slots;
    const int32_t *request, *length, *table;
    int64_t table_width, block_size;
    int64_t* chosen;  // [layers of experts, N, chosen experts] to be filled, or none
};

// One matrix a head: [.., width] floats that lie side by side, and how far it is to the next row, head and token.
struct Heads {
    const void* data;
    int64_t batch, head, token;
};

// Queries [B, H, T, width] that are the last of the keys [B, K, S, width]; shared and start [B, T], or none.
struct CausalCall {
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    Heads q, k, v;
    const int32_t *shared, *start;
    double scale;
};

struct Kernels {
    const char* isa;
    void (*linear)(const Weights&, const void* x, int64_t x_type, int64_t x_stride, int64_t n, int64_t matrices,
                   float* y, int threads);
    void (*experts)(const Weights& up, const Weights& down, const void* x, int64_t x_type, const int64_t* ids,
                    const float* weights, int64_t n, int64_t k, int64_t experts, float* y, int threads);
    void (*rows)(const Weights&, const int64_t* ids, int64_t n, float* y);
    void (*mla)(const Queries&, const PagedCache&, int64_t rank, int64_t width, float* out, int threads);
    void (*gqa)(const Queries&, const PagedCache& keys, const PagedCache& values, int64_t kv_heads, int64_t width,
                float* out, int threads);
    void (*rms_norm)(const void* x, int64_t type, const void* w, int64_t n, int64_t width, float eps, void* y,
                     int threads);
    void (*rope)(const void* x, int64_t type, int64_t token_stride, int64_t head_stride, const float* cosine,
                 const float* sine, int64_t period, int64_t n, int64_t heads, int64_t width, int64_t interleaved, void* y, int threads);
    void (*survey)(const float* x, int64_t n, int64_t width, int64_t* best, uint8_t* finite);
    void (*gated)(const void* gate, const void* up, int64_t type, int64_t stride, int64_t n, int64_t width, void* out,
                  int threads);
    void (*gated_back)(const void* gate, const void* up, int64_t type, int64_t stride, const void* grad,
                       const float* by, int64_t n, int64_t width, void* dgate, void* dup, int64_t dstride,
                       void* scaled, float* dots, int threads);
    void (*softmax)(const void* x, int64_t type, const float* by, int64_t n, int64_t width, void* out, float* sums,
                    int threads);
    void (*causal)(const CausalCall&, float* out, float* sums, int threads);
    void (*causal_back)(const CausalCall&, const Heads& grad, const float* out, const float* sums, float* dq, float* dk,
                        float* dv, int threads);
    void (*layers)(const Layer* all, int64_t count, const Step&, int64_t hidden, float* x, int threads);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
