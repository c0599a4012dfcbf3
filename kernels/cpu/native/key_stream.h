// The keys of one query block, block by block: runs of tokens of the selected clusters where they lie, then the means of the
// skipped ones.
#pragma once

#include <algorithm>

#include "attention.h"
#include "strip.h"

namespace svg2 {

// One query block of one head: which clusters it selects, and what it knows of those that it skips.
struct QueryBlock {
    int64_t batch, head, block;

    int64_t kv_head(const AttentionCall& call) const { return head / (call.q_heads / call.kv_heads); }
    int64_t q_row(const AttentionCall& call) const { return batch * call.q_heads + head; }
    int64_t kv_row(const AttentionCall& call) const { return batch * call.kv_heads + kv_head(call); }
    const uint8_t* selected(const AttentionCall& call) const {
        return call.block_map + (q_row(call) * (call.q_clusters + 2) + block) * (call.k_clusters + 2);
    }
    const int32_t* k_bounds(const AttentionCall& call) const {
        return call.k_offsets + kv_row(call) * (call.k_clusters + 3);
    }
    // Context and null blocks have no centroid: first-order compensation leaves them alone.
    bool compensated(const AttentionCall& call) const {
        return call.k_centroids != nullptr && (call.q_centroids == nullptr || block < call.q_clusters);
    }
};

class KeyStream {
  public:
    // floats: room for floats_needed(call), of the thread.
    KeyStream(const AttentionCall& call, const QueryBlock& of, float* floats)
        : call_(call),
          of_(of),
          selected_(of.selected(call)),
          bounds_(of.k_bounds(call)),
          keys_(floats),
          values_(keys_ + KEYS_PER_BLOCK * call.dim),
          zeros_(values_ + KEYS_PER_BLOCK * up_to_rows(call.value_dim)) {
        const int64_t kv_head = of.kv_head(call);
        key_rows_ = call.key.row(of.batch, kv_head, 0);
        value_rows_ = call.value.row(of.batch, kv_head, 0);
        key_bytes_ = call.key.token_stride * call.key.bytes_per_element();
        value_bytes_ = call.value.token_stride * call.value.bytes_per_element();
        order_ = call.k_order ? call.k_order + of.kv_row(call) * call.num_keys : nullptr;
        std::memset(zeros_, 0, (call.dim + up_to_rows(call.value_dim)) * sizeof(float));
    }

    static int64_t floats_needed(const AttentionCall& call) {
        return (KEYS_PER_BLOCK + 1) * (call.dim + up_to_rows(call.value_dim));
    }

    // The next keys of selected blocks, where they lie; false where there are none left.
    bool next_selected(KeyBlock& block) {
        block.count = 0;
        for (; cluster_ < call_.k_clusters + 2; ++cluster_, within_ = 0) {
            if (!selected_[cluster_]) continue;
            const int64_t end = bounds_[cluster_ + 1];
            for (int64_t at = bounds_[cluster_] + within_; at < end; ++at, ++within_) {
                if (block.count == KEYS_PER_BLOCK) return finish(block);
                add_token(block, at);
            }
        }
        return finish(block);
    }

    // The next means of clusters that are skipped and not empty; false where there are none left.
    bool next_skipped(KeyBlock& block) {
        block.count = 0;
        for (; skipped_ < call_.k_clusters; ++skipped_) {
            if (selected_[skipped_] || bounds_[skipped_ + 1] == bounds_[skipped_]) continue;
            if (block.count == KEYS_PER_BLOCK) return finish(block);
            add_mean(block, skipped_);
        }
        return finish(block);
    }

    // Makes the rows of next_selected, or of next_skipped, rows of float32 with whole groups of columns.
    void convert(KeyBlock& block, bool selected) {
        const int64_t columns = up_to_rows(call_.value_dim);
        const int64_t key_type = selected ? call_.key.type : FLOAT32, value_type = selected ? call_.value.type : FLOAT32;
        for (int64_t i = 0; i < block.count && key_type != FLOAT32; ++i) {
            float* to = keys_ + i * call_.dim;
            read_row((const char*)block.keys[i], key_type, call_.dim, to);
            block.keys[i] = to;
        }
        if (value_type == FLOAT32 && columns == call_.value_dim) return;
        for (int64_t i = 0; i < block.count; ++i) {
            float* to = values_ + i * columns;
            read_row((const char*)block.values[i], value_type, call_.value_dim, to);
            std::fill(to + call_.value_dim, to + columns, 0.0f);
            block.values[i] = to;
        }
    }

  private:
    void add_token(KeyBlock& block, int64_t position) {
        const int64_t i = block.count++, token = order_ ? order_[position] : position;
        const char* key = key_rows_ + token * key_bytes_;
        const char* value = value_rows_ + token * value_bytes_;
        block.bias[i] = 0.0f;
        block.keys[i] = (const float*)key;
        block.values[i] = (const float*)value;
    }

    void add_mean(KeyBlock& block, int64_t cluster) {
        const int64_t i = block.count++, row = of_.kv_row(call_) * call_.k_clusters + cluster;
        const float* value = call_.v_centroids + row * call_.value_dim;
        block.keys[i] = call_.k_centroids + row * call_.dim;
        block.values[i] = value;
        block.bias[i] = bias_of_mean(block.keys[i], cluster);
    }

    // ln of the number of keys, or of first order ln m_ij - s q_i.c_j.
    float bias_of_mean(const float* mean, int64_t cluster) const {
        if (call_.q_centroids == nullptr) return std::log((float)(bounds_[cluster + 1] - bounds_[cluster]));
        const int64_t row = of_.q_row(call_) * call_.q_clusters + of_.block;
        const float* centroid = call_.q_centroids + row * call_.dim;
        Vec lanes{};
        int64_t d = 0;
        for (; d + LANES <= call_.dim; d += LANES) lanes += load(centroid + d) * load(mean + d);
        float at_centroid = sum_of(lanes);
        for (; d < call_.dim; ++d) at_centroid += centroid[d] * mean[d];
        return call_.log_mass[row * (call_.k_clusters + 2) + cluster] - (float)call_.scale * at_centroid;
    }

    bool finish(KeyBlock& block) const {
        for (int64_t i = block.count; i < up_to_rows(block.count); ++i) {
            block.keys[i] = block.values[i] = zeros_;
            block.bias[i] = -__builtin_inff();
        }
        return block.count > 0;
    }

    const AttentionCall& call_;
    const QueryBlock of_;
    const uint8_t* selected_;
    const int32_t* bounds_;
    const char *key_rows_, *value_rows_;
    int64_t key_bytes_, value_bytes_;
    const int32_t* order_;
    float *keys_, *values_, *zeros_;
    int64_t cluster_ = 0, within_ = 0, skipped_ = 0;
};

}  // namespace svg2
