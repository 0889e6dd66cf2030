#include <algorithm>

#include "augment_stages.h"

namespace stn_fast {
namespace {

// Images are looked up in words that hold all channels of a pixel, with a black border: one row and column before, two after.
// A coordinate is clamped into the border, where it reads nothing but black with any weight, so no pixel needs a test.
constexpr std::int64_t kBefore = 1, kAfter = 2;

std::int64_t pitch(const ImageSize& size) { return kBefore + size.width + kAfter; }

template <int Channels>
STN_FAST_INLINE void pack(const ImageSize& size, const std::uint8_t* STN_FAST_RESTRICT image,
                          std::uint32_t* STN_FAST_RESTRICT packed) {
    const std::int64_t pixels = size.pixels();
    for (std::int64_t y = 0; y < size.height; ++y) {
        const std::uint8_t* row = image + y * size.width;
        std::uint32_t* to = packed + (y + kBefore) * pitch(size) + kBefore;
#pragma omp simd
        for (std::int64_t x = 0; x < size.width; ++x) {
            std::uint32_t word = row[x];
            if (Channels == 3) {
                word |= std::uint32_t{row[x + pixels]} << 8 | std::uint32_t{row[x + 2 * pixels]} << 16;
            }
            to[x] = word;
        }
    }
}

// A coordinate counted from the border's edge, clamped to [0, last]. On the bits, so that infinities and NaN end inside too.
STN_FAST_INLINE float bounded(float coordinate, std::int32_t last) {
    return as_float(std::min(std::max(as_int(coordinate), 0), last));
}

STN_FAST_INLINE float channel_of(std::uint32_t word, int channel) {
    return static_cast<float>(static_cast<std::int32_t>(word >> (8 * channel) & 0xffu));
}

template <int Channels>
STN_FAST_INLINE void interpolate(const Plan& plan, const ImageSize& size, const std::uint32_t* STN_FAST_RESTRICT packed,
                                 float* STN_FAST_RESTRICT out) {
    const float xx = static_cast<float>(plan.xx), yx = static_cast<float>(plan.yx);
    const std::int32_t last_x = as_int(static_cast<float>(size.width + 1));
    const std::int32_t last_y = as_int(static_cast<float>(size.height + 1));
    const std::int32_t step = static_cast<std::int32_t>(pitch(size)), width = static_cast<std::int32_t>(size.width);
    const std::int64_t pixels = size.pixels();
    for (std::int64_t y = 0; y < size.height; ++y) {
        const float x0 = static_cast<float>(plan.xy * static_cast<double>(y) + plan.x0 + kBefore);
        const float y0 = static_cast<float>(plan.yy * static_cast<double>(y) + plan.y0 + kBefore);
        float* to = out + y * size.width;
#pragma omp simd
        for (std::int32_t x = 0; x < width; ++x) {
            const float source_x = bounded(xx * static_cast<float>(x) + x0, last_x);
            const float source_y = bounded(yx * static_cast<float>(x) + y0, last_y);
            const std::int32_t column = static_cast<std::int32_t>(source_x), row = static_cast<std::int32_t>(source_y);
            const float right = source_x - static_cast<float>(column), down = source_y - static_cast<float>(row);
            const std::int32_t at = row * step + column;
            const std::uint32_t north_west = packed[at], north_east = packed[at + 1];
            const std::uint32_t south_west = packed[at + step], south_east = packed[at + step + 1];
            for (int c = 0; c < Channels; ++c) {
                const float west = channel_of(north_west, c), east = channel_of(north_east, c);
                const float north = west + right * (east - west);
                const float lower_west = channel_of(south_west, c), lower_east = channel_of(south_east, c);
                const float south = lower_west + right * (lower_east - lower_west);
                to[x + c * pixels] = (north + down * (south - north)) * (1.0f / 255.0f);
            }
        }
    }
}

STN_FAST_CLONES void interpolate_image(const Plan& plan, const ImageSize& size, const std::uint8_t* image,
                                       std::uint32_t* packed, float* out) {
    if (size.channels == 3) {
        pack<3>(size, image, packed);
        interpolate<3>(plan, size, packed, out);
    } else {
        pack<1>(size, image, packed);
        interpolate<1>(plan, size, packed, out);
    }
}

STN_FAST_CLONES void copy_image(const Plan& plan, const ImageSize& size, const std::uint8_t* STN_FAST_RESTRICT image,
                                float* STN_FAST_RESTRICT out) {
    // Output columns [from, to) show a column of the image; the others are black.
    const std::int64_t first = plan.mirrored ? plan.shift_x - size.width + 1 : -plan.shift_x;
    const std::int64_t from = std::clamp<std::int64_t>(first, 0, size.width);
    const std::int64_t to = std::clamp<std::int64_t>(first + size.width, 0, size.width);
    for (std::int64_t i = 0; i < size.channels * size.height; ++i) {
        const std::int64_t y = i % size.height + plan.shift_y;
        float* row = out + i * size.width;
        if (y < 0 || y >= size.height) {
            std::fill_n(row, size.width, 0.0f);
            continue;
        }
        const std::uint8_t* source = image + (i - i % size.height + y) * size.width + plan.shift_x;
        std::fill(row, row + from, 0.0f);
        if (plan.mirrored) {
            for (std::int64_t x = from; x < to; ++x) row[x] = static_cast<float>(source[-x]) / 255.0f;
        } else {
            for (std::int64_t x = from; x < to; ++x) row[x] = static_cast<float>(source[x]) / 255.0f;
        }
        std::fill(row + to, row + size.width, 0.0f);
    }
}

}  // namespace

std::int64_t scratch_words(const ImageSize& size) { return pitch(size) * (kBefore + size.height + kAfter); }

void place(const Plan& plan, const ImageSize& size, const std::uint8_t* image, std::uint32_t* scratch, float* out) {
    if (plan.interpolated) {
        interpolate_image(plan, size, image, scratch, out);
    } else {
        copy_image(plan, size, image, out);
    }
}

}  // namespace stn_fast
