#include "random.h"

#include <algorithm>

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialElements = 8192;  // below this, starting threads costs more than it saves

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
