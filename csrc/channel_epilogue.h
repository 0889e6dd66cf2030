#pragma once
#include <cstdint>

namespace stn_fast {

// What surrounds one convolution with the filters [W; R] of a gated layer, y = P + scale * Q + shift over whole channels.
// `both` holds P and Q of every group side by side: (batch, groups, 2, outputs, pixels), `outputs` counting those of one group.
// Images lie channel by channel (pixels last), or pixel by pixel where the flag `..._last` says that channels are last;
// y_last only where both_last. scale and shift are (batch, groups * outputs). Results don't depend on `threads`.

// y = P + scale * Q + shift, max(y, 0) where `relu`; no shift means 0. q, where wanted, is Q alone, lying as `both` does.
void channel_epilogue_forward(const float* both, const float* scale, const float* shift, float* y, float* q, std::int64_t batch,
                              std::int64_t groups, std::int64_t outputs, std::int64_t pixels, bool both_last, bool y_last,
                              bool relu, int threads);

// With g = dy, where y is given dy * [y > 0]: d_both = (g, g * scale), d_scale = sum over pixels of g * q, d_shift that of g.
// dy and y lie as y does, q and d_both as `both`. A null output isn't computed; q is needed for d_scale alone.
void channel_epilogue_backward(const float* dy, const float* y, const float* q, const float* scale, float* d_both,
                               float* d_scale, float* d_shift, std::int64_t batch, std::int64_t groups, std::int64_t outputs,
                               std::int64_t pixels, bool both_last, bool y_last, int threads);

// (batch, rows, columns) to (batch, columns, rows)
void transpose(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, int threads);

}  // namespace stn_fast
