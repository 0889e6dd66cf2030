#pragma once
// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123) and what is made of its
// words. key = seed, counter = (element / 4, example, step, stream); word `element % 4` belongs to `element`.
#include <cstdint>

#include "elementary.h"

namespace stn_fast {

constexpr int kLanes = 16;           // counters drawn at once; a fixed trip count becomes vector code
constexpr int kDraws = 4 * kLanes;   // numbers they give

struct Words {
    std::uint32_t w0, w1, w2, w3;
};

STN_FAST_INLINE Words philox(Words c, std::uint32_t k0, std::uint32_t k1) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c.w0;
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c.w2;
        c = {static_cast<std::uint32_t>(product1 >> 32) ^ c.w1 ^ k0, static_cast<std::uint32_t>(product1),
             static_cast<std::uint32_t>(product0 >> 32) ^ c.w3 ^ k1, static_cast<std::uint32_t>(product0)};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// The part of the address that all numbers of one call share.
struct Generator {
    std::uint32_t key0, key1, step, stream;

    Generator(std::uint64_t seed, std::uint64_t step_index, std::uint64_t stream_index)
        : key0(static_cast<std::uint32_t>(seed)),
          key1(static_cast<std::uint32_t>(seed >> 32)),
          step(static_cast<std::uint32_t>(step_index)),
          stream(static_cast<std::uint32_t>(stream_index)) {}
};

STN_FAST_INLINE Words words_at(const Generator& g, std::uint32_t quad, std::uint32_t example) {
    return philox({quad, example, g.step, g.stream}, g.key0, g.key1);
}

// Uniforms are steps of 2^-24: exact in float32, bit for bit the same on every backend.
STN_FAST_INLINE std::int32_t uniform_steps(std::uint32_t word) { return static_cast<std::int32_t>(word >> 8); }
STN_FAST_INLINE float uniform_of(std::uint32_t word) { return static_cast<float>(uniform_steps(word)) * 0x1p-24f; }

// Box-Muller. 1 - u is exact and never 0, so the logarithm is finite.
STN_FAST_INLINE void normals_of(std::uint32_t word_a, std::uint32_t word_b, float& first, float& second) {
    const float radius = sqrt_positive(-2.0f * log_positive(1.0f - uniform_of(word_a)));
    float sine, cosine;
    sincos_turns(uniform_steps(word_b), sine, cosine);
    first = radius * cosine;
    second = radius * sine;
}

// Words of one example for the 64 elements from 4 * quad on, in element order.
STN_FAST_INLINE void draw_words(const Generator& g, std::uint32_t quad, std::uint32_t example,
                                std::uint32_t* STN_FAST_RESTRICT words) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        const Words w = words_at(g, quad + static_cast<std::uint32_t>(lane), example);
        words[4 * lane] = w.w0;
        words[4 * lane + 1] = w.w1;
        words[4 * lane + 2] = w.w2;
        words[4 * lane + 3] = w.w3;
    }
}

// Normals of one example for the 64 elements from 4 * quad on, in element order.
STN_FAST_INLINE void draw_normals(const Generator& g, std::uint32_t quad, std::uint32_t example,
                                  float* STN_FAST_RESTRICT normals) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        const Words w = words_at(g, quad + static_cast<std::uint32_t>(lane), example);
        float n0, n1, n2, n3;
        normals_of(w.w0, w.w1, n0, n1);
        normals_of(w.w2, w.w3, n2, n3);
        normals[4 * lane] = n0;
        normals[4 * lane + 1] = n1;
        normals[4 * lane + 2] = n2;
        normals[4 * lane + 3] = n3;
    }
}

void philox(const std::uint32_t* counters, const std::uint32_t* keys, std::uint32_t* out, std::int64_t count, int threads);
void uniform(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
             std::uint64_t step, std::uint64_t stream, int threads);
void normal(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
            std::uint64_t step, std::uint64_t stream, int threads);

}  // namespace stn_fast
