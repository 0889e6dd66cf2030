#pragma once
// A device on the host, for kernels/cuda: this header takes the place of the one there, and the kernels are compiled unchanged.
//
// Every thread is a fiber with a stack of its own. It runs until it waits, for its block, its warp or the grid, and then another
// one goes on, so that what a launch computes doesn't depend on which threads run at once, but may depend on their order where
// a barrier is missing: the order of blocks and warps is an argument. Tensor cores and shuffles are collectives of a
// warp, with the operands spread over lanes as the PTX manual has them for mma.m16n8k16.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define STN_FAST_DEVICE inline
#define __global__
#define __launch_bounds__(threads, blocks)
#define threadIdx (stn_fast::emulated::running->thread_index)
#define blockIdx (stn_fast::emulated::running->block_index)
#define gridDim (stn_fast::emulated::grid->size)

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

namespace stn_fast {

using int64 = long long;

struct Bfloat16 {
    unsigned short bits;
};

inline float widen(Bfloat16 number) {
    const std::uint32_t word = static_cast<std::uint32_t>(number.bits) << 16;
    float result;
    std::memcpy(&result, &word, sizeof result);
    return result;
}

inline Bfloat16 narrow(float number) {
    if (std::isnan(number)) return {0x7fff};
    std::uint32_t word;
    std::memcpy(&word, &number, sizeof word);
    return {static_cast<unsigned short>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }

namespace emulated {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 64 << 10, kGuardBytes = 4096;
constexpr unsigned char kFill = 0xff;  // fresh shared memory, and what lies behind it: NaN in every format

struct Index {
    int x;
};

// A counter that only grows, and the value that somebody waits for.
struct Condition {
    const unsigned* counter = nullptr;
    unsigned value = 0;
    bool holds() const { return !counter || static_cast<int>(*counter - value) >= 0; }
};

// All members have arrived once in every generation.
struct Meeting {
    unsigned members, arrived = 0, generation = 0;
};

struct Fiber {
    Index thread_index, block_index;
    ucontext_t entry;
    jmp_buf context;
    Condition condition;
    bool started = false, finished = false;
};

// What a lane hands to the others of its warp; one place for each parity of the generation, as a lane may be one ahead.
struct Operands {
    uint4 left;
    uint2 right;
    float value;
};

struct Warp {
    Meeting meeting{kLanes};
    Operands operands[2][kLanes];
    const char* collective = nullptr;
};

struct Block {
    Meeting meeting;
    std::vector<unsigned char> shared;
    std::vector<Warp> warps;
};

struct Grid {
    Index size;
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    std::function<void()> kernel;
    jmp_buf scheduler;
    const char* failure = nullptr;
};

inline Fiber* running = nullptr;
inline Grid* grid = nullptr;

inline void wait(const unsigned* counter, unsigned value) {
    running->condition = {counter, value};
    if (running->condition.holds()) return;
    if (!_setjmp(running->context)) _longjmp(grid->scheduler, 1);
}

inline void meet(Meeting& meeting) {
    const unsigned next = meeting.generation + 1;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        meeting.generation = next;
    }
    wait(&meeting.generation, next);
}

inline Block& block() { return grid->blocks[running->block_index.x]; }
inline int lane() { return running->thread_index.x % kLanes; }

// Every lane's operands, once all lanes of the warp have called the same collective.
inline const Operands* exchange(const char* collective, const Operands& mine) {
    Warp& warp = block().warps[running->thread_index.x / kLanes];
    if (warp.meeting.arrived == 0) warp.collective = collective;
    if (warp.collective != collective) grid->failure = "the lanes of a warp went separate ways";
    Operands* places = warp.operands[warp.meeting.generation % 2];
    places[lane()] = mine;
    meet(warp.meeting);
    return places;
}

inline void run_fiber() {
    grid->kernel();
    running->finished = true;
    _longjmp(grid->scheduler, 1);
}

// Lets one thread go on as far as it can; whether it could.
inline bool advance(Fiber& fiber) {
    if (fiber.finished || !fiber.condition.holds()) return false;
    running = &fiber;
    if (!_setjmp(grid->scheduler)) {
        if (fiber.started) _longjmp(fiber.context, 1);
        fiber.started = true;
        setcontext(&fiber.entry);
    }
    return true;
}

// Runs the kernel in every thread of every block; null, or what went wrong. Order 0 is the natural one.
inline const char* launch(int blocks, int threads, std::size_t shared_bytes, unsigned order, std::function<void()> kernel) {
    const std::size_t count = static_cast<std::size_t>(blocks) * threads, stacks_bytes = count * kStackBytes;
    void* stacks = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return "no memory for the stacks";
    Grid launched{{blocks}, std::vector<Block>(blocks), std::vector<Fiber>(count), std::move(kernel), {}, nullptr};
    grid = &launched;
    for (Block& each : launched.blocks) {
        each.meeting.members = threads;
        each.shared.assign(shared_bytes + kGuardBytes, kFill);
        each.warps.resize(threads / kLanes);
    }
    for (std::size_t i = 0; i < count; ++i) {
        Fiber& fiber = launched.fibers[i];
        fiber.block_index.x = static_cast<int>(i / threads), fiber.thread_index.x = static_cast<int>(i % threads);
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = static_cast<char*>(stacks) + i * kStackBytes;
        fiber.entry.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.entry, run_fiber, 0);
    }
    std::vector<std::size_t> warps(count / kLanes);
    std::iota(warps.begin(), warps.end(), std::size_t{0});
    std::mt19937 shuffle(order);
    for (bool moved = true; moved && !launched.failure;) {
        moved = false;
        if (order) std::shuffle(warps.begin(), warps.end(), shuffle);
        for (const std::size_t warp : warps) {
            for (bool again = true; again;) {
                again = false;
                for (int i = 0; i < kLanes; ++i) again |= advance(launched.fibers[warp * kLanes + i]);
                moved |= again;
            }
        }
    }
    for (const Fiber& fiber : launched.fibers) {
        if (!launched.failure && !fiber.finished) launched.failure = "threads wait for each other for ever";
    }
    for (const Block& each : launched.blocks) {
        const auto guard = each.shared.end() - kGuardBytes;
        if (std::any_of(guard, each.shared.end(), [](unsigned char byte) { return byte != kFill; })) {
            launched.failure = "shared memory was written beyond its end";
        }
    }
    munmap(stacks, stacks_bytes);
    return launched.failure;
}

// Element `index` of a word that holds two.
inline float half(unsigned word, int index) { return widen({static_cast<unsigned short>(word >> 16 * index)}); }

}  // namespace emulated

inline unsigned char* shared_memory() { return emulated::block().shared.data(); }
inline void synchronise_block() { emulated::meet(emulated::block().meeting); }
inline float from_lane(float value, int source) { return emulated::exchange("shuffle", {{}, {}, value})[source].value; }
inline uint4 load_shared_by_blocks(const uint4* from) { return *from; }
inline float load_shared_by_blocks(const float* from) { return *from; }

// A lane is 4 * group + member. Of the left tile it has columns 2 * member, + 1 of row group (first word) and of row group + 8
// (second), then the same rows 8 columns on; of the right one rows 2 * member, + 1 and 8 on of column group; of the sums columns
// 2 * member, + 1 of rows group and group + 8.
inline void multiply_accumulate(float (&sums)[4], const uint4& left, const uint2& right) {
    const emulated::Operands* lanes = emulated::exchange("mma", {left, right, 0.0f});
    const int group = emulated::lane() / 4, member = emulated::lane() % 4;
    for (int element = 0; element < 4; ++element) {
        const int column = 2 * member + element % 2;
        for (int k = 0; k < 16; ++k) {
            const uint4& a = lanes[group * 4 + k % 8 / 2].left;
            const uint2& b = lanes[column * 4 + k % 8 / 2].right;
            const unsigned upper = k < 8 ? a.x : a.z, lower = k < 8 ? a.y : a.w;
            sums[element] += emulated::half(element < 2 ? upper : lower, k % 2) * emulated::half(k < 8 ? b.x : b.y, k % 2);
        }
    }
}

class GridBarrier {
public:
    explicit GridBarrier(unsigned* counter) : counter_(counter) {}

    void arrive() {
        target_ += gridDim.x;
        synchronise_block();
        if (threadIdx.x == 0) ++*counter_;
    }

    void wait() {
        if (threadIdx.x == 0) emulated::wait(counter_, target_);
        synchronise_block();
    }

private:
    unsigned* counter_;
    unsigned target_ = 0;
};

}  // namespace stn_fast
