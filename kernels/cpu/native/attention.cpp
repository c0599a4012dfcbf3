// svg2::block_sparse_attention and svg2::first_order_attention.
//
// A work item is up to ROWS_PER_ITEM queries of one query block: strips of them, transposed, stay in the second-level cache
// while the keys that the block selects pass by once, KEYS_PER_BLOCK at a time. What an item computes depends on nothing but
// its queries, so that no result depends on the number of threads or on who took which item.

#include <new>
#include <vector>

#include "key_stream.h"
#include "parallel.h"

namespace svg2 {
namespace {

constexpr int64_t ROWS_PER_ITEM = 240;
constexpr int64_t ITEMS_PER_THREAD = 4;  // at the least, if there are queries enough: threads end at the same time
constexpr int64_t MAX_STRIPS = ROWS_PER_ITEM / STRIP + 1;

struct Item {
    QueryBlock of;
    int64_t first_row, rows, keys;  // rows: positions in the order of clusters
    int64_t cost() const { return rows * keys; }
};

int64_t keys_of(const AttentionCall& call, const QueryBlock& of) {
    const uint8_t* selected = of.selected(call);
    const int32_t* bounds = of.k_bounds(call);
    const bool compensated = of.compensated(call);
    int64_t keys = 0;
    for (int64_t j = 0; j < call.k_clusters + 2; ++j) {
        const int64_t size = bounds[j + 1] - bounds[j];
        keys += selected[j] ? size : (compensated && j < call.k_clusters && size > 0);
    }
    return keys;
}

std::vector<Item> items_of(const AttentionCall& call) {
    int64_t most_rows = ROWS_PER_ITEM;
    const int64_t wanted = ITEMS_PER_THREAD * call.threads, all_rows = call.batch * call.q_heads * call.num_queries;
    while (most_rows > STRIP && all_rows / most_rows < wanted) most_rows -= STRIP;
    std::vector<Item> items;
    for (int64_t b = 0; b < call.batch; ++b) {
        for (int64_t h = 0; h < call.q_heads; ++h) {
            const int32_t* bounds = call.q_offsets + (b * call.q_heads + h) * (call.q_clusters + 3);
            for (int64_t i = 0; i < call.q_clusters + 2; ++i) {
                const int64_t rows = bounds[i + 1] - bounds[i];
                if (rows == 0) continue;
                const QueryBlock of{b, h, i};
                const int64_t keys = keys_of(call, of), pieces = (rows + most_rows - 1) / most_rows;
                const int64_t per_piece = ((rows + pieces - 1) / pieces + LANES - 1) / LANES * LANES;
                for (int64_t first = 0; first < rows; first += per_piece) {
                    items.push_back({of, bounds[i] + first, std::min(per_piece, rows - first), keys});
                }
            }
        }
    }
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
    return items;
}

class ItemRunner {
  public:
    ItemRunner(const AttentionCall& call, float* floats) : call_(call), columns_(up_to_rows(call.value_dim)) {
        term_rows_ = (const float**)floats;
        weights_ = floats + floats_of_pointers(call.dim + 1);
        row_ = weights_ + std::max<int64_t>(KEYS_PER_BLOCK, call.dim + 1) * STRIP;
        stream_ = row_ + std::max(call.dim, columns_);
        terms_ = stream_ + KeyStream::floats_needed(call);
        strips_ = terms_ + (call.dim + 1) * columns_;
    }

    static int64_t floats_needed(const AttentionCall& call) {
        const int64_t columns = up_to_rows(call.value_dim);
        return floats_of_pointers(call.dim + 1) + std::max<int64_t>(KEYS_PER_BLOCK, call.dim + 1) * STRIP + std::max(call.dim, columns) +
               KeyStream::floats_needed(call) + (call.dim + 1) * columns + MAX_STRIPS * STRIP * (call.dim + columns);
    }

    void run(const Item& item) {
        lay_out(item);
        KeyStream stream(call_, item.of, stream_);
        KeyBlock blocks[2];  // the one that is attended to, and the next one on its way
        int current = 0;
        for (bool more = stream.next_selected(blocks[0]); more; current = 1 - current) {
            more = stream.next_selected(blocks[1 - current]);
            stream.convert(blocks[current], true);
            attend(blocks[current], more ? &blocks[1 - current] : nullptr);
        }
        if (item.of.compensated(call_) && stream.next_skipped(blocks[0])) {
            for (int s = 0; s < num_strips_; ++s) strip_[s].mark_skipped();
            do {
                stream.convert(blocks[0], false);
                attend(blocks[0], nullptr);
            } while (stream.next_skipped(blocks[0]));
            if (call_.q_centroids) first_order(item.of);
        }
        for (int s = 0; s < num_strips_; ++s) write(item, s);
    }

  private:
    static int64_t floats_of_pointers(int64_t count) { return (2 * count + 15) / 16 * 16; }

    void lay_out(const Item& item) {
        int64_t vectors = (item.rows + LANES - 1) / LANES, first = 0;
        float* floats = strips_;
        num_strips_ = 0;
        while (vectors > 0) {
            Strip& strip = strip_[num_strips_];
            strip.vectors = vectors_of_strip(vectors);
            strip.queries = floats;
            strip.out = floats + call_.dim * strip.vectors * LANES;
            floats = strip.out + columns_ * strip.vectors * LANES;
            strip.clear(columns_);
            first_of_[num_strips_++] = first;
            read(item, strip, first);
            first += strip.vectors * LANES;
            vectors -= strip.vectors;
        }
    }

    int64_t query_token(const Item& item, int64_t row) const {
        const int64_t position = item.first_row + row;
        return call_.q_order ? call_.q_order[item.of.q_row(call_) * call_.num_queries + position] : position;
    }

    void read(const Item& item, Strip& strip, int64_t first) {
        const int64_t width = strip.vectors * LANES, rows = std::min(width, item.rows - first);
        const auto row_of = [&](int64_t lane) {
            return call_.query.row(item.of.batch, item.of.head, query_token(item, first + lane));
        };
        // The weights are not needed yet, and there is room.
        read_lanes(row_of, rows, width, call_.query.type, call_.dim, (float)call_.scale, weights_, strip.queries);
    }

    void attend(const KeyBlock& block, const KeyBlock* next) {
        const int64_t key_bytes = call_.dim * call_.key.bytes_per_element();
        const int64_t value_bytes = call_.value_dim * call_.value.bytes_per_element();
        for (int s = 0; s < num_strips_; ++s) {
            const Upcoming upcoming{s == 0 ? next : nullptr, key_bytes, value_bytes};
            with_vectors(strip_[s].vectors, [&](auto v) {
                attend_to_block<decltype(v)::value>(strip_[s], block, call_.dim, columns_, upcoming, weights_);
            });
        }
    }

    void first_order(const QueryBlock& of) {
        const int64_t row = of.q_row(call_) * call_.q_clusters + of.block;
        const float* slope = call_.slope + of.kv_row(call_) * call_.dim * call_.value_dim;
        for (int64_t d = 0; d <= call_.dim; ++d) {
            const float* from = d == 0 ? call_.residual + row * call_.value_dim : slope + (d - 1) * call_.value_dim;
            term_rows_[d] = terms_ + d * columns_;  // up to whole groups of columns
            read_row((const char*)from, FLOAT32, call_.value_dim, terms_ + d * columns_);
            std::fill(terms_ + d * columns_ + call_.value_dim, terms_ + (d + 1) * columns_, 0.0f);
        }
        const float inverse_scale = call_.scale == 0.0 ? 0.0f : (float)(1.0 / call_.scale);
        for (int s = 0; s < num_strips_; ++s) {
            with_vectors(strip_[s].vectors, [&](auto v) {
                add_first_order<decltype(v)::value>(
                    strip_[s], call_.q_centroids + row * call_.dim, term_rows_, inverse_scale, call_.dim, columns_,
                    weights_);
            });
        }
    }

    void write(const Item& item, int s) {
        const Strip& strip = strip_[s];
        const int64_t width = strip.vectors * LANES, first = first_of_[s];
        for (int64_t lane = 0; lane < std::min(width, item.rows - first); ++lane) {
            const int64_t token = query_token(item, first + lane);
            const float total = strip.total[lane / LANES][lane % LANES], shift = strip.shift[lane / LANES][lane % LANES];
            // Rows without keys are zeros; if there are keys and no weight, it is 0 / 0 as in any softmax.
            const float factor = item.keys == 0 ? 0.0f : 1.0f / total;
            for (int64_t c = 0; c < call_.value_dim; ++c) row_[c] = strip.out[c * width + lane] * factor;
            write_row(row_, call_.out.type, call_.value_dim, call_.out.row(item.of.batch, item.of.head, token));
            call_.lse[item.of.q_row(call_) * call_.num_queries + token] =
                (float)(shift * LN_2 + std::log((double)total));
        }
    }

    const AttentionCall& call_;
    const int64_t columns_;
    const float** term_rows_;
    float *weights_, *row_, *stream_, *terms_, *strips_;
    Strip strip_[MAX_STRIPS];
    int64_t first_of_[MAX_STRIPS];
    int num_strips_ = 0;
};

}  // namespace
}  // namespace svg2

extern "C" {

SVG2_EXPORT int64_t svg2_attention_call_bytes() { return sizeof(svg2::AttentionCall); }

// 0, or 1 where there is not enough memory.
SVG2_EXPORT int64_t svg2_attention(const svg2::AttentionCall* call) {
    try {
        const auto items = svg2::items_of(*call);
        svg2::Workspace workspace(call->threads, svg2::ItemRunner::floats_needed(*call));
        if (workspace.missing()) return 1;
        svg2::for_each_item(items.size(), call->threads, [&](int64_t item, int64_t thread) {
            svg2::ItemRunner(*call, workspace.of_thread(thread)).run(items[item]);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
