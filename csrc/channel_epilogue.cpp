#include "channel_epilogue.h"

#include <algorithm>

#include "isa.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialWork = 65536;  // numbers below which one thread is faster
constexpr int kChannels = 256;               // of a task: rows of a kilobyte
constexpr int kStrip = 16;                   // pixels that are transposed together: a cache line of every channel
constexpr int kRun = 1024;                   // pixels of a channel that are summed up before they join the total
constexpr int kRowStride = kChannels + 16;   // rows a kilobyte apart would crowd the same cache sets

using Strip = float[kStrip][kRowStride];

struct Sizes {
    std::int64_t batch, groups, outputs, pixels;
    bool joined;

    std::int64_t channels() const { return groups * outputs; }
    std::int64_t halves() const { return joined ? 2 : 1; }
    std::int64_t tiles() const { return groups * tiles_of_group(); }
    std::int64_t tiles_of_group() const { return (outputs + kChannels - 1) / kChannels; }
};

// Some channels of one group of one example, and where they start.
struct Tile {
    std::int64_t example;
    std::int64_t own;      // in (channels)
    std::int64_t half;     // in what P or Q lie in: (groups, 2, outputs) if joined, else (channels)
    std::int64_t channel;  // in (batch, channels)
    int width;

    Tile(const Sizes& s, std::int64_t b, std::int64_t index) : example(b) {
        const std::int64_t group = index / s.tiles_of_group(), first = index % s.tiles_of_group() * kChannels;
        own = group * s.outputs + first;
        half = group * s.halves() * s.outputs + first;
        channel = b * s.channels() + own;
        width = static_cast<int>(std::min<std::int64_t>(kChannels, s.outputs - first));
    }
};

// NaN stays NaN.
STN_FAST_INLINE float rectified(float v) { return 0.0f > v ? 0.0f : v; }
// As torch's rule: where y is NaN the gradient passes.
STN_FAST_INLINE float rectified_gradient(float y, float g) { return y <= 0.0f ? 0.0f : g; }

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
// Four by four numbers by shuffles, which no compiler finds by itself.
STN_FAST_INLINE void transpose_quad(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
    typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
    const auto row = [&](int r) STN_FAST_INLINE_LAMBDA { return *reinterpret_cast<const Quad*>(from + r * from_stride); };
    const Quad a = row(0), b = row(1), c = row(2), d = row(3);
    const Quad ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const auto put = [&](int r, Quad value) STN_FAST_INLINE_LAMBDA { *reinterpret_cast<Quad*>(to + r * to_stride) = value; };
    put(0, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    put(1, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    put(2, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    put(3, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}
#else
STN_FAST_INLINE void transpose_quad(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
    for (int c = 0; c < 4; ++c) {
        for (int r = 0; r < 4; ++r) to[c * to_stride + r] = from[r * from_stride + c];
    }
}
#endif

// to[c][r] = from[r][c]. What lies far apart, as the channels of an image may, crowds the same cache sets: each of its lines is
// read, or written, to its end before the next is begun.
STN_FAST_INLINE void transpose_tile(const float* from, std::int64_t from_stride, int rows, int columns, float* to,
                                    std::int64_t to_stride) {
    const int whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    const auto quad = [&](int r, int c) STN_FAST_INLINE_LAMBDA {
        transpose_quad(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    };
    if (from_stride > to_stride) {
        for (int r = 0; r < whole_rows; r += 4) {
            for (int c = 0; c < whole_columns; c += 4) quad(r, c);
        }
    } else {
        for (int c = 0; c < whole_columns; c += 4) {
            for (int r = 0; r < whole_rows; r += 4) quad(r, c);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
    }
}

struct Forward {
    const float *p, *q, *scale, *shift;
    float *y, *q_copy;
    Sizes sizes;
    bool y_last, relu;
};

// Channel by channel.
STN_FAST_CLONES void forward_planes(const Forward& t, const Tile& tile) {
    const std::int64_t pixels = t.sizes.pixels;
    for (int o = 0; o < tile.width; ++o) {
        const std::int64_t channel = tile.channel + o;
        const std::int64_t at = (tile.example * t.sizes.halves() * t.sizes.channels() + tile.half + o) * pixels;
        const float *p = t.p + at, *q = t.q + at;
        float* y = t.y + channel * pixels;
        const float scale = t.scale[channel], shift = t.shift ? t.shift[channel] : 0.0f;
        if (t.relu) {
#pragma omp simd
            for (std::int64_t i = 0; i < pixels; ++i) y[i] = rectified(p[i] + scale * q[i] + shift);
        } else {
#pragma omp simd
            for (std::int64_t i = 0; i < pixels; ++i) y[i] = p[i] + scale * q[i] + shift;
        }
        if (t.q_copy) std::copy_n(q, pixels, t.q_copy + channel * pixels);
    }
}

// Pixel by pixel.
STN_FAST_CLONES void forward_rows(const Forward& t, const Tile& tile) {
    const std::int64_t pixels = t.sizes.pixels, channels = t.sizes.channels();
    float scale[kChannels], shift[kChannels] = {};
    std::copy_n(t.scale + tile.channel, tile.width, scale);
    if (t.shift) std::copy_n(t.shift + tile.channel, tile.width, shift);
    Strip strip;
    for (std::int64_t first = 0; first < pixels; first += kStrip) {
        const int count = static_cast<int>(std::min<std::int64_t>(kStrip, pixels - first));
        for (int i = 0; i < count; ++i) {
            const std::int64_t pixel = tile.example * pixels + first + i, at = pixel * channels + tile.own;
            const std::int64_t from = pixel * t.sizes.halves() * channels + tile.half;
            const float *p = t.p + from, *q = t.q + from;
            float* y = t.y_last ? t.y + at : strip[i];
            if (t.relu) {
#pragma omp simd
                for (int o = 0; o < tile.width; ++o) y[o] = rectified(p[o] + scale[o] * q[o] + shift[o]);
            } else {
#pragma omp simd
                for (int o = 0; o < tile.width; ++o) y[o] = p[o] + scale[o] * q[o] + shift[o];
            }
            if (t.q_copy) std::copy_n(q, tile.width, t.q_copy + at);
        }
        if (!t.y_last) transpose_tile(strip[0], kRowStride, count, tile.width, t.y + tile.channel * pixels + first, pixels);
    }
}

struct Backward {
    const float *dy, *y, *q, *scale;
    float *d_p, *d_q, *d_scale, *d_shift;
    Sizes sizes;
    bool y_last;
};

// Channel by channel.
STN_FAST_CLONES void backward_planes(const Backward& t, const Tile& tile) {
    const std::int64_t pixels = t.sizes.pixels;
    float masked[kRun];
    for (int o = 0; o < tile.width; ++o) {
        const std::int64_t channel = tile.channel + o;
        const float scale = t.scale[channel];
        float product = 0.0f, total = 0.0f;
        for (std::int64_t first = 0; first < pixels; first += kRun) {
            const std::int64_t at = channel * pixels + first, count = std::min<std::int64_t>(kRun, pixels - first);
            const float* STN_FAST_RESTRICT g = t.dy + at;
            if (t.y) {
                const float* STN_FAST_RESTRICT y = t.y + at;
                for (std::int64_t i = 0; i < count; ++i) masked[i] = rectified_gradient(y[i], g[i]);
                g = masked;
            }
            const std::int64_t to = (tile.example * t.sizes.halves() * t.sizes.channels() + tile.half + o) * pixels + first;
            if (t.d_p) std::copy_n(g, count, t.d_p + to);
            if (t.d_q) {
                float* STN_FAST_RESTRICT dq = t.d_q + to;
                for (std::int64_t i = 0; i < count; ++i) dq[i] = g[i] * scale;
            }
            if (t.d_scale) {
                const float* STN_FAST_RESTRICT q = t.q + at;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (std::int64_t i = 0; i < count; ++i) sum += g[i] * q[i];
                product += sum;
            }
            if (t.d_shift) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (std::int64_t i = 0; i < count; ++i) sum += g[i];
                total += sum;
            }
        }
        if (t.d_scale) t.d_scale[channel] = product;
        if (t.d_shift) t.d_shift[channel] = total;
    }
}

// Pixel by pixel. Sums of a strip are added up before they join the total.
STN_FAST_CLONES void backward_rows(const Backward& t, const Tile& tile) {
    const std::int64_t pixels = t.sizes.pixels, channels = t.sizes.channels();
    float scale[kChannels], product[kChannels] = {}, total[kChannels] = {};
    std::copy_n(t.scale + tile.channel, tile.width, scale);
    Strip dy_strip, y_strip;
    for (std::int64_t first = 0; first < pixels; first += kStrip) {
        const int count = static_cast<int>(std::min<std::int64_t>(kStrip, pixels - first));
        if (!t.y_last) {
            const std::int64_t at = tile.channel * pixels + first;
            transpose_tile(t.dy + at, pixels, tile.width, count, dy_strip[0], kRowStride);
            if (t.y) transpose_tile(t.y + at, pixels, tile.width, count, y_strip[0], kRowStride);
        }
        float strip_product[kChannels] = {}, strip_total[kChannels] = {}, masked[kChannels];
        for (int i = 0; i < count; ++i) {
            const std::int64_t pixel = tile.example * pixels + first + i, at = pixel * channels + tile.own;
            const float* STN_FAST_RESTRICT g = t.y_last ? t.dy + at : dy_strip[i];
            if (t.y) {
                const float* STN_FAST_RESTRICT y = t.y_last ? t.y + at : y_strip[i];
                for (int o = 0; o < tile.width; ++o) masked[o] = rectified_gradient(y[o], g[o]);
                g = masked;
            }
            const std::int64_t to = pixel * t.sizes.halves() * channels + tile.half;
            if (t.d_p) std::copy_n(g, tile.width, t.d_p + to);
            if (t.d_q) {
                float* STN_FAST_RESTRICT dq = t.d_q + to;
                for (int o = 0; o < tile.width; ++o) dq[o] = g[o] * scale[o];
            }
            if (t.d_scale) {
                const float* STN_FAST_RESTRICT q = t.q + at;
                for (int o = 0; o < tile.width; ++o) strip_product[o] += g[o] * q[o];
            }
            if (t.d_shift) {
                for (int o = 0; o < tile.width; ++o) strip_total[o] += g[o];
            }
        }
        if (t.d_scale) {
            for (int o = 0; o < tile.width; ++o) product[o] += strip_product[o];
        }
        if (t.d_shift) {
            for (int o = 0; o < tile.width; ++o) total[o] += strip_total[o];
        }
    }
    if (t.d_scale) std::copy_n(product, tile.width, t.d_scale + tile.channel);
    if (t.d_shift) std::copy_n(total, tile.width, t.d_shift + tile.channel);
}

STN_FAST_CLONES void transpose_columns(const float* from, float* to, std::int64_t rows, std::int64_t columns,
                                       std::int64_t first) {
    const int count = static_cast<int>(std::min<std::int64_t>(kStrip, rows - first));
    for (std::int64_t c = 0; c < columns; c += kStrip) {
        const int width = static_cast<int>(std::min<std::int64_t>(kStrip, columns - c));
        transpose_tile(from + first * columns + c, columns, count, width, to + c * rows + first, rows);
    }
}

}  // namespace

void channel_epilogue_forward(const float* p, const float* q, const float* scale, const float* shift, float* y, float* q_copy,
                              std::int64_t batch, std::int64_t groups, std::int64_t outputs, std::int64_t pixels, bool joined,
                              bool q_last, bool y_last, bool relu, int threads) {
    const Forward task{p, q, scale, shift, y, q_copy, {batch, groups, outputs, pixels, joined}, y_last, relu};
    const std::int64_t tiles = task.sizes.tiles();
    const bool parallel = batch * task.sizes.channels() * pixels > kSerialWork;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (parallel)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < tiles; ++i) (q_last ? forward_rows : forward_planes)(task, Tile(task.sizes, b, i));
    }
}

void channel_epilogue_backward(const float* dy, const float* y, const float* q, const float* scale, float* d_p, float* d_q,
                               float* d_scale, float* d_shift, std::int64_t batch, std::int64_t groups, std::int64_t outputs,
                               std::int64_t pixels, bool joined, bool q_last, bool y_last, int threads) {
    const Backward task{dy, y, q, scale, d_p, d_q, d_scale, d_shift, {batch, groups, outputs, pixels, joined}, y_last};
    const std::int64_t tiles = task.sizes.tiles();
    const bool parallel = batch * task.sizes.channels() * pixels > kSerialWork;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (parallel)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < tiles; ++i) (q_last ? backward_rows : backward_planes)(task, Tile(task.sizes, b, i));
    }
}

void transpose(const float* from, float* to, std::int64_t batch, std::int64_t rows, std::int64_t columns, int threads) {
    const std::int64_t size = rows * columns, strips = (rows + kStrip - 1) / kStrip;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (batch * size > kSerialWork)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t i = 0; i < strips; ++i) transpose_columns(from + b * size, to + b * size, rows, columns, i * kStrip);
    }
}

}  // namespace stn_fast
