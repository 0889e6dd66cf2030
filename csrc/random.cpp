#include "random.h"

#include <algorithm>

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialElements = 8192;  // below this, starting threads costs more than it saves

template <typename Rounds>
STN_FAST_INLINE void fill_tile(Rounds rounds, const Generator& g, std::uint32_t quad, std::uint32_t quad_step,
                               std::uint32_t example, std::uint32_t example_step, WordTile& words) {
#pragma omp simd
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) {
        const Words w = rounds(Words{quad + lane * quad_step, example + lane * example_step, g.step, g.stream}, g.key0, g.key1);
        words[0][lane] = w.w0;
        words[1][lane] = w.w1;
        words[2][lane] = w.w2;
        words[3][lane] = w.w3;
    }
}

STN_FAST_CLONES void draw_tile_narrow(const Generator& g, std::uint32_t quad, std::uint32_t quad_step, std::uint32_t example,
                                      std::uint32_t example_step, WordTile& words) {
    const auto rounds = [](Words c, std::uint32_t k0, std::uint32_t k1) STN_FAST_INLINE_LAMBDA { return philox(c, k0, k1); };
    fill_tile(rounds, g, quad, quad_step, example, example_step, words);
}

#if STN_FAST_HAS_CLONES
__attribute__((target("arch=x86-64-v4"))) void draw_tile_wide(const Generator& g, std::uint32_t quad, std::uint32_t quad_step,
                                                              std::uint32_t example, std::uint32_t example_step,
                                                              WordTile& words) {
    const auto rounds = [](Words c, std::uint32_t k0, std::uint32_t k1) STN_FAST_INLINE_LAMBDA { return philox_wide(c, k0, k1); };
    fill_tile(rounds, g, quad, quad_step, example, example_step, words);
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
