#pragma once
#include <cstdint>

namespace stn_fast {

// What surrounds the two matrix products P = x W^T and Q = x R^T of a gated layer,
//     y = P + b + (h Gw^T) * Q + (h Gb^T) * r.
// Rows m of P, Q, y, dy are (outer, batch, inner) positions by `outputs`; row m belongs to example (m / inner) % batch. h is
// (batch, n), the gates are (outputs, n). bias, response_bias and bias_gate are all present or all null.
// The (batch, outputs) gates are computed tile by tile where they are used. Results don't depend on `threads`.

// y holds P on entry and the result on return.
void gated_epilogue_forward(float* y, const float* q, const float* h, const float* weight_gate, const float* bias,
                            const float* response_bias, const float* bias_gate, std::int64_t outer, std::int64_t batch,
                            std::int64_t inner, std::int64_t outputs, std::int64_t n, int threads);

// With dS = sum over an example's positions of dy * q and dC that of dy:
//     g = dy * (h Gw^T), d_weight_gate = dS^T h, d_bias = sum dC, d_bias_gate = r * (dC^T h),
//     d_response_bias = sum dC * (h Gb^T), d_h = dS Gw + (dC * r) Gb.
// A null output isn't computed; q is needed for d_weight_gate and d_h alone. Where `accumulate`, all but g are added to what the
// outputs hold, so that a caller may go through the rows in blocks.
void gated_epilogue_backward(const float* dy, const float* q, const float* h, const float* weight_gate,
                             const float* response_bias, const float* bias_gate, float* g, float* d_weight_gate, float* d_bias,
                             float* d_response_bias, float* d_bias_gate, float* d_h, std::int64_t outer, std::int64_t batch,
                             std::int64_t inner, std::int64_t outputs, std::int64_t n, bool accumulate, int threads);

}  // namespace stn_fast
