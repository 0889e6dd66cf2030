#include "gate_tile.h"
#include "gated_linear.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialWork = 65536;  // rows * outputs below which one thread is faster
constexpr std::int64_t kMaxChunks = 16;      // of examples: each has sums of its own, added in order at the end

struct Backward {
    const float *dy, *q, *h, *weight_gate, *response_bias, *bias_gate;
    float *g, *d_weight_gate, *d_bias, *d_response_bias, *d_bias_gate, *d_h;
    std::int64_t outer, batch, inner, outputs, n;
    bool accumulate;

    bool wants_gate_sums() const { return d_weight_gate != nullptr; }                       // dS^T h
    bool wants_bias_sums() const { return d_response_bias || d_bias_gate; }                 // dC^T h
    bool wants_products() const { return wants_gate_sums() || d_h; }                        // dS
    bool wants_totals() const { return d_bias || wants_bias_sums() || (d_h && bias_gate); }  // dC
};

// What one chunk of examples adds to the gradients of one tile of outputs: dS^T h and dC^T h, transposed, and the sum of dC.
struct Sums {
    float *gate, *bias_gate, *bias;

    static std::int64_t size(std::int64_t n) { return (2 * depth(n) + 1) * kTile; }
    Sums(float* memory, std::int64_t n)
        : gate(memory), bias_gate(memory + depth(n) * kTile), bias(memory + 2 * depth(n) * kTile) {}
};

// One pass over the positions of one example: g, and the sums dS and dC over them.
STN_FAST_INLINE void reduce_positions(const Backward& t, std::int64_t b, std::int64_t o0, int width,
                                      const float* STN_FAST_RESTRICT scale, float* STN_FAST_RESTRICT product,
                                      float* STN_FAST_RESTRICT total) {
    const bool products = t.wants_products(), totals = t.wants_totals();
    bool started = false;
    for (std::int64_t i = 0; i < t.outer; ++i) {
        for (std::int64_t p = 0; p < t.inner; ++p) {
            const std::int64_t at = ((i * t.batch + b) * t.inner + p) * t.outputs + o0;
            const float* STN_FAST_RESTRICT dy = t.dy + at;
            if (t.g) {
                float* STN_FAST_RESTRICT g = t.g + at;
                for (std::int64_t o = 0; o < width; ++o) g[o] = dy[o] * scale[o];
            }
            if (products) {
                const float* STN_FAST_RESTRICT q = t.q + at;
                if (started) {
                    for (std::int64_t o = 0; o < width; ++o) product[o] += dy[o] * q[o];
                } else {
                    for (std::int64_t o = 0; o < width; ++o) product[o] = dy[o] * q[o];
                }
            }
            if (totals) {
                if (started) {
                    for (std::int64_t o = 0; o < width; ++o) total[o] += dy[o];
                } else {
                    std::copy_n(dy, width, total);
                }
            }
            started = true;
        }
    }
}

// Outputs [o0, o0 + width) of examples [first, last). `sums` belong to this task; rows of d_h too, to which it adds.
STN_FAST_CLONES void backward_tile(const Backward& t, std::int64_t first, std::int64_t last, std::int64_t o0, int width,
                                   const Sums& sums, float* memory) {
    const std::int64_t rows = depth(t.n);
    float *gates = memory, *bias_gates = gates + rows * kTile, *h = bias_gates + rows * kTile;
    float* d_h = h + kExamples * rows;
    if (t.g || t.d_h) transpose_gate(t.weight_gate + o0 * t.n, nullptr, t.n, width, gates);
    if (t.d_h && t.bias_gate) transpose_gate(t.bias_gate + o0 * t.n, t.response_bias + o0, t.n, width, bias_gates);
    if (t.wants_gate_sums()) std::fill_n(sums.gate, rows * kTile, 0.0f);
    if (t.wants_bias_sums()) std::fill_n(sums.bias_gate, rows * kTile, 0.0f);
    if (t.d_bias) std::fill_n(sums.bias, kTile, 0.0f);

    TileRows scale, product = {}, total = {};  // the padding beyond `width` stays zero
    for (std::int64_t b = first; b < last; b += kExamples) {
        const int count = static_cast<int>(std::min<std::int64_t>(kExamples, last - b));
        copy_response(t.h + b * t.n, t.n, count, h);
        if (t.g) times_gate(h, gates, t.n, width, scale);
        for (int e = 0; e < count; ++e) reduce_positions(t, b + e, o0, width, scale[e], product[e], total[e]);
        for (int e = count; e < kExamples; ++e) {
            std::fill_n(product[e], kTile, 0.0f);
            std::fill_n(total[e], kTile, 0.0f);
        }
        if (t.wants_gate_sums()) add_outer_products(product, h, t.n, width, sums.gate);
        if (t.wants_bias_sums()) add_outer_products(total, h, t.n, width, sums.bias_gate);
        if (t.d_bias) {
            for (std::int64_t o = 0; o < padded(width); ++o) {
                sums.bias[o] += ((total[0][o] + total[1][o]) + (total[2][o] + total[3][o])) +
                                ((total[4][o] + total[5][o]) + (total[6][o] + total[7][o]));
            }
        }
        if (t.d_h) {
            if (t.bias_gate) {
                times_gate_transposed<true>(product, gates, total, bias_gates, t.n, width, d_h);
            } else {
                times_gate_transposed<false>(product, gates, product, gates, t.n, width, d_h);
            }
            for (int e = 0; e < count; ++e) {
                for (std::int64_t k = 0; k < t.n; ++k) t.d_h[(b + e) * t.n + k] += d_h[e * rows + k];
            }
        }
    }
}

// Adds the chunks' sums of one tile in order and writes the gradients of its outputs.
STN_FAST_CLONES void finish_tile(const Backward& t, const float* memory, std::int64_t chunks, std::int64_t stride,
                                 std::int64_t o0, int width) {
    const std::int64_t rows = depth(t.n);
    float response_bias[kTile] = {};
    for (std::int64_t k = 0; k < t.n; ++k) {
        float gate[kTile] = {}, bias_gate[kTile] = {};
        for (std::int64_t c = 0; c < chunks; ++c) {
            const float* sums = memory + c * stride + k * kTile;
            if (t.wants_gate_sums()) {
                for (std::int64_t o = 0; o < width; ++o) gate[o] += sums[o];
            }
            if (t.wants_bias_sums()) {
                for (std::int64_t o = 0; o < width; ++o) bias_gate[o] += sums[rows * kTile + o];
            }
        }
        for (std::int64_t o = 0; o < width; ++o) {
            const std::int64_t at = (o0 + o) * t.n + k;
            if (t.d_weight_gate) t.d_weight_gate[at] = gate[o] + (t.accumulate ? t.d_weight_gate[at] : 0.0f);
            if (t.d_bias_gate) {
                t.d_bias_gate[at] = t.response_bias[o0 + o] * bias_gate[o] + (t.accumulate ? t.d_bias_gate[at] : 0.0f);
            }
            if (t.d_response_bias) response_bias[o] += bias_gate[o] * t.bias_gate[at];
        }
    }
    if (t.d_response_bias) {
        for (std::int64_t o = 0; o < width; ++o) {
            t.d_response_bias[o0 + o] = response_bias[o] + (t.accumulate ? t.d_response_bias[o0 + o] : 0.0f);
        }
    }
    if (t.d_bias) {
        for (std::int64_t o = 0; o < width; ++o) {
            float sum = t.accumulate ? t.d_bias[o0 + o] : 0.0f;
            for (std::int64_t c = 0; c < chunks; ++c) sum += memory[c * stride + 2 * rows * kTile + o];
            t.d_bias[o0 + o] = sum;
        }
    }
}

}  // namespace

void gated_epilogue_backward(const float* dy, const float* q, const float* h, const float* weight_gate,
                             const float* response_bias, const float* bias_gate, float* g, float* d_weight_gate, float* d_bias,
                             float* d_response_bias, float* d_bias_gate, float* d_h, std::int64_t outer, std::int64_t batch,
                             std::int64_t inner, std::int64_t outputs, std::int64_t n, bool accumulate, int threads) {
    const Backward task{dy, q, h, weight_gate, response_bias, bias_gate,
                        g, d_weight_gate, d_bias, d_response_bias, d_bias_gate, d_h,
                        outer, batch, inner, outputs, n, accumulate};
    const std::int64_t positions = outer * inner;
    const std::int64_t tiles = (outputs + kTile - 1) / kTile;
    const bool sums_wanted = task.wants_gate_sums() || task.wants_bias_sums() || d_bias;
    const bool parallel = positions * batch * outputs > kSerialWork;
    // The grid is the same for any number of threads, so the sums are too. A chunk is large enough to pay for its sums, and
    // where tiles can be shared out instead (without d_h, whose rows belong to a chunk) there are fewer.
    std::int64_t chunks = std::min({kMaxChunks, (batch + kExamples - 1) / kExamples, (positions * batch + 31) / 32});
    if (!d_h && tiles > 0) chunks = std::min(chunks, (2 * kMaxChunks + tiles - 1) / tiles);
    chunks = std::max<std::int64_t>(chunks, 1);
    const std::int64_t step = ((batch + chunks - 1) / chunks + kExamples - 1) / kExamples * kExamples;
    const std::int64_t stride = Sums::size(n);
    float* memory = scratch<0>(sums_wanted ? tiles * chunks * stride : 0);
    if (d_h && !accumulate) std::fill_n(d_h, batch * n, 0.0f);

    const auto run = [&](std::int64_t tile, std::int64_t chunk) {
        const std::int64_t first = std::min(chunk * step, batch), last = std::min(first + step, batch);
        const int width = static_cast<int>(std::min<std::int64_t>(kTile, outputs - tile * kTile));
        const Sums sums(sums_wanted ? memory + (tile * chunks + chunk) * stride : nullptr, n);
        backward_tile(task, first, last, tile * kTile, width, sums, scratch<1>(depth(n) * (2 * kTile + 2 * kExamples)));
    };
    if (d_h) {
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            for (std::int64_t tile = 0; tile < tiles; ++tile) run(tile, chunk);
        }
    } else {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (parallel)
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) run(tile, chunk);
        }
    }
    if (!sums_wanted) return;
#pragma omp parallel for num_threads(threads) schedule(static) if (parallel)
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const int width = static_cast<int>(std::min<std::int64_t>(kTile, outputs - tile * kTile));
        finish_tile(task, memory + tile * chunks * stride, chunks, stride, tile * kTile, width);
    }
}

}  // namespace stn_fast
