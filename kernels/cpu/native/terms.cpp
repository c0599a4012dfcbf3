// svg2::first_order_terms: what the means of skipped clusters leave out, at a query centroid (residual) and next to it (slope).
//
// A residual is a sum over the keys of skipped clusters, most of all. Where it is known what all clusters together leave out
// (svg2::first_order_estimates), that of the selected ones is taken off it instead, and few keys are read.

#include <vector>

#include "clusters.h"

namespace svg2 {
namespace {

// A difference loses what its terms are larger than it: of a row that skips less than this part of its mass, the skipped clusters
// themselves are summed.
constexpr float LEAST_SHARE = 1.0f / 64.0f;

constexpr int64_t ROWS_PER_ITEM = 32;

// How the residual of one query is summed.
struct RowPlan {
    float shift;   // log2 of the mass of all that it skips, so that the weights of that have the sum 1
    float of_all;  // the mass of all clusters over that, where the selected ones are taken off what all leave out; else 0

    bool needs(bool selected) const { return selected == (of_all > 0.0f); }
};

// log2 of the sum of 2^x; room up to a multiple of LANES behind them.
float log2_sum(float* x, int64_t count) {
    while (count % LANES != 0) x[count++] = -__builtin_inff();
    Vec most = broadcast(-__builtin_inff()), sum{};
    for (int64_t i = 0; i < count; i += LANES) most = larger(load(x + i), most);
    const float largest = largest_of(most);
    for (int64_t i = 0; i < count; i += LANES) {
        Vec power = load(x + i) - largest;
        exp2<1>(&power);
        sum += power;
    }
    return largest + std::log2(sum_of(sum));
}

// Of query `query` of a key head. masses: room for 2 (Ck + LANES) floats.
RowPlan plan_row(const ClustersCall& call, int64_t kv_row, int64_t query, float* masses) {
    const int64_t k_clusters = call.k_clusters;
    const int32_t* bounds = call.k_offsets + kv_row * (k_clusters + 3);
    const uint8_t* selected = map_row(call, kv_row, query);
    const float* mass = rows_of_head(call.log_mass, call, kv_row, k_clusters + 2) + query * (k_clusters + 2);
    float *of[2] = {masses, masses + k_clusters + LANES};  // skipped, selected
    int64_t clusters[2] = {0, 0}, keys[2] = {0, 0};
    for (int64_t j = 0; j < k_clusters; ++j) {
        const int64_t size = bounds[j + 1] - bounds[j];
        if (size == 0) continue;
        const int which = selected[j] != 0;
        of[which][clusters[which]++] = mass[j] * LOG2_E;
        keys[which] += size;
    }
    if (clusters[0] == 0) return {0.0f, 0.0f};
    RowPlan plan{log2_sum(of[0], clusters[0]), 0.0f};
    if (call.residual_of_all == nullptr || keys[1] >= keys[0]) return plan;
    const float* known = rows_of_head(call.residual_of_all, call, kv_row, call.value_dim) + query * call.value_dim;
    const float share = clusters[1] == 0 ? 1.0f : 1.0f / (1.0f + std::exp2(log2_sum(of[1], clusters[1]) - plan.shift));
    float finite = 0.0f;
    for (int64_t c = 0; c < call.value_dim; ++c) finite += known[c] * 0.0f;
    if (share >= LEAST_SHARE && finite == 0.0f) plan.of_all = 1.0f / share;
    return plan;
}

// Sums over the keys of a part of the clusters of one head: of residuals, and of the slope.
class PartRunner {
  public:
    PartRunner(const ClustersCall& call, const RowPlan* plans, int64_t kv_row, int64_t part, float* floats)
        : call_(call),
          plans_(plans + kv_row * call.queries()),
          kv_row_(kv_row),
          columns_(up_to_rows(call.value_dim)),
          keys_(call, kv_row, false, floats),
          weights_(floats + Cluster::floats_needed(call)),
          by_row_(weights_ + STRIP * KEYS_PER_BLOCK),
          slope_(by_row_ + STRIP * call.dim),
          packs_(slope_ + columns_ * lanes_of(call.dim)),
          rows_((int32_t*)(packs_ + STRIPS_AT_ONCE * floats_of_pack(call))),
          residual_(call.residual_sums + (kv_row * call.parts + part) * call.queries() * call.value_dim),
          slope_out_(call.slope_sums + (kv_row * call.parts + part) * call.dim * call.value_dim) {}

    static int64_t floats_needed(const ClustersCall& call) {
        const int64_t slope = up_to_rows(call.value_dim) * lanes_of(call.dim);
        const int64_t packs = STRIPS_AT_ONCE * floats_of_pack(call);
        return Cluster::floats_needed(call) + STRIP * (KEYS_PER_BLOCK + call.dim) + slope + packs + call.queries();
    }

    void run(int64_t first, int64_t last) {
        std::memset(residual_, 0, call_.queries() * call_.value_dim * sizeof(float));
        std::memset(slope_, 0, columns_ * lanes_of(call_.dim) * sizeof(float));
        for (int64_t j = first; j < last; ++j) {
            const int64_t rows = keys_.size(j) > 0 ? find_rows(j) : 0;
            for (int64_t begin = 0; begin == 0 || begin < rows;) begin = add_cluster(j, begin, rows);
        }
        write_slope();
    }

  private:
    // Queries that need the same cluster, side by side.
    struct Pack {
        int vectors;
        int64_t begin, count;  // in rows_
        float *queries, *sums, *shifts;

        int64_t width() const { return vectors * LANES; }
    };

    static int64_t lanes_of(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }
    static int64_t floats_of_pack(const ClustersCall& call) {
        return STRIP * (call.dim + up_to_rows(call.value_dim) + 1);
    }

    // Which queries need cluster j, into rows_; how many.
    int64_t find_rows(int64_t j) {
        int64_t count = 0;
        for (int64_t query = 0; query < call_.queries(); ++query) {
            rows_[count] = (int32_t)query;  // no branch: it would be taken or not at random
            count += plans_[query].needs(map_row(call_, kv_row_, query)[j] != 0);
        }
        return count;
    }

    // Cluster j for as many of the queries from rows_[begin] on as there are packs for; where the next ones begin. The slope has it
    // with the first ones.
    int64_t add_cluster(int64_t j, int64_t begin, int64_t rows) {
        const bool is_first = begin == 0;
        Pack packs[STRIPS_AT_ONCE];
        int64_t count = 0;
        for (; count < STRIPS_AT_ONCE && begin < rows; ++count) {
            packs[count] = read_pack(begin, rows, packs_ + count * floats_of_pack(call_));
            begin += packs[count].count;
        }
        for (int64_t at = 0; at < keys_.size(j); at += KEYS_PER_BLOCK) {
            const KeyBlock& block = keys_.read(j, at);
            for (int64_t i = 0; i < count; ++i) {
                with_vectors(packs[i].vectors, [&](auto v) { add_block<decltype(v)::value>(block, packs[i]); });
            }
            if (is_first) add_to_slope(block, keys_.key_mean(j));
        }
        for (int64_t i = 0; i < count; ++i) add_to_residuals(packs[i]);
        return std::max<int64_t>(begin, 1);
    }

    Pack read_pack(int64_t begin, int64_t rows, float* floats) {
        const int vectors = vectors_of_strip((rows - begin + LANES - 1) / LANES);
        Pack pack{vectors, begin, std::min<int64_t>(rows - begin, vectors * LANES), floats, nullptr, nullptr};
        pack.sums = pack.queries + STRIP * call_.dim;
        pack.shifts = pack.sums + STRIP * columns_;
        const float* centroids = rows_of_head(call_.q_centroids, call_, kv_row_, call_.dim);
        const auto row_of = [&](int64_t lane) { return (const char*)(centroids + rows_[begin + lane] * call_.dim); };
        read_lanes(row_of, pack.count, pack.width(), FLOAT32, call_.dim, (float)call_.scale, by_row_, pack.queries);
        std::memset(pack.sums, 0, columns_ * pack.width() * sizeof(float));
        for (int64_t lane = 0; lane < pack.width(); ++lane) {
            pack.shifts[lane] = lane < pack.count ? plans_[rows_[begin + lane]].shift : __builtin_inff();
        }
        return pack;
    }

    template <int V>
    SVG2_OUTLINE void add_block(const KeyBlock& block, const Pack& pack) {
        Vec shift[V], largest[V] = {};
        SVG2_UNROLL for (int v = 0; v < V; ++v) shift[v] = load(pack.shifts + v * LANES);
        for (int64_t i = 0; i < block.count; i += ROWS) {
            scores_of_rows<V>(block.keys + i, block.bias + i, pack.queries, call_.dim, weights_ + i * V * LANES, largest);
        }
        for (int64_t i = 0; i < block.count; ++i) {
            Vec weight[V];
            float* at_row = weights_ + i * V * LANES;
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                weight[v] = rounded(load(at_row + v * LANES) * broadcast(LOG2_E)) - shift[v];
            }
            exp2<V>(weight);
            SVG2_UNROLL for (int v = 0; v < V; ++v) store(at_row + v * LANES, weight[v]);
        }
        add_values<V>(block, pack.sums);
    }

    // sums [columns][strip] and the values of a block, each times its weights in weights_.
    template <int V>
    SVG2_OUTLINE void add_values(const KeyBlock& block, float* sums) const {
        Vec one[V];
        SVG2_UNROLL for (int v = 0; v < V; ++v) one[v] = broadcast(1.0f);
        for (int64_t column = 0; column < columns_; column += ROWS) {
            add_weighted_columns<V>(block.values, block.count, weights_, column, one, sums + column * V * LANES);
        }
    }

    void add_to_residuals(const Pack& pack) {
        for (int64_t lane = 0; lane < pack.count; ++lane) {
            float* to = residual_ + rows_[pack.begin + lane] * call_.value_dim;
            for (int64_t c = 0; c < call_.value_dim; ++c) to[c] += pack.sums[c * pack.width() + lane];
        }
    }

    // Slope columns [columns][vectors] of a few vectors of key columns at a time.
    template <class Function>
    void for_key_columns(const Function& function) const {
        for (int64_t d = 0; d < call_.dim;) {
            const int vectors = vectors_of_strip((call_.dim - d + LANES - 1) / LANES);
            function(d, vectors, slope_ + d * columns_);
            d += vectors * LANES;
        }
    }

    // The sum over the keys of a block of (k_t - c_j) (v_t - v_j)'. Key columns lie in the lanes.
    void add_to_slope(const KeyBlock& block, const float* key_mean) {
        for_key_columns([&](int64_t first, int vectors, float* sums) {
            const int64_t width = vectors * LANES, given = std::min(width, call_.dim - first);
            for (int64_t i = 0; i < block.count; ++i) {
                float* lanes = weights_ + i * width;
                for (int64_t d = 0; d < given; ++d) lanes[d] = block.keys[i][first + d] - key_mean[first + d];
                std::fill(lanes + given, lanes + width, 0.0f);
            }
            with_vectors(vectors, [&](auto v) { add_values<decltype(v)::value>(block, sums); });
        });
    }

    void write_slope() const {
        for_key_columns([&](int64_t first, int vectors, const float* sums) {
            for (int64_t d = first; d < std::min(call_.dim, first + vectors * LANES); ++d) {
                for (int64_t c = 0; c < call_.value_dim; ++c) {
                    slope_out_[d * call_.value_dim + c] = sums[c * vectors * LANES + d - first];
                }
            }
        });
    }

    const ClustersCall& call_;
    const RowPlan* plans_;
    const int64_t kv_row_, columns_;
    Cluster keys_;
    float *weights_, *by_row_, *slope_, *packs_;
    int32_t* rows_;
    float *residual_, *slope_out_;
};

// sum [size]: the sums of all parts, always in the same order.
void add_parts(const float* of_parts, int64_t parts, int64_t size, float* sum) {
    std::memcpy(sum, of_parts, size * sizeof(float));
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < size; ++i) sum[i] += of_parts[part * size + i];
    }
}

// Residuals and slope of one head, from its parts.
void finish_head(const ClustersCall& call, const RowPlan* plans, int64_t kv_row) {
    const int64_t residuals = call.queries() * call.value_dim, slopes = call.dim * call.value_dim;
    float *residual = call.residual + kv_row * residuals, *slope = call.slope + kv_row * slopes;
    add_parts(call.residual_sums + kv_row * call.parts * residuals, call.parts, residuals, residual);
    for (int64_t query = 0; query < call.queries(); ++query) {
        const float of_all = plans[kv_row * call.queries() + query].of_all;
        if (!(of_all > 0.0f)) continue;
        const float* all = call.residual_of_all + kv_row * residuals + query * call.value_dim;
        float* row = residual + query * call.value_dim;
        for (int64_t c = 0; c < call.value_dim; ++c) row[c] = of_all * all[c] - row[c];
    }
    add_parts(call.slope_sums + kv_row * call.parts * slopes, call.parts, slopes, slope);
    const int64_t tokens = call.k_offsets[kv_row * (call.k_clusters + 3) + call.k_clusters];
    const float factor = (float)(call.scale / (double)std::max<int64_t>(tokens, 1));
    for (int64_t i = 0; i < slopes; ++i) slope[i] *= factor;
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_terms_call_bytes() { return sizeof(svg2::ClustersCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_terms(const svg2::ClustersCall* call) {
    using namespace svg2;
    try {
        const int64_t heads = call->batch * call->kv_heads, queries = call->queries();
        const int64_t needed = std::max(PartRunner::floats_needed(*call), 2 * (call->k_clusters + LANES));
        const Workspace workspace(call->threads, needed);
        if (workspace.missing()) return 1;
        std::vector<RowPlan> plans(heads * queries);
        const int64_t stretches = (queries + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
        for_each_item(heads * stretches, call->threads, [&](int64_t item, int64_t thread) {
            const int64_t head = item / stretches, first = item % stretches * ROWS_PER_ITEM;
            for (int64_t query = first; query < std::min(first + ROWS_PER_ITEM, queries); ++query) {
                plans[head * queries + query] = plan_row(*call, head, query, workspace.of_thread(thread));
            }
        });
        for_each_item(heads * call->parts, call->threads, [&](int64_t item, int64_t thread) {
            const int64_t head = item / call->parts, part = item % call->parts;
            const auto begin_of = [&](int64_t which) { return which * call->k_clusters / call->parts; };
            PartRunner runner(*call, plans.data(), head, part, workspace.of_thread(thread));
            runner.run(begin_of(part), begin_of(part + 1));
        });
        for_each_item(heads, call->threads, [&](int64_t head, int64_t) { finish_head(*call, plans.data(), head); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
