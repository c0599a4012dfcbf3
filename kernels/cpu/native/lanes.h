// Rows of tokens become lanes: strips of up to VECTORS vectors, transposed.
#pragma once

#include <type_traits>

#include "products.h"
#include "rows.h"

namespace svg2 {

constexpr int64_t STRIP = VECTORS * LANES;

inline int64_t up_to_rows(int64_t count) { return (count + ROWS - 1) / ROWS * ROWS; }

// How many vectors the next strip takes of those that are left: the last four are two and two, as a single one has too few
// sums in flight.
inline int vectors_of_strip(int64_t left) { return left == 4 ? 2 : (int)(left < VECTORS ? left : VECTORS); }

// Calls the function with the number of vectors of a strip, which is a constant inside.
template <class Function>
SVG2_INLINE void with_vectors(int vectors, const Function& function) {
    static_assert(VECTORS == 3);
    if (vectors == 1) function(std::integral_constant<int, 1>());
    if (vectors == 2) function(std::integral_constant<int, 2>());
    if (vectors == 3) function(std::integral_constant<int, 3>());
}

// to[d][lane] = scale * (element d of row row_of(lane)), for the first `rows` of `width` lanes; 0 in the others. by_row: room for
// width * dim floats.
template <class RowOf>
void read_lanes(
    const RowOf& row_of, int64_t rows, int64_t width, int64_t type, int64_t dim, float scale, float* by_row, float* to) {
    for (int64_t lane = 0; lane < rows; ++lane) read_row(row_of(lane), type, dim, by_row + lane * dim);
    for (int64_t i = rows * dim; i < width * dim; ++i) by_row[i] = 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
        for (int64_t lane = 0; lane < width; ++lane) to[d * width + lane] = by_row[lane * dim + d] * scale;
    }
}

}  // namespace svg2
