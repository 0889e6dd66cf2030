#pragma once
#include <cstdint>

namespace stn_fast {

// y = keep ? x / (1 - rate[b]) : 0, keep where the element's uniform is >= rate[b]; nothing is kept at rates >= 1.
// x and y are (outer, batch, middle, last), contiguous, and may be the same. The element that decides is
// i_outer * e_outer + i_middle * e_middle + i_last * e_last: a stride of 0 shares the mask along that dimension.
// e_last is 0 or 1.
// The backward pass is the same function of dy.
void dropout(const float* x, const float* rate, float* y, std::int64_t outer, std::int64_t batch, std::int64_t middle,
             std::int64_t last, std::int64_t e_outer, std::int64_t e_middle, std::int64_t e_last, std::uint64_t first_example,
             std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads);

}  // namespace stn_fast
