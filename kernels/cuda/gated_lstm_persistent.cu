// The recurrence of a gated LSTM over a whole sequence in one launch, forward and backward. All blocks stay resident: each keeps
// its share of W_hh and R_hh in shared memory from the first step to the last, and a barrier of the grid parts the steps.
//
// Sizes: T steps, B examples, H hidden units. Gates are i, f, g, o, and a row of 4H holds them one after the other. All tensors
// are contiguous bfloat16; sums, activations and what is carried from step to step are float32.
#include <tiles.h>

namespace stn_fast {

constexpr int kGates = 4, kBranches = 2, kParts = kGates * kBranches;  // branch 0 is W, branch 1 is R
constexpr int kCellGate = 2;                                          // g: tanh; the others: sigmoid

STN_FAST_DEVICE float read(const Bfloat16* from, int64 at) { return widen(from[at]); }
STN_FAST_DEVICE Bfloat16 half_of(unsigned word, int half) { return {static_cast<unsigned short>(word >> 16 * half)}; }

// Forward. A tile of columns is a hidden unit: column 2 q + branch is gate q of that branch. So the four lanes that share a row
// of the product hold P and Q of one gate each, and a quarter of the cell is computed in each of them.
template <class S>
STN_FAST_DEVICE void keep_units(const Bfloat16* weight, const Bfloat16* response_weight, unsigned* right) {
    constexpr int kPairs = S::kDepthTiles * kTileDepth / 2;
    for (int i = threadIdx.x; i < S::kColumnTiles * kTileColumns * kPairs; i += kThreads) {
        const int column = i / kPairs, k = i % kPairs * 2;
        const int unit = blockIdx.x * S::kColumnTiles + column / kParts, gate = column % kParts / kBranches;
        const Bfloat16* matrix = column % kBranches ? response_weight : weight;
        const Bfloat16* row = matrix + (static_cast<int64>(gate) * S::kHidden + unit) * S::kHidden;
        const bool inside = unit < S::kHidden;
        const Bfloat16 low = inside && k < S::kHidden ? row[k] : Bfloat16{0};
        const Bfloat16 high = inside && k + 1 < S::kHidden ? row[k + 1] : Bfloat16{0};
        right[right_word<S>(k, column)] = pack(low, high);
    }
}

// What the lanes of a warp keep of their two cells each in a tile: from step to step scale and shift, packed, and the cell state,
// and of one step what the input contributes to both. No lane reads another's. As registers they would be too many.
struct Kept {
    unsigned terms[2][32];
    float c[2][32];
    unsigned from_input[32];
};

// On entry gates (T, B, 4H) is what the input contributes; scale, shift (B, 4H) gate the response, h_0, c_0 (B, H) are the state
// before the first step, weight and response_weight (4H, H). Writes y (T, B, H) and the last cell state c_n (B, H); with
// kSave also the activated gates in place and cells (T, B, H); with kSaveResponse also response (T, B, 4H), h_{t-1} R^T.
// `exchange` holds two left factors, zeros on entry: h_{t-1} of this step and that of the next.
template <class S, bool kHasShift, bool kSave, bool kSaveResponse>
__global__ void __launch_bounds__(kThreads, 1)
    gated_lstm_forward(Bfloat16* gates, const Bfloat16* h_0, const Bfloat16* c_0, const Bfloat16* weight,
                       const Bfloat16* response_weight, const Bfloat16* scale, const Bfloat16* shift, Bfloat16* y, Bfloat16* c_n,
                       Bfloat16* cells, Bfloat16* response, uint4* exchange, unsigned* counter, int64 steps, int64 batch,
                       int64 reverse) {
    constexpr int64 kHidden = S::kHidden, kWide = kGates * kHidden;
    uint2* right = reinterpret_cast<uint2*>(shared_memory());
    float4* shares = reinterpret_cast<float4*>(right + S::kRightVectors);
    GridBarrier barrier(counter);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, gate = lane % 4;

    // The tiles of a warp, over all passes: n-th of a pass, or none.
    constexpr int kTiles = S::kRowTiles * S::kColumnTiles;
    Kept* kept = reinterpret_cast<Kept*>(shares + kWarps * S::kPassTiles * 32);
    const auto tile_of = [&](int pass, int n) {
        const int tile = warp + n * kWarps, index = pass * S::kPassTiles + tile;
        return tile < S::kPassTiles && index < kTiles ? index : -1;
    };
    struct Place {
        int64 example, unit;
        bool inside;
    };
    // The cell of this lane in a tile; `half` says which of its two rows.
    const auto place = [&](int tile, int half) {
        const int64 example = tile / S::kColumnTiles * kTileRows + half * 8 + lane / 4;
        const int64 unit = static_cast<int64>(blockIdx.x) * S::kColumnTiles + tile % S::kColumnTiles;
        return Place{example, unit, example < batch && unit < kHidden};
    };

    // Results of a pass wait in shared memory until they are stored: activated gate, q and h of both rows, packed, in place of
    // the lane's part of the first share, which has been added up.
    const auto results = [&](int n) { return reinterpret_cast<uint4*>(shares + (warp + n * kWarps) * 32 + lane); };
    const auto store = [&](int pass, int64 t) {
        for (int n = 0; n < S::kTilesOfWarp; ++n) {
            const int tile = tile_of(pass, n);
            if (tile < 0) continue;
            const uint4 result = *results(n);
            for (int half = 0; half < 2; ++half) {
                const Place at = place(tile, half);
                if (!at.inside) continue;
                const int64 position = t * batch + at.example, state = position * kHidden + at.unit;
                const int64 wide = position * kWide + gate * kHidden + at.unit;
                if (kSave) gates[wide] = half_of(result.x, half);
                if (kSaveResponse) response[wide] = half_of(result.y, half);
                if (gate == 0) y[state] = half_of(result.z, half);
                if (gate == 2 && kSave) cells[state] = narrow(kept[tile].c[half][lane]);
            }
        }
    };

    keep_units<S>(weight, response_weight, reinterpret_cast<unsigned*>(right));
    for (int pass = 0; pass < S::kPasses; ++pass) {
        for (int n = 0; n < S::kTilesOfWarp; ++n) {
            const int tile = tile_of(pass, n);
            if (tile < 0) continue;
            for (int half = 0; half < 2; ++half) {
                const Place at = place(tile, half);
                const int64 state = at.example * kHidden + at.unit, wide = at.example * kWide + gate * kHidden + at.unit;
                kept[tile].c[half][lane] = at.inside ? read(c_0, state) : 0.0f;
                kept[tile].terms[half][lane] = at.inside ? pack(scale[wide], kHasShift ? shift[wide] : Bfloat16{0}) : 0;
                if (!at.inside || gate > 0) continue;
                reinterpret_cast<Bfloat16*>(exchange)[left_position<S>(at.example, at.unit)] = h_0[state];
            }
        }
    }

    for (int64 step = 0; step < steps; ++step) {
        const int64 t = reverse ? steps - 1 - step : step;
        barrier.arrive();  // other blocks need h of the last step; all else is stored afterwards
        // What the input contributes is on its way while other blocks are waited for.
        unsigned fetched[S::kPasses][S::kTilesOfWarp];
#pragma unroll
        for (int pass = 0; pass < S::kPasses; ++pass) {
#pragma unroll
            for (int n = 0; n < S::kTilesOfWarp; ++n) {
                const int tile = tile_of(pass, n);
                Bfloat16 both[2] = {};
                for (int half = 0; half < 2; ++half) {
                    const Place at = place(tile, half);
                    const int64 wide = (t * batch + at.example) * kWide + gate * kHidden + at.unit;
                    if (tile >= 0 && at.inside) both[half] = gates[wide];
                }
                fetched[pass][n] = pack(both[0], both[1]);
            }
        }
        if (step > 0) store(S::kPasses - 1, reverse ? t + 1 : t - 1);
        barrier.wait();
#pragma unroll
        for (int pass = 0; pass < S::kPasses; ++pass) {
#pragma unroll
            for (int n = 0; n < S::kTilesOfWarp; ++n) {
                const int tile = tile_of(pass, n);
                if (tile >= 0) kept[tile].from_input[lane] = fetched[pass][n];
            }
        }
        const uint4* before = exchange + step % 2 * S::kLeftVectors;
        Bfloat16* after = reinterpret_cast<Bfloat16*>(exchange + (step + 1) % 2 * S::kLeftVectors);
#pragma unroll 1
        for (int pass = 0; pass < S::kPasses; ++pass) {
            if (pass > 0) synchronise_block();  // the shares of the pass before have been read
            multiply<S>(before, right, pass * S::kAtOnce, shares);
            synchronise_block();
            for (int n = 0; n < S::kTilesOfWarp; ++n) {
                const int tile = tile_of(pass, n);
                if (tile < 0) continue;
                const float4 product = total<S>(shares, warp + n * kWarps);
                Bfloat16 activated[2], q[2], h[2];
                for (int half = 0; half < 2; ++half) {
                    const Place at = place(tile, half);
                    const float of_weight = half ? product.z : product.x, of_response = half ? product.w : product.y;
                    const unsigned term = kept[tile].terms[half][lane], from_input = kept[tile].from_input[lane];
                    const float sum = widen(half_of(from_input, half)) + of_weight +
                                      widen(half_of(term, 0)) * of_response + widen(half_of(term, 1));
                    const float own = gate == kCellGate ? hyperbolic_tangent(sum) : sigmoid(sum);
                    const int first = lane - gate;
                    const float i = from_lane(own, first), f = from_lane(own, first + 1);
                    const float g = from_lane(own, first + 2), o = from_lane(own, first + 3);
                    const float cell = f * kept[tile].c[half][lane] + i * g;
                    kept[tile].c[half][lane] = cell;
                    activated[half] = narrow(own), q[half] = narrow(of_response);
                    h[half] = narrow(o * hyperbolic_tangent(cell));
                    if (!at.inside) continue;
                    if (gate == 1) after[left_position<S>(at.example, at.unit)] = h[half];
                    if (gate == 3 && step == steps - 1) c_n[at.example * kHidden + at.unit] = narrow(cell);
                }
                *results(n) = uint4{pack(activated[0], activated[1]), pack(q[0], q[1]), pack(h[0], h[1]), 0};
            }
            if (pass < S::kPasses - 1) store(pass, t);
        }
    }
    store(S::kPasses - 1, reverse ? 0 : steps - 1);
}

// Backward. The sum over 4H gates of both branches is cut into kParts, gate by gate and branch by branch, and a block multiplies
// one part by one slice of the columns of W or R: so a block reads no more of what others wrote than in forward. Column c of a
// slice is hidden unit c of that slice.
template <class S>
STN_FAST_DEVICE void keep_columns(const Bfloat16* weight, const Bfloat16* response_weight, int part, int first_column,
                                  unsigned* right) {
    constexpr int kColumns = S::kColumnTiles * kTileColumns;
    const Bfloat16* matrix = part % kBranches ? response_weight : weight;
    const Bfloat16* rows = matrix + static_cast<int64>(part / kBranches) * S::kHidden * S::kHidden;
    for (int i = threadIdx.x; i < kColumns * S::kDepthTiles * kTileDepth / 2; i += kThreads) {
        const int column = i % kColumns, k = i / kColumns * 2;
        const int64 at = static_cast<int64>(k) * S::kHidden + first_column + column;
        const bool inside = first_column + column < S::kHidden;
        const Bfloat16 low = inside && k < S::kHidden ? rows[at] : Bfloat16{0};
        const Bfloat16 high = inside && k + 1 < S::kHidden ? rows[at + S::kHidden] : Bfloat16{0};
        right[right_word<S>(k, column)] = pack(low, high);
    }
}

// From dy (T, B, H), d_last_cell (B, H; null: zeros), the activated gates (T, B, 4H) and cells (T, B, H) of forward, c_0, scale
// and the weights: d_gates (T, B, 4H), the gradient of what the activations were applied to, those of c_0, in float32, and,
// where d_h_0 is not null, of h_0. `exchange` holds kParts left factors, zeros on entry: d_gates of the step for W, and times
// scale for R. `products` (kParts, rows, columns) are the parts of dh, in whole tiles.
template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    gated_lstm_backward(const Bfloat16* dy, const Bfloat16* d_last_cell, const Bfloat16* gates, const Bfloat16* cells,
                        const Bfloat16* c_0, const Bfloat16* weight, const Bfloat16* response_weight, const Bfloat16* scale,
                        Bfloat16* d_gates, Bfloat16* d_h_0, float* d_c_0, uint4* exchange, float* products, unsigned* counter,
                        int64 steps, int64 batch, int64 reverse) {
    constexpr int64 kHidden = S::kHidden, kWide = kGates * kHidden;
    constexpr int kSlice = S::kColumnTiles * kTileColumns, kSlices = ceil_div(S::kHidden, kSlice);
    constexpr int kRows = S::kRowTiles * kTileRows, kColumns = kSlices * kSlice;
    constexpr int kAllThreads = kSlices * kParts * kThreads, kCells = ceil_div(kRows * S::kHidden, kAllThreads);
    uint2* right = reinterpret_cast<uint2*>(shared_memory());
    float4* shares = reinterpret_cast<float4*>(right + S::kRightVectors);
    GridBarrier barrier(counter);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int part = blockIdx.x % kParts, first_column = blockIdx.x / kParts * kSlice;
    keep_columns<S>(weight, response_weight, part, first_column, reinterpret_cast<unsigned*>(right));

    // The cells of a step are dealt out to all threads of the grid; each keeps its own from step to step.
    const int64 first_cell = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x, all_cells = batch * kHidden;
    const auto sum_of_parts = [&](int64 example, int64 unit) {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < kParts; ++p) sum += load_shared_by_blocks(products + (p * kRows + example) * kColumns + unit);
        return sum;
    };
    float dc[kCells];
#pragma unroll
    for (int n = 0; n < kCells; ++n) {
        const int64 cell = first_cell + static_cast<int64>(n) * kAllThreads;
        dc[n] = 0.0f;
        if (d_last_cell && cell < all_cells) dc[n] = read(d_last_cell, cell);
    }

    for (int64 left = steps - 1; left >= 0; --left) {
        const int64 t = reverse ? steps - 1 - left : left, t_before = reverse ? t + 1 : t - 1;
        const bool last = left == steps - 1;
        float activated[kCells][kGates], scales[kCells][kGates], c[kCells], c_before[kCells], dh[kCells];
#pragma unroll
        for (int n = 0; n < kCells; ++n) {
            const int64 cell = first_cell + static_cast<int64>(n) * kAllThreads;
            if (cell >= all_cells) continue;
            const int64 wide = cell / kHidden * kWide + cell % kHidden;
#pragma unroll
            for (int q = 0; q < kGates; ++q) {
                activated[n][q] = read(gates, t * batch * kWide + wide + q * kHidden);
                scales[n][q] = read(scale, wide + q * kHidden);
            }
            c[n] = read(cells, t * all_cells + cell);
            c_before[n] = left == 0 ? read(c_0, cell) : read(cells, t_before * all_cells + cell);
            dh[n] = read(dy, t * all_cells + cell);
        }
        if (!last) barrier.wait();
        unsigned gradients[kCells][kGates / 2];
#pragma unroll
        for (int n = 0; n < kCells; ++n) {
            const int64 cell = first_cell + static_cast<int64>(n) * kAllThreads;
            if (cell >= all_cells) continue;
            const int64 example = cell / kHidden, unit = cell % kHidden;
            if (!last) dh[n] += sum_of_parts(example, unit);
            const float i = activated[n][0], f = activated[n][1], g = activated[n][2], o = activated[n][3];
            const float tanh_c = hyperbolic_tangent(c[n]);
            const float d_c = dc[n] + dh[n] * o * (1.0f - tanh_c * tanh_c);
            const float before[kGates] = {d_c * g * i * (1.0f - i), d_c * c_before[n] * f * (1.0f - f),
                                          d_c * i * (1.0f - g * g), dh[n] * tanh_c * o * (1.0f - o)};
            dc[n] = d_c * f;
            Bfloat16* left_factor = reinterpret_cast<Bfloat16*>(exchange) + left_position<S>(example, unit);
#pragma unroll
            for (int q = 0; q < kGates; ++q) {
                left_factor[int64{kBranches} * q * S::kLeftVectors * 8] = narrow(before[q]);
                left_factor[(int64{kBranches} * q + 1) * S::kLeftVectors * 8] = narrow(before[q] * scales[n][q]);
            }
            gradients[n][0] = pack(narrow(before[0]), narrow(before[1]));
            gradients[n][1] = pack(narrow(before[2]), narrow(before[3]));
        }
        barrier.arrive();  // other blocks need the left factors; d_gates are stored afterwards
#pragma unroll
        for (int n = 0; n < kCells; ++n) {
            const int64 cell = first_cell + static_cast<int64>(n) * kAllThreads;
            if (cell >= all_cells) continue;
            const int64 wide = t * batch * kWide + cell / kHidden * kWide + cell % kHidden;
#pragma unroll
            for (int q = 0; q < kGates; ++q) d_gates[wide + q * kHidden] = half_of(gradients[n][q / 2], q % 2);
        }
        if (left == 0 && !d_h_0) break;
        barrier.wait();
#pragma unroll 1
        for (int pass = 0; pass < S::kPasses; ++pass) {
            if (pass > 0) synchronise_block();  // the shares of the pass before have been read
            multiply<S>(exchange + part * S::kLeftVectors, right, pass * S::kAtOnce, shares);
            synchronise_block();
            for (int tile = warp; tile < S::kPassTiles; tile += kWarps) {
                const int row_tile = pass * S::kAtOnce + tile / S::kColumnTiles;
                if (row_tile >= S::kRowTiles) break;
                const float4 sum = total<S>(shares, tile);
                const int row = row_tile * kTileRows + lane / 4;
                const int column = first_column + tile % S::kColumnTiles * kTileColumns + lane % 4 * 2;
                float* to = products + (static_cast<int64>(part) * kRows + row) * kColumns + column;
                *reinterpret_cast<float2*>(to) = float2{sum.x, sum.y};
                *reinterpret_cast<float2*>(to + 8 * kColumns) = float2{sum.z, sum.w};
            }
        }
        barrier.arrive();
    }

    if (d_h_0) barrier.wait();
    for (int n = 0; n < kCells; ++n) {
        const int64 cell = first_cell + static_cast<int64>(n) * kAllThreads;
        if (cell >= all_cells) continue;
        d_c_0[cell] = dc[n];
        if (d_h_0) d_h_0[cell] = narrow(sum_of_parts(cell / kHidden, cell % kHidden));
    }
}

}  // namespace stn_fast
