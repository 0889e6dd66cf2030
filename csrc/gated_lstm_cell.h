#pragma once
#include <cstdint>

namespace stn_fast {

// One time step of a gated LSTM around its matrix products. Rows are examples: gates, scale, shift and response are (batch,
// 4 hidden) in the order i, f, g, o; c_before, c, h and their gradients are (batch, hidden). Results don't depend on `threads`.

// gates holds what the input contributes on entry, and sigmoid(i), sigmoid(f), tanh(g), sigmoid(o) of
//     gates + p + scale * q + shift
// on return; then c = f * c_before + i * g and h = o * tanh(c). p = h_before W^T and q = h_before R^T have rows that begin
// p_row and q_row numbers apart; q is copied to `response` unless that is null. shift may be null. With q null, there is no
// response.
void gated_lstm_cell_forward(float* gates, const float* p, const float* q, const float* scale, const float* shift,
                             const float* c_before, float* c, float* h, float* response, std::int64_t p_row, std::int64_t q_row,
                             std::int64_t batch, std::int64_t hidden, int threads);

// From the gradient of h, which is dy plus dh (null: zero), and that of c: d_gates, that of what the activations were applied to;
// again as d_p; d_q = d_gates * scale; and in place of dc that of c_before. Rows of d_p and d_q begin p_row and q_row apart.
// d_p and d_q may be null together.
void gated_lstm_cell_backward(const float* dy, const float* dh, float* dc, const float* gates, const float* c,
                              const float* c_before, const float* scale, float* d_gates, float* d_p, float* d_q,
                              std::int64_t p_row, std::int64_t q_row, std::int64_t batch, std::int64_t hidden, int threads);

// The tangents of h, and in place of dc of c, from those before the activations, d_before plus p (null: zero), both rows without
// gaps, and that of c_before in dc.
void lstm_cell_tangent(const float* d_before, const float* p, const float* gates, const float* c, const float* c_before, float* dc,
                       float* dh, std::int64_t batch, std::int64_t hidden, int threads);

}  // namespace stn_fast
