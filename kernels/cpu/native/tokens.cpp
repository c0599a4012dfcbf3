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
    float rest = 0.0f;
    for (; d < dim; ++d) rest += (x[d] - y[d]) * (x[d] - y[d]);
    return rest + sum_of(lanes[0] + lanes[1]);
}

// The rows of one cluster.
struct Members {
    const TokensCall& call;
    int64_t b, h;
    const int32_t *order, *offsets;  // offsets[0] to offsets[1]

    Members(const TokensCall& call, int64_t head, int64_t cluster)
        : call(call),
          b(head / call.heads),
          h(head % call.heads),
          order(call.order ? call.order + head * call.num_tokens : nullptr),
          offsets(call.offsets + head * (call.clusters + 3) + cluster) {}

    int64_t size() const { return offsets[1] - offsets[0]; }
    const char* row(int64_t position) const { return call.x.row(b, h, order ? order[position] : position); }

    // `count` columns of a row from the d-th on, where they are or in `room`.
    const float* columns(int64_t position, int64_t d, int64_t count, float* room) const {
        return as_floats(row(position) + d * call.x.bytes_per_element(), call.x.type, count, room);
    }

    // The same, of rows that are read one after another: asks for the columns of one that comes later.
    const float* next_columns(int64_t position, int64_t d, int64_t count, float* room) const {
        const int64_t bytes = call.x.bytes_per_element();
        if (position + ROWS_AHEAD < offsets[1]) prefetch(row(position + ROWS_AHEAD) + d * bytes, count * bytes);
        return columns(position, d, count, room);
    }
};

// mean [COUNT vectors] of columns from the d-th on, or of the squares of their differences to a centroid.
template <int COUNT>
void mean_of_columns(const Members& members, int64_t d, const float* centroid, float* room, float* mean) {
    Vec sum[COUNT] = {}, middle[COUNT] = {};
    if (centroid) {
        SVG2_UNROLL for (int i = 0; i < COUNT; ++i) middle[i] = load(centroid + i * LANES);
    }
    for (int64_t position = members.offsets[0]; position < members.offsets[1]; ++position) {
        const float* values = members.next_columns(position, d, COUNT * LANES, room);
        SVG2_UNROLL for (int i = 0; i < COUNT; ++i) {
            const Vec x = load(values + i * LANES);
            sum[i] += centroid ? (x - middle[i]) * (x - middle[i]) : x;
        }
    }
    const float size = (float)std::max<int64_t>(members.size(), 1);
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) store(mean + i * LANES, sum[i] / size);
}

// Of one cluster the mean of its rows, or of the squares of their differences to its centroid. room: dim floats.
void mean_of_cluster(const TokensCall& call, int64_t head, int64_t cluster, float* room) {
    const Members members(call, head, cluster);
    float* mean = call.means + (head * call.clusters + cluster) * call.dim;
    const float* centroid = call.centroids ? call.centroids + (head * call.clusters + cluster) * call.dim : nullptr;
    const auto centroid_at = [&](int64_t d) { return centroid ? centroid + d : nullptr; };
    constexpr int AT_ONCE = 4;  // as many sums as additions that a processor has under way
    int64_t d = 0;
    for (; d + AT_ONCE * LANES <= call.dim; d += AT_ONCE * LANES) {
        mean_of_columns<AT_ONCE>(members, d, centroid_at(d), room, mean + d);
    }
    for (; d + LANES <= call.dim; d += LANES) mean_of_columns<1>(members, d, centroid_at(d), room, mean + d);
    const int64_t left = call.dim - d;
    std::memset(mean + d, 0, left * sizeof(float));
    for (int64_t position = members.offsets[0]; position < members.offsets[1] && left > 0; ++position) {
        const float* values = members.next_columns(position, d, left, room);
        for (int64_t i = 0; i < left; ++i) {
            mean[d + i] += centroid ? (values[i] - centroid[d + i]) * (values[i] - centroid[d + i]) : values[i];
        }
    }
    for (int64_t i = 0; i < left && members.size() > 0; ++i) mean[d + i] /= (float)members.size();
}

// The differences to the centroid of the `count` members of one cluster that are farthest from it, the farthest first. Those kept so
// far are sorted; another one goes behind all that are at least as far. work: dim + 2 count floats.
void farthest_of_cluster(const TokensCall& call, int64_t head, int64_t cluster, float* work) {
    const Members members(call, head, cluster);
    const int64_t dim = call.dim;
    const float* centroid = call.centroids + (head * call.clusters + cluster) * dim;
    float *room = work, *distances = work + dim;
    int32_t* positions = (int32_t*)(distances + call.count);
    int64_t found = 0;
    for (int64_t position = members.offsets[0]; position < members.offsets[1]; ++position) {
        const float distance = squared_distance(members.next_columns(position, 0, dim, room), centroid, dim);
        if (found == call.count && !(distance > distances[found - 1])) continue;
        int64_t place = found < call.count ? found++ : found - 1;
        for (; place > 0 && distances[place - 1] < distance; --place) {
            distances[place] = distances[place - 1];
            positions[place] = positions[place - 1];
        }
        distances[place] = distance;
        positions[place] = (int32_t)position;
    }
    float* kept = call.means + (head * call.clusters + cluster) * call.count * dim;
    for (int64_t m = 0; m < found; ++m) {
        const float* member = members.columns(positions[m], 0, dim, room);
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
