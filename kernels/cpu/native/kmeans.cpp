// svg2::kmeans: Lloyd's algorithm. Tokens lie in the lanes and centroids pass by as rows, so that the nearest one so far stays
// in a register: no score is ever in memory.
//
// An iteration is two parallel loops, as every mean needs every label. Means are sums over the tokens in their order, a few
// columns of one head an item: they do not depend on who computes what.

#include <new>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace svg2 {
namespace {

// Mirrored in kmeans.py. Tensors are contiguous but for x and valid.
struct KmeansCall {
    Tokens x;
    const float* start;  // [B, H, C, D] or null: tokens spread evenly are the start
    const uint8_t* valid;  // [B, 1 or H, N] or null
    int32_t* labels;  // [B, H, N]
    float* centroids;  // [B, H, C, D]
    int32_t* sizes;  // [B, H, C]
    int64_t batch, heads, num_tokens, dim, clusters, iters, valid_heads, threads;

    const uint8_t* valid_of(int64_t b, int64_t h) const {
        if (valid == nullptr) return nullptr;
        return valid + (b * valid_heads + (valid_heads > 1 ? h : 0)) * num_tokens;
    }
};

constexpr int64_t TOKENS_PER_ITEM = 10 * STRIP;
constexpr int64_t COLUMNS_PER_ITEM = 32;  // two lines of the cache of every token

// Centroids as rows: those that are not finite are zeros that nobody chooses, as are those up to a multiple of ROWS.
struct Directions {
    std::vector<float> zeros, bias;  // bias: -|c|^2 / 2
    std::vector<const float*> rows;

    Directions(int64_t clusters, int64_t dim) : zeros(dim, 0.0f), bias(up_to_rows(clusters)), rows(up_to_rows(clusters)) {}

    void set(const float* centroids, int64_t clusters, int64_t dim) {
        for (int64_t c = 0; c < (int64_t)rows.size(); ++c) {
            float squares = __builtin_inff();
            if (c < clusters) {
                squares = 0.0f;
                for (int64_t d = 0; d < dim; ++d) squares += centroids[c * dim + d] * centroids[c * dim + d];
            }
            const bool usable = squares < __builtin_inff();
            rows[c] = usable ? centroids + c * dim : zeros.data();
            bias[c] = usable ? squares / -2 : -__builtin_inff();
        }
    }
};

// The middle token of each of C equal stretches of the valid tokens; zeros where there is none at all.
void spread_seeds(const KmeansCall& call, int64_t b, int64_t h, float* centroids) {
    const uint8_t* valid = call.valid_of(b, h);
    int64_t members = 0, cluster = 0, rank = 0;
    for (int64_t t = 0; t < call.num_tokens; ++t) members += valid == nullptr || valid[t];
    std::memset(centroids, 0, call.clusters * call.dim * sizeof(float));
    for (int64_t t = 0; t < call.num_tokens; ++t) {
        if (valid && !valid[t]) continue;
        for (; cluster < call.clusters && (2 * cluster + 1) * members / (2 * call.clusters) == rank; ++cluster) {
            read_row(call.x.row(b, h, t), call.x.type, call.dim, centroids + cluster * call.dim);
        }
        ++rank;
    }
}

// Of a token that is not finite, as an arg-max that takes NaN for the largest: it stays with the centroid that it has broken,
// and breaks no other.
int32_t nearest_of_broken(const Directions& to, int64_t clusters, const float* token, int64_t dim) {
    int32_t nearest = 0;
    float best = -__builtin_inff();
    for (int64_t c = 0; c < clusters; ++c) {
        float score = to.bias[c];
        for (int64_t d = 0; d < dim; ++d) score += to.rows[c][d] * token[d];
        if (score != score) return (int32_t)c;
        if (score > best) {
            best = score;
            nearest = (int32_t)c;
        }
    }
    return nearest;
}

template <int V>
void nearest_of_strip(const Directions& to, const float* tokens, int64_t dim, int32_t* nearest, float* scores) {
    Vec best[V];
    IntVec index[V];
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        best[v] = broadcast(-__builtin_inff());
        index[v] = IntVec{};
    }
    for (int64_t c = 0; c < (int64_t)to.rows.size(); c += ROWS) {
        Vec score[ROWS][V];
        products_of_rows<V>(&to.rows[c], &to.bias[c], tokens, dim, score);
        SVG2_UNROLL for (int r = 0; r < ROWS; ++r) {
            SVG2_UNROLL for (int v = 0; v < V; ++v) {
                // Strictly: of equal ones the first is chosen.
                index[v] = score[r][v] > best[v] ? IntVec{} + (int32_t)(c + r) : index[v];
                best[v] = score[r][v] > best[v] ? score[r][v] : best[v];
            }
        }
    }
    SVG2_UNROLL for (int v = 0; v < V; ++v) {
        std::memcpy(nearest + v * LANES, &index[v], sizeof(IntVec));
        store(scores + v * LANES, best[v]);
    }
}

// Labels of up to TOKENS_PER_ITEM tokens from `first` on; returns whether any of them is new. floats: 2 * STRIP * dim.
bool assign(const KmeansCall& call, const Directions& to, int64_t b, int64_t h, int64_t first, float* floats) {
    int32_t* labels = call.labels + (b * call.heads + h) * call.num_tokens;
    const int64_t last = std::min(first + TOKENS_PER_ITEM, call.num_tokens);
    bool changed = false;
    while (first < last) {
        const int vectors = vectors_of_strip((last - first + LANES - 1) / LANES);
        const int64_t width = vectors * LANES, rows = std::min(width, last - first);
        const auto row_of = [&](int64_t lane) { return call.x.row(b, h, first + lane); };
        read_lanes(row_of, rows, width, call.x.type, call.dim, 1.0f, floats, floats + STRIP * call.dim);
        int32_t nearest[STRIP];
        float scores[STRIP];
        with_vectors(vectors, [&](auto v) {
            nearest_of_strip<decltype(v)::value>(to, floats + STRIP * call.dim, call.dim, nearest, scores);
        });
        for (int64_t lane = 0; lane < rows; ++lane) {
            if (std::isfinite(scores[lane])) continue;
            nearest[lane] = nearest_of_broken(to, call.clusters, floats + lane * call.dim, call.dim);
        }
        changed |= std::memcmp(labels + first, nearest, rows * sizeof(int32_t)) != 0;
        std::memcpy(labels + first, nearest, rows * sizeof(int32_t));
        first += rows;
    }
    return changed;
}

// The means of a few columns of one head's clusters, and the sizes; what has no member stays as it is. floats: as many as the
// clusters have in these columns, and COLUMNS_PER_ITEM more. counts: clusters.
void update(const KmeansCall& call, int64_t b, int64_t h, int64_t column, float* floats, int32_t* counts) {
    const int64_t head = b * call.heads + h, columns = std::min(COLUMNS_PER_ITEM, call.dim - column);
    const int32_t* labels = call.labels + head * call.num_tokens;
    const uint8_t* valid = call.valid_of(b, h);
    float *sums = floats + COLUMNS_PER_ITEM, *row = floats;
    std::memset(sums, 0, call.clusters * COLUMNS_PER_ITEM * sizeof(float));
    std::memset(counts, 0, call.clusters * sizeof(int32_t));
    for (int64_t t = 0; t < call.num_tokens; ++t) {
        if (valid && !valid[t]) continue;
        const char* from = call.x.row(b, h, t) + column * call.x.bytes_per_element();
        read_row(from, call.x.type, columns, row);
        float* sum = sums + labels[t] * COLUMNS_PER_ITEM;
        for (int64_t d = 0; d < columns; ++d) sum[d] += row[d];
        ++counts[labels[t]];
    }
    for (int64_t c = 0; c < call.clusters; ++c) {
        if (column == 0) call.sizes[head * call.clusters + c] = counts[c];
        if (counts[c] == 0) continue;
        float* mean = call.centroids + (head * call.clusters + c) * call.dim + column;
        for (int64_t d = 0; d < columns; ++d) mean[d] = sums[c * COLUMNS_PER_ITEM + d] / (float)counts[c];
    }
}

void run(const KmeansCall& call, const Workspace& workspace) {
    const int64_t heads = call.batch * call.heads, per_head = call.clusters * call.dim;
    std::vector<Directions> directions(heads, Directions(call.clusters, call.dim));
    for_each_item(heads, call.threads, [&](int64_t head, int64_t) {
        float* centroids = call.centroids + head * per_head;
        if (call.start) std::memcpy(centroids, call.start + head * per_head, per_head * sizeof(float));
        else spread_seeds(call, head / call.heads, head % call.heads, centroids);
        directions[head].set(centroids, call.clusters, call.dim);
    });
    const int64_t tiles = (call.num_tokens + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM;
    const int64_t slices = (call.dim + COLUMNS_PER_ITEM - 1) / COLUMNS_PER_ITEM;
    for (int64_t iteration = 0; iteration < call.iters; ++iteration) {
        std::atomic<bool> changed{iteration == 0};
        for_each_item(heads * tiles, call.threads, [&](int64_t item, int64_t thread) {
            const int64_t head = item / tiles, first = item % tiles * TOKENS_PER_ITEM;
            const int64_t b = head / call.heads, h = head % call.heads;
            if (assign(call, directions[head], b, h, first, workspace.of_thread(thread))) changed = true;
        });
        if (!changed) return;  // a fixed point: every further iteration would give the same
        for_each_item(heads * slices, call.threads, [&](int64_t item, int64_t thread) {
            const int64_t head = item / slices, column = item % slices * COLUMNS_PER_ITEM;
            float* floats = workspace.of_thread(thread);
            int32_t* counts = (int32_t*)(floats + (call.clusters + 1) * COLUMNS_PER_ITEM);
            update(call, head / call.heads, head % call.heads, column, floats, counts);
        });
        if (iteration + 1 < call.iters) {
            for_each_item(heads, call.threads, [&](int64_t head, int64_t) {
                directions[head].set(call.centroids + head * per_head, call.clusters, call.dim);
            });
        }
    }
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_kmeans_call_bytes() { return sizeof(svg2::KmeansCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_kmeans(const svg2::KmeansCall* call) {
    try {
        const int64_t assigning = 2 * svg2::STRIP * call->dim;
        const int64_t updating = (call->clusters + 1) * svg2::COLUMNS_PER_ITEM + call->clusters;
        svg2::Workspace workspace(call->threads, std::max(assigning, updating));
        if (workspace.missing()) return 1;
        svg2::run(*call, workspace);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
