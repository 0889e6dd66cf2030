#pragma once
// exp, log, log1p, sqrt, tanh, sine and cosine as short polynomials, so that loops over them become vector code on every compiler
// without -ffast-math. The fits are minimax; each function is within 2 ulp (sigmoid 2.1) of the true value over the range stated.
// Choices are made on the bits: a compiler that honours floating-point traps keeps `x > 0 ? ... : ...` a branch.
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace stn_fast {

STN_FAST_INLINE float as_float(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

STN_FAST_INLINE std::int32_t as_int(float value) {
    std::int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// log(x) for normal x > 0, with full relative precision near 1: x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
STN_FAST_INLINE float log_positive(float x) {
    const std::int32_t exponent = (as_int(x) - 0x3f3504f3) >> 23;
    const float f = as_float(as_int(x) - exponent * (1 << 23)) - 1.0f;
    const float e = static_cast<float>(exponent);
    float p = -0.07634492963552475f;
    p = p * f + 0.12761574983596802f;
    p = p * f - 0.13160182535648346f;
    p = p * f + 0.14201758801937103f;
    p = p * f - 0.16623356938362122f;
    p = p * f + 0.20001226663589478f;
    p = p * f - 0.2500081956386566f;
    p = p * f + 0.3333333134651184f;
    const float f2 = f * f;
    // log 2 in two parts: the product of the first with e is exact.
    return (f + (f2 * (f * p - 0.5f) + e * -2.12194440e-4f)) + e * 0.693359375f;
}

// sin and cos of 2 pi turns, where turns = steps / 2^24. Reduced exactly: to the nearest quarter, and what is left is
// in [-1/8, 1/8].
STN_FAST_INLINE void sincos_turns(std::int32_t steps, float& sine, float& cosine) {
    const std::int32_t quarter = (steps + (1 << 21)) >> 22;
    const float f = static_cast<float>(steps - quarter * (1 << 22)) * 0x1p-24f;
    const float f2 = f * f;
    float s = -75.39356231689453f;
    s = s * f2 + 81.59235382080078f;
    s = s * f2 - 41.3416633605957f;
    s = (s * f2 + 6.2831854820251465f) * f;
    float c = 59.229244232177734f;
    c = c * f2 - 85.4432373046875f;
    c = c * f2 + 64.93932342529297f;
    c = c * f2 - 19.739208221435547f;
    c = c * f2 + 1.0f;
    const std::int32_t odd = -(quarter & 1);  // all ones or none: in odd quarters the two change places
    const std::int32_t changed = (as_int(s) ^ as_int(c)) & odd;
    sine = as_float(as_int(s) ^ changed ^ ((quarter & 2) << 30));
    cosine = as_float(as_int(c) ^ changed ^ (((quarter + 1) & 2) << 30));
}

// sqrt(x) for x = 0 or normal x > 0. The library's sets errno, which keeps a loop over it scalar.
STN_FAST_INLINE float sqrt_positive(float x) {
    float y = as_float(0x5f375a86 - (as_int(x) >> 1));  // 1 / sqrt(x) to 4%, then two Newton steps
    y = y * (1.5f - 0.5f * x * y * y);
    y = y * (1.5f - 0.5f * x * y * y);
    const float root = x * y;
    return root + 0.5f * y * (x - root * root);
}

// exp(-x) for x >= 0; 0 where the result would be subnormal (x > 87.3).
STN_FAST_INLINE float exp_minus(float x) {
    constexpr float kLast = 87.33654f;
    const std::int32_t kept = -static_cast<std::int32_t>(as_int(x) < as_int(kLast));  // all ones or none
    const float bounded = as_float((as_int(x) & kept) | (as_int(kLast) & ~kept));
    // Adding 1.5 * 2^23 rounds to the nearest integer, which then sits in the low bits.
    const float shifted = bounded * -1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = (-bounded - k * 0.693359375f) - k * -2.12194440e-4f;
    float p = 0.001381461275741458f;
    p = p * r + 0.008368710055947304f;
    p = p * r + 0.04166838899254799f;
    p = p * r + 0.1666652113199234f;
    p = p * r + 0.4999999403953552f;
    p = (p * r) * r + r + 1.0f;
    const std::int32_t exponent = as_int(shifted) - as_int(12582912.0f);
    return as_float((as_int(p) + exponent * (1 << 23)) & kept);
}

// log(1 + t) for t in [0, 1], as 2 atanh(s) with s = t / (2 + t).
STN_FAST_INLINE float log1p_unit(float t) {
    const float s = t / (2.0f + t);
    const float s2 = s * s;
    float p = 0.12150467187166214f;
    p = p * s2 + 0.10713829100131989f;
    p = p * s2 + 0.14308442175388336f;
    p = p * s2 + 0.19999438524246216f;
    p = p * s2 + 0.3333333730697632f;
    return 2.0f * (s + s * (s2 * p));
}

STN_FAST_INLINE float absolute(float x) { return as_float(as_int(x) & 0x7fffffff); }

// log(1 + exp(x)) for finite x, without overflow or cancellation; here and below x - x makes a NaN stay one.
STN_FAST_INLINE float softplus(float x) {
    const float positive_part = as_float(as_int(x) & ~(as_int(x) >> 31));
    return positive_part + log1p_unit(exp_minus(absolute(x))) + (x - x);
}

// 1 / (1 + exp(-x)), which doesn't overflow either.
STN_FAST_INLINE float sigmoid(float x) {
    const float t = exp_minus(absolute(x));
    const std::int32_t negative = as_int(x) >> 31;  // all ones or none
    const float numerator = as_float((as_int(t) & negative) | (as_int(1.0f) & ~negative));
    return numerator / (1.0f + t) + (x - x);
}

// sigmoid(x) sigmoid(-x)
STN_FAST_INLINE float sigmoid_derivative(float x) {
    const float t = exp_minus(absolute(x));
    return t / ((1.0f + t) * (1.0f + t)) + (x - x);
}

// Infinity as the largest finite number, for functions whose value at infinity is their limit; a NaN stays one.
STN_FAST_INLINE float finite(float x) {
    return as_float(as_int(x) - static_cast<std::int32_t>(as_int(absolute(x)) == 0x7f800000));
}

// tanh(x) for finite x: near 0 as x (1 + x^2 p(x^2)), so that small results keep their precision.
STN_FAST_INLINE float hyperbolic_tangent(float x) {
    const float magnitude = absolute(x);
    const float x2 = x * x;
    float p = -0.005704226903617382f;
    p = p * x2 + 0.02063843421638012f;
    p = p * x2 - 0.0537395253777504f;
    p = p * x2 + 0.13331440091133118f;
    p = p * x2 - 0.3333328068256378f;
    const float near = x + x * (x2 * p);
    const float t = exp_minus(2.0f * magnitude);
    const float far = (1.0f - t) / (1.0f + t);
    const std::int32_t small = -static_cast<std::int32_t>(as_int(magnitude) < as_int(0.625f));  // all ones or none
    const std::int32_t signed_far = as_int(far) | (as_int(x) & ~0x7fffffff);
    return as_float((as_int(near) & small) | (signed_far & ~small)) + (x - x);
}

}  // namespace stn_fast
