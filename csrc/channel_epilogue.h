#pragma once
#include <cstdint>

namespace stn_fast {

// What surrounds the two convolutions P = conv(x, W) and Q = conv(x, R) of a gated layer, y = P + scale * Q + shift over whole
// channels. `joined`: P and Q come from one convolution with the filters [W; R], so that they lie side by side in every group,
// (batch, groups, 2, outputs, pixels), `outputs` counting those of one group; else each is (batch, groups * outputs, pixels).
// Images lie channel by channel (pixels last), or pixel by pixel where the flag `..._last` says that channels are last;
// y_last only where q_last. scale and shift are (batch, groups * outputs). Results don't depend on `threads`.

// y = P + scale * Q + shift, max(y, 0) where `relu`; no shift means 0. y may be P where both are of one layout and not joined.
// q_copy, where wanted, is Q alone, lying as P and Q do, which is what q_last tells.
void channel_epilogue_forward(const float* p, const float* q, const float* scale, const float* shift, float* y, float* q_copy,
                              std::int64_t batch, std::int64_t groups, std::int64_t outputs, std::int64_t pixels, bool joined,
                              bool q_last, bool y_last, bool relu, int threads);

// With g = dy, where y is given dy * [y > 0]: d_p = g, d_q = g * scale, d_scale = sum over pixels of g * q, d_shift that of g.
// dy and y lie as y does, d_p and d_q as P and Q, and q as q_copy. A null output isn't computed; q is needed for d_scale alone.
void channel_epilogue_backward(const float* dy, const float* y, const float* q, const float* scale, float* d_p, float* d_q,
                               float* d_scale, float* d_shift, std::int64_t batch, std::int64_t groups, std::int64_t outputs,
                               std::int64_t pixels, bool joined, bool q_last, bool y_last, int threads);

// (batch, rows, columns) to (batch, columns, rows)
void transpose(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, int threads);

}  // namespace stn_fast
