// What svg2::block_estimates and svg2::first_order_terms share: sums over the keys of every cluster, for all query centroids of a
// head. Query centroids lie in the lanes and keys pass by as rows, as in attention; but here a block of keys is of one cluster,
// and its rows are differences to the means of that cluster.
#pragma once

#include <new>

#include "parallel.h"
#include "strip.h"

namespace svg2 {

// Mirrored in clusters.py. Tensors are contiguous but for Tokens; outputs of the op that is not run are null.
struct ClustersCall {
    Tokens key, value;  // in the order of clusters
    const int32_t* k_offsets;  // [B, Hkv, Ck + 3]
    const float* q_centroids;  // [B, Hq, Cq, D]
    const float* k_centroids;  // [B, Hkv, Ck, D]
    const float* v_centroids;  // [B, Hkv, Ck, Dv]
    const float* outputs;  // [B, Hq, Cq, Dv]: of every query centroid if all clusters are compensated
    float* mass;  // [B, Hq, Cq, Ck + 2]: its logarithm
    float* error;  // [B, Hq, Cq, Ck]: its logarithm
    const float* log_mass;  // [B, Hq, Cq, Ck + 2]
    const uint8_t* block_map;  // [B, Hq, Cq + 2, Ck + 2]
    const float* residual_of_all;  // [B, Hq, Cq, Dv] or null
    float* residual;  // [B, Hq, Cq, Dv]; of all clusters where it is asked for with the estimates, else null
    float* residual_sums;  // [B, Hkv, parts, Hq / Hkv * Cq, Dv], for the estimates Dv + 2: workspace
    float* slope_sums;  // [B, Hkv, parts, D, Dv]: workspace
    float* slope;  // [B, Hkv, D, Dv]
    double scale;
    int64_t batch, q_heads, kv_heads, dim, value_dim, q_clusters, k_clusters, parts, threads;

    // Queries that share a key head lie one after another.
    int64_t queries() const { return q_heads / kv_heads * q_clusters; }
};

// The keys of one head, a block of one cluster at a time, as differences to the means of their clusters.
class Cluster {
  public:
    // key_differences: else the keys themselves.
    Cluster(const ClustersCall& call, int64_t kv_row, bool key_differences, float* floats)
        : call_(call),
          kv_row_(kv_row),
          key_differences_(key_differences),
          columns_(up_to_rows(call.value_dim)),
          keys_(floats),
          values_(floats + KEYS_PER_BLOCK * call.dim),
          zeros_(values_ + KEYS_PER_BLOCK * columns_) {
        std::memset(zeros_, 0, std::max(call.dim, columns_) * sizeof(float));
    }

    static int64_t floats_needed(const ClustersCall& call) {
        const int64_t columns = up_to_rows(call.value_dim);
        return KEYS_PER_BLOCK * (call.dim + columns) + std::max(call.dim, columns);
    }

    int64_t first(int64_t cluster) const { return call_.k_offsets[kv_row_ * (call_.k_clusters + 3) + cluster]; }
    int64_t size(int64_t cluster) const { return first(cluster + 1) - first(cluster); }
    const float* key_mean(int64_t cluster) const {
        return call_.k_centroids + (kv_row_ * call_.k_clusters + cluster) * call_.dim;
    }
    const float* value_mean(int64_t cluster) const {
        return call_.v_centroids + (kv_row_ * call_.k_clusters + cluster) * call_.value_dim;
    }

    // Keys from position `at` of a cluster on, as many as there are or a block holds. They are there until others are read; the
    // same ones are not read again.
    const KeyBlock& read(int64_t cluster, int64_t at) {
        KeyBlock& block = block_;
        if (cluster == cluster_ && at == at_) return block;
        const int64_t b = kv_row_ / call_.kv_heads, g = kv_row_ % call_.kv_heads;
        cluster_ = cluster;
        at_ = at;
        block.count = std::min<int64_t>(KEYS_PER_BLOCK, size(cluster) - at);
        for (int64_t i = 0; i < up_to_rows(block.count); ++i) {
            float *key = keys_ + i * call_.dim, *value = values_ + i * columns_;
            block.bias[i] = 0.0f;
            block.keys[i] = i < block.count ? key : zeros_;
            block.values[i] = i < block.count ? value : zeros_;
            if (i >= block.count) continue;
            const int64_t token = first(cluster) + at + i, ahead = token + KEYS_PER_BLOCK;
            if (ahead < first(call_.k_clusters)) {
                prefetch(call_.key.row(b, g, ahead), call_.dim * call_.key.bytes_per_element());
                prefetch(call_.value.row(b, g, ahead), call_.value_dim * call_.value.bytes_per_element());
            }
            const float* row = as_floats(call_.key.row(b, g, token), call_.key.type, call_.dim, key);
            if (key_differences_) subtract(row, key_mean(cluster), call_.dim, key);
            else block.keys[i] = row;
            row = as_floats(call_.value.row(b, g, token), call_.value.type, call_.value_dim, value);
            subtract(row, value_mean(cluster), call_.value_dim, value);
            std::fill(value + call_.value_dim, value + columns_, 0.0f);
        }
        return block;
    }

  private:
    static void subtract(const float* row, const float* mean, int64_t length, float* to) {
        for (int64_t d = 0; d < length; ++d) to[d] = row[d] - mean[d];
    }

    const ClustersCall& call_;
    const int64_t kv_row_;
    const bool key_differences_;
    const int64_t columns_;
    float *keys_, *values_, *zeros_;
    KeyBlock block_;
    int64_t cluster_ = -1, at_ = -1;  // where block_ is from
};

constexpr int64_t STRIPS_AT_ONCE = 6;  // that share what a Cluster reads

// A strip of query centroids of one key head, and where it stands in the tensors.
struct QueryStrip {
    int64_t first, rows;  // of all queries of the key head
    int vectors;
    float* queries;  // [D][strip], times the scale

    int64_t width() const { return vectors * LANES; }
};

// Rows of a contiguous tensor [.., Cq, length] that belong to the queries of a key head.
template <class T>
T* rows_of_head(T* tensor, const ClustersCall& call, int64_t kv_row, int64_t length) {
    return tensor + kv_row * call.queries() * length;
}

// What a query of a key head selects, [Ck + 2].
inline const uint8_t* map_row(const ClustersCall& call, int64_t kv_row, int64_t query) {
    const int64_t q_row = kv_row * (call.q_heads / call.kv_heads) + query / call.q_clusters;
    return call.block_map + (q_row * (call.q_clusters + 2) + query % call.q_clusters) * (call.k_clusters + 2);
}

inline QueryStrip read_strip(const ClustersCall& call, int64_t kv_row, int64_t first, int most_vectors, float* by_row, float* to) {
    const int64_t left = call.queries() - first;
    const int64_t vectors = std::min<int64_t>(most_vectors, (left + LANES - 1) / LANES);
    const QueryStrip strip{first, std::min(left, vectors * LANES), (int)vectors, to};
    const float* centroids = rows_of_head(call.q_centroids, call, kv_row, call.dim);
    const auto row_of = [&](int64_t lane) { return (const char*)(centroids + (first + lane) * call.dim); };
    read_lanes(row_of, strip.rows, strip.width(), FLOAT32, call.dim, (float)call.scale, by_row, to);
    return strip;
}

}  // namespace svg2
