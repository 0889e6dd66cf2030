#pragma once
// What is done to one image, as numbers: its strengths and its draws, worked out before its pixels are touched.
#include <cstdint>

#include "random.h"

namespace stn_fast {

// Rows of the table of strengths, and bits of the mask.
enum Strength {
    kBrightness, kContrast, kSaturation, kHue, kInputScale, kInputNoise, kRotation, kTranslation, kScale, kShear,
    kCutoutLength, kCutoutHoles, kInputDropout
};

constexpr int kMostHoles = 24;
constexpr std::uint32_t kPixelQuad = 16;  // the first counter of the numbers that pixels draw; 64 uniforms lie before it
constexpr int kMostChannels = 3;

struct ImageSize {
    std::int64_t channels, height, width;
    std::int64_t pixels() const { return height * width; }
    std::int64_t values() const { return channels * height * width; }
};

// The square of rows [top, bottom) and columns [left, right), inside of the image.
struct Hole {
    std::int64_t top, bottom, left, right;
};

struct Plan {
    // The source of output pixel (x, y) is (xx * x + xy * y + x0, yx * x + yy * y + y0).
    bool interpolated;
    double xx, xy, x0, yx, yy, y0;
    // The same where pixels are copied: pixel (x + shift_x, y + shift_y) of the image, or of its mirror image.
    bool mirrored;
    std::int64_t shift_x, shift_y;

    float brightness, contrast, saturation, turns;   // factors, and the turn of the hue
    float slope[kMostChannels], offset[kMostChannels];  // normalised value = slope * colour + offset
    float noise;
    std::int32_t drop_threshold;  // a pixel is kept where its uniform has at least that many steps
    float kept_scale;
    int holes;
    Hole hole[kMostHoles];

    int mask;
    bool on(Strength strength) const { return (mask >> strength & 1) != 0; }
};

// The plan of image b of the batch, which draws the numbers of `example`.
Plan plan_image(const float* table, std::int64_t batch, std::int64_t b, const ImageSize& size, int mask, const float* mean,
                const float* std, float flip, std::int64_t crop_padding, const Generator& g, std::uint32_t example);

}  // namespace stn_fast
