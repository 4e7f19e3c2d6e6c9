// The C interface of the library, for ctypes: which variant runs, and its functions with plain arguments.
#include <cstring>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Kernels* find(const char* isa) {
#ifdef RORQUAL_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16");
    if (avx512 && !std::strcmp(isa, "avx512")) return &kernels_avx512;
    if (avx2 && !std::strcmp(isa, "avx2")) return &kernels_avx2;
#endif
    return std::strcmp(isa, "portable") ? nullptr : &kernels_portable;
}

const Kernels* active = &kernels_portable;

}  // namespace

EXPORT const char* rorqual_source_hash() { return RORQUAL_SOURCE_HASH; }

// Run a variant from now on; 0 where this processor cannot.
EXPORT int rorqual_use(const char* isa) {
    const Kernels* found = find(isa);
    if (found) active = found;
    return found != nullptr;
}

EXPORT void rorqual_linear(const void* w, int64_t rows, int64_t width, int64_t kind, int64_t group, const void* x,
                           int64_t x_type, int64_t x_stride, int64_t n, int64_t matrices, void* y, int64_t threads) {
    active->linear({(const uint8_t*)w, rows, width, kind, group}, x, x_type, x_stride, n, matrices, (float*)y,
                   (int)threads);
}

EXPORT void rorqual_experts(const void* up, const void* down, int64_t hidden, int64_t inner, int64_t kind,
                            int64_t group, const void* x, int64_t x_type, const void* ids, const void* weights,
                            int64_t n, int64_t k, int64_t experts, void* y, int64_t threads) {
    active->experts({(const uint8_t*)up, 2 * inner, hidden, kind, group},
                    {(const uint8_t*)down, hidden, inner, kind, group}, x, x_type, (const int64_t*)ids,
                    (const float*)weights, n, k, experts, (float*)y, (int)threads);
}

EXPORT void rorqual_rows(const void* w, int64_t count, int64_t width, int64_t kind, int64_t group, const void* ids,
                         int64_t n, void* y) {
    active->rows({(const uint8_t*)w, count, width, kind, group}, (const int64_t*)ids, n, (float*)y);
}

EXPORT void rorqual_mla(const void* q, const void* request, const void* length, int64_t n, int64_t heads, float scale,
                        const void* cache, int64_t type, int64_t stride, int64_t block_size, const void* table,
                        int64_t table_width, int64_t rank, int64_t width, void* out, int64_t threads) {
    active->mla({(const float*)q, (const int32_t*)request, (const int32_t*)length, n, heads, scale},
                {cache, type, stride, block_size, (const int32_t*)table, table_width}, rank, width, (float*)out,
                (int)threads);
}

EXPORT void rorqual_gqa(const void* q, const void* request, const void* length, int64_t n, int64_t heads, float scale,
                        const void* keys, const void* values, int64_t type, int64_t stride, int64_t block_size,
                        const void* table, int64_t table_width, int64_t kv_heads, int64_t width, void* out,
                        int64_t threads) {
    active->gqa({(const float*)q, (const int32_t*)request, (const int32_t*)length, n, heads, scale},
                {keys, type, stride, block_size, (const int32_t*)table, table_width},
                {values, type, stride, block_size, (const int32_t*)table, table_width}, kv_heads, width, (float*)out,
                (int)threads);
}

EXPORT void rorqual_rms_norm(const void* x, int64_t type, const void* w, int64_t n, int64_t width, float eps, void* y,
                             int64_t threads) {
    active->rms_norm(x, type, w, n, width, eps, y, (int)threads);
}

EXPORT void rorqual_rope(const void* x, int64_t type, int64_t token_stride, int64_t head_stride, const void* cosine,
                         const void* sine, int64_t period, int64_t n, int64_t heads, int64_t width, int64_t interleaved,
                         void* y, int64_t threads) {
    active->rope(x, type, token_stride, head_stride, (const float*)cosine, (const float*)sine, period, n, heads, width,
                 interleaved, y, (int)threads);
}

EXPORT void rorqual_survey(const void* x, int64_t n, int64_t width, void* best, void* finite) {
    active->survey((const float*)x, n, width, (int64_t*)best, (uint8_t*)finite);
}

EXPORT void rorqual_gated(const void* gate, const void* up, int64_t type, int64_t stride, int64_t n, int64_t width,
                          void* out, int64_t threads) {
    active->gated(gate, up, type, stride, n, width, out, (int)threads);
}

EXPORT void rorqual_gated_back(const void* gate, const void* up, int64_t type, int64_t stride, const void* grad,
                               const void* by, int64_t n, int64_t width, void* dgate, void* dup, int64_t dstride,
                               void* scaled, void* dots, int64_t threads) {
    active->gated_back(gate, up, type, stride, grad, (const float*)by, n, width, dgate, dup, dstride, scaled,
                       (float*)dots, (int)threads);
}

EXPORT void rorqual_softmax(const void* x, int64_t type, const void* by, int64_t n, int64_t width, void* out, void* sums,
                            int64_t threads) {
    active->softmax(x, type, (const float*)by, n, width, out, (float*)sums, (int)threads);
}

EXPORT void rorqual_causal(const void* call, void* out, void* sums, int64_t threads) {
    active->causal(*(const CausalCall*)call, (float*)out, (float*)sums, (int)threads);
}

EXPORT void rorqual_causal_back(const void* call, const void* grad, const void* out, const void* sums, void* dq, void* dk,
                                void* dv, int64_t threads) {
    active->causal_back(*(const CausalCall*)call, *(const Heads*)grad, (const float*)out, (const float*)sums, (float*)dq,
                        (float*)dk, (float*)dv, (int)threads);
}

EXPORT void rorqual_layers(const void* all, int64_t count, const void* step, int64_t hidden, void* x, int64_t threads) {
    active->layers((const Layer*)all, count, *(const Step*)step, hidden, (float*)x, (int)threads);
}

// Bytes of the structures above: the Python side's must agree.
EXPORT int64_t rorqual_layer_bytes() { return sizeof(Layer); }
EXPORT int64_t rorqual_step_bytes() { return sizeof(Step); }
EXPORT int64_t rorqual_causal_bytes() { return sizeof(CausalCall); }
