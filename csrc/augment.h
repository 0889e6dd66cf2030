#pragma once
#include <cstdint>

namespace stn_fast {

// uint8 images (batch, channels, height, width), channels 1 or 3, to normalised floats of the same shape, each image under
// strengths of its own: table (13, batch), rows in the order of `Strength` in augment_plan.h, row k in use where bit k of mask is
// set. stn_fast/ops/augment.py says what they mean, and which random number decides what. mean and std are (channels,).
void augment(const std::uint8_t* images, const float* table, const float* mean, const float* std, float* out,
             std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, int mask, float flip,
             std::int64_t crop_padding, std::uint64_t first_example, std::uint64_t seed, std::uint64_t step,
             std::uint64_t stream, int threads);

}  // namespace stn_fast
