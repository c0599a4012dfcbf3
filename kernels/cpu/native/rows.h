// Rows of tokens: where they lie, and how they become rows of float32.
#pragma once

#include <cmath>

#include "vector.h"

namespace svg2 {

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A tensor [B, H, N, D] of unit stride in its last dimension; strides in elements. Mirrored in calls.py.
struct Tokens {
    char* data;
    int64_t batch_stride, head_stride, token_stride;
    int64_t type;

    int64_t bytes_per_element() const { return type == FLOAT32 ? 4 : 2; }
    char* row(int64_t batch, int64_t head, int64_t token) const {
        return data + (batch * batch_stride + head * head_stride + token * token_stride) * bytes_per_element();
    }
};

SVG2_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

SVG2_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

SVG2_INLINE float half_to_float(uint16_t half) {
    // Exponent and mantissa moved into place make 2^-112 times the number, also of what is denormal.
    uint32_t magnitude = (half & 0x7fffu) << 13;
    float x = from_bits(magnitude) * 0x1p112f;
    uint32_t infinite = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
    return from_bits(to_bits(x) | infinite | ((half & 0x8000u) << 16));
}

SVG2_INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    __fp16 half = (__fp16)x;
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
#else
#error "no conversion to float16 on this machine"
#endif
}

SVG2_INLINE uint16_t float_to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    if (x != x) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

SVG2_INLINE void prefetch(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

// A row of any type as float32.
inline void read_row(const char* from, int64_t type, int64_t length, float* to) {
    if (type == FLOAT32) {
        std::memcpy(to, from, length * sizeof(float));
    } else if (type == BFLOAT16) {
        const uint16_t* row = (const uint16_t*)from;
        for (int64_t i = 0; i < length; ++i) to[i] = from_bits((uint32_t)row[i] << 16);
    } else {
        const uint16_t* row = (const uint16_t*)from;
        for (int64_t i = 0; i < length; ++i) to[i] = half_to_float(row[i]);
    }
}

// A row where it is, or read into `room`.
inline const float* as_floats(const char* row, int64_t type, int64_t length, float* room) {
    if (type == FLOAT32) return (const float*)row;
    read_row(row, type, length, room);
    return room;
}

// A row of float32 as any type, rounded to nearest.
inline void write_row(const float* from, int64_t type, int64_t length, char* to) {
    if (type == FLOAT32) {
        std::memcpy(to, from, length * sizeof(float));
    } else if (type == BFLOAT16) {
        for (int64_t i = 0; i < length; ++i) ((uint16_t*)to)[i] = float_to_bfloat16(from[i]);
    } else {
        for (int64_t i = 0; i < length; ++i) ((uint16_t*)to)[i] = float_to_half(from[i]);
    }
}

}  // namespace svg2
