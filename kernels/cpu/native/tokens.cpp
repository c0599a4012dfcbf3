// Ops that move or sum tokens: svg2::cluster_order, permute_tokens and unpermute_tokens, cluster_means,
// cluster_variances and farthest_members.

#include <new>

#include "parallel.h"
#include "rows.h"

namespace svg2 {
namespace {

// Mirrored in tokens.py. Tensors are contiguous but for x and out; what an op does not need is null.
struct TokensCall {
    Tokens x, out;
    int32_t* order;  // [B, H, N]: the token at a position
    int32_t* offsets;  // [B, H, C + 3]
    const int32_t* labels;  // [B, H, video tokens]
    const uint8_t* valid;  // [B, 1 or H, N] or null
    const float* centroids;  // [B, H, C, D] or null: sums of squares of differences to them instead of sums
    float* means;  // [B, H, C, D], or [B, H, C, count, D] of the farthest members
    int64_t batch, heads, num_tokens, dim, clusters, start, video_tokens, valid_heads, inverse, count, threads;
};

constexpr int64_t ROWS_PER_ITEM = 1024;
constexpr int64_t CLUSTERS_PER_ITEM = 16;
constexpr int64_t ROWS_AHEAD = 12;  // rows in an order lie anywhere: they are asked for before they are needed

// A counting sort of the tokens of one head by block: stable, two passes over the labels.
void order_head(const TokensCall& call, int64_t head) {
    const int64_t b = head / call.heads, h = head % call.heads, boundaries = call.clusters + 3;
    const int32_t* labels = call.labels + head * call.video_tokens;
    const uint8_t* valid = nullptr;
    if (call.valid) valid = call.valid + (b * call.valid_heads + (call.valid_heads > 1 ? h : 0)) * call.num_tokens;
    const auto block_of = [&](int64_t token) -> int64_t {
        if (valid && !valid[token]) return call.clusters + 1;
        const int64_t place = token - call.start;
        return place >= 0 && place < call.video_tokens ? labels[place] : call.clusters;
    };
    int32_t* offsets = call.offsets + head * boundaries;
    int32_t* order = call.order + head * call.num_tokens;
    // offsets[i + 1] counts the tokens of block i, then is where its next one goes, and in the end is where it ends.
    std::memset(offsets, 0, boundaries * sizeof(int32_t));
    for (int64_t token = 0; token < call.num_tokens; ++token) ++offsets[block_of(token) + 1];
    int32_t before = 0;
    for (int64_t i = 1; i < boundaries; ++i) {
        const int32_t size = offsets[i];
        offsets[i] = before;
        before += size;
    }
    for (int64_t token = 0; token < call.num_tokens; ++token) order[offsets[block_of(token) + 1]++] = (int32_t)token;
}

// Rows of one head from `first` position on, to their positions, or inversely from them to their tokens.
void permute_rows(const TokensCall& call, int64_t head, int64_t first) {
    const int64_t b = head / call.heads, h = head % call.heads, bytes = call.dim * call.x.bytes_per_element();
    const int32_t* order = call.order + head * call.num_tokens;
    const int64_t last = first + ROWS_PER_ITEM < call.num_tokens ? first + ROWS_PER_ITEM : call.num_tokens;
    for (int64_t position = first; position < last; ++position) {
        const int64_t token = order[position];
        const int64_t from = call.inverse ? position : token, to = call.inverse ? token : position;
        if (!call.inverse && position + ROWS_AHEAD < last) prefetch(call.x.row(b, h, order[position + ROWS_AHEAD]), bytes);
        std::memcpy(call.out.row(b, h, to), call.x.row(b, h, from), bytes);
    }
}

float squared_distance(const float* x, const float* y, int64_t dim) {
    Vec lanes[2] = {};
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) {
        SVG2_UNROLL for (int v = 0; v < 2; ++v) {
            const Vec away = load(x + d + v * LANES) - load(y + d + v * LANES);
            lanes[v] += away * away;
        }
    }
    // Halves of halves: a sum lane by lane is a chain of additions that takes longer than the products.
    float sums[LANES], sum = 0.0f;
    store(sums, lanes[0] + lanes[1]);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    for (; d < dim; ++d) sum += (x[d] - y[d]) * (x[d] - y[d]);
    return sum + sums[0];
}

// Of one cluster the mean of its rows, or of the squares of their differences to its centroid. row: dim floats.
void mean_of_cluster(const TokensCall& call, int64_t head, int64_t cluster, float* row) {
    const int64_t b = head / call.heads, h = head % call.heads;
    const int32_t* offsets = call.offsets + head * (call.clusters + 3) + cluster;
    const int32_t* order = call.order ? call.order + head * call.num_tokens : nullptr;
    float* mean = call.means + (head * call.clusters + cluster) * call.dim;
    const float* centroid = call.centroids ? call.centroids + (head * call.clusters + cluster) * call.dim : nullptr;
    const int64_t bytes = call.dim * call.x.bytes_per_element();
    const auto row_at = [&](int64_t position) { return call.x.row(b, h, order ? order[position] : position); };
    std::memset(mean, 0, call.dim * sizeof(float));
    for (int64_t position = offsets[0]; position < offsets[1]; ++position) {
        if (position + ROWS_AHEAD < offsets[1]) prefetch(row_at(position + ROWS_AHEAD), bytes);
        const float* values = row;
        if (call.x.type == FLOAT32) values = (const float*)row_at(position);
        else read_row(row_at(position), call.x.type, call.dim, row);
        if (centroid) {
            for (int64_t d = 0; d < call.dim; ++d) mean[d] += (values[d] - centroid[d]) * (values[d] - centroid[d]);
        } else {
            for (int64_t d = 0; d < call.dim; ++d) mean[d] += values[d];
        }
    }
    const int64_t size = offsets[1] - offsets[0];
    for (int64_t d = 0; d < call.dim && size > 0; ++d) mean[d] /= (float)size;
}

// The differences to the centroid of the `count` members of one cluster that are farthest from it, the farthest first. Those kept so
// far are sorted; another one goes behind all that are at least as far. work: dim + 2 count floats.
void farthest_of_cluster(const TokensCall& call, int64_t head, int64_t cluster, float* work) {
    const int64_t b = head / call.heads, h = head % call.heads, dim = call.dim;
    const int32_t* offsets = call.offsets + head * (call.clusters + 3) + cluster;
    const int32_t* order = call.order + head * call.num_tokens;
    const float* centroid = call.centroids + (head * call.clusters + cluster) * dim;
    float *row = work, *distances = work + dim;
    int32_t* tokens = (int32_t*)(distances + call.count);
    const auto row_of = [&](int64_t token) -> const float* {
        const char* from = call.x.row(b, h, token);
        if (call.x.type == FLOAT32) return (const float*)from;
        read_row(from, call.x.type, dim, row);
        return row;
    };
    int64_t found = 0;
    for (int64_t position = offsets[0]; position < offsets[1]; ++position) {
        if (position + ROWS_AHEAD < offsets[1]) {
            prefetch(call.x.row(b, h, order[position + ROWS_AHEAD]), dim * call.x.bytes_per_element());
        }
        const float distance = squared_distance(row_of(order[position]), centroid, dim);
        if (found == call.count && !(distance > distances[found - 1])) continue;
        int64_t place = found < call.count ? found++ : found - 1;
        for (; place > 0 && distances[place - 1] < distance; --place) {
            distances[place] = distances[place - 1];
            tokens[place] = tokens[place - 1];
        }
        distances[place] = distance;
        tokens[place] = order[position];
    }
    float* kept = call.means + (head * call.clusters + cluster) * call.count * dim;
    for (int64_t m = 0; m < found; ++m) {
        const float* member = row_of(tokens[m]);
        for (int64_t d = 0; d < dim; ++d) kept[m * dim + d] = member[d] - centroid[d];
    }
    std::memset(kept + found * dim, 0, (call.count - found) * dim * sizeof(float));
}

int64_t pieces(int64_t count, int64_t of) { return (count + of - 1) / of; }

// Calls function(call, head, cluster, floats of the thread's own) for every cluster of every head.
template <class Function>
int64_t for_each_cluster(const TokensCall& call, int64_t floats, const Function& function) {
    const Workspace workspace(call.threads, floats);
    if (workspace.missing()) return 1;
    const int64_t per_head = pieces(call.clusters, CLUSTERS_PER_ITEM);
    for_each_item(call.batch * call.heads * per_head, call.threads, [&](int64_t item, int64_t thread) {
        const int64_t first = item % per_head * CLUSTERS_PER_ITEM;
        for (int64_t c = first; c < first + CLUSTERS_PER_ITEM && c < call.clusters; ++c) {
            function(call, item / per_head, c, workspace.of_thread(thread));
        }
    });
    return 0;
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_order_call_bytes() { return sizeof(svg2::TokensCall); }
SVG2_EXPORT int64_t svg2_permute_call_bytes() { return sizeof(svg2::TokensCall); }
SVG2_EXPORT int64_t svg2_means_call_bytes() { return sizeof(svg2::TokensCall); }
SVG2_EXPORT int64_t svg2_farthest_call_bytes() { return sizeof(svg2::TokensCall); }

// The smallest and the largest of a number of values that is not 0.
SVG2_EXPORT void svg2_range(const int32_t* values, int64_t count, int32_t* range) {
    int32_t smallest = values[0], largest = values[0];
    for (int64_t i = 1; i < count; ++i) {
        smallest = values[i] < smallest ? values[i] : smallest;
        largest = values[i] > largest ? values[i] : largest;
    }
    range[0] = smallest;
    range[1] = largest;
}

// All others return 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_order(const svg2::TokensCall* call) {
    svg2::for_each_item(call->batch * call->heads, call->threads, [&](int64_t head, int64_t) {
        svg2::order_head(*call, head);
    });
    return 0;
}

SVG2_EXPORT int64_t svg2_permute(const svg2::TokensCall* call) {
    const int64_t per_head = svg2::pieces(call->num_tokens, svg2::ROWS_PER_ITEM);
    svg2::for_each_item(call->batch * call->heads * per_head, call->threads, [&](int64_t item, int64_t) {
        svg2::permute_rows(*call, item / per_head, item % per_head * svg2::ROWS_PER_ITEM);
    });
    return 0;
}

SVG2_EXPORT int64_t svg2_means(const svg2::TokensCall* call) {
    return svg2::for_each_cluster(*call, call->dim, svg2::mean_of_cluster);
}

SVG2_EXPORT int64_t svg2_farthest(const svg2::TokensCall* call) {
    return svg2::for_each_cluster(*call, call->dim + 2 * call->count, svg2::farthest_of_cluster);
}
}
