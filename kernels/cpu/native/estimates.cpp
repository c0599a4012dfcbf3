// svg2::block_estimates: exact masses of key clusters at query centroids, and the errors of compensating them. And
// svg2::first_order_estimates: also what the means of all clusters together leave out there, a sum of sums that the errors need.

#include "clusters.h"

namespace svg2 {
namespace {

// What all clusters so far leave out at a strip of queries: sum over j, t of 2^(s q.k_t - shift) (v_t - v_j), and the sum of these
// powers. In memory [Dv, up to a multiple of ROWS][strip], then the sum, then the shift: the largest exponent of a cluster.
struct LeftOut {
    float* sums;  // null where nobody asks

    static int64_t floats_needed(const ClustersCall& call) {
        return call.residual ? STRIP * (up_to_rows(call.value_dim) + 2) : 0;
    }
    void clear(int64_t columns, int64_t width) const {
        if (sums == nullptr) return;
        std::memset(sums, 0, (columns + 1) * width * sizeof(float));
        for (int64_t i = 0; i < width; ++i) sums[(columns + 1) * width + i] = -__builtin_inff();
    }

    // A cluster with these sums and this mass, all times 2^exponent.
    template <int V>
    void add(int64_t columns, const float* of_cluster, const Vec* mass, const Vec* exponent) const {
        Vec before[V], now[V];
        SVG2_UNROLL for (int v = 0; v < V; ++v) {
            float* shift = sums + ((columns + 1) * V + v) * LANES;
            const Vec largest = larger(exponent[v], load(shift));
            before[v] = load(shift) - largest;
            now[v] = exponent[v] - largest;
            store(shift, largest);
        }
        exp2<V>(before);
        exp2<V>(now);
        for (int64_t c = 0; c <= columns; ++c) {
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                float* sum = sums + (c * V + v) * LANES;
                const Vec added = c < columns ? load(of_cluster + (c * V + v) * LANES) : mass[v];
                store(sum, load(sum) * before[v] + added * now[v]);
            }
        }
    }
};

// ln m_ij and ln e_ij of one cluster for a strip. With d_t = s q.(k_t - c_j) and the largest of them (or 0) as shift, all weights are
// e^(s q.c_j + shift) times w_t = e^(d_t - shift) - e^(-shift): nothing overflows, and nothing large cancels. The sum over t of
// w_t (v_t - o) is that of w_t (v_t - v_j) and (sum_t w_t) (v_j - o).
template <int V>
SVG2_OUTLINE void estimate(
    const ClustersCall& call, const QueryStrip& strip, Cluster& keys, int64_t kv_row, int64_t cluster,
    const float* mean_scores, const float* outputs, const LeftOut& left_out, float* weights, float* sums) {
    const int64_t columns = up_to_rows(call.value_dim), size = keys.size(cluster);
    float* mass_rows = rows_of_head(call.mass, call, kv_row, call.k_clusters + 2);
    float* error_rows = rows_of_head(call.error, call, kv_row, call.k_clusters);
    if (size == 0) {  // its mean may be anything
        for (int64_t query = strip.first; query < strip.first + strip.rows; ++query) {
            mass_rows[query * (call.k_clusters + 2) + cluster] = -__builtin_inff();
            error_rows[query * call.k_clusters + cluster] = -__builtin_inff();
        }
        return;
    }
    Vec shift[V] = {}, total[V] = {}, at_mean[V] = {};
    std::memset(sums, 0, columns * V * LANES * sizeof(float));
    for (int64_t at = 0; at < size; at += KEYS_PER_BLOCK) {
        const KeyBlock& block = keys.read(cluster, at);
        Vec largest[V], factor[V];
        SVG2_UNROLL for (int v = 0; v < V; ++v) largest[v] = broadcast(-__builtin_inff());
        for (int64_t i = 0; i < block.count; i += ROWS) {
            scores_of_rows<V>(block.keys + i, block.bias + i, strip.queries, call.dim, weights + i * V * LANES, largest);
        }
        SVG2_UNROLL for (int v = 0; v < V; ++v) {
            const Vec most = larger(largest[v] * broadcast(LOG2_E), shift[v]);
            factor[v] = shift[v] - most;
            shift[v] = most;
            at_mean[v] = -most;
        }
        exp2<V>(factor);
        exp2<V>(at_mean);
        SVG2_UNROLL for (int v = 0; v < V; ++v) total[v] *= factor[v];
        for (int64_t i = 0; i < block.count; ++i) {
            Vec weight[V];
            float* at_row = weights + i * V * LANES;
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                weight[v] = rounded(load(at_row + v * LANES) * broadcast(LOG2_E)) - shift[v];
            }
            exp2<V>(weight);
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                weight[v] -= at_mean[v];
                store(at_row + v * LANES, weight[v]);
                total[v] += weight[v];
            }
        }
        for (int64_t column = 0; column < columns; column += ROWS) {
            add_weighted_columns<V>(
                block.values, block.count, weights, column, factor, sums + column * V * LANES);
        }
    }
    const float* mean = keys.value_mean(cluster);
    Vec squares[V] = {};
    for (int64_t c = 0; c < call.value_dim; ++c) {
        SVG2_UNROLL for (int v = 0; v < V; ++v) {
            const int64_t at = (c * V + v) * LANES;
            const Vec sum = load(sums + at) + total[v] * (mean[c] - load(outputs + at));
            squares[v] += sum * sum;
        }
    }
    Vec masses[V], exponents[V];
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        masses[v] = total[v] + at_mean[v] * (float)size;
        exponents[v] = load(mean_scores + v * LANES) * broadcast(LOG2_E) + shift[v];
    }
    if (left_out.sums) left_out.add<V>(columns, sums, masses, exponents);
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        const Vec base = load(mean_scores + v * LANES) + shift[v] * broadcast((float)LN_2);
        const Vec mass = log(masses[v]) + base, error = log(squares[v]) + base + base;
        for (int lane = 0; lane < LANES && v * LANES + lane < strip.rows; ++lane) {
            const int64_t query = strip.first + v * LANES + lane;
            mass_rows[query * (call.k_clusters + 2) + cluster] = mass[lane];
            error_rows[query * call.k_clusters + cluster] = error[lane];
        }
    }
}

// An item is a part of the clusters and all queries of one key head, STRIPS_AT_ONCE strips of them at a time: what a
// cluster's keys are less their mean is computed once for these strips.
struct EstimateRunner {
    const ClustersCall& call;
    float* floats;

    struct Queries {
        QueryStrip strip;
        float *outputs, *mean_scores;
        LeftOut left_out;
    };

    static int64_t columns_of(const ClustersCall& call) { return std::max(call.dim, up_to_rows(call.value_dim)); }
    static int64_t clusters_of(const ClustersCall& call) { return up_to_rows((call.k_clusters + call.parts - 1) / call.parts); }
    static int64_t floats_of_strip(const ClustersCall& call) {
        return STRIP * (2 * columns_of(call) + clusters_of(call)) + LeftOut::floats_needed(call);
    }
    static int64_t floats_needed(const ClustersCall& call) {
        const int64_t wide = columns_of(call);
        return Cluster::floats_needed(call) + STRIP * (KEYS_PER_BLOCK + 2 * wide) + STRIPS_AT_ONCE * floats_of_strip(call);
    }

    void run(int64_t kv_row, int64_t part) const {
        float* weights = floats + Cluster::floats_needed(call);
        float *sums = weights + STRIP * KEYS_PER_BLOCK, *by_row = sums + STRIP * columns_of(call);
        const int64_t first_cluster = part * call.k_clusters / call.parts, last = (part + 1) * call.k_clusters / call.parts;
        Cluster keys(call, kv_row, true, floats);
        for (int64_t first = 0; first < call.queries();) {
            Queries at_once[STRIPS_AT_ONCE];
            int count = 0;
            for (; count < STRIPS_AT_ONCE && first < call.queries(); ++count) {
                float* own = by_row + STRIP * columns_of(call) + count * floats_of_strip(call);
                at_once[count] = read(keys, kv_row, first, first_cluster, last, by_row, own);
                first += at_once[count].strip.rows;
            }
            for (int64_t j = first_cluster; j < last; ++j) {
                for (int i = 0; i < count; ++i) {
                    const Queries& of = at_once[i];
                    with_vectors(of.strip.vectors, [&](auto v) {
                        const float* scores = of.mean_scores + (j - first_cluster) * of.strip.width();
                        estimate<decltype(v)::value>(
                            call, of.strip, keys, kv_row, j, scores, of.outputs, of.left_out, weights, sums);
                    });
                }
            }
            for (int i = 0; i < count && call.residual; ++i) write_left_out(at_once[i], kv_row, part);
        }
    }

    // by_row: room for a strip; own: floats_of_strip, for what is returned.
    Queries read(
        const Cluster& keys, int64_t kv_row, int64_t first, int64_t first_cluster, int64_t last, float* by_row,
        float* own) const {
        const int most = vectors_of_strip((call.queries() - first + LANES - 1) / LANES);
        Queries of{read_strip(call, kv_row, first, most, by_row, own), own + STRIP * columns_of(call), nullptr, {nullptr}};
        of.mean_scores = of.outputs + STRIP * columns_of(call);
        if (call.residual) of.left_out.sums = of.mean_scores + STRIP * clusters_of(call);
        of.left_out.clear(up_to_rows(call.value_dim), of.strip.width());
        const float* from = rows_of_head(call.outputs, call, kv_row, call.value_dim);
        const auto row_of = [&](int64_t lane) { return (const char*)(from + (first + lane) * call.value_dim); };
        read_lanes(row_of, of.strip.rows, of.strip.width(), FLOAT32, call.value_dim, 1.0f, by_row, of.outputs);
        with_vectors(of.strip.vectors, [&](auto v) {
            scores_of_means<decltype(v)::value>(of.strip, keys, first_cluster, last, of.mean_scores);
        });
        return of;
    }

    // Into a row per query: what is left out, the mass, and the exponent of both.
    void write_left_out(const Queries& of, int64_t kv_row, int64_t part) const {
        const int64_t length = call.value_dim + 2, skipped = up_to_rows(call.value_dim) - call.value_dim;
        float* rows = call.residual_sums + (kv_row * call.parts + part) * call.queries() * length;
        for (int64_t lane = 0; lane < of.strip.rows; ++lane) {
            for (int64_t c = 0; c < length; ++c) {
                const int64_t from = c < call.value_dim ? c : c + skipped;
                rows[(of.strip.first + lane) * length + c] = of.left_out.sums[from * of.strip.width() + lane];
            }
        }
    }

    template <int V>
    void scores_of_means(
        const QueryStrip& strip, const Cluster& keys, int64_t first, int64_t last, float* mean_scores) const {
        for (int64_t j = first; j < last; j += ROWS) {
            const float* rows[ROWS];
            const float bias[ROWS] = {};
            Vec largest[V] = {};
            for (int r = 0; r < ROWS; ++r) rows[r] = keys.key_mean(std::min(j + r, last - 1));
            scores_of_rows<V>(rows, bias, strip.queries, call.dim, mean_scores + (j - first) * V * LANES, largest);
        }
    }
};

// The residuals of one head from what each part of the clusters leaves out, over the mass of all; 0 where there are no keys.
void add_left_out(const ClustersCall& call, int64_t kv_row) {
    const int64_t length = call.value_dim + 2;
    for (int64_t query = 0; query < call.queries(); ++query) {
        const auto row_of = [&](int64_t part) {
            return call.residual_sums + ((kv_row * call.parts + part) * call.queries() + query) * length;
        };
        float largest = -__builtin_inff(), mass = 0.0f;
        for (int64_t part = 0; part < call.parts; ++part) largest = std::max(largest, row_of(part)[length - 1]);
        float* residual = rows_of_head(call.residual, call, kv_row, call.value_dim) + query * call.value_dim;
        std::memset(residual, 0, call.value_dim * sizeof(float));
        for (int64_t part = 0; part < call.parts; ++part) {
            const float* row = row_of(part);
            const float factor = std::exp2(row[length - 1] - largest);
            if (factor == 0.0f || row[length - 2] == 0.0f) continue;
            mass += factor * row[length - 2];
            for (int64_t c = 0; c < call.value_dim; ++c) residual[c] += factor * row[c];
        }
        for (int64_t c = 0; c < call.value_dim && mass != 0.0f; ++c) residual[c] /= mass;
    }
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_estimates_call_bytes() { return sizeof(svg2::ClustersCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_estimates(const svg2::ClustersCall* call) {
    using namespace svg2;
    try {
        const Workspace workspace(call->threads, EstimateRunner::floats_needed(*call));
        if (workspace.missing()) return 1;
        const int64_t heads = call->batch * call->kv_heads;
        for_each_item(heads * call->parts, call->threads, [&](int64_t item, int64_t thread) {
            const EstimateRunner runner{*call, workspace.of_thread(thread)};
            runner.run(item / call->parts, item % call->parts);
        });
        if (call->residual == nullptr) return 0;
        for_each_item(heads, call->threads, [&](int64_t head, int64_t) { add_left_out(*call, head); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
