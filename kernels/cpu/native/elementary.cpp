// The elementary functions of vector.h over arrays, so that tests can measure their errors.

#include "parallel.h"
#include "vector.h"

extern "C" {

// In place; count is a multiple of 16, which the lanes of every machine divide.
SVG2_EXPORT void svg2_exp2(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += svg2::LANES) {
        svg2::Vec v[1] = {svg2::load(x + i)};
        svg2::exp2<1>(v);
        svg2::store(x + i, v[0]);
    }
}

SVG2_EXPORT void svg2_log(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += svg2::LANES) svg2::store(x + i, svg2::log(svg2::load(x + i)));
}
}
