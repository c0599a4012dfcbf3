// The two matrix products of attention, as register tiles. Queries lie in the lanes: a strip of them is stored transposed,
// [D][strip], and keys and values are read row by row, one number broadcast at a time. So keys need no packing and no
// padding, wherever their rows are; the softmax over keys is a loop with no step across lanes; and the result of one product
// has the layout that the next one reads.
//
// What lies in the lanes is read once for all ROWS: with an operand in memory in each multiply-add, as compilers like to have
// it, loads and not multiplications are what a core has too few of.
#pragma once

#include "vector.h"

namespace svg2 {

// Rows of keys, or columns of values, in a register tile; and vectors of queries in the widest strip. ROWS * VECTORS sums,
// VECTORS operands and one broadcast fill the registers: 32 of AVX-512 and NEON, 16 of AVX2.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8, VECTORS = 3;
#else
constexpr int ROWS = 4, VECTORS = 3;
#endif

// sum[r][strip] = bias[r] + sum_d rows[r][d] * queries[d][strip], for ROWS rows.
template <int V>
SVG2_INLINE void products_of_rows(
    const float* const* rows, const float* bias, const float* queries, int64_t dim, Vec (&sum)[ROWS][V]) {
    const float* row[ROWS];
    SVG2_UNROLL for (int r = 0; r < ROWS; ++r) {
        row[r] = rows[r];
        SVG2_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = broadcast(bias[r]);
    }
    for (int64_t d = 0; d < dim; ++d) {
        Vec query[V];
        SVG2_UNROLL for (int v = 0; v < V; ++v) query[v] = in_register(load(queries + (d * V + v) * LANES));
        SVG2_UNROLL for (int r = 0; r < ROWS; ++r) {
            const Vec x = broadcast(row[r][d]);
            SVG2_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += x * query[v];
        }
    }
}

// The same into memory, [r][strip]; largest[v] becomes the largest of what it was and all of them.
template <int V>
SVG2_INLINE void scores_of_rows(
    const float* const* rows, const float* bias, const float* queries, int64_t dim, float* scores, Vec* largest) {
    Vec sum[ROWS][V];
    products_of_rows<V>(rows, bias, queries, dim, sum);
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        Vec most = largest[v];
        SVG2_UNROLL for (int r = 0; r < ROWS; ++r) {
            store(scores + (r * V + v) * LANES, sum[r][v]);
            most = larger(sum[r][v], most);
        }
        largest[v] = most;
    }
}

// out[c][strip] = factor * out[c][strip] + sum_t rows[t][column + c] * weights[t][strip], for ROWS columns c.
template <int V>
SVG2_INLINE void add_weighted_columns(
    const float* const* rows, int64_t count, const float* weights, int64_t column, const Vec* factor, float* out) {
    Vec sum[ROWS][V];
    SVG2_UNROLL for (int c = 0; c < ROWS; ++c) {
        SVG2_UNROLL for (int v = 0; v < V; ++v) sum[c][v] = load(out + (c * V + v) * LANES) * factor[v];
    }
    for (int64_t t = 0; t < count; ++t) {
        const float* row = rows[t] + column;
        Vec weight[V];
        SVG2_UNROLL for (int v = 0; v < V; ++v) weight[v] = in_register(load(weights + (t * V + v) * LANES));
        SVG2_UNROLL for (int c = 0; c < ROWS; ++c) {
            const Vec x = broadcast(row[c]);
            SVG2_UNROLL for (int v = 0; v < V; ++v) sum[c][v] += x * weight[v];
        }
    }
    SVG2_UNROLL for (int c = 0; c < ROWS; ++c) {
        SVG2_UNROLL for (int v = 0; v < V; ++v) store(out + (c * V + v) * LANES, sum[c][v]);
    }
}

}  // namespace svg2
