#include "random.h"

#include <algorithm>

#if STN_FAST_HAS_CLONES
#include <immintrin.h>
#endif

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialElements = 8192;  // below this, starting threads costs more than it saves

STN_FAST_CLONES void draw_tile_narrow(const Generator& g, std::uint32_t quad, std::uint32_t quad_step, std::uint32_t example,
                                      std::uint32_t example_step, WordTile& words) {
#pragma omp simd
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const Words w = philox(Words{quad + lane * quad_step, example + lane * example_step, g.step, g.stream}, g.key0, g.key1);
        words[0][lane] = w.w0;
        words[1][lane] = w.w1;
        words[2][lane] = w.w2;
        words[3][lane] = w.w3;
    }
}

#if STN_FAST_HAS_CLONES
using Wide = unsigned long long __attribute__((vector_size(64)));

// Products of the lower halves. With a mask of ones, as without a mask GCC 12 warns of its own header.
__attribute__((target("arch=x86-64-v4"))) STN_FAST_INLINE Wide multiply(const Wide& x, std::uint32_t y) {
    return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(y)));
}

// The same with every word in 64 bits, so that the halves of products needn't be moved about: the multiplication reads the lower
// half alone, and what gathers in the upper one is left there. Left to the compiler, which clears it, this takes half as long again
// (Zen 4: 44 ns a tile, not 30).
__attribute__((target("arch=x86-64-v4"))) void draw_tile_wide(const Generator& g, std::uint32_t quad, std::uint32_t quad_step,
                                                              std::uint32_t example, std::uint32_t example_step,
                                                              WordTile& words) {
    constexpr int kHalf = kLanes / 2;
    Wide c0[2], c1[2], c2[2], c3[2];
    for (int i = 0; i < 2; ++i) {
        const Wide lane = Wide{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<unsigned long long>(i * kHalf);
        c0[i] = multiply(lane, quad_step) + quad;
        c1[i] = multiply(lane, example_step) + example;
        c2[i] = Wide{} + g.step;
        c3[i] = Wide{} + g.stream;
    }
    std::uint32_t k0 = g.key0, k1 = g.key1;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < 2; ++i) {
            const Wide product0 = multiply(c0[i], kMultiplier0), product1 = multiply(c2[i], kMultiplier1);
            c0[i] = (product1 >> 32) ^ c1[i] ^ k0;
            c1[i] = product1;
            c2[i] = (product0 >> 32) ^ c3[i] ^ k1;
            c3[i] = product0;
        }
        k0 += kKeyStep0;
        k1 += kKeyStep1;
    }
    for (int i = 0; i < 2; ++i) {
        const Wide results[] = {c0[i], c1[i], c2[i], c3[i]};
        for (int word = 0; word < 4; ++word) {
            _mm512_mask_cvtepi64_storeu_epi32(words[word] + i * kHalf, 0xff, reinterpret_cast<__m512i>(results[word]));
        }
    }
}

const auto chosen_draw_tile = __builtin_cpu_supports("x86-64-v4") ? draw_tile_wide : draw_tile_narrow;
#else
constexpr auto chosen_draw_tile = draw_tile_narrow;
#endif

STN_FAST_CLONES void uniform_row(const Generator& g, std::uint32_t example, float* out, std::int64_t elements) {
    std::uint32_t words[kDraws];
    for (std::int64_t start = 0; start < elements; start += kDraws) {
        const std::int64_t count = std::min<std::int64_t>(kDraws, elements - start);
        draw_words(g, static_cast<std::uint32_t>(start / 4), example, words);
        for (std::int64_t i = 0; i < count; ++i) out[start + i] = uniform_of(words[i]);
    }
}

STN_FAST_CLONES void normal_row(const Generator& g, std::uint32_t example, float* out, std::int64_t elements) {
    float normals[kDraws];
    for (std::int64_t start = 0; start < elements; start += kDraws) {
        const std::int64_t count = std::min<std::int64_t>(kDraws, elements - start);
        draw_normals(g, static_cast<std::uint32_t>(start / 4), example, normals);
        std::copy_n(normals, count, out + start);
    }
}

template <typename Row>
void for_each_row(Row row, float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (examples * elements > kSerialElements)
    for (std::int64_t b = 0; b < examples; ++b) {
        row(static_cast<std::uint32_t>(first_example + static_cast<std::uint64_t>(b)), out + b * elements);
    }
}

}  // namespace

void draw_tile(const Generator& g, std::uint32_t quad, std::uint32_t quad_step, std::uint32_t example,
               std::uint32_t example_step, WordTile& words) {
    chosen_draw_tile(g, quad, quad_step, example, example_step, words);
}

void philox(const std::uint32_t* counters, const std::uint32_t* keys, std::uint32_t* out, std::int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (4 * count > kSerialElements)
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t* c = counters + 4 * i;
        const Words w = philox(Words{c[0], c[1], c[2], c[3]}, keys[2 * i], keys[2 * i + 1]);
        out[4 * i] = w.w0;
        out[4 * i + 1] = w.w1;
        out[4 * i + 2] = w.w2;
        out[4 * i + 3] = w.w3;
    }
}

void uniform(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
             std::uint64_t step, std::uint64_t stream, int threads) {
    const Generator g(seed, step, stream);
    const auto row = [&](std::uint32_t example, float* to) { uniform_row(g, example, to, elements); };
    for_each_row(row, out, examples, elements, first_example, threads);
}

void normal(float* out, std::int64_t examples, std::int64_t elements, std::uint64_t first_example, std::uint64_t seed,
            std::uint64_t step, std::uint64_t stream, int threads) {
    const Generator g(seed, step, stream);
    const auto row = [&](std::uint32_t example, float* to) { normal_row(g, example, to, elements); };
    for_each_row(row, out, examples, elements, first_example, threads);
}

}  // namespace stn_fast
