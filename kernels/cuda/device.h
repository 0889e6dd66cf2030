#pragma once
// What the kernels ask of the device beyond plain C++, a function each. Tests put a header of this name in its place that does
// the same on the host, so nothing else here may use an instruction of the device's own.

#define STN_FAST_DEVICE __device__ __forceinline__

namespace stn_fast {

using int64 = long long;

// The upper half of a float, rounded to nearest even.
struct Bfloat16 {
    unsigned short bits;
};

STN_FAST_DEVICE float widen(Bfloat16 number) { return __uint_as_float(static_cast<unsigned>(number.bits) << 16); }

STN_FAST_DEVICE Bfloat16 narrow(float number) {
    Bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(number));
    return result;
}

STN_FAST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
STN_FAST_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }

// The block's dynamic shared memory, aligned for vectors of 16 bytes.
STN_FAST_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
}

STN_FAST_DEVICE void synchronise_block() { __syncthreads(); }

// `value` of the lane `source`; the whole warp takes part.
STN_FAST_DEVICE float from_lane(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }

// Loads of what other blocks wrote during this launch: from the L2 cache, as the L1 caches are not coherent.
STN_FAST_DEVICE uint4 load_shared_by_blocks(const uint4* from) { return __ldcg(from); }
STN_FAST_DEVICE float load_shared_by_blocks(const float* from) { return __ldcg(from); }

// sums += left right on the tensor cores, for a tile of 16 x 16 by 16 x 8 numbers spread over a warp (mma.sync.m16n8k16).
STN_FAST_DEVICE void multiply_accumulate(float (&sums)[4], const uint4& left, const uint2& right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(right.x), "r"(right.y));
}

// A barrier of all blocks, which must be resident together (a cooperative launch), in two halves: what the block wrote before
// `arrive` is seen by every block after its `wait`. The counter starts at zero and only grows: nothing has to be reset, and
// that it wraps around does no harm, as differences are compared. A block that waits in vain for some tens of seconds, at half
// a microsecond or more a poll, ends the launch with an error instead of hanging the process.
class GridBarrier {
public:
    STN_FAST_DEVICE explicit GridBarrier(unsigned* counter) : counter_(counter), target_(0) {}

    STN_FAST_DEVICE void arrive() {
        target_ += gridDim.x;
        __syncthreads();
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
    }

    STN_FAST_DEVICE void wait() {
        if (threadIdx.x == 0) {
            unsigned arrived, polls = 0;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter_) : "memory");
                if (++polls == kMostPolls) __trap();
            } while (static_cast<int>(arrived - target_) < 0);
        }
        __syncthreads();
    }

private:
    static constexpr unsigned kMostPolls = 1u << 26;
    unsigned* counter_;
    unsigned target_;
};

}  // namespace stn_fast
