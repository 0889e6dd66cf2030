#include "dropout.h"

#include <algorithm>
#include <cmath>

#include "random.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialElements = 8192;  // below this, starting threads costs more than it saves
constexpr std::int64_t kBlock = 4096;           // positions along `last` that one task draws

struct Task {
    const float* x;
    float* y;
    std::int64_t outer, batch, middle, last;
    std::int64_t e_outer, e_middle;
    Generator generator;
};

struct Example {
    std::int64_t index;      // in this batch
    std::uint32_t global;    // in the whole batch
    std::int32_t threshold;  // in steps of a uniform
    float scale;

    Example(std::int64_t b, std::uint64_t first_example, float rate)
        : index(b),
          global(static_cast<std::uint32_t>(first_example + static_cast<std::uint64_t>(b))),
          // u >= rate exactly where the integer u * 2^24 >= ceil(rate * 2^24); a NaN drops everything
          threshold(rate < 1.0f ? static_cast<std::int32_t>(std::ceil(std::max(rate, 0.0f) * 0x1p24f)) : 1 << 24),
          scale(rate < 1.0f ? 1.0f / (1.0f - rate) : 0.0f) {}
};

// All ones where the element is kept, all zeros where it is dropped.
STN_FAST_INLINE std::int32_t kept(std::uint32_t word, std::int32_t threshold) {
    return -static_cast<std::int32_t>(uniform_steps(word) >= threshold);
}

// A dropped element is 0 whatever it was: inf and NaN too.
STN_FAST_INLINE float apply(float x, float scale, std::int32_t mask) { return as_float(as_int(x * scale) & mask); }

// Masks of `count` consecutive elements from `element` on, which may start inside of a counter.
STN_FAST_INLINE void draw_masks(const Task& t, const Example& example, std::int64_t element, std::int64_t count,
                                std::int32_t* STN_FAST_RESTRICT masks) {
    std::uint32_t words[kDraws];
    const std::int64_t skipped = element % 4;
    std::uint32_t quad = static_cast<std::uint32_t>(element / 4);
    for (std::int64_t done = -skipped; done < count; done += kDraws, quad += kLanes) {
        draw_words(t.generator, quad, example.global, words);
        const std::int64_t from = std::max<std::int64_t>(0, -done), to = std::min<std::int64_t>(kDraws, count - done);
        for (std::int64_t i = from; i < to; ++i) masks[done + i] = kept(words[i], example.threshold);
    }
}

constexpr std::int64_t kPiece = 16 * kDraws;  // masks held at a time

// What one task covers. Along outer and middle it is either one position, or all of them under a shared mask.
struct Range {
    std::int64_t outer_start, outer_stop, middle_start, middle_stop, last_start, last_stop;
};

// e_last = 1: neighbours have masks of their own, drawn once for all the outer and middle positions that share them.
STN_FAST_CLONES void drop_elements(const Task& t, const Example& example, const Range& range) {
    std::int32_t masks[kPiece];
    const std::int64_t element = range.outer_start * t.e_outer + range.middle_start * t.e_middle;
    for (std::int64_t l = range.last_start; l < range.last_stop; l += kPiece) {
        const std::int64_t count = std::min(kPiece, range.last_stop - l);
        draw_masks(t, example, element + l, count, masks);
        for (std::int64_t i = range.outer_start; i < range.outer_stop; ++i) {
            for (std::int64_t m = range.middle_start; m < range.middle_stop; ++m) {
                const std::int64_t at = ((i * t.batch + example.index) * t.middle + m) * t.last + l;
#pragma omp simd
                for (std::int64_t c = 0; c < count; ++c) t.y[at + c] = apply(t.x[at + c], example.scale, masks[c]);
            }
        }
    }
}

// e_last = 0: a run of `last` neighbours is kept or dropped as one (a channel, say).
STN_FAST_CLONES void drop_runs(const Task& t, const Example& example, const Range& range) {
    std::int32_t masks[kPiece];
    const std::int64_t piece = t.e_middle == 1 ? kPiece : 1;  // only consecutive elements share counters
    for (std::int64_t m = range.middle_start; m < range.middle_stop; m += piece) {
        const std::int64_t count = std::min(piece, range.middle_stop - m);
        draw_masks(t, example, range.outer_start * t.e_outer + m * t.e_middle, count, masks);
        for (std::int64_t i = range.outer_start; i < range.outer_stop; ++i) {
            for (std::int64_t c = 0; c < count; ++c) {
                const std::int64_t at = ((i * t.batch + example.index) * t.middle + m + c) * t.last;
                const std::int32_t mask = masks[c];
#pragma omp simd
                for (std::int64_t l = 0; l < t.last; ++l) t.y[at + l] = apply(t.x[at + l], example.scale, mask);
            }
        }
    }
}

std::int64_t pieces(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

}  // namespace

void dropout(const float* x, const float* rate, float* y, std::int64_t outer, std::int64_t batch, std::int64_t middle,
             std::int64_t last, std::int64_t e_outer, std::int64_t e_middle, std::int64_t e_last, std::uint64_t first_example,
             std::uint64_t seed, std::uint64_t step, std::uint64_t stream, int threads) {
    const std::int64_t size = outer * batch * middle * last;
    if (size == 0) return;
    // Middle and last become one dimension where their elements follow each other, or where both share one mask.
    if (middle > 1 && ((e_last == 1 && e_middle == last) || (e_last == 0 && e_middle == 0))) {
        last *= middle;
        middle = 1;
    }
    const Task task{x, y, outer, batch, middle, last, e_outer, e_middle, Generator(seed, step, stream)};
    const bool by_element = e_last != 0;
    const std::int64_t outer_step = e_outer != 0 ? 1 : outer;
    const std::int64_t middle_step = by_element && e_middle != 0 ? 1 : by_element ? middle : std::min(middle, kPiece);
    const std::int64_t last_step = by_element ? kBlock : last;
    const std::int64_t outers = pieces(outer, outer_step), middles = pieces(middle, middle_step), lasts = pieces(last, last_step);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (size > kSerialElements)
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t task_index = 0; task_index < outers * middles * lasts; ++task_index) {
            const std::int64_t i = task_index / (middles * lasts) * outer_step;
            const std::int64_t m = task_index / lasts % middles * middle_step;
            const std::int64_t l = task_index % lasts * last_step;
            const Range range{i, std::min(i + outer_step, outer),  m, std::min(m + middle_step, middle),
                              l, std::min(l + last_step, last)};
            const Example example(b, first_example, rate[b]);
            (by_element ? drop_elements : drop_runs)(task, example, range);
        }
    }
}

}  // namespace stn_fast
