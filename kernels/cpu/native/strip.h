// Attention of one strip of queries to one block of keys after another: scores, online softmax and weighted values, with
// all state in the lanes of the strip.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace svg2 {

constexpr int KEYS_PER_BLOCK = 64;  // a multiple of ROWS; scores and rows of a block stay in the first-level cache
constexpr double LN_2 = 0.6931471805599453;

// A block of keys with their values: rows of float32, where they are or converted. After the last key come rows of zeros with
// a bias of -inf, up to a multiple of ROWS.
struct KeyBlock {
    const float* keys[KEYS_PER_BLOCK];
    const float* values[KEYS_PER_BLOCK];
    float bias[KEYS_PER_BLOCK];
    int64_t count = 0;
};

// The rows of a block that is attended to next: fetched into the second-level cache a few at a time while the products of this
// one are computed. All at once, they would wait for each other.
struct Upcoming {
    const KeyBlock* block;  // null: nothing to fetch
    int64_t key_bytes, value_bytes;  // of a row

    SVG2_INLINE void fetch(int64_t first) const {
        if (block == nullptr) return;
        for (int64_t i = first; i < std::min<int64_t>(first + ROWS, block->count); ++i) {
            for (int64_t at = 0; at < key_bytes; at += 64) __builtin_prefetch((const char*)block->keys[i] + at, 0, 2);
            for (int64_t at = 0; at < value_bytes; at += 64) __builtin_prefetch((const char*)block->values[i] + at, 0, 2);
        }
    }
};

// The state of a strip of up to VECTORS vectors of queries.
struct Strip {
    int vectors;
    float* queries;   // [D][strip], times the scale
    float* out;       // [Dv, up to a multiple of ROWS][strip]
    Vec shift[VECTORS];    // the largest score so far, in powers of 2: what exponents are relative to
    Vec total[VECTORS];    // sum of 2^(score - shift)
    Vec before[VECTORS];   // the part of total that came before mark_skipped

    void clear(int64_t value_columns) {
        for (int v = 0; v < VECTORS; ++v) {
            shift[v] = broadcast(-__builtin_inff());
            total[v] = before[v] = Vec{};
        }
        std::memset(out, 0, value_columns * vectors * LANES * sizeof(float));
    }
    // From here on, keys are means of skipped clusters.
    void mark_skipped() {
        for (int v = 0; v < VECTORS; ++v) before[v] = total[v];
    }
};

// Scores of a block in [key][strip], turned into weights relative to the new shift. factor: what turns sums relative to the old
// shift into sums relative to the new one.
template <int V>
SVG2_INLINE void weights_of_block(Strip& strip, const KeyBlock& block, int64_t dim, const Upcoming& upcoming, float* weights, Vec* factor) {
    Vec largest[V], shift[V], sum[V];
    SVG2_UNROLL for (int v = 0; v < V; ++v) largest[v] = broadcast(-__builtin_inff());
    for (int64_t key = 0; key < block.count; key += ROWS) {
        upcoming.fetch(key);
        scores_of_rows<V>(
            block.keys + key, block.bias + key, strip.queries, dim, weights + key * V * LANES, largest);
    }
    const Vec lowest = broadcast(-__builtin_inff());
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        const Vec most = larger(largest[v] * broadcast(LOG2_E), strip.shift[v]);
        // As long as all scores are -inf, their weights are 0 and not 2^(-inf + inf).
        shift[v] = most == lowest ? Vec{} : most;
        factor[v] = strip.shift[v] - shift[v];
        strip.shift[v] = most;
        sum[v] = Vec{};
    }
    exp2<V>(factor);
    for (int64_t key = 0; key < block.count; key += 2) {  // of the zeros up to a multiple of ROWS, the weights are 0
        Vec weight[2 * V];
        float* at = weights + key * V * LANES;
        SVG2_UNROLL for (int i = 0; i < 2 * V; ++i) {
            weight[i] = rounded(load(at + i * LANES) * broadcast(LOG2_E)) - shift[i % V];
        }
        exp2<2 * V>(weight);
        SVG2_UNROLL for (int i = 0; i < 2 * V; ++i) {
            store(at + i * LANES, weight[i]);
            sum[i % V] += weight[i];
        }
    }
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        strip.total[v] = strip.total[v] * factor[v] + sum[v];
        strip.before[v] = strip.before[v] * factor[v];
    }
}

template <int V>
void attend_to_block(
    Strip& strip, const KeyBlock& block, int64_t dim, int64_t value_columns, const Upcoming& upcoming, float* weights) {
    Vec factor[V];
    weights_of_block<V>(strip, block, dim, upcoming, weights, factor);
    for (int64_t column = 0; column < value_columns; column += ROWS) {
        add_weighted_columns<V>(block.values, block.count, weights, column, factor, strip.out + column * V * LANES);
    }
}

// The first-order terms of a strip: out += skipped * (residual + (q - centroid) G), where G and residual lie as rows of
// "values" and the queries less the centroid are their "weights". inverse_scale takes the scale out of the queries again.
template <int V>
void add_first_order(
    Strip& strip, const float* centroid, const float* const* rows, float inverse_scale, int64_t dim,
    int64_t value_columns, float* weights) {
    Vec skipped[V], one[V];
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        skipped[v] = strip.total[v] - strip.before[v];
        one[v] = broadcast(1.0f);
        store(weights + v * LANES, skipped[v]);
    }
    for (int64_t d = 0; d < dim; ++d) {
        SVG2_UNROLL for (int v = 0; v < V; ++v) {
            const Vec away = load(strip.queries + (d * V + v) * LANES) * inverse_scale - centroid[d];
            store(weights + ((d + 1) * V + v) * LANES, away * skipped[v]);
        }
    }
    for (int64_t column = 0; column < value_columns; column += ROWS) {
        add_weighted_columns<V>(rows, dim + 1, weights, column, one, strip.out + column * V * LANES);
    }
}

}  // namespace svg2
