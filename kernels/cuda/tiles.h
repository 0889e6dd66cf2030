#pragma once
// Products of a batch of rows, spread over all blocks, with a block's own columns of a matrix that stays in its shared memory.
//
// Both factors lie as mma.sync.m16n8k16 takes them: a tile of the left one, 16 rows by 16 deep, is 32 lanes of four words, a
// tile of the right one, 16 deep by 8 columns, 32 lanes of two, and a word is two bfloat16 next to each other in depth. So
// every lane loads its share of a tile in one access, and a warp's accesses are contiguous.
#include <device.h>

namespace stn_fast {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTileRows = 16, kTileDepth = 16, kTileColumns = 8;

STN_FAST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The sizes of a launch, all known when it is compiled: H hidden units, which is also the depth of every product, tiles of rows
// (examples), tiles of columns in a block, and the tiles of rows that are multiplied at once, in registers.
template <int hidden, int row_tiles, int column_tiles, int row_tiles_at_once>
struct Shape {
    static constexpr int kHidden = hidden, kRowTiles = row_tiles, kColumnTiles = column_tiles, kAtOnce = row_tiles_at_once;
    static constexpr int kDepthTiles = ceil_div(hidden, kTileDepth);
    static constexpr int kDepthTilesOfWarp = ceil_div(kDepthTiles, kWarps);
    static constexpr int kPasses = ceil_div(row_tiles, row_tiles_at_once);
    static constexpr int kPassTiles = row_tiles_at_once * column_tiles;
    static constexpr int kTilesOfWarp = ceil_div(kPassTiles, kWarps);
    static constexpr int kLeftVectors = row_tiles * kDepthTiles * 32;      // uint4 of a left factor
    static constexpr int kRightVectors = kDepthTiles * column_tiles * 32;  // uint2 of a block's right factor
};

// Where left[row][k] lies, counted in bfloat16.
template <class S>
STN_FAST_DEVICE int left_position(int row, int k) {
    const int tile = row / kTileRows * S::kDepthTiles + k / kTileDepth;
    const int lane = row % 8 * 4 + k % 8 / 2;
    const int word = row % kTileRows / 8 + k % kTileDepth / 8 * 2;
    return ((tile * 32 + lane) * 4 + word) * 2 + k % 2;
}

// Where right[k][column] and right[k + 1][column] lie, counted in words; k is even.
template <class S>
STN_FAST_DEVICE int right_word(int k, int column) {
    const int tile = k / kTileDepth * S::kColumnTiles + column / kTileColumns;
    const int lane = column % kTileColumns * 4 + k % 8 / 2;
    return (tile * 32 + lane) * 2 + k % kTileDepth / 8;
}

STN_FAST_DEVICE unsigned pack(Bfloat16 low, Bfloat16 high) { return low.bits | static_cast<unsigned>(high.bits) << 16; }

// One pass: kAtOnce tiles of rows, from `first_row_tile` on, times all columns of the block. Each warp multiplies a share of the
// depth, so no number of the left factor is read twice by a block, and leaves its sums for `total` in `shares`, a place to a
// warp, tile and lane. The block must be synchronised in between.
template <class S>
STN_FAST_DEVICE void multiply(const uint4* left, const uint2* right, int first_row_tile, float4* shares) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint4 a[S::kDepthTilesOfWarp][S::kAtOnce];
    // All loads are issued before the first of them is needed.
#pragma unroll
    for (int i = 0; i < S::kDepthTilesOfWarp; ++i) {
        const int k = warp + i * kWarps;
#pragma unroll
        for (int r = 0; r < S::kAtOnce; ++r) {
            const int row = first_row_tile + r;
            const bool inside = k < S::kDepthTiles && row < S::kRowTiles;
            a[i][r] = inside ? load_shared_by_blocks(left + (row * S::kDepthTiles + k) * 32 + lane) : uint4{0, 0, 0, 0};
        }
    }
    float sums[S::kAtOnce][S::kColumnTiles][4] = {};
#pragma unroll
    for (int i = 0; i < S::kDepthTilesOfWarp; ++i) {
        const int k = warp + i * kWarps;
        if (k >= S::kDepthTiles) break;
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
            const uint2 b = right[(k * S::kColumnTiles + c) * 32 + lane];
#pragma unroll
            for (int r = 0; r < S::kAtOnce; ++r) multiply_accumulate(sums[r][c], a[i][r], b);
        }
    }
    float4* mine = shares + warp * S::kPassTiles * 32 + lane;
#pragma unroll
    for (int r = 0; r < S::kAtOnce; ++r) {
#pragma unroll
        for (int c = 0; c < S::kColumnTiles; ++c) {
            const float(&sum)[4] = sums[r][c];
            mine[(r * S::kColumnTiles + c) * 32] = float4{sum[0], sum[1], sum[2], sum[3]};
        }
    }
}

// A lane's part of a tile of the product, added up over the warps in their order: columns c and c + 1 of row r in x and y, of
// row r + 8 in z and w, where r = lane / 4 and c = lane % 4 * 2.
template <class S>
STN_FAST_DEVICE float4 total(const float4* shares, int tile) {
    const int lane = threadIdx.x % 32;
    float4 sum = shares[tile * 32 + lane];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
        const float4 share = shares[(warp * S::kPassTiles + tile) * 32 + lane];
        sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
    }
    return sum;
}

}  // namespace stn_fast
