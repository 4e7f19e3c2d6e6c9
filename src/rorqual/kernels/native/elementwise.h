// RMSNorm and rotary embedding in one call each: as torch operations, ten small calls whose dispatch is most of their
// time when one token is decoded.
#pragma once

#include <cmath>

#include "scratch.h"

namespace {

inline void put_any(void* y, int64_t type, int64_t i, float value) {
    if (type == FLOAT32) {
        ((float*)y)[i] = value;
        return;
    }
    uint16_t rounded[16];
    store_bf16(rounded, set1(value));
    ((uint16_t*)y)[i] = rounded[0];
}

inline void put(void* y, int64_t type, int64_t i, F value) {
    if (type == FLOAT32)
        store((float*)y + i, value);
    else
        store_bf16((uint16_t*)y + i, value);
}

// `count` values; `from` has room for whole vectors.
inline void put_group(void* y, int64_t type, int64_t i, int64_t count, const float* from) {
    for (; count >= 16; count -= 16, i += 16, from += 16) put(y, type, i, load(from));
    if (!count) return;
    if (type == FLOAT32) {
        std::memcpy((float*)y + i, from, count * sizeof(float));
    } else {
        uint16_t rounded[16];
        store_bf16(rounded, load(from));
        std::memcpy((uint16_t*)y + i, rounded, count * sizeof(uint16_t));
    }
}

inline F through(int64_t type, F x) {
    if (type == FLOAT32) return x;
    uint16_t rounded[16];
    store_bf16(rounded, x);
    return load_bf16(rounded);
}

// y = round(x / rms(x)) * w in rows of `width`; all of one type.
void rms_norm(const void* x, int64_t type, const void* w, int64_t n, int64_t width, float eps, void* y, int threads) {
    if (n * width < SMALL) threads = 1;
    const int64_t whole = width / 16 * 16;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = i * width;
        F squares = zero();
        for (int64_t c = 0; c < whole; c += 16) squares = fma(load_any(x, type, at + c), load_any(x, type, at + c), squares);
        float total = sum(squares);
        for (int64_t c = whole; c < width; c++) total += one(x, type, at + c) * one(x, type, at + c);
        const float by = 1.0f / std::sqrt(total / (float)width + eps);
        for (int64_t c = 0; c < whole; c += 16) {
            const F v = mul(through(type, mul(load_any(x, type, at + c), set1(by))), load_any(w, type, c));
            put(y, type, at + c, v);
        }
        for (int64_t c = whole; c < width; c++) {
            float normed[16];
            store(normed, through(type, set1(one(x, type, at + c) * by)));
            put_any(y, type, at + c, normed[0] * one(w, type, c));
        }
    }
}

// One row of pairs (2i, 2i + 1); c and s [width padded to 16] hold each pair's cosine twice, and its sine, first negated.
inline void rotate_pairs(const void* x, int64_t type, int64_t from, const float* c, const float* s, int64_t width, void* y,
                         int64_t to) {
    for (int64_t j = 0; j < width; j += 16) {
        const int64_t some = least(16, width - j);
        alignas(64) float part[16];
        if (some < 16) load_group(x, type, from + j, some, 16, part);
        const F v = some < 16 ? load(part) : load_any(x, type, from + j);
        const F turned = add(mul(v, load(c + j)), mul(swap_pairs(v), load(s + j)));
        if (some < 16) {
            store(part, turned);
            put_group(y, type, to + j, some, part);
        } else {
            put(y, type, to + j, turned);
        }
    }
}

// One row of pairs (i, i + half).
inline void rotate_halves(const void* x, int64_t type, int64_t from, const float* c, const float* s, int64_t half, void* y,
                          int64_t to) {
    for (int64_t j = 0; j < half; j += 16) {
        const int64_t some = least(16, half - j);
        alignas(64) float a[16], b[16], cosines[16], sines[16];
        load_group(x, type, from + j, some, 16, a);
        load_group(x, type, from + j + half, some, 16, b);
        load_group(c, FLOAT32, j, some, 16, cosines);
        load_group(s, FLOAT32, j, some, 16, sines);
        const F first = sub(mul(load(a), load(cosines)), mul(load(b), load(sines)));
        const F second = add(mul(load(b), load(cosines)), mul(load(a), load(sines)));
        store(a, first);
        store(b, second);
        put_group(y, type, to + j, some, a);
        put_group(y, type, to + j + half, some, b);
    }
}

// Rotates [n, heads, width] by cos, sin [period, width / 2], over and over: pairs (2i, 2i + 1), or (i, i + width / 2).
// Strides in values.
void rope(const void* x, int64_t type, int64_t token_stride, int64_t head_stride, const float* cosine,
          const float* sine, int64_t period, int64_t n, int64_t heads, int64_t width, int64_t interleaved, void* y, int threads) {
    if (n * heads * width < SMALL) threads = 1;
    const int64_t half = width / 2, padded = up_to(width, 16);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        static thread_local Scratch twice_kept;
        const float *c = cosine + i % period * half, *s = sine + i % period * half;
        float *twice = twice_kept.take<float>(2 * padded), *signs = twice + padded;
        for (int64_t j = 0; interleaved && j < half; j++) {
            twice[2 * j] = twice[2 * j + 1] = c[j];
            signs[2 * j] = -s[j], signs[2 * j + 1] = s[j];
        }
        for (int64_t j = width; j < padded; j++) twice[j] = signs[j] = 0;
        for (int64_t h = 0; h < heads; h++) {
            const int64_t from = i * token_stride + h * head_stride, to = (i * heads + h) * width;
            if (interleaved)
                rotate_pairs(x, type, from, twice, signs, width, y, to);
            else
                rotate_halves(x, type, from, c, s, half, y, to);
        }
    }
}

// For each row of x [n, width]: the place of its first largest value, and whether all are finite.
void survey(const float* x, int64_t n, int64_t width, int64_t* best, uint8_t* finite) {
    const int64_t whole = width / 16 * 16;
    for (int64_t i = 0; i < n; i++, x += width) {
        F top = set1(-INFINITY), poison = zero();
        for (int64_t c = 0; c < whole; c += 16) {
            top = max(top, load(x + c));
            poison = fma(load(x + c), zero(), poison);  // NaN where a value is NaN or infinite, else 0
        }
        float most = highest(top), off = sum(poison);
        for (int64_t c = whole; c < width; c++) most = x[c] > most ? x[c] : most, off += x[c] * 0.0f;
        finite[i] = off == 0.0f;
        best[i] = 0;
        if (finite[i])
            while (x[best[i]] != most) best[i]++;
    }
}

}  // namespace
