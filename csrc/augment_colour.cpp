#include <algorithm>
#include <cmath>

#include "augment_stages.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kBlock = 512;  // pixels that go through all stages while they are in the cache

constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;

// Bits of floats >= 0 are in the order of the numbers.
STN_FAST_INLINE float least(float x, float y) { return as_float(std::min(as_int(x), as_int(y))); }
STN_FAST_INLINE float most(float x, float y) { return as_float(std::max(as_int(x), as_int(y))); }

STN_FAST_INLINE float unit(float x) { return as_float(std::min(std::max(as_int(x), 0), as_int(1.0f))); }

STN_FAST_INLINE float chosen(std::int32_t mask, float x, float y) {
    return as_float((as_int(x) & mask) | (as_int(y) & ~mask));
}

// The colour planes of some consecutive pixels; grey images have them all in one place.
struct Planes {
    float *red, *green, *blue;
    std::int64_t count;
};

template <int Channels>
STN_FAST_INLINE float grey(const Planes& p, std::int64_t i) {
    return Channels == 1 ? p.red[i] : kRed * p.red[i] + kGreen * p.green[i] + kBlue * p.blue[i];
}

template <typename Body>
STN_FAST_INLINE void for_values(float* STN_FAST_RESTRICT values, std::int64_t count, Body body) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) values[i] = body(values[i]);
}

template <int Channels>
STN_FAST_INLINE double sum_grey(const Planes& p) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < p.count; ++i) sum += grey<Channels>(p, i);
    return sum;
}

STN_FAST_INLINE void saturate(const Planes& p, float factor) {
    float *STN_FAST_RESTRICT red = p.red, *STN_FAST_RESTRICT green = p.green, *STN_FAST_RESTRICT blue = p.blue;
#pragma omp simd
    for (std::int64_t i = 0; i < p.count; ++i) {
        const float level = kRed * red[i] + kGreen * green[i] + kBlue * blue[i];
        red[i] = unit(level + factor * (red[i] - level));
        green[i] = unit(level + factor * (green[i] - level));
        blue[i] = unit(level + factor * (blue[i] - level));
    }
}

// In HSV a channel is value - chroma * w(d), d the distance of the hue from the channel's complement in sixths of a turn, and
// w(d) = 1 for d <= 1... counted round the circle: with s in [-6, 6] the distance to the nearest multiple of 6 is
// 3 - |3 - |s||.
STN_FAST_INLINE float hue_weight(float sixths) { return unit(absolute(3.0f - absolute(sixths)) - 1.0f); }

STN_FAST_INLINE void turn_hue(const Planes& p, float turns) {
    float *STN_FAST_RESTRICT red = p.red, *STN_FAST_RESTRICT green = p.green, *STN_FAST_RESTRICT blue = p.blue;
    // The hue is in [-1, 5] sixths, so that these, brought into [-5, 1), keep the sum in [-6, 6].
    float start[3];
    for (int c = 0; c < 3; ++c) {
        const double angle = 6.0 * turns + 3.0 - 2.0 * c;
        start[c] = static_cast<float>(angle - 6.0 * std::floor((angle + 5.0) / 6.0));
    }
    const float start_red = start[0], start_green = start[1], start_blue = start[2];
#pragma omp simd
    for (std::int64_t i = 0; i < p.count; ++i) {
        const float r = red[i], g = green[i], b = blue[i];
        const float value = most(most(r, g), b), chroma = value - least(least(r, g), b);
        const std::int32_t coloured = -static_cast<std::int32_t>(as_int(chroma) > 0);
        const std::int32_t is_red = -static_cast<std::int32_t>(as_int(value) == as_int(r));
        const std::int32_t is_green = -static_cast<std::int32_t>(as_int(value) == as_int(g));
        const float difference = chosen(is_red, g - b, chosen(is_green, b - r, r - g));
        const float base = chosen(is_red, 0.0f, chosen(is_green, 2.0f, 4.0f));
        const float hue = base + difference / chosen(coloured, chroma, 1.0f);
        red[i] = value - chroma * hue_weight(hue + start_red);
        green[i] = value - chroma * hue_weight(hue + start_green);
        blue[i] = value - chroma * hue_weight(hue + start_blue);
    }
}

template <int Channels, typename Body>
STN_FAST_INLINE void for_blocks(const ImageSize& size, float* out, Body body) {
    const std::int64_t pixels = size.pixels();
    for (std::int64_t start = 0; start < pixels; start += kBlock) {
        float* at = out + start;
        const std::int64_t green = Channels == 1 ? 0 : pixels;
        body(Planes{at, at + green, at + 2 * green, std::min(kBlock, pixels - start)});
    }
}

template <int Channels>
STN_FAST_INLINE void colour_channels(const Plan& plan, const ImageSize& size, float* out) {
    const bool brightness = plan.on(kBrightness), contrast = plan.on(kContrast);
    const float bright = plan.brightness, sharp = plan.contrast;
    double sum = 0.0;
    if (brightness || contrast) {
        for_blocks<Channels>(size, out, [&](const Planes& p) STN_FAST_INLINE_LAMBDA {
            if (brightness) {
                const auto brighten = [=](float x) STN_FAST_INLINE_LAMBDA { return unit(x * bright); };
                float* planes[] = {p.red, p.green, p.blue};
                for (int c = 0; c < Channels; ++c) for_values(planes[c], p.count, brighten);
            }
            if (contrast) sum += sum_grey<Channels>(p);
        });
    }
    const float level = static_cast<float>(sum / static_cast<double>(size.pixels()));
    for_blocks<Channels>(size, out, [&](const Planes& p) STN_FAST_INLINE_LAMBDA {
        float* planes[] = {p.red, p.green, p.blue};
        if (contrast) {
            const auto sharpen = [=](float x) STN_FAST_INLINE_LAMBDA { return unit(level + sharp * (x - level)); };
            for (int c = 0; c < Channels; ++c) for_values(planes[c], p.count, sharpen);
        }
        if (Channels == 3 && plan.on(kSaturation)) saturate(p, plan.saturation);
        if (Channels == 3 && plan.on(kHue)) turn_hue(p, plan.turns);
        for (int c = 0; c < Channels; ++c) {
            const float slope = plan.slope[c], offset = plan.offset[c];
            const auto normalise = [=](float x) STN_FAST_INLINE_LAMBDA { return slope * x + offset; };
            for_values(planes[c], p.count, normalise);
        }
    });
}

STN_FAST_CLONES void colour_image(const Plan& plan, const ImageSize& size, float* out) {
    if (size.channels == 3) {
        colour_channels<3>(plan, size, out);
    } else {
        colour_channels<1>(plan, size, out);
    }
}

}  // namespace

void colour(const Plan& plan, const ImageSize& size, float* out) { colour_image(plan, size, out); }

}  // namespace stn_fast
