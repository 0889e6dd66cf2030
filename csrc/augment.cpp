#include "augment.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "augment_plan.h"
#include "augment_stages.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialValues = 4096;  // below this, starting threads costs more than it saves

// Several tiles are drawn before any becomes normals: neither is then kept waiting by the other (a tenth faster on Zen 4).
STN_FAST_CLONES void add_noise(const Generator& g, std::uint32_t example, float scale, float* out, std::int64_t values) {
    constexpr int kTiles = 4;
    WordTile tiles[kTiles];
    float normals[kTiles * kDraws];
    std::uint32_t quad = kPixelQuad;
    for (std::int64_t start = 0; start < values; start += kTiles * kDraws) {
        const std::int64_t count = std::min<std::int64_t>(kTiles * kDraws, values - start);
        const int used = static_cast<int>((count + kDraws - 1) / kDraws);
        for (int t = 0; t < used; ++t, quad += kLanes) draw_tile(g, quad, 1, example, 0, tiles[t]);
        for (int t = 0; t < used; ++t) normals_of_tile(tiles[t], normals + t * kDraws);
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) out[start + i] += scale * normals[i];
    }
}

// Drops whole pixels: out is (channels, pixels), and all channels of one share a uniform.
STN_FAST_CLONES void drop_pixels(const Generator& g, std::uint32_t example, std::uint32_t quad, std::int32_t threshold,
                                 float kept_scale, float* out, std::int64_t channels, std::int64_t pixels) {
    std::uint32_t words[kDraws];
    std::int32_t kept[kDraws];  // all ones or none
    for (std::int64_t start = 0; start < pixels; start += kDraws, quad += kLanes) {
        const std::int64_t count = std::min<std::int64_t>(kDraws, pixels - start);
        draw_words(g, quad, example, words);
#pragma omp simd
        for (int i = 0; i < kDraws; ++i) kept[i] = -static_cast<std::int32_t>(uniform_steps(words[i]) >= threshold);
        for (std::int64_t c = 0; c < channels; ++c) {
            float* at = out + c * pixels + start;
#pragma omp simd
            for (std::int64_t i = 0; i < count; ++i) at[i] = as_float(as_int(at[i] * kept_scale) & kept[i]);
        }
    }
}

void cut_out(const Plan& plan, const ImageSize& size, float* out) {
    for (int k = 0; k < plan.holes; ++k) {
        const Hole& hole = plan.hole[k];
        for (std::int64_t c = 0; c < size.channels; ++c) {
            for (std::int64_t y = hole.top; y < hole.bottom; ++y) {
                float* row = out + (c * size.height + y) * size.width;
                std::fill(row + hole.left, row + hole.right, 0.0f);
            }
        }
    }
}

}  // namespace

void corrupt(const Plan& plan, const ImageSize& size, const Generator& g, std::uint32_t example, float* out) {
    if (plan.on(kInputNoise)) add_noise(g, example, plan.noise, out, size.values());
    if (plan.on(kInputDropout)) {
        const std::uint32_t quad = kPixelQuad + static_cast<std::uint32_t>((size.values() + 3) / 4);
        drop_pixels(g, example, quad, plan.drop_threshold, plan.kept_scale, out, size.channels, size.pixels());
    }
    cut_out(plan, size, out);
}

void augment(const std::uint8_t* images, const float* table, const float* mean, const float* std, float* out,
             std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, int mask, float flip,
             std::int64_t crop_padding, std::uint64_t first_example, std::uint64_t seed, std::uint64_t step,
             std::uint64_t stream, int threads) {
    const ImageSize size{channels, height, width};
    const Generator g(seed, step, stream);
    const std::int64_t shares = batch * size.values() > kSerialValues ? std::max(1, threads) : 1;
    std::vector<Scratch> scratch(static_cast<std::size_t>(shares), Scratch(size));
#pragma omp parallel for num_threads(threads) schedule(static) if (shares > 1)
    for (std::int64_t share = 0; share < shares; ++share) {
        for (std::int64_t b = share * batch / shares; b < (share + 1) * batch / shares; ++b) {
            const std::uint32_t example = static_cast<std::uint32_t>(first_example + static_cast<std::uint64_t>(b));
            const Plan plan = plan_image(table, batch, b, size, mask, mean, std, flip, crop_padding, g, example);
            float* image = out + b * size.values();
            place(plan, size, images + b * size.values(), scratch[static_cast<std::size_t>(share)], image);
            colour(plan, size, image);
            corrupt(plan, size, g, example, image);
        }
    }
}

}  // namespace stn_fast
