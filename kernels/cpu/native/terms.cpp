// svg2::first_order_terms: what the means of skipped clusters leave out, at a query centroid (residual) and next to it (slope).

#include "clusters.h"

namespace svg2 {
namespace {

// D_i of the queries of a few strips, which share what the keys of a cluster are less their mean. An item is such a group.
struct ResidualRunner {
    const ClustersCall& call;
    float* floats;

    struct Queries {
        QueryStrip strip;
        float *sums, *shifts;

        bool skips(int64_t cluster) const {
            const float* shift = shifts + cluster * strip.width();
            return std::any_of(shift, shift + strip.rows, [](float x) { return x != __builtin_inff(); });
        }
    };

    static int64_t floats_of_strip(const ClustersCall& call) {
        return STRIP * (up_to_rows(call.value_dim) + call.k_clusters + call.dim);
    }
    static int64_t floats_needed(const ClustersCall& call) {
        return Cluster::floats_needed(call) + STRIP * (KEYS_PER_BLOCK + call.dim) + STRIPS_AT_ONCE * floats_of_strip(call);
    }

    // Strips of up to most_vectors vectors from query `first` on.
    void run(int64_t kv_row, int64_t first, int64_t strips, int most_vectors) const {
        float* weights = floats + Cluster::floats_needed(call);
        float *by_row = weights + STRIP * KEYS_PER_BLOCK, *own = by_row + STRIP * call.dim;
        Cluster keys(call, kv_row, false, floats);
        Queries at_once[STRIPS_AT_ONCE];
        int64_t count = 0;
        for (; count < strips && first < call.queries(); ++count, own += floats_of_strip(call)) {
            at_once[count] = read(keys, kv_row, first, most_vectors, by_row, own);
            first += at_once[count].strip.rows;
        }
        for (int64_t j = 0; j < call.k_clusters; ++j) {
            for (int64_t at = 0; at < keys.size(j); at += KEYS_PER_BLOCK) {
                for (int64_t i = 0; i < count; ++i) {
                    if (at_once[i].skips(j)) add_block(at_once[i], keys.read(j, at), j, weights);
                }
            }
        }
        for (int64_t i = 0; i < count; ++i) write(at_once[i], kv_row);
    }

  private:
    // own: floats_of_strip, for what is returned.
    Queries read(
        const Cluster& keys, int64_t kv_row, int64_t first, int most_vectors, float* by_row, float* own) const {
        float *sums = own + STRIP * call.dim, *shifts = sums + STRIP * up_to_rows(call.value_dim);
        const Queries of{read_strip(call, kv_row, first, most_vectors, by_row, own), sums, shifts};
        std::memset(sums, 0, up_to_rows(call.value_dim) * of.strip.width() * sizeof(float));
        read_shifts(of.strip, keys, kv_row, shifts);
        return of;
    }

    void write(const Queries& of, int64_t kv_row) const {
        float* residual = rows_of_head(call.residual, call, kv_row, call.value_dim);
        for (int64_t lane = 0; lane < of.strip.rows; ++lane) {
            for (int64_t c = 0; c < call.value_dim; ++c) {
                residual[(of.strip.first + lane) * call.value_dim + c] = of.sums[c * of.strip.width() + lane];
            }
        }
    }

    // shifts[j][lane] is log2 of the mass of all that the query skips, so that its weights have the sum 1; infinite where it
    // does not skip j.
    void read_shifts(const QueryStrip& strip, const Cluster& keys, int64_t kv_row, float* shifts) const {
        const int64_t k_clusters = call.k_clusters, width = strip.width();
        for (int64_t i = 0; i < width * k_clusters; ++i) shifts[i] = __builtin_inff();
        for (int64_t lane = 0; lane < strip.rows; ++lane) {
            const int64_t query = strip.first + lane, head = query / call.q_clusters, i = query % call.q_clusters;
            const int64_t q_row = kv_row * (call.q_heads / call.kv_heads) + head;
            const uint8_t* selected = call.block_map + (q_row * (call.q_clusters + 2) + i) * (k_clusters + 2);
            const float* mass = call.log_mass + (q_row * call.q_clusters + i) * (k_clusters + 2);
            const auto skips = [&](int64_t j) { return !selected[j] && keys.size(j) > 0; };
            float largest = -__builtin_inff(), sum = 0.0f;
            for (int64_t j = 0; j < k_clusters; ++j) {
                if (skips(j)) largest = std::max(largest, mass[j]);
            }
            for (int64_t j = 0; j < k_clusters; ++j) {
                if (skips(j)) sum += std::exp(mass[j] - largest);
            }
            const float shift = (largest + std::log(sum)) * LOG2_E;
            for (int64_t j = 0; j < k_clusters; ++j) {
                if (skips(j)) shifts[j * width + lane] = shift;
            }
        }
    }

    void add_block(const Queries& of, const KeyBlock& block, int64_t cluster, float* weights) const {
        const float* shifts = of.shifts + cluster * of.strip.width();
        with_vectors(of.strip.vectors, [&](auto v) {
            add_block<decltype(v)::value>(of.strip, block, shifts, weights, of.sums);
        });
    }

    template <int V>
    void add_block(
        const QueryStrip& strip, const KeyBlock& block, const float* shifts, float* weights, float* sums) const {
        Vec one[V], shift[V], largest[V] = {};
        SVG2_UNROLL for (int v = 0; v < V; ++v) {
            one[v] = broadcast(1.0f);
            shift[v] = load(shifts + v * LANES);
        }
        for (int64_t i = 0; i < block.count; i += ROWS) {
            scores_of_rows<V>(block.keys + i, block.bias + i, strip.queries, call.dim, weights + i * V * LANES, largest);
        }
        for (int64_t i = 0; i < block.count; ++i) {
            Vec weight[V];
            float* at_row = weights + i * V * LANES;
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                weight[v] = rounded(load(at_row + v * LANES) * broadcast(LOG2_E)) - shift[v];
            }
            exp2<V>(weight);
            SVG2_UNROLL for (int v = 0; v < V; ++v) store(at_row + v * LANES, weight[v]);
        }
        for (int64_t column = 0; column < up_to_rows(call.value_dim); column += ROWS) {
            add_weighted_columns<V>(block.values, block.count, weights, column, one, sums + column * V * LANES);
        }
    }
};

// The sum over the keys of a part of the clusters of (k_t - c_j) (v_t - v_j)'. Key columns lie in the lanes.
struct SlopeRunner {
    const ClustersCall& call;
    float* floats;

    static int64_t lanes_of(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }
    static int64_t floats_needed(const ClustersCall& call) {
        const int64_t columns = up_to_rows(call.value_dim);
        return Cluster::floats_needed(call) + STRIP * KEYS_PER_BLOCK + columns * lanes_of(call.dim);
    }

    void run(int64_t kv_row, int64_t part) const {
        const int64_t columns = up_to_rows(call.value_dim);
        float *lanes = floats + Cluster::floats_needed(call), *sums = lanes + STRIP * KEYS_PER_BLOCK;
        Cluster keys(call, kv_row, true, floats);
        std::memset(sums, 0, columns * lanes_of(call.dim) * sizeof(float));
        const int64_t last = (part + 1) * call.k_clusters / call.slope_parts;
        for (int64_t j = part * call.k_clusters / call.slope_parts; j < last; ++j) {
            for (int64_t at = 0; at < keys.size(j); at += KEYS_PER_BLOCK) {
                const KeyBlock& block = keys.read(j, at);
                for_groups([&](int64_t d, int vectors) { add_block(block, d, vectors, lanes, sums + d * columns); });
            }
        }
        float* slope = call.slope_sums + (kv_row * call.slope_parts + part) * call.dim * call.value_dim;
        for_groups([&](int64_t first, int vectors) {
            for (int64_t d = first; d < std::min(call.dim, first + vectors * LANES); ++d) {
                for (int64_t c = 0; c < call.value_dim; ++c) {
                    slope[d * call.value_dim + c] = sums[first * columns + c * vectors * LANES + d - first];
                }
            }
        });
    }

    template <class Function>
    void for_groups(const Function& function) const {
        for (int64_t d = 0; d < call.dim;) {
            const int vectors = vectors_of_strip((call.dim - d + LANES - 1) / LANES);
            function(d, vectors);
            d += vectors * LANES;
        }
    }

    void add_block(const KeyBlock& block, int64_t first, int vectors, float* lanes, float* sums) const {
        const int64_t width = vectors * LANES, given = std::min(width, call.dim - first);
        for (int64_t i = 0; i < block.count; ++i) {
            std::memcpy(lanes + i * width, block.keys[i] + first, given * sizeof(float));
            std::fill(lanes + i * width + given, lanes + (i + 1) * width, 0.0f);
        }
        with_vectors(vectors, [&](auto v) {
            constexpr int V = decltype(v)::value;
            Vec one[V];
            SVG2_UNROLL for (int u = 0; u < V; ++u) one[u] = broadcast(1.0f);
            for (int64_t column = 0; column < up_to_rows(call.value_dim); column += ROWS) {
                add_weighted_columns<V>(block.values, block.count, lanes, column, one, sums + column * V * LANES);
            }
        });
    }
};

// The slope of one head: the sums of its parts, always in the same order, times the scale and per token of a cluster.
void add_parts(const ClustersCall& call, int64_t kv_row) {
    const int64_t size = call.dim * call.value_dim;
    const int64_t tokens = call.k_offsets[kv_row * (call.k_clusters + 3) + call.k_clusters];
    const float factor = (float)(call.scale / (double)std::max<int64_t>(tokens, 1));
    const float* sums = call.slope_sums + kv_row * call.slope_parts * size;
    float* slope = call.slope + kv_row * size;
    std::memcpy(slope, sums, size * sizeof(float));
    for (int64_t part = 1; part < call.slope_parts; ++part) {
        for (int64_t i = 0; i < size; ++i) slope[i] += sums[part * size + i];
    }
    for (int64_t i = 0; i < size; ++i) slope[i] *= factor;
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_terms_call_bytes() { return sizeof(svg2::ClustersCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_terms(const svg2::ClustersCall* call) {
    using namespace svg2;
    try {
        const int64_t needed = std::max(ResidualRunner::floats_needed(*call), SlopeRunner::floats_needed(*call));
        const Workspace workspace(call->threads, needed);
        if (workspace.missing()) return 1;
        const int64_t heads = call->batch * call->kv_heads;
        int vectors = VECTORS;  // narrower strips where there are threads without any
        const auto strips_of = [&] { return (call->queries() + vectors * LANES - 1) / (vectors * LANES); };
        while (vectors > 1 && heads * strips_of() < 2 * call->threads) --vectors;
        const int64_t most = heads * strips_of() / (2 * call->threads);
        const int64_t strips = std::max<int64_t>(1, std::min(STRIPS_AT_ONCE, most));
        const int64_t groups = (strips_of() + strips - 1) / strips, residuals = heads * groups;
        for_each_item(residuals + heads * call->slope_parts, call->threads, [&](int64_t item, int64_t thread) {
            float* floats = workspace.of_thread(thread);
            const int64_t part = item - residuals, first = item % groups * strips * vectors * LANES;
            if (part < 0) ResidualRunner{*call, floats}.run(item / groups, first, strips, vectors);
            else SlopeRunner{*call, floats}.run(part / call->slope_parts, part % call->slope_parts);
        });
        for_each_item(heads, call->threads, [&](int64_t head, int64_t) { add_parts(*call, head); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
