#include "gated_embedding.h"

#include <algorithm>

#include "isa.h"

namespace stn_fast {
namespace {

constexpr std::int64_t kSerialWork = 16384;  // numbers of e below which one thread is faster
constexpr std::int64_t kColumns = 64;        // a task of backward: few enough to share the work, whole cache lines

struct Tables {
    const std::int64_t* tokens;
    const float *response, *s, *scale;
    std::int64_t batch, inner, width;

    STN_FAST_INLINE std::int64_t example(std::int64_t row) const { return row / inner % batch; }
    STN_FAST_INLINE float factor(std::int64_t word) const { return scale ? scale[word] : 1.0f; }
};

STN_FAST_CLONES void forward_row(const Tables& t, const float* weight, float* STN_FAST_RESTRICT e, std::int64_t row) {
    const std::int64_t word = t.tokens[row], width = t.width;
    const float *w = weight + word * width, *r = t.response + word * width, *s = t.s + t.example(row) * width;
    const float factor = t.factor(word);
    float* STN_FAST_RESTRICT out = e + row * width;
    if (factor == 0.0f) {  // a dropped row is 0 whatever it holds
        std::fill_n(out, width, 0.0f);
        return;
    }
#pragma omp simd
    for (std::int64_t j = 0; j < width; ++j) out[j] = factor * (w[j] + s[j] * r[j]);
}

struct Sums {
    float *d_weight, *d_response, *d_s;
    std::int64_t rows, padding;
};

// Columns [first, first + count) of every row, in their order: a column belongs to one thread, whoever that is.
STN_FAST_CLONES void backward_columns(const Tables& t, const float* de, const Sums& sums, std::int64_t first, std::int64_t count) {
    for (std::int64_t row = 0; row < sums.rows; ++row) {
        const std::int64_t word = t.tokens[row], at = word * t.width + first, gate = t.example(row) * t.width + first;
        const float factor = t.factor(word);
        if (factor == 0.0f) continue;
        const float* STN_FAST_RESTRICT g = de + row * t.width + first;
        if (sums.d_weight && word != sums.padding) {
            float* STN_FAST_RESTRICT total = sums.d_weight + at;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) total[j] += factor * g[j];
        }
        if (sums.d_response && word != sums.padding) {
            float* STN_FAST_RESTRICT total = sums.d_response + at;
            const float* s = t.s + gate;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) total[j] += factor * g[j] * s[j];
        }
        if (sums.d_s) {
            float* STN_FAST_RESTRICT total = sums.d_s + gate;
            const float* r = t.response + at;
#pragma omp simd
            for (std::int64_t j = 0; j < count; ++j) total[j] += factor * g[j] * r[j];
        }
    }
}

}  // namespace

void gated_embedding_forward(const std::int64_t* tokens, const float* weight, const float* response, const float* s,
                             const float* scale, float* e, std::int64_t rows, std::int64_t batch, std::int64_t inner,
                             std::int64_t width, int threads) {
    const Tables tables{tokens, response, s, scale, batch, inner, width};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kSerialWork)
    for (std::int64_t row = 0; row < rows; ++row) forward_row(tables, weight, e, row);
}

void gated_embedding_backward(const float* de, const std::int64_t* tokens, const float* response, const float* s,
                              const float* scale, float* d_weight, float* d_response, float* d_s, std::int64_t rows,
                              std::int64_t batch, std::int64_t inner, std::int64_t width, std::int64_t padding, int threads) {
    const Tables tables{tokens, response, s, scale, batch, inner, width};
    const Sums sums{d_weight, d_response, d_s, rows, padding};
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kSerialWork)
    for (std::int64_t first = 0; first < width; first += kColumns) {
        backward_columns(tables, de, sums, first, std::min(kColumns, width - first));
    }
}

}  // namespace stn_fast
