// Sixteen floats at a time in plain C++, for any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct F {
    float v[16];
};
constexpr bool BF16_PAIRS = false;
constexpr int ROWS = 4;
constexpr int KEYS = 2;
constexpr int HEADS = 2;
constexpr int SUMS = 4;            // vectors that stay in registers while a product is added up

template <class Op>
inline F each(Op op) {
    F r;
    for (int i = 0; i < 16; i++) r.v[i] = op(i);
    return r;
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) return from_bits(sign | 0x3f800000u) * (float)mantissa * 5.9604644775390625e-8f;  // 2^-24
    return from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline F zero() { return F{}; }
inline F set1(float x) { return each([&](int) { return x; }); }
inline F load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline F add(F x, F y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
inline F sub(F x, F y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
inline F mul(F x, F y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
inline F div(F x, F y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
inline F fma(F x, F y, F z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline F max(F x, F y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline F abs(F x) { return each([&](int i) { return std::fabs(x.v[i]); }); }

inline F swap_pairs(F x) { return each([&](int i) { return x.v[i ^ 1]; }); }  // 1, 0, 3, 2, …
inline float sum(F x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x.v[i] += x.v[i + half];
    return x.v[0];
}

inline float highest(F x) {
    float top = x.v[0];
    for (float y : x.v) top = y > top ? y : top;
    return top;
}

inline F load_half(const uint16_t* p) { return each([&](int i) { return half_to_float(p[i]); }); }
inline F load_bf16(const uint16_t* p) { return each([&](int i) { return from_bits((uint32_t)p[i] << 16); }); }
inline void store_bf16(uint16_t* p, F x) {
    for (int i = 0; i < 16; i++) p[i] = to_bf16(x.v[i]);
}
inline F load_int8(const int8_t* p) { return each([&](int i) { return (float)p[i]; }); }
inline void store_int8(int8_t* p, F x) {
    for (int i = 0; i < 16; i++) p[i] = (int8_t)std::nearbyintf(x.v[i]);
}
inline F exp(F x) { return each([&](int i) { return std::exp(x.v[i]); }); }

}  // namespace
