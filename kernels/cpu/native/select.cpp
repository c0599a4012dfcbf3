// svg2::select_blocks_of_layer: one budget for all heads of a batch item. The priorities of all blocks, then the threshold by a
// histogram of the upper half of their bits, and a sort of the one bin that it falls into.

#include <cmath>
#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "vector.h"

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
    uint8_t* block_map;  // [B, Hq, Cq + 2, Ck + 2]
    float* priority;  // [B, Hq, Cq, Ck]: workspace
    double scale, density;
    int64_t batch, q_heads, kv_heads, dim, q_clusters, k_clusters, threads;

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
constexpr float NOTHING = -__builtin_inff();  // priority of what is not to be selected

// sum_d variance_d (key_d - mean_d)^2
float logit_variance(const float* variance, const float* key, const float* mean, int64_t dim) {
    Vec lanes{};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        const Vec away = load(key + d) - load(mean + d);
        lanes += load(variance + d) * away * away;
    }
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];
    for (; d < dim; ++d) sum += variance[d] * (key[d] - mean[d]) * (key[d] - mean[d]);
    return sum;
}

// Priorities of a row, and its context and null columns. A row with an estimate that is not finite keeps all that has keys,
// outside the budget: its priorities say so by NaN. mean: dim floats.
void rate_row(const SelectCall& call, int64_t b, int64_t row, float* mean) {
    const int64_t q_row = b * call.rows() + row, count = call.k_clusters;
    const float *mass = call.log_mass + q_row * (count + 2), *error = call.log_error + q_row * count;
    const float* variance = call.q_variances + q_row * call.dim;
    const float* keys = call.k_centroids + call.kv_row(b, row) * count * call.dim;
    const int32_t* bounds = call.bounds(b, row);
    float* priority = call.priority + q_row * count;
    float largest = mass[count], of_clusters = NOTHING;
    bool broken = false;
    for (int64_t j = 0; j < count; ++j) {
        if (bounds[j + 1] == bounds[j]) continue;
        broken |= std::isnan(error[j]) || !std::isfinite(mass[j]);
        of_clusters = std::max(of_clusters, mass[j]);
    }
    largest = std::max(largest, of_clusters);
    if (broken || call.q_sizes[q_row] == 0) {
        std::fill(priority, priority + count, broken ? __builtin_nanf("") : NOTHING);
        return;
    }
    float total = std::exp(mass[count] - largest), clusters = 0.0f;
    std::memset(mean, 0, call.dim * sizeof(float));
    for (int64_t j = 0; j < count; ++j) {
        if (bounds[j + 1] == bounds[j]) continue;
        const float weight = std::exp(mass[j] - of_clusters);
        clusters += weight;
        for (int64_t d = 0; d < call.dim; ++d) mean[d] += weight * keys[j * call.dim + d];
    }
    total += clusters * std::exp(of_clusters - largest);
    for (int64_t d = 0; d < call.dim; ++d) mean[d] /= clusters;
    const float log_total = std::log(total) + largest, half = (float)(0.5 * call.scale * call.scale);
    for (int64_t j = 0; j < count; ++j) {
        const int64_t size = bounds[j + 1] - bounds[j];
        priority[j] = NOTHING;
        if (size == 0) continue;
        const float boost = half * logit_variance(variance, keys + j * call.dim, mean, call.dim);
        priority[j] = error[j] - 2.0f * log_total - std::log((float)size) + std::min(MAX_LOG_BOOST, boost);
    }
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
        const svg2::Workspace workspace(call->threads, call->dim);
        if (workspace.missing()) return 1;
        svg2::for_each_item(call->batch * call->rows(), call->threads, [&](int64_t item, int64_t thread) {
            svg2::rate_row(*call, item / call->rows(), item % call->rows(), workspace.of_thread(thread));
        });
        for (int64_t b = 0; b < call->batch; ++b) svg2::spend(*call, b);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
