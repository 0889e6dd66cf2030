#include "noise.h"

#include <algorithm>
#include <vector>

#include "random.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialElements = 4096;  // below this, starting threads costs more than it saves
constexpr std::int64_t kBlock = 2048;           // positions along `inner` that one task draws

// Calls body(offset, count, normals) for the consecutive elements [element, element + count), at most 64 at a time.
template <typename Body>
STN_FAST_INLINE void for_normals(const Generator& g, std::uint32_t example, std::int64_t element, std::int64_t count, Body body) {
    float normals[kDraws];
    std::uint32_t quad = static_cast<std::uint32_t>(element / 4);
    for (std::int64_t done = -(element % 4); done < count; done += kDraws, quad += kLanes) {
        draw_normals(g, quad, example, normals);
        const std::int64_t from = std::max<std::int64_t>(0, -done), to = std::min<std::int64_t>(kDraws, count - done);
        body(done + from, to - from, normals + from);
    }
}

STN_FAST_CLONES void add_noise(const Generator& g, std::uint32_t example, std::int64_t element, std::int64_t count, float scale,
                               const float* x, float* y) {
    for_normals(g, example, element, count, [&](std::int64_t at, std::int64_t width,
                                                const float* normals) STN_FAST_INLINE_LAMBDA {
#pragma omp simd
        for (std::int64_t c = 0; c < width; ++c) y[at + c] = x[at + c] + scale * normals[c];
    });
}

STN_FAST_CLONES double dot_with_noise(const Generator& g, std::uint32_t example, std::int64_t element, std::int64_t count,
                                      const float* dy) {
    float sums[kDraws] = {};
    for_normals(g, example, element, count, [&](std::int64_t at, std::int64_t width,
                                                const float* normals) STN_FAST_INLINE_LAMBDA {
#pragma omp simd
        for (std::int64_t c = 0; c < width; ++c) sums[c] += dy[at + c] * normals[c];
    });
    double total = 0.0;
    for (float sum : sums) total += sum;
    return total;
}

// Calls body(example, global example, task, element, count, address) for blocks of every example, on several threads.
template <typename Body>
void for_each_block(std::int64_t outer, std::int64_t batch, std::int64_t inner, std::uint64_t first_example, int threads,
                    Body body) {
    const std::int64_t blocks = (inner + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (outer * batch * inner > kSerialElements)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t task = 0; task < outer * blocks; ++task) {
            const std::int64_t i = task / blocks, start = task % blocks * kBlock;
            const std::int64_t count = std::min(kBlock, inner - start);
            const std::uint32_t example = static_cast<std::uint32_t>(first_example + static_cast<std::uint64_t>(b));
            body(b, example, task, i * inner + start, count, (i * batch + b) * inner + start);
        }
    }
}

}  // namespace

void noise_forward(const float* x, const float* scale, float* y, std::int64_t outer, std::int64_t batch, std::int64_t inner,
                   std::uint64_t first_example, std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads) {
    const Generator g(seed, step, stream);
    for_each_block(outer, batch, inner, first_example, threads,
                   [&](std::int64_t b, std::uint32_t example, std::int64_t, std::int64_t element, std::int64_t count,
                       std::int64_t at) { add_noise(g, example, element, count, scale[b], x + at, y + at); });
}

void noise_backward(const float* dy, float* d_scale, std::int64_t outer, std::int64_t batch, std::int64_t inner,
                    std::uint64_t first_example, std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads) {
    const Generator g(seed, step, stream);
    const std::int64_t tasks = outer * ((inner + kBlock - 1) / kBlock);
    std::vector<double> sums(static_cast<std::size_t>(batch * tasks));
    for_each_block(outer, batch, inner, first_example, threads,
                   [&](std::int64_t b, std::uint32_t example, std::int64_t task, std::int64_t element, std::int64_t count,
                       std::int64_t at) { sums[b * tasks + task] = dot_with_noise(g, example, element, count, dy + at); });
    for (std::int64_t b = 0; b < batch; ++b) {
        double total = 0.0;
        for (std::int64_t task = 0; task < tasks; ++task) total += sums[b * tasks + task];
        d_scale[b] = static_cast<float>(total);
    }
}

}  // namespace stn_fast
