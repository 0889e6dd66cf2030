#include "gated_lstm_cell.h"

#include <algorithm>

#include "elementary.h"
#include "isa.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialWork = 16384;  // numbers of c below which one thread is faster
constexpr std::int64_t kUnits = 256;         // hidden units of a task

struct Forward {
    float* gates;
    const float *p, *q, *scale, *shift, *c_before;
    float *c, *h, *response;
    std::int64_t p_row, q_row, hidden;
};

// Hidden units [first, first + count) of one example.
STN_FAST_CLONES void forward_units(const Forward& t, std::int64_t example, std::int64_t first, std::int64_t count) {
    const std::int64_t at = example * t.hidden + first, wide = 4 * example * t.hidden + first, next = t.hidden;
    for (int k = 0; k < 4; ++k) {
        float* gate = t.gates + wide + k * next;
        const float* p = t.p + example * t.p_row + first + k * next;
        if (!t.q) {
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) gate[j] += p[j];
            continue;
        }
        const float* q = t.q + example * t.q_row + first + k * next;
        const float* scale = t.scale + wide + k * next;
        if (t.shift) {
            const float* shift = t.shift + wide + k * next;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) gate[j] += p[j] + scale[j] * q[j] + shift[j];
        } else {
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) gate[j] += p[j] + scale[j] * q[j];
        }
        if (t.response) std::copy_n(q, count, t.response + wide + k * next);
    }
    float *i = t.gates + wide, *f = i + next, *g = f + next, *o = g + next;
    const float* c_before = t.c_before + at;
    float *c = t.c + at, *h = t.h + at;
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j) {
        i[j] = sigmoid(finite(i[j]));
        f[j] = sigmoid(finite(f[j]));
        g[j] = hyperbolic_tangent(finite(g[j]));
        o[j] = sigmoid(finite(o[j]));
        c[j] = f[j] * c_before[j] + i[j] * g[j];
        h[j] = o[j] * hyperbolic_tangent(finite(c[j]));
    }
}

struct Backward {
    const float *dy, *dh;
    float* dc;
    const float *gates, *c, *c_before, *scale;
    float *d_gates, *d_p, *d_q;
    std::int64_t p_row, q_row, hidden;
};

STN_FAST_CLONES void backward_units(const Backward& t, std::int64_t example, std::int64_t first, std::int64_t count) {
    const std::int64_t at = example * t.hidden + first, wide = 4 * example * t.hidden + first, next = t.hidden;
    const float *dy = t.dy + at, *dh = t.dh ? t.dh + at : nullptr, *c = t.c + at, *c_before = t.c_before + at;
    const float *i = t.gates + wide, *f = i + next, *g = f + next, *o = g + next;
    float *d_i = t.d_gates + wide, *d_f = d_i + next, *d_g = d_f + next, *d_o = d_g + next;
    float* dc = t.dc + at;
    float d_h[kUnits];
    if (dh) {
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) d_h[j] = dy[j] + dh[j];
    } else {
        std::copy_n(dy, count, d_h);
    }
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j) {
        const float tanh_c = hyperbolic_tangent(finite(c[j]));
        const float d_c = dc[j] + d_h[j] * o[j] * (1.0f - tanh_c * tanh_c);
        d_i[j] = d_c * g[j] * (i[j] * (1.0f - i[j]));
        d_f[j] = d_c * c_before[j] * (f[j] * (1.0f - f[j]));
        d_g[j] = d_c * i[j] * (1.0f - g[j] * g[j]);
        d_o[j] = d_h[j] * tanh_c * (o[j] * (1.0f - o[j]));
        dc[j] = d_c * f[j];
    }
    if (!t.d_p) return;
    for (int k = 0; k < 4; ++k) {
        const float *d_gate = t.d_gates + wide + k * next, *scale = t.scale + wide + k * next;
        float *d_p = t.d_p + example * t.p_row + first + k * next, *d_q = t.d_q + example * t.q_row + first + k * next;
        std::copy_n(d_gate, count, d_p);
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) d_q[j] = d_gate[j] * scale[j];
    }
}

struct Tangent {
    const float *d_before, *p, *gates, *c, *c_before;
    float *dc, *dh;
    std::int64_t hidden;
};

STN_FAST_CLONES void tangent_units(const Tangent& t, std::int64_t example, std::int64_t first, std::int64_t count) {
    const std::int64_t at = example * t.hidden + first, wide = 4 * example * t.hidden + first, next = t.hidden;
    float before[4][kUnits];
    for (int k = 0; k < 4; ++k) {
        const float* d_before = t.d_before + wide + k * next;
        if (t.p) {
            const float* p = t.p + wide + k * next;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) before[k][j] = d_before[j] + p[j];
        } else {
            std::copy_n(d_before, count, before[k]);
        }
    }
    const float *d_i = before[0], *d_f = before[1], *d_g = before[2], *d_o = before[3];
    const float *i = t.gates + wide, *f = i + next, *g = f + next, *o = g + next, *c = t.c + at, *c_before = t.c_before + at;
    float *dc = t.dc + at, *dh = t.dh + at;
#pragma omp simd
    for (std::int64_t j = 0; j < count; ++j) {
        const float tanh_c = hyperbolic_tangent(finite(c[j]));
        dc[j] = f[j] * dc[j] + c_before[j] * (f[j] * (1.0f - f[j])) * d_f[j] + g[j] * (i[j] * (1.0f - i[j])) * d_i[j] +
                i[j] * (1.0f - g[j] * g[j]) * d_g[j];
        dh[j] = tanh_c * (o[j] * (1.0f - o[j])) * d_o[j] + o[j] * (1.0f - tanh_c * tanh_c) * dc[j];
    }
}

// Every number is computed alike in any task, so any thread may take any of them.
template <typename Task>
void over_units(const Task& task, void (*units)(const Task&, std::int64_t, std::int64_t, std::int64_t), std::int64_t batch,
                std::int64_t hidden, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (batch * hidden > kSerialWork)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t first = 0; first < hidden; first += kUnits) units(task, b, first, std::min(kUnits, hidden - first));
    }
}

}  // namespace

void gated_lstm_cell_forward(float* gates, const float* p, const float* q, const float* scale, const float* shift,
                             const float* c_before, float* c, float* h, float* response, std::int64_t p_row, std::int64_t q_row,
                             std::int64_t batch, std::int64_t hidden, int threads) {
    const Forward task{gates, p, q, scale, shift, c_before, c, h, response, p_row, q_row, hidden};
    over_units(task, forward_units, batch, hidden, threads);
}

void gated_lstm_cell_backward(const float* dy, const float* dh, float* dc, const float* gates, const float* c,
                              const float* c_before, const float* scale, float* d_gates, float* d_p, float* d_q,
                              std::int64_t p_row, std::int64_t q_row, std::int64_t batch, std::int64_t hidden, int threads) {
    const Backward task{dy, dh, dc, gates, c, c_before, scale, d_gates, d_p, d_q, p_row, q_row, hidden};
    over_units(task, backward_units, batch, hidden, threads);
}

void lstm_cell_tangent(const float* d_before, const float* p, const float* gates, const float* c, const float* c_before, float* dc,
                       float* dh, std::int64_t batch, std::int64_t hidden, int threads) {
    const Tangent task{d_before, p, gates, c, c_before, dc, dh, hidden};
    over_units(task, tangent_units, batch, hidden, threads);
}

}  // namespace stn_fast
