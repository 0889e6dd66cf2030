#include "augment_plan.h"

#include <algorithm>
#include <cmath>

namespace stn_fast {
namespace {

// Which of an image's uniforms decides what.
enum Draw {
    kFlipDraw, kCropXDraw, kCropYDraw, kRotationDraw, kShiftXDraw, kShiftYDraw, kZoomDraw, kShearDraw, kBrightnessDraw,
    kContrastDraw, kSaturationDraw, kHueDraw, kGainDraw
};
constexpr int kHoleDraw = 16;

constexpr double kRadians = 3.14159265358979323846 / 180.0;

// An image's strengths with its uniforms.
struct Image {
    const float* table;
    std::int64_t batch, index;
    int mask;
    float uniform[kDraws];

    double strength(Strength row) const { return (mask >> row & 1) != 0 ? table[row * batch + index] : 0.0; }
    double jitter(Strength row, Draw draw) const { return (2.0 * uniform[draw] - 1.0) * strength(row); }
    float factor(Strength row, Draw draw) const { return static_cast<float>(std::max(0.0, 1.0 + jitter(row, draw))); }
    // A whole number below count, as float32 arithmetic gives it on every backend.
    std::int64_t choice(int draw, std::int64_t count) const {
        return static_cast<std::int64_t>(uniform[draw] * static_cast<float>(count));
    }
};

void plan_geometry(const Image& image, const ImageSize& size, float flip, std::int64_t crop_padding, Plan& plan) {
    const double width = static_cast<double>(size.width), height = static_cast<double>(size.height);
    const std::int64_t crop_x = image.choice(kCropXDraw, 2 * crop_padding + 1) - crop_padding;
    const std::int64_t crop_y = image.choice(kCropYDraw, 2 * crop_padding + 1) - crop_padding;
    plan.mirrored = image.uniform[kFlipDraw] < flip;
    plan.shift_x = crop_x;
    plan.shift_y = crop_y;
    constexpr int kAffine = 1 << kRotation | 1 << kTranslation | 1 << kScale | 1 << kShear;
    plan.interpolated = (plan.mask & kAffine) != 0;
    if (!plan.interpolated) return;

    // Forward: p' - c = Rotation * zoom * [[1, tan shear], [0, 1]] * (p - c) + shift. Here is the inverse.
    const double angle = image.jitter(kRotation, kRotationDraw) * kRadians;
    const double slant = std::tan(image.jitter(kShear, kShearDraw) * kRadians);
    const double zoom = std::exp((2.0 * image.uniform[kZoomDraw] - 1.0) * std::log1p(image.strength(kScale)));
    const double cosine = std::cos(angle) / zoom, sine = std::sin(angle) / zoom;
    const double centre_x = (width - 1.0) / 2.0, centre_y = (height - 1.0) / 2.0;
    const double from_x = centre_x + image.jitter(kTranslation, kShiftXDraw) * width;
    const double from_y = centre_y + image.jitter(kTranslation, kShiftYDraw) * height;
    plan.xx = cosine - slant * sine;
    plan.xy = -sine - slant * cosine;
    plan.yx = sine;
    plan.yy = cosine;
    plan.x0 = centre_x + static_cast<double>(crop_x) - plan.xx * from_x - plan.xy * from_y;
    plan.y0 = centre_y + static_cast<double>(crop_y) - plan.yx * from_x - plan.yy * from_y;
    if (plan.mirrored) {
        plan.xx = -plan.xx;
        plan.xy = -plan.xy;
        plan.x0 = width - 1.0 - plan.x0;
    }
}

void plan_holes(const Image& image, const ImageSize& size, Plan& plan) {
    const std::int64_t length = static_cast<std::int64_t>(image.strength(kCutoutLength));
    plan.holes = length > 0 ? static_cast<int>(image.strength(kCutoutHoles)) : 0;
    for (int k = 0; k < plan.holes; ++k) {
        const std::int64_t left = image.choice(kHoleDraw + 2 * k, size.width) - length / 2;
        const std::int64_t top = image.choice(kHoleDraw + 2 * k + 1, size.height) - length / 2;
        plan.hole[k] = {std::max<std::int64_t>(top, 0), std::min(top + length, size.height), std::max<std::int64_t>(left, 0),
                        std::min(left + length, size.width)};
    }
}

}  // namespace

Plan plan_image(const float* table, std::int64_t batch, std::int64_t b, const ImageSize& size, int mask, const float* mean,
                const float* std, float flip, std::int64_t crop_padding, const Generator& g, std::uint32_t example) {
    Image image{table, batch, b, mask, {}};
    std::uint32_t words[kDraws];
    draw_words(g, 0, example, words);
    for (int k = 0; k < kDraws; ++k) image.uniform[k] = uniform_of(words[k]);

    Plan plan{};
    plan.mask = mask;
    plan_geometry(image, size, flip, crop_padding, plan);
    plan.brightness = image.factor(kBrightness, kBrightnessDraw);
    plan.contrast = image.factor(kContrast, kContrastDraw);
    plan.saturation = image.factor(kSaturation, kSaturationDraw);
    plan.turns = static_cast<float>(image.jitter(kHue, kHueDraw));
    const double high = 1.0 + image.strength(kInputScale), low = 1.0 / high;
    const double gain = low + image.uniform[kGainDraw] * (high - low);
    for (std::int64_t c = 0; c < size.channels; ++c) {
        plan.slope[c] = static_cast<float>(gain / std[c]);
        plan.offset[c] = static_cast<float>(-gain * mean[c] / std[c]);
    }
    plan.noise = static_cast<float>(image.strength(kInputNoise));
    const float rate = static_cast<float>(image.strength(kInputDropout));
    // u >= rate exactly where the integer u * 2^24 >= ceil(rate * 2^24)
    plan.drop_threshold = static_cast<std::int32_t>(std::ceil(rate * 0x1p24f));
    plan.kept_scale = 1.0f / (1.0f - rate);
    plan_holes(image, size, plan);
    return plan;
}

}  // namespace stn_fast
