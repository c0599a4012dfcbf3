// svg2::select_blocks_of_layer: one budget for all heads of a batch item. The priorities of all blocks, then the threshold by a
// histogram of the upper half of their bits, and a sort of the one bin that it falls into.

#include <cmath>
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "lanes.h"
#include "parallel.h"

namespace svg2 {
namespace {

// Mirrored in select.py. Tensors are contiguous.
struct SelectCall {
    const float* log_mass;  // [B, Hq, Cq, Ck + 2]
    const float* log_error;  // [B, Hq, Cq, Ck]
    const float* q_variances;  // [B, Hq, Cq, D]
    const float* k_centroids;  // [B, Hkv, Ck, D]
    const int32_t* q_sizes;  // [B, Hq, Cq]
    const int32_t* k_offsets;  // [B, Hkv, Ck + 3]
    const float* far_members;  // [B, Hq, Cq, members, D] or null
    uint8_t* block_map;  // [B, Hq, Cq + 2, Ck + 2]
    float* priority;  // [B, Hq, Cq, Ck]: workspace
    double scale, density;
    int64_t batch, q_heads, kv_heads, dim, q_clusters, k_clusters, members, threads;

    int64_t rows() const { return q_heads * q_clusters; }  // of a batch item
    int64_t kv_row(int64_t b, int64_t row) const {
        return b * kv_heads + row / q_clusters / (q_heads / kv_heads);
    }
    const int32_t* bounds(int64_t b, int64_t row) const { return k_offsets + kv_row(b, row) * (k_clusters + 3); }
    uint8_t* map_row(int64_t b, int64_t row) const {
        return block_map + ((b * q_heads + row / q_clusters) * (q_clusters + 2) + row % q_clusters) * (k_clusters + 2);
    }
};

constexpr float MAX_LOG_BOOST = 8.0f;
constexpr int64_t BINS = 1 << 16;
constexpr int64_t ROWS_PER_ITEM = 8;
constexpr float NOTHING = -__builtin_inff();  // priority of what is not to be selected

int64_t padded(int64_t count) { return (count + STRIP - 1) / STRIP * STRIP; }

// e^x of a vector; x <= 88.
Vec exp_of(Vec x) {
    x = x * broadcast(LOG2_E);
    exp2<1>(&x);
    return x;
}

// What one thread needs. Clusters lie side by side, padded to whole strips; of an empty or padding one the key is 0 and the mass
// -inf.
struct Ratings {
    int64_t width;
    const float *keys, *log_sizes;  // [strips, D, STRIP], times s, and [width] of the head, as turn_keys made them
    float *mass, *boost, *squares, *logits, *means;  // [width], logits [strips, members up to ROWS, STRIP], means [D]

    static int64_t floats(const SelectCall& call) {
        return (3 + up_to_rows(call.members)) * padded(call.k_clusters) + call.dim;
    }
    Ratings(const SelectCall& call, const float* keys, float* memory) : width(padded(call.k_clusters)), keys(keys) {
        log_sizes = keys + call.dim * width;
        mass = memory;
        boost = mass + width;
        squares = boost + width;
        logits = squares + width;
        means = logits + up_to_rows(call.members) * width;
    }
};

// The mean keys of one key head times s, strips of them side by side, and ln n_j: turned [D + 1, width], which is 0. What belongs
// to no key stays so.
void turn_keys(const SelectCall& call, int64_t kv_row, float* turned) {
    const float* keys = call.k_centroids + kv_row * call.k_clusters * call.dim;
    const int32_t* bounds = call.k_offsets + kv_row * (call.k_clusters + 3);
    float* log_sizes = turned + call.dim * padded(call.k_clusters);
    for (int64_t j = 0; j < call.k_clusters; ++j) {
        if (bounds[j + 1] == bounds[j]) continue;
        float* lane = turned + j / STRIP * call.dim * STRIP + j % STRIP;
        for (int64_t d = 0; d < call.dim; ++d) lane[d * STRIP] = keys[j * call.dim + d] * (float)call.scale;
        log_sizes[j] = std::log((float)(bounds[j + 1] - bounds[j]));
    }
}

// ln of the sum of e^mass over clusters.
float log_mass_of_clusters(const Ratings& work) {
    Vec most = broadcast(NOTHING), sum{};
    for (int64_t j = 0; j < work.width; j += LANES) most = larger(load(work.mass + j), most);
    const float largest = largest_of(most);
    for (int64_t j = 0; j < work.width; j += LANES) sum += exp_of(load(work.mass + j) - largest);
    return largest + std::log(sum_of(sum));
}

// Means of COUNT dimensions of the keys from the d-th on, weighted by squares.
template <int COUNT>
void mean_keys(int64_t d, int64_t dim, Ratings& work) {
    Vec weighted[COUNT] = {};
    for (int64_t j = 0; j < work.width; j += STRIP) {
        const float* keys = work.keys + j * dim + d * STRIP;
        SVG2_UNROLL for (int v = 0; v < VECTORS; ++v) {
            const Vec weight = load(work.squares + j + v * LANES);
            SVG2_UNROLL for (int i = 0; i < COUNT; ++i) weighted[i] += load(keys + i * STRIP + v * LANES) * weight;
        }
    }
    for (int i = 0; i < COUNT; ++i) work.means[d + i] = sum_of(weighted[i]);
}

// boost = min(8, s^2 / 2 sum_d variance_d (key_d - mean_d)^2), the mean weighted by the masses.
void boost_by_variance(const SelectCall& call, int64_t q_row, float of_clusters, Ratings& work) {
    const float* variance = call.q_variances + q_row * call.dim;
    for (int64_t j = 0; j < work.width; j += LANES) store(work.squares + j, exp_of(load(work.mass + j) - of_clusters));
    int64_t d = 0;
    for (; d + 4 <= call.dim; d += 4) mean_keys<4>(d, call.dim, work);
    for (; d < call.dim; ++d) mean_keys<1>(d, call.dim, work);
    for (int64_t j = 0; j < work.width; j += STRIP) {
        const float* keys = work.keys + j * call.dim;
        Vec boost[VECTORS] = {};
        for (d = 0; d < call.dim; ++d) {
            SVG2_UNROLL for (int v = 0; v < VECTORS; ++v) {
                const Vec away = load(keys + d * STRIP + v * LANES) - work.means[d];
                boost[v] += variance[d] * away * away;
            }
        }
        SVG2_UNROLL for (int v = 0; v < VECTORS; ++v) {
            store(work.boost + j + v * LANES, -larger(-0.5f * boost[v], broadcast(-MAX_LOG_BOOST)));
        }
    }
}

// logits = s (q_m - q_i).c_j of all members, those of a strip of clusters while it is in the first-level cache. Beside the last
// member the first one stands again.
void logits_of_members(const SelectCall& call, const float* far_members, int64_t members, Ratings& work) {
    const float bias[ROWS] = {};
    for (int64_t j = 0; j < work.width; j += STRIP) {
        for (int64_t m = 0; m < members; m += ROWS) {
            const float* rows[ROWS];
            for (int64_t r = 0; r < ROWS; ++r) rows[r] = far_members + (m + r < members ? m + r : 0) * call.dim;
            Vec largest[VECTORS] = {};
            float* logits = work.logits + j * up_to_rows(call.members) + m * STRIP;
            scores_of_rows<VECTORS>(rows, bias, work.keys + j * call.dim, call.dim, logits, largest);
        }
    }
}

// Adds P_mj^2 of a member to squares [width]; its logits [strips, .., STRIP], each `stride` after the other, become e^(mass + logit),
// up to a factor.
void add_squared_shares(float* logits, int64_t stride, float context, Ratings& work) {
    const auto for_vectors = [&](const auto& function) {
        float* strip = logits;
        for (int64_t j = 0; j < work.width; j += STRIP, strip += stride) {
            SVG2_UNROLL for (int v = 0; v < VECTORS; ++v) function(strip + v * LANES, j + v * LANES);
        }
    };
    Vec most = broadcast(context), sum{};
    for_vectors([&](float* at, int64_t j) {
        const Vec logit = load(at) + load(work.mass + j);
        store(at, logit);
        most = larger(logit, most);
    });
    const float largest = largest_of(most);
    for_vectors([&](float* at, int64_t) {
        const Vec weight = exp_of(load(at) - largest);
        store(at, weight);
        sum += weight;
    });
    const float share = 1.0f / (sum_of(sum) + std::exp(context - largest));
    for_vectors([&](float* at, int64_t j) {
        const Vec weight = load(at) * share;
        store(work.squares + j, load(work.squares + j) + weight * weight);
    });
}

// boost = ln(e^boost + sum_m (P_mj / P_ij)^2 / size). Squares of shares below 10^-38 are lost: nobody attends there.
void boost_by_members(const SelectCall& call, int64_t q_row, float context, float log_row, Ratings& work) {
    const float* far_members = call.far_members + q_row * call.members * call.dim;
    const int64_t members = std::min<int64_t>(call.members, call.q_sizes[q_row]);
    std::memset(work.squares, 0, work.width * sizeof(float));
    logits_of_members(call, far_members, members, work);
    const int64_t stride = up_to_rows(call.members) * STRIP;
    for (int64_t m = 0; m < members; ++m) add_squared_shares(work.logits + m * STRIP, stride, context, work);
    const float share = 1.0f / (float)call.q_sizes[q_row];
    for (int64_t j = 0; j < work.width; j += LANES) {
        const Vec boost = load(work.boost + j);
        const Vec squares = log(load(work.squares + j) * share) - 2.0f * (load(work.mass + j) - log_row);
        const Vec most = larger(squares, boost);  // boost where a cluster is empty, of which the squares are NaN
        store(work.boost + j, most + log(exp_of(squares - most) + exp_of(boost - most)));
    }
}

// Priorities of a row, and its context and null columns. A row with an estimate that is not finite keeps all that has keys,
// outside the budget: its priorities say so by NaN.
void rate_row(const SelectCall& call, int64_t b, int64_t row, Ratings& work) {
    const int64_t q_row = b * call.rows() + row, count = call.k_clusters;
    const float *mass = call.log_mass + q_row * (count + 2), *error = call.log_error + q_row * count;
    const int32_t* bounds = call.bounds(b, row);
    float* priority = call.priority + q_row * count;
    bool broken = false;
    for (int64_t j = 0; j < work.width; ++j) {
        const bool filled = j < count && bounds[j + 1] > bounds[j];
        work.mass[j] = filled ? mass[j] : NOTHING;
        broken |= filled && (std::isnan(error[j]) || !std::isfinite(mass[j]));
    }
    if (broken || call.q_sizes[q_row] == 0) {
        std::fill(priority, priority + count, broken ? __builtin_nanf("") : NOTHING);
        return;
    }
    const float of_clusters = log_mass_of_clusters(work), most = std::max(of_clusters, mass[count]);
    const float log_row = most + std::log(std::exp(of_clusters - most) + std::exp(mass[count] - most));
    boost_by_variance(call, q_row, of_clusters, work);
    if (call.far_members) boost_by_members(call, q_row, mass[count], log_row, work);
    for (int64_t j = 0; j < count; ++j) {
        priority[j] = NOTHING;
        if (bounds[j + 1] > bounds[j]) priority[j] = error[j] - 2.0f * log_row - work.log_sizes[j] + work.boost[j];
    }
}

// Rows of one head, from `first` on. turned: the mean keys of all key heads.
void rate_rows(const SelectCall& call, int64_t head, int64_t first, const float* turned, float* memory) {
    const int64_t b = head / call.q_heads, row = head % call.q_heads * call.q_clusters;
    const int64_t last = std::min(first + ROWS_PER_ITEM, call.q_clusters);
    Ratings work(call, turned + call.kv_row(b, row) * (call.dim + 1) * padded(call.k_clusters), memory);
    for (int64_t i = first; i < last; ++i) rate_row(call, b, row + i, work);
}

// The bin of a priority: the upper half of the bits of a float is in the float's order, once those of negative ones are turned
// around.
int64_t bin_of(float priority) {
    int32_t bits;
    std::memcpy(&bits, &priority, sizeof bits);
    return ((bits < 0 ? bits ^ 0x7fffffff : bits) >> 16) + BINS / 2;
}

// The blocks of a batch item that the budget is for: calls function(row, cluster, priority, pairs) for each, in order.
template <class Function>
void for_rated(const SelectCall& call, int64_t b, const Function& function) {
    for (int64_t row = 0; row < call.rows(); ++row) {
        const int64_t q_row = b * call.rows() + row;
        const float* priority = call.priority + q_row * call.k_clusters;
        const int32_t* bounds = call.bounds(b, row);
        for (int64_t j = 0; j < call.k_clusters; ++j) {
            if (std::isnan(priority[j])) continue;
            const double pairs = (double)call.q_sizes[q_row] * (bounds[j + 1] - bounds[j]);
            function(row, j, priority[j], pairs);
        }
    }
}

struct Tied {
    int64_t row, cluster;
    float priority;
    double pairs;
};

// Keeps the highest priorities of a batch item until their pairs first reach the budget; ties go to the lower index.
void spend(const SelectCall& call, int64_t b) {
    std::vector<double> in_bin(BINS, 0.0);
    double all = 0.0;
    for_rated(call, b, [&](int64_t, int64_t, float priority, double pairs) {
        all += pairs;
        if (priority > NOTHING) in_bin[bin_of(priority)] += pairs;
    });
    const double budget = call.density * all;
    int64_t last = BINS - 1;  // the bin in which the budget is reached
    double above = 0.0;
    while (last > 0 && above + in_bin[last] < budget) above += in_bin[last--];
    std::vector<Tied> tied;
    for_rated(call, b, [&](int64_t row, int64_t j, float priority, double pairs) {
        const int64_t bin = priority > NOTHING ? bin_of(priority) : -1;
        call.map_row(b, row)[j] = bin > last;
        if (bin == last) tied.push_back({row, j, priority, pairs});
    });
    std::stable_sort(tied.begin(), tied.end(), [](const Tied& x, const Tied& y) { return x.priority > y.priority; });
    for (const Tied& block : tied) {
        if (!(above < budget)) break;
        call.map_row(b, block.row)[block.cluster] = 1;
        above += block.pairs;
    }
    for (int64_t row = 0; row < call.rows(); ++row) {
        const float* priority = call.priority + (b * call.rows() + row) * call.k_clusters;
        const int32_t* bounds = call.bounds(b, row);
        for (int64_t j = 0; j < call.k_clusters; ++j) {
            if (std::isnan(priority[j])) call.map_row(b, row)[j] = bounds[j + 1] > bounds[j];
        }
    }
}

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_select_call_bytes() { return sizeof(svg2::SelectCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_select(const svg2::SelectCall* call) {
    try {
        const svg2::Workspace workspace(call->threads, svg2::Ratings::floats(*call));
        if (workspace.missing()) return 1;
        const int64_t per_head = (call->q_clusters + svg2::ROWS_PER_ITEM - 1) / svg2::ROWS_PER_ITEM;
        const int64_t items = call->batch * call->q_heads * per_head, kv_heads = call->batch * call->kv_heads;
        const int64_t of_head = (call->dim + 1) * svg2::padded(call->k_clusters);
        std::vector<float> turned(kv_heads * of_head);
        svg2::for_each_item(kv_heads, call->threads, [&](int64_t kv_row, int64_t) {
            svg2::turn_keys(*call, kv_row, turned.data() + kv_row * of_head);
        });
        svg2::for_each_item(items, call->threads, [&](int64_t item, int64_t thread) {
            const int64_t first = item % per_head * svg2::ROWS_PER_ITEM;
            svg2::rate_rows(*call, item / per_head, first, turned.data(), workspace.of_thread(thread));
        });
        for (int64_t b = 0; b < call->batch; ++b) svg2::spend(*call, b);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
