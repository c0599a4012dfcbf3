// Vectors of floats, as wide as the machine has them: GCC's and Clang's vector types, so that one source is AVX2, AVX-512
// and NEON. What these types have no operator for (maximum, exponential) is here, and nothing else is written per machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace svg2 {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr float LOG2_E = 1.4426950408889634f;

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(LANES * sizeof(float))));

#define SVG2_INLINE inline __attribute__((always_inline))
// A function of its own: in the middle of a larger one, the compiler keeps sums in memory and not in registers.
#define SVG2_OUTLINE __attribute__((noinline))
#if defined(__clang__)
#define SVG2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SVG2_UNROLL _Pragma("GCC unroll 32")
#endif

SVG2_INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

SVG2_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

SVG2_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 is x for every x, also for -0 and NaN

// The larger of both; b where one is NaN.
SVG2_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// By halves of halves: lane by lane it is a chain of additions that takes longer than what comes before it.
inline float sum_of(Vec lanes) {
    float sums[LANES];
    store(sums, lanes);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

inline float largest_of(Vec lanes) {
    float largest = lanes[0];
    for (int lane = 1; lane < LANES; ++lane) largest = std::max(largest, (float)lanes[lane]);
    return largest;
}

// x as a value in a register, of which the compiler does not know where it comes from: it neither reads it from memory again
// at each use nor makes what computed it a part of another instruction.
SVG2_INLINE Vec in_register(Vec x) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__x86_64__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

// A product as it is when it is rounded, and not as part of a fused multiply-add. Exponents are relative to a largest one that
// was rounded: with scores of 10^10 the largest less itself would else be a power of two of any size.
SVG2_INLINE Vec rounded(Vec x) { return in_register(x); }

// x = 2^x for COUNT vectors of x <= 127, with a relative error below 2e-7; below 2^-126.5 it is exactly 0, so that no
// denormal number slows the products down; NaN stays NaN. Step by step for all vectors: a single one is a chain of dependent
// instructions, of which a processor does not look far enough ahead to overlap several.
template <int COUNT>
SVG2_INLINE void exp2(Vec* x) {
    // Adding 1.5 * 2^23 rounds to an integer, and the 127 beside it is the bias of a float's exponent: so the low bits of
    // the sum are the exponent of 2^n.
    const Vec magic = broadcast(12582912.0f + 127.0f), lowest = broadcast(-127.0f);
    // The polynomial of fifth degree with p(0) = 1 that has the smallest relative error on [-1/2, 1/2]: 0.92e-7.
    const float coefficients[] = {0x1.3cea88p-7f, 0x1.c6b752p-5f, 0x1.ebf9bcp-3f, 0x1.62e42ap-1f, 1.0f};
    Vec power[COUNT], p[COUNT];
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) x[i] = larger(lowest, x[i]);
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) power[i] = x[i] + magic;
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) x[i] -= power[i] - magic;
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) power[i] = (Vec)((IntVec)power[i] << 23);
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) p[i] = broadcast(0x1.5bba14p-10f);
    SVG2_UNROLL for (int c = 0; c < 5; ++c) {
        SVG2_UNROLL for (int i = 0; i < COUNT; ++i) p[i] = p[i] * x[i] + broadcast(coefficients[c]);
    }
    // A product and not a sum of exponents: NaN times anything is NaN.
    SVG2_UNROLL for (int i = 0; i < COUNT; ++i) x[i] = p[i] * power[i];
}

// ln x with an error of a few roundings; ln 0 is -inf, of NaN and of negative numbers NaN.
SVG2_INLINE Vec log(Vec x) {
    const Vec infinity = broadcast(__builtin_inff());
    const Vec small = x < broadcast(0x1p-100f) ? broadcast(1.0f) : Vec{};  // where it may be denormal
    const Vec y = x * (broadcast(1.0f) + small * 0x1p64f);  // 1 + 2^64 is 2^64
    // y = 2^e m, m between the roots of 1/2 and of 2, and ln m is a series in (m - 1) / (m + 1).
    const IntVec e = ((IntVec)y - 0x3f3504f3) >> 23;
    const Vec m = (Vec)((IntVec)y - (e << 23));
    const Vec s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    Vec series = s2 * broadcast(1.0f / 9) + broadcast(1.0f / 7);
    series = series * s2 + broadcast(1.0f / 5);
    series = series * s2 + broadcast(1.0f / 3);
    series = 2.0f * (s + s * s2 * series);
    const Vec result = series + (__builtin_convertvector(e, Vec) - small * 64.0f) * broadcast(0.6931471805599453f);
    const Vec zero_or_less = x == Vec{} ? -infinity : infinity - infinity;
    const Vec nonnegative = x < infinity ? result : x;  // infinity and NaN
    return x > Vec{} ? nonnegative : (x <= Vec{} ? zero_or_less : x);
}

}  // namespace svg2
