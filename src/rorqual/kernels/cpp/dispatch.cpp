// The C interface of the library: which variant this processor runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static const Kernels* pick() {
#ifdef RORQUAL_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512bf16");
    if (avx2 && avx512) return &kernels_avx512;
    if (avx2) return &kernels_avx2;
#endif
    return &kernels_portable;
}

static const Kernels* active = pick();

EXPORT const char* rorqual_isa() { return active->isa; }
EXPORT const char* rorqual_source_hash() { return RORQUAL_SOURCE_HASH; }
