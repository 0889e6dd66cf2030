#pragma once
// What is done to the pixels of one image, in this order. `out` holds its (channels, height, width) floats throughout.
#include <cstdint>
#include <vector>

#include "augment_plan.h"

namespace stn_fast {

// Memory that `place` needs beside an image; the same serves all images of one size, one after the other.
struct Scratch {
    std::vector<std::uint32_t> packed;
    std::vector<float> plane;
    explicit Scratch(const ImageSize& size);
};

// out = the pixels that the geometry puts there, in [0, 1].
void place(const Plan& plan, const ImageSize& size, const std::uint8_t* image, Scratch& scratch, float* out);

// Brightness, contrast, saturation, hue; then the normalisation, which includes the input scale.
void colour(const Plan& plan, const ImageSize& size, float* out);

// Noise, dropout and cutout.
void corrupt(const Plan& plan, const ImageSize& size, const Generator& g, std::uint32_t example, float* out);

}  // namespace stn_fast
