#include "gate_tile.h"
#include "gated_linear.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialWork = 65536;  // rows * outputs below which one thread is faster

struct Forward {
    float* y;
    const float *q, *h, *weight_gate, *bias, *response_bias, *bias_gate;
    std::int64_t outer, batch, inner, outputs, n;
};

// Outputs [o0, o0 + width) of examples [first, last).
STN_FAST_CLONES void forward_tile(const Forward& t, std::int64_t first, std::int64_t last, std::int64_t o0, int width,
                                  float* gates) {
    float* bias_gates = gates + depth(t.n) * kTile;
    float* h = bias_gates + depth(t.n) * kTile;
    transpose_gate(t.weight_gate + o0 * t.n, nullptr, t.n, width, gates);
    if (t.bias) transpose_gate(t.bias_gate + o0 * t.n, t.response_bias + o0, t.n, width, bias_gates);
    for (std::int64_t b = first; b < last; b += kExamples) {
        const int count = static_cast<int>(std::min<std::int64_t>(kExamples, last - b));
        copy_response(t.h + b * t.n, t.n, count, h);
        TileRows scale, shift;
        times_gate(h, gates, t.n, width, scale);
        if (t.bias) times_gate(h, bias_gates, t.n, width, shift);
        for (std::int64_t i = 0; i < t.outer; ++i) {
            for (int e = 0; e < count; ++e) {
                for (std::int64_t p = 0; p < t.inner; ++p) {
                    const std::int64_t at = ((i * t.batch + b + e) * t.inner + p) * t.outputs + o0;
                    float* STN_FAST_RESTRICT y = t.y + at;
                    const float* STN_FAST_RESTRICT q = t.q + at;
                    if (t.bias) {
                        const float* STN_FAST_RESTRICT bias = t.bias + o0;
                        for (std::int64_t o = 0; o < width; ++o) y[o] += scale[e][o] * q[o] + (shift[e][o] + bias[o]);
                    } else {
                        for (std::int64_t o = 0; o < width; ++o) y[o] += scale[e][o] * q[o];
                    }
                }
            }
        }
    }
}

}  // namespace

void gated_epilogue_forward(float* y, const float* q, const float* h, const float* weight_gate, const float* bias,
                            const float* response_bias, const float* bias_gate, std::int64_t outer, std::int64_t batch,
                            std::int64_t inner, std::int64_t outputs, std::int64_t n, int threads) {
    const std::int64_t size = outer * batch * inner * outputs;
    if (size == 0) return;
    const Forward task{y, q, h, weight_gate, bias, response_bias, bias_gate, outer, batch, inner, outputs, n};
    const std::int64_t tiles = (outputs + kTile - 1) / kTile;
    // Every number is computed alike in any chunk, so the chunks may follow the threads: enough of them to share the work.
    const std::int64_t wanted = size > kSerialWork ? (4 * threads + tiles - 1) / tiles : 1;
    const std::int64_t step = (std::max<std::int64_t>(batch / wanted, 1) + kExamples - 1) / kExamples * kExamples;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (size > kSerialWork)
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        for (std::int64_t first = 0; first < batch; first += step) {
            const std::int64_t o0 = tile * kTile;
            const int width = static_cast<int>(std::min<std::int64_t>(kTile, outputs - o0));
            float* memory = scratch<0>(depth(n) * (2 * kTile + kExamples));
            forward_tile(task, first, std::min(first + step, batch), o0, width, memory);
        }
    }
}

}  // namespace stn_fast
