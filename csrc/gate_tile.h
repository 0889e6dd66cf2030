#pragma once
// The small dense products between the response input h of a few examples and the gates of a tile of outputs. The tile of gates
// lies transposed, (n, kTile), so that the loops over outputs are contiguous.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "isa.h"

namespace stn_fast {

constexpr int kExamples = 8;  // handled at once: every gate loaded serves them all
constexpr int kTile = 256;    // outputs: long rows for the caches, gates and sums that stay in them
constexpr int kColumns = 16;  // outputs that a register, or a few, hold

using TileRows = float[kExamples][kTile];

// Scratch memory that a thread keeps for its next call: fresh pages would cost more than the work done in them.
template <int Slot>
inline float* scratch(std::int64_t size) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local std::int64_t capacity = 0;
    if (size > capacity) {
        memory.reset(new float[static_cast<std::size_t>(size)]);
        capacity = size;
    }
    return memory.get();
}

// The columns computed for `width` outputs: whole vectors, of which the last may be padding.
STN_FAST_INLINE int padded(int width) { return (width + kColumns - 1) / kColumns * kColumns; }

// The rows that n hyperparameters take in a tile: even, as they are taken two at a time; the last may be zeros.
STN_FAST_INLINE std::int64_t depth(std::int64_t n) { return (n + 1) / 2 * 2; }

// tile[k][o] = gate[o][k] * factor[o], zero beyond n and `width`; no factor means 1.
STN_FAST_INLINE void transpose_gate(const float* STN_FAST_RESTRICT gate, const float* STN_FAST_RESTRICT factor, std::int64_t n,
                                    int width, float* STN_FAST_RESTRICT tile) {
    const int columns = padded(width);
    for (std::int64_t k = 0; k < depth(n); ++k) {
        for (std::int64_t o = 0; o < columns; ++o) {
            const bool inside = k < n && o < width;
            tile[k * kTile + o] = inside ? gate[o * n + k] * (factor ? factor[o] : 1.0f) : 0.0f;
        }
    }
}

// rows[e][k] = h[e][k], zero beyond n and `count`
STN_FAST_INLINE void copy_response(const float* STN_FAST_RESTRICT h, std::int64_t n, int count, float* STN_FAST_RESTRICT rows) {
    for (int e = 0; e < kExamples; ++e) {
        for (std::int64_t k = 0; k < depth(n); ++k) rows[e * depth(n) + k] = e < count && k < n ? h[e * n + k] : 0.0f;
    }
}

// out[e][o] = sum_k h[e][k] * tile[k][o]; four examples by 16 outputs stay in registers while k runs.
STN_FAST_INLINE void times_gate(const float* STN_FAST_RESTRICT h, const float* STN_FAST_RESTRICT tile, std::int64_t n, int width,
                                TileRows& STN_FAST_RESTRICT out) {
    constexpr int kHeld = 4;
    for (int o = 0; o < padded(width); o += kColumns) {
        for (int first = 0; first < kExamples; first += kHeld) {
            float sums[kHeld][kColumns] = {};
            for (std::int64_t k = 0; k < n; ++k) {
                const float* gate = tile + k * kTile + o;
#pragma GCC unroll 4
                for (int e = 0; e < kHeld; ++e) {
                    const float factor = h[(first + e) * depth(n) + k];
#pragma omp simd
                    for (int c = 0; c < kColumns; ++c) sums[e][c] += factor * gate[c];
                }
            }
            for (int e = 0; e < kHeld; ++e) std::copy_n(sums[e], kColumns, out[first + e] + o);
        }
    }
}

// sums[k][o] += sum_e rows[e][o] * h[e][k]
STN_FAST_INLINE void add_outer_products(const TileRows& STN_FAST_RESTRICT rows, const float* STN_FAST_RESTRICT h, std::int64_t n,
                                        int width, float* STN_FAST_RESTRICT sums) {
    const int columns = padded(width);
    const std::int64_t stride = depth(n);
    for (std::int64_t k = 0; k < n; k += 2) {
        float *STN_FAST_RESTRICT to0 = sums + k * kTile, *STN_FAST_RESTRICT to1 = to0 + kTile;
        for (int e = 0; e < kExamples; e += 4) {
            const float *r0 = rows[e], *r1 = rows[e + 1], *r2 = rows[e + 2], *r3 = rows[e + 3];
            const float* a = h + e * stride + k;
            const float a0 = a[0], a1 = a[stride], a2 = a[2 * stride], a3 = a[3 * stride];
            const float b0 = a[1], b1 = a[stride + 1], b2 = a[2 * stride + 1], b3 = a[3 * stride + 1];
#pragma omp simd
            for (std::int64_t o = 0; o < columns; ++o) {
                to0[o] = to0[o] + r0[o] * a0 + r1[o] * a1 + r2[o] * a2 + r3[o] * a3;
                to1[o] = to1[o] + r0[o] * b0 + r1[o] * b1 + r2[o] * b2 + r3[o] * b3;
            }
        }
    }
}

// sums[e][k] = sum_o rows[e][o] * tile[k][o], plus the same of a second pair if there is one: two k for four e at a time, so that
// a number loaded is used more than once, and the sum over lanes at the end, the dear part, is shared by both pairs.
template <bool Second>
STN_FAST_INLINE void times_gate_transposed(const TileRows& rows, const float* tile, const TileRows& second_rows,
                                           const float* second_tile, std::int64_t n, int width,
                                           float* STN_FAST_RESTRICT sums) {
    const int columns = padded(width);
    const std::int64_t stride = depth(n);
    for (std::int64_t k = 0; k < n; k += 2) {
        const float *g = tile + k * kTile, *next_g = g + kTile;
        const float *f = second_tile + k * kTile, *next_f = f + kTile;
        for (int e = 0; e < kExamples; e += 4) {
            const float *r0 = rows[e], *r1 = rows[e + 1], *r2 = rows[e + 2], *r3 = rows[e + 3];
            const float *q0 = second_rows[e], *q1 = second_rows[e + 1], *q2 = second_rows[e + 2], *q3 = second_rows[e + 3];
            float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
            for (std::int64_t o = 0; o < columns; ++o) {
                a0 += r0[o] * g[o] + (Second ? q0[o] * f[o] : 0.0f);
                a1 += r1[o] * g[o] + (Second ? q1[o] * f[o] : 0.0f);
                a2 += r2[o] * g[o] + (Second ? q2[o] * f[o] : 0.0f);
                a3 += r3[o] * g[o] + (Second ? q3[o] * f[o] : 0.0f);
                b0 += r0[o] * next_g[o] + (Second ? q0[o] * next_f[o] : 0.0f);
                b1 += r1[o] * next_g[o] + (Second ? q1[o] * next_f[o] : 0.0f);
                b2 += r2[o] * next_g[o] + (Second ? q2[o] * next_f[o] : 0.0f);
                b3 += r3[o] * next_g[o] + (Second ? q3[o] * next_f[o] : 0.0f);
            }
            float* to = sums + e * stride + k;
            to[0] = a0, to[stride] = a1, to[2 * stride] = a2, to[3 * stride] = a3;
            to[1] = b0, to[stride + 1] = b1, to[2 * stride + 1] = b2, to[3 * stride + 1] = b3;
        }
    }
}

}  // namespace stn_fast
