#pragma once
#include <cstdint>

namespace stn_fast {

// y = x + scale[b] * normal(element); x and y are (outer, batch, inner), contiguous, and may be the same.
// The element is i_outer * inner + i_inner.
void noise_forward(const float* x, const float* scale, float* y, std::int64_t outer, std::int64_t batch, std::int64_t inner,
                   std::uint64_t first_example, std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads);

// d_scale[b] = sum over the example of dy * normal(element), drawn again. The sum is made in a fixed order.
void noise_backward(const float* dy, float* d_scale, std::int64_t outer, std::int64_t batch, std::int64_t inner,
                    std::uint64_t first_example, std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads);

}  // namespace stn_fast
