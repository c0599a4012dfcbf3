// What a call of block-sparse attention is given, mirrored in attention.py.
#pragma once

#include "rows.h"

namespace svg2 {

// Tensors are contiguous but for Tokens. Where compensation is off, the pointers of what only it needs are null.
struct AttentionCall {
    Tokens query, key, value, out;
    float* lse;  // [B, Hq, Nq]
    const int32_t* q_offsets;  // [B, Hq, Cq + 3]
    const int32_t* k_offsets;  // [B, Hkv, Ck + 3]
    const uint8_t* block_map;  // [B, Hq, Cq + 2, Ck + 2]
    const int32_t* q_order;  // [B, Hq, Nq] or null
    const int32_t* k_order;  // [B, Hkv, Nk] or null
    const float* k_centroids;  // [B, Hkv, Ck, D] or null: no compensation
    const float* v_centroids;  // [B, Hkv, Ck, Dv]
    const float* q_centroids;  // [B, Hq, Cq, D] or null: not of first order
    const float* log_mass;  // [B, Hq, Cq, Ck + 2]
    const float* residual;  // [B, Hq, Cq, Dv]
    const float* slope;  // [B, Hkv, D, Dv]
    double scale;
    int64_t batch, q_heads, kv_heads, num_queries, num_keys, dim, value_dim, q_clusters, k_clusters;
    int64_t threads;
};

}  // namespace svg2
