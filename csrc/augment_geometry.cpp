#include <algorithm>
#include <cstring>

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

// Some consecutive output pixels: where they lie in the packed image, and what they find there. In a first loop the places are
// worked out, in a second they are read, two neighbours at a time, in a third the colours are mixed: the outer two are vector
// code, and the plain loads between them are faster than the gathers of AVX2 and AVX-512 (3 times on Zen 4).
constexpr std::int64_t kBlock = 256;

struct Block {
    std::int64_t at[kBlock];                     // the north-western of four neighbours
    float right[kBlock], down[kBlock];           // how far from there, in [0, 1)
    std::uint32_t north[2 * kBlock], south[2 * kBlock];  // west, east, west, east, ...
};

STN_FAST_INLINE void find(const Plan& plan, const ImageSize& size, std::int64_t first, std::int64_t count, Block& block) {
    const float xx = static_cast<float>(plan.xx), yx = static_cast<float>(plan.yx);
    const std::int32_t last_x = as_int(static_cast<float>(size.width + 1));
    const std::int32_t last_y = as_int(static_cast<float>(size.height + 1));
    const std::int32_t step = static_cast<std::int32_t>(pitch(size));
    for (std::int64_t done = 0; done < count;) {
        const std::int64_t y = (first + done) / size.width, start = (first + done) % size.width;
        const std::int64_t stop = std::min(size.width, start + count - done);
        const float x0 = static_cast<float>(plan.xy * static_cast<double>(y) + plan.x0 + kBefore);
        const float y0 = static_cast<float>(plan.yy * static_cast<double>(y) + plan.y0 + kBefore);
        std::int64_t* STN_FAST_RESTRICT at = block.at + done - start;
        float *STN_FAST_RESTRICT right = block.right + done - start, *STN_FAST_RESTRICT down = block.down + done - start;
#pragma omp simd
        for (std::int64_t x = start; x < stop; ++x) {
            const float column_of_row = static_cast<float>(static_cast<std::int32_t>(x));
            const float source_x = bounded(xx * column_of_row + x0, last_x);
            const float source_y = bounded(yx * column_of_row + y0, last_y);
            const std::int32_t column = static_cast<std::int32_t>(source_x), row = static_cast<std::int32_t>(source_y);
            right[x] = source_x - static_cast<float>(column);
            down[x] = source_y - static_cast<float>(row);
            at[x] = row * step + column;
        }
        done += stop - start;
    }
}

// Not part of a clone: with AVX2 the compiler would make it gathers.
STN_FAST_NO_INLINE void read(const std::uint32_t* packed, std::int64_t step, std::int64_t count, Block& block) {
    for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(block.north + 2 * i, packed + block.at[i], 2 * sizeof *packed);
        std::memcpy(block.south + 2 * i, packed + block.at[i] + step, 2 * sizeof *packed);
    }
}

template <int Channels>
STN_FAST_INLINE void mix(const Block& block, std::int64_t count, std::int64_t pixels, float* STN_FAST_RESTRICT out) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t north_west = block.north[2 * i], north_east = block.north[2 * i + 1];
        const std::uint32_t south_west = block.south[2 * i], south_east = block.south[2 * i + 1];
        const float right = block.right[i], down = block.down[i];
        for (int c = 0; c < Channels; ++c) {
            const float nw = channel_of(north_west, c), sw = channel_of(south_west, c);
            const float north = nw + right * (channel_of(north_east, c) - nw);
            const float south = sw + right * (channel_of(south_east, c) - sw);
            out[i + c * pixels] = (north + down * (south - north)) * (1.0f / 255.0f);
        }
    }
}

template <int Channels>
STN_FAST_INLINE void interpolate(const Plan& plan, const ImageSize& size, const std::uint32_t* packed, float* out) {
    Block block;
    const std::int64_t pixels = size.pixels();
    for (std::int64_t first = 0; first < pixels; first += kBlock) {
        const std::int64_t count = std::min(kBlock, pixels - first);
        find(plan, size, first, count, block);
        read(packed, pitch(size), count, block);
        mix<Channels>(block, count, pixels, out + first);
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

STN_FAST_CLONES void convert(const std::uint8_t* STN_FAST_RESTRICT bytes, std::int64_t count, float* STN_FAST_RESTRICT out) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<std::int32_t>(bytes[i])) / 255.0f;
}

STN_FAST_CLONES void convert_backwards(const std::uint8_t* STN_FAST_RESTRICT bytes, std::int64_t count,
                                       float* STN_FAST_RESTRICT out) {
    const std::uint8_t* last = bytes + count - 1;
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<std::int32_t>(last[-i])) / 255.0f;
}

// Whole planes are converted, and then rows moved: rows are too short for vector code of their own. A plane backwards has its
// rows mirrored and in reverse order.
void copy_image(const Plan& plan, const ImageSize& size, const std::uint8_t* image, float* plane, float* out) {
    if (!plan.mirrored && plan.shift_x == 0 && plan.shift_y == 0) return convert(image, size.values(), out);
    // Output columns [from, to) show a column of the image; the others are black.
    const std::int64_t from = std::clamp<std::int64_t>(-plan.shift_x, 0, size.width);
    const std::int64_t to = std::clamp<std::int64_t>(size.width - plan.shift_x, 0, size.width);
    for (std::int64_t c = 0; c < size.channels; ++c) {
        (plan.mirrored ? convert_backwards : convert)(image + c * size.pixels(), size.pixels(), plane);
        for (std::int64_t y = 0; y < size.height; ++y, out += size.width) {
            const std::int64_t row = y + plan.shift_y;
            if (row < 0 || row >= size.height) {
                std::fill_n(out, size.width, 0.0f);
                continue;
            }
            const float* source = plane + (plan.mirrored ? size.height - 1 - row : row) * size.width + plan.shift_x;
            std::fill(out, out + from, 0.0f);
            std::copy(source + from, source + to, out + from);
            std::fill(out + to, out + size.width, 0.0f);
        }
    }
}

}  // namespace

Scratch::Scratch(const ImageSize& size)
    : packed(static_cast<std::size_t>(pitch(size) * (kBefore + size.height + kAfter))),
      plane(static_cast<std::size_t>(size.pixels())) {}

void place(const Plan& plan, const ImageSize& size, const std::uint8_t* image, Scratch& scratch, float* out) {
    if (plan.interpolated) {
        interpolate_image(plan, size, image, scratch.packed.data(), out);
    } else {
        copy_image(plan, size, image, scratch.plane.data(), out);
    }
}

}  // namespace stn_fast
