// All layers of a packed model over a few rows in one call: the same kernels in the same order as the modules of
// rorqual/model call them one by one, whose dispatch takes as long as the work where one token is decoded.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "quantised.h"

#include <initializer_list>
#include <utility>

namespace {

inline void add_to(float* y, const float* x, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(y + i, add(load(y + i), load(x + i)));
    for (; i < count; i++) y[i] += x[i];
}

inline void norm(const float* x, const float* w, int64_t n, int64_t width, float eps, float* y) {
    rms_norm(x, FLOAT32, w, n, width, eps, y, 1);
}

// Each y [n, w.rows] = x [n, w.width] times w, and the bias where there is one.
inline void project(std::initializer_list<std::pair<const Packed&, float*>> all, const float* x, int64_t n, int threads) {
    Product some[SIDE_BY_SIDE];
    int count = 0;
    for (const auto& [p, y] : all) some[count++] = {p.w, 1, x, p.w.width, y};
    products(some, count, FLOAT32, n, threads);
    for (const auto& [p, y] : all)
        if (p.bias)
            for (int64_t i = 0; i < n; i++) add_to(y + i * p.w.rows, p.bias, p.w.rows);
}

// Rows of a cache are float32 or bfloat16.
inline void keep(const float* x, int64_t width, const Rows& rows, int64_t slot) {
    uint8_t* to = rows.data + slot * rows.stride;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) put(to, rows.type, i, load(x + i));
    for (; i < width; i++) put_any(to, rows.type, i, x[i]);
}

inline PagedCache seen(const Rows& rows, const Step& s) {
    return {rows.data, rows.type, rows.stride, s.block_size, s.table, s.table_width};
}

// Positions of the `count` largest of `from` [n] that are not barred, one after the other; NaN loses against numbers.
inline void largest(const float* from, int64_t n, int64_t count, bool* barred, int64_t* out) {
    for (int64_t j = 0; j < count; j++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (!barred[i] && (best < 0 || from[i] > from[best] || from[best] != from[best])) best = i;
        barred[out[j] = best] = true;
    }
}

// The router's choice for one row of logits [E] (rorqual/model/moe.py: Router).
inline void choose_experts(const Router& r, float* scores, int64_t* ids, float* weights) {
    static thread_local Scratch choice_kept, barred_kept, groups_kept;
    const int64_t size = r.experts / r.groups;
    float *choice = choice_kept.take<float>(r.experts), *of_group = groups_kept.take<float>(2 * r.groups);
    bool* barred = barred_kept.take<bool>(r.experts + r.groups);
    int64_t i = 0;
    if (r.softmax) {
        float top = scores[0], total = 0;
        for (int64_t e = 1; e < r.experts; e++) top = scores[e] > top ? scores[e] : top;
        for (int64_t e = 0; e < r.experts; e++) total += scores[e] = std::exp(scores[e] - top);
        for (int64_t e = 0; e < r.experts; e++) scores[e] /= total;
    } else {
        for (; i < r.experts; i++) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    }
    for (int64_t e = 0; e < r.experts; e++) choice[e] = scores[e] + (r.bias ? r.bias[e] : 0.0f), barred[e] = false;
    if (r.kept_groups < r.groups) {
        bool* out = barred + r.experts;
        for (int64_t g = 0; g < r.groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; e++) {
                if (choice[e] > first)
                    second = first, first = choice[e];
                else if (choice[e] > second)
                    second = choice[e];
            }
            of_group[g] = r.bias ? first + second : first;
            out[g] = false;
        }
        largest(of_group, r.groups, r.kept_groups, out, ids);
        for (int64_t e = 0; e < r.experts; e++) barred[e] = !out[e / size];
    }
    largest(choice, r.experts, r.chosen, barred, ids);
    float total = 0;
    for (int64_t k = 0; k < r.chosen; k++) total += weights[k] = scores[ids[k]];
    const float by = r.scaled ? r.scale : 1.0f;
    for (int64_t k = 0; k < r.chosen; k++) weights[k] = (r.normalised ? weights[k] / (total + 1e-20f) : weights[k]) * by;
}

// x + what the latents give: normed [n, hidden] → out [n, hidden].
void latent_attention(const Layer& l, const Step& s, const float* normed, float* out, int threads) {
    static thread_local Scratch q_kept, low_kept, kv_kept, rope_kept, nope_kept, wide_kept, found_kept, values_kept;
    const int64_t n = s.n, heads = l.heads, nope = l.nope, rot = l.rotary, rank = l.rank, qk = nope + rot;
    float* q = q_kept.take<float>(n * heads * qk);
    float *kv = kv_kept.take<float>(n * (2 * rank + 3 * rot)), *latent = kv + n * (rank + rot), *key = latent + n * rank;
    if (l.q_low.w.rows) {
        const int64_t low = l.q_low.w.rows;
        float* compressed = low_kept.take<float>(2 * n * low);
        project({{l.q_low, compressed}, {l.kv, kv}}, normed, n, threads);
        norm(compressed, l.q_low_norm, n, low, l.latent_eps, compressed + n * low);
        project({{l.q, q}}, compressed + n * low, n, threads);
    } else {
        project({{l.q, q}, {l.kv, kv}}, normed, n, threads);
    }
    if (l.q_norm) {
        float* normed_q = rope_kept.take<float>(n * heads * qk);
        norm(q, l.q_norm, n * heads, qk, l.eps, normed_q);
        std::memcpy(q, normed_q, n * heads * qk * sizeof(float));
        float* normed_key = key + n * rot;
        for (int64_t i = 0; i < n; i++) {
            float* own = kv + i * (rank + rot) + rank;
            norm(own, l.k_norm, 1, rot, l.eps, normed_key);
            std::memcpy(own, normed_key, rot * sizeof(float));
        }
    }
    for (int64_t i = 0; i < n; i++) norm(kv + i * (rank + rot), l.kv_norm, 1, rank, l.latent_eps, latent + i * rank);
    rope(kv + rank, FLOAT32, rank + rot, rot, s.cosine, s.sine, n, n, 1, rot, l.interleaved, key, 1);
    float row[4096];
    for (int64_t i = 0; i < n; i++) {
        std::memcpy(row, latent + i * rank, rank * sizeof(float));
        std::memcpy(row + rank, key + i * rot, rot * sizeof(float));
        keep(row, rank + rot, l.keys, s.slots[i]);
    }
    float* turned = rope_kept.take<float>(n * heads * rot);
    rope(q + nope, FLOAT32, heads * qk, qk, s.cosine, s.sine, n, n, heads, rot, l.interleaved, turned, 1);
    float* plain = nope_kept.take<float>(n * heads * nope);
    for (int64_t i = 0; i < n * heads; i++) std::memcpy(plain + i * nope, q + i * qk, nope * sizeof(float));
    float *wide = wide_kept.take<float>(n * heads * (2 * rank + rot)), *query = wide + n * heads * rank;
    linear(l.absorbed_keys.w, plain, FLOAT32, heads * nope, n, heads, wide, threads);
    for (int64_t i = 0; i < n * heads; i++) {
        std::memcpy(query + i * (rank + rot), wide + i * rank, rank * sizeof(float));
        std::memcpy(query + i * (rank + rot) + rank, turned + i * rot, rot * sizeof(float));
    }
    float* found = found_kept.take<float>(n * heads * rank);
    mla({query, s.request, s.length, n, heads, l.scale}, seen(l.keys, s), rank, rank + rot, found, threads);
    float* values = values_kept.take<float>(n * l.out.w.width);
    linear(l.absorbed_values.w, found, FLOAT32, heads * rank, n, heads, values, threads);
    project({{l.out, out}}, values, n, threads);
}

void grouped_attention(const Layer& l, const Step& s, const float* normed, float* out, int threads) {
    static thread_local Scratch q_kept, k_kept, v_kept, found_kept;
    const int64_t n = s.n, heads = l.heads, kv_heads = l.kv_heads, width = l.rotary;
    float *q = q_kept.take<float>(2 * n * heads * width), *turned = q + n * heads * width;
    float *k = k_kept.take<float>(2 * n * kv_heads * width), *key = k + n * kv_heads * width;
    float* v = v_kept.take<float>(n * kv_heads * width);
    project({{l.q, q}, {l.kv, k}, {l.v, v}}, normed, n, threads);
    if (l.q_norm) {
        norm(q, l.q_norm, n * heads, width, l.eps, turned);
        norm(k, l.k_norm, n * kv_heads, width, l.eps, key);
        std::memcpy(q, turned, n * heads * width * sizeof(float));
        std::memcpy(k, key, n * kv_heads * width * sizeof(float));
    }
    rope(q, FLOAT32, heads * width, width, s.cosine, s.sine, n, n, heads, width, 0, turned, 1);
    rope(k, FLOAT32, kv_heads * width, width, s.cosine, s.sine, n, n, kv_heads, width, 0, key, 1);
    for (int64_t i = 0; i < n; i++) {
        keep(key + i * kv_heads * width, kv_heads * width, l.keys, s.slots[i]);
        keep(v + i * kv_heads * width, kv_heads * width, l.values, s.slots[i]);
    }
    float* found = found_kept.take<float>(n * heads * width);
    gqa({turned, s.request, s.length, n, heads, l.scale}, seen(l.keys, s), seen(l.values, s), kv_heads, width, found,
        threads);
    project({{l.out, out}}, found, n, threads);
}

// One expert that every row chooses.
inline void dense(const Pair& p, const float* x, int64_t n, float* out, int threads) {
    static thread_local Scratch ids_kept, ones_kept;
    int64_t* ids = ids_kept.take<int64_t>(n);
    float* ones = ones_kept.take<float>(n);
    for (int64_t i = 0; i < n; i++) ids[i] = 0, ones[i] = 1;
    experts(p.up, p.down, x, FLOAT32, ids, ones, n, 1, 1, out, threads);
}

// `chosen` [n, chosen experts]: filled where it is wanted.
void feed_forward(const Layer& l, const float* normed, int64_t n, float* out, int64_t* chosen, int threads) {
    static thread_local Scratch logits_kept, ids_kept, weights_kept, shared_kept;
    const Router& r = l.router;
    if (!r.experts) return dense(l.mlp, normed, n, out, threads);
    const int64_t hidden = l.mlp.down.rows, pairs = n * r.experts;
    float *logits = logits_kept.take<float>(pairs), *weights = weights_kept.take<float>(n * r.chosen);
    int64_t* ids = ids_kept.take<int64_t>(n * most(r.chosen, r.groups));
    const int alone = pairs * hidden < SMALL ? 1 : threads;
#pragma omp parallel for num_threads(alone)
    for (int64_t i = 0; i < pairs; i++)
        logits[i] = dot(normed + i / r.experts * hidden, r.weight + i % r.experts * hidden, hidden);
    for (int64_t i = 0; i < n; i++)
        choose_experts(r, logits + i * r.experts, ids + i * r.chosen, weights + i * r.chosen);
    if (chosen) std::memcpy(chosen, ids, n * r.chosen * sizeof(int64_t));
    experts(l.mlp.up, l.mlp.down, normed, FLOAT32, ids, weights, n, r.chosen, r.experts, out, threads);
    if (l.shared.down.rows) {
        float* shared = shared_kept.take<float>(n * hidden);
        dense(l.shared, normed, n, shared, threads);
        add_to(out, shared, n * hidden);
    }
}

// x [n, hidden] through every layer, in place.
void layers(const Layer* all, int64_t count, const Step& s, int64_t hidden, float* x, int threads) {
    static thread_local Scratch normed_kept, out_kept;
    float *normed = normed_kept.take<float>(s.n * hidden), *out = out_kept.take<float>(s.n * hidden);
    int64_t* chosen = s.chosen;
    for (const Layer* l = all; l < all + count; l++) {
        norm(x, l->in_norm, s.n, hidden, l->eps, normed);
        (l->rank ? latent_attention : grouped_attention)(*l, s, normed, out, threads);
        add_to(x, out, s.n * hidden);
        norm(x, l->post_norm, s.n, hidden, l->eps, normed);
        feed_forward(*l, normed, s.n, out, chosen, threads);
        if (chosen && l->router.experts) chosen += s.n * l->router.chosen;
        add_to(x, out, s.n * hidden);
    }
}

}  // namespace
