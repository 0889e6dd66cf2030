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

constexpr std::uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

// The upper half of a 64-bit product. The lower is asked for apart: vector units have an instruction for each.
STN_FAST_INLINE std::uint32_t high_product(std::uint32_t a, std::uint32_t b) {
    return static_cast<std::uint32_t>((std::uint64_t{a} * b) >> 32);
}

// Ten rounds on 32-bit words.
STN_FAST_INLINE Words philox(Words c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        c = {high_product(kMultiplier1, c.w2) ^ c.w1 ^ k0, kMultiplier1 * c.w2,
             high_product(kMultiplier0, c.w0) ^ c.w3 ^ k1, kMultiplier0 * c.w0};
        k0 += kKeyStep0;
        k1 += kKeyStep1;
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

// Words of 16 counters. Lane l has the counter (quad + l * quad_step, example + l * example_step, step, stream).
using WordTile = std::uint32_t[4][kLanes];
void draw_tile(const Generator& g, std::uint32_t quad, std::uint32_t quad_step, std::uint32_t example,
               std::uint32_t example_step, WordTile& words);

// Words of one example for the 64 elements from 4 * quad on, in element order.
STN_FAST_INLINE void draw_words(const Generator& g, std::uint32_t quad, std::uint32_t example,
                                std::uint32_t* STN_FAST_RESTRICT words) {
    WordTile tile;
    draw_tile(g, quad, 1, example, 0, tile);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        words[4 * lane] = tile[0][lane];
        words[4 * lane + 1] = tile[1][lane];
        words[4 * lane + 2] = tile[2][lane];
        words[4 * lane + 3] = tile[3][lane];
    }
}

// The 64 normals of a tile of one example, in element order.
STN_FAST_INLINE void normals_of_tile(const WordTile& tile, float* STN_FAST_RESTRICT normals) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        float n0, n1, n2, n3;
        normals_of(tile[0][lane], tile[1][lane], n0, n1);
        normals_of(tile[2][lane], tile[3][lane], n2, n3);
        normals[4 * lane] = n0;
        normals[4 * lane + 1] = n1;
        normals[4 * lane + 2] = n2;
        normals[4 * lane + 3] = n3;
    }
}

// Normals of one example for the 64 elements from 4 * quad on, in element order.
STN_FAST_INLINE void draw_normals(const Generator& g, std::uint32_t quad, std::uint32_t example,
                                  float* STN_FAST_RESTRICT normals) {
    WordTile tile;
    draw_tile(g, quad, 1, example, 0, tile);
    normals_of_tile(tile, normals);
}

void philox(const std::uint32_t* counters, const std::uint32_t* keys, std::uint32_t* out, std::int64_t count, int threads);
void uniform(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
             std::uint64_t step, std::uint64_t stream, int threads);
void normal(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
            std::uint64_t step, std::uint64_t stream, int threads);

}  // namespace stn_fast
