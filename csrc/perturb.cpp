#include "perturb.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "random.h"

namespace stn_fast {
namespace {

constexpr int kGroup = 4;              // hyperparameters that share a Philox counter
constexpr int kExamples = 4 * kLanes;  // handled at once
constexpr std::int64_t kChunk = 256;   // examples; sums are made per chunk and then in order, whatever the threads
constexpr std::int64_t kSerial = 512;  // examples below which one thread is faster

enum class Kind { none, lower, upper, both };

struct Row {
    Kind kind;
    float low, high;
    bool integer, per_example, responds_with_value;

    Row(const float* table, std::int64_t k)
        : kind(static_cast<Kind>(static_cast<int>(table[6 * k]))),
          low(table[6 * k + 1]),
          high(table[6 * k + 2]),
          integer(table[6 * k + 3] != 0.0f),
          per_example(table[6 * k + 4] != 0.0f),
          responds_with_value(table[6 * k + 5] != 0.0f) {}
};

struct Task {
    const float* location;
    const float* scale;
    const float* table;
    std::int64_t n, batch;
    std::uint32_t first_example;
    Generator generator;
};

struct Forward {
    const float* center;
    float *values, *response, *noise;
};

struct Backward {
    const float* d_values;
    bool d_values_in_rows;
    const float *d_response, *location, *scale, *table, *noise;
    std::int64_t n, batch;
    double* sums;  // (chunks, n, 2): of d_lam and of d_lam * eps
};

using Tile = float[kGroup][kExamples];  // one row per hyperparameter of a group, one column per example

STN_FAST_INLINE void draw(const Generator& g, std::int64_t group, std::uint32_t example, std::uint32_t stride, Tile& eps) {
    WordTile words;
    for (int start = 0; start < kExamples; start += kLanes) {
        draw_tile(g, static_cast<std::uint32_t>(group), 0, example + stride * static_cast<std::uint32_t>(start), stride, words);
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
            normals_of(words[0][lane], words[1][lane], eps[0][start + lane], eps[1][start + lane]);
            normals_of(words[2][lane], words[3][lane], eps[2][start + lane], eps[3][start + lane]);
        }
    }
}

// The kind is the same for all lanes, so it is chosen outside of the loops over them.
STN_FAST_INLINE void constrain(const Row& row, const float* STN_FAST_RESTRICT lam, float* STN_FAST_RESTRICT value) {
    switch (row.kind) {
        case Kind::lower:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) value[lane] = row.low + softplus(lam[lane]);
            break;
        case Kind::upper:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) value[lane] = row.high - softplus(-lam[lane]);
            break;
        case Kind::both:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) value[lane] = row.low + (row.high - row.low) * sigmoid(lam[lane]);
            break;
        default:
            std::copy_n(lam, kExamples, value);
    }
    if (row.integer) {
        for (int lane = 0; lane < kExamples; ++lane) value[lane] = std::floor(value[lane]);
    }
}

STN_FAST_INLINE void constrain_derivative(const Row& row, const float* STN_FAST_RESTRICT lam, float* STN_FAST_RESTRICT slope) {
    if (row.integer) {
        std::fill_n(slope, kExamples, 0.0f);
        return;
    }
    switch (row.kind) {
        case Kind::lower:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) slope[lane] = sigmoid(lam[lane]);
            break;
        case Kind::upper:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) slope[lane] = sigmoid(-lam[lane]);
            break;
        case Kind::both:
#pragma omp simd
            for (int lane = 0; lane < kExamples; ++lane) slope[lane] = (row.high - row.low) * sigmoid_derivative(lam[lane]);
            break;
        default:
            std::fill_n(slope, kExamples, 1.0f);
    }
}

// Between a tile and up to 64 rows of a (batch, n) matrix, in which a group is 4 neighbouring columns or fewer.
STN_FAST_INLINE void store_rows(const Tile& tile, float* STN_FAST_RESTRICT matrix, std::int64_t n, int members, int count) {
    if (members == kGroup) {
        for (int lane = 0; lane < count; ++lane) {
            for (int j = 0; j < kGroup; ++j) matrix[lane * n + j] = tile[j][lane];
        }
    } else {
        for (int lane = 0; lane < count; ++lane) {
            for (int j = 0; j < members; ++j) matrix[lane * n + j] = tile[j][lane];
        }
    }
}

STN_FAST_INLINE void load_rows(const float* STN_FAST_RESTRICT matrix, std::int64_t n, int members, int count, Tile& tile) {
    if (matrix == nullptr || count < kExamples || members < kGroup) {
        for (int j = 0; j < kGroup; ++j) std::fill_n(tile[j], kExamples, 0.0f);
    }
    if (matrix == nullptr) return;
    if (members == kGroup) {
        for (int lane = 0; lane < count; ++lane) {
            for (int j = 0; j < kGroup; ++j) tile[j][lane] = matrix[lane * n + j];
        }
    } else {
        for (int lane = 0; lane < count; ++lane) {
            for (int j = 0; j < members; ++j) tile[j][lane] = matrix[lane * n + j];
        }
    }
}

// Calls body(first hyperparameter, members, first example, count, eps of each hyperparameter) for every tile of a chunk.
template <typename Body>
STN_FAST_INLINE void for_each_tile(const Task& task, std::int64_t first, std::int64_t k0, Body body) {
    const int members = static_cast<int>(std::min<std::int64_t>(kGroup, task.n - k0));
    bool any_shared = false, any_own = false;
    for (int j = 0; j < members; ++j) (Row(task.table, k0 + j).per_example ? any_own : any_shared) = true;
    Tile own, shared;
    const float* eps[kGroup];
    for (int j = 0; j < members; ++j) eps[j] = Row(task.table, k0 + j).per_example ? own[j] : shared[j];
    if (any_shared) draw(task.generator, k0 / kGroup, 0, 0, shared);
    const std::int64_t last = std::min(first + kChunk, task.batch);
    for (std::int64_t b = first; b < last; b += kExamples) {
        if (any_own) draw(task.generator, k0 / kGroup, task.first_example + static_cast<std::uint32_t>(b), 1, own);
        body(members, b, static_cast<int>(std::min<std::int64_t>(kExamples, last - b)), eps);
    }
}

STN_FAST_CLONES void forward_chunk(const Task& task, const Forward& out, std::int64_t first) {
    for (std::int64_t k0 = 0; k0 < task.n; k0 += kGroup) {
        for_each_tile(task, first, k0, [&](int members, std::int64_t b, int count,
                                           const float* const* eps) STN_FAST_INLINE_LAMBDA {
            Tile response;
            for (int j = 0; j < members; ++j) {
                const Row row(task.table, k0 + j);
                const float location = task.location[k0 + j], scale = task.scale[k0 + j], center = out.center[k0 + j];
                const std::int64_t at = (k0 + j) * task.batch + b;
                float lam[kExamples], value[kExamples];
                for (int lane = 0; lane < kExamples; ++lane) lam[lane] = location + scale * eps[j][lane];
                constrain(row, lam, value);
                if (row.responds_with_value) {
                    std::copy_n(value, kExamples, response[j]);
                } else {
                    for (int lane = 0; lane < kExamples; ++lane) response[j][lane] = lam[lane] - center;
                }
                std::copy_n(value, count, out.values + at);
                if (out.noise) std::copy_n(eps[j], count, out.noise + at);
            }
            store_rows(response, out.response + b * task.n + k0, task.n, members, count);
        });
    }
}

// Gradients of up to 64 examples, for the members of one group.
STN_FAST_INLINE void backward_tile(const Backward& in, std::int64_t k0, int members, std::int64_t b, int count, Tile& sum,
                                   Tile& sum_eps) {
    Tile d_response, d_values;
    const std::int64_t corner = b * in.n + k0;
    load_rows(in.d_response ? in.d_response + corner : nullptr, in.n, members, count, d_response);
    if (in.d_values_in_rows) load_rows(in.d_values + corner, in.n, members, count, d_values);
    for (int j = 0; j < members; ++j) {
        const Row row(in.table, k0 + j);
        const std::int64_t at = (k0 + j) * in.batch + b;
        float eps[kExamples];  // zero beyond `count`
        std::copy_n(in.noise + at, count, eps);
        std::fill(eps + count, eps + kExamples, 0.0f);
        float* STN_FAST_RESTRICT d = d_response[j];
        const bool through_value = in.d_values || row.responds_with_value;
        if (through_value) {
            float lam[kExamples], slope[kExamples];
            for (int lane = 0; lane < kExamples; ++lane) lam[lane] = in.location[k0 + j] + in.scale[k0 + j] * eps[lane];
            constrain_derivative(row, lam, slope);
            if (row.responds_with_value) {
                for (int lane = 0; lane < kExamples; ++lane) d[lane] *= slope[lane];
            }
            if (in.d_values) {
                float* STN_FAST_RESTRICT d_value = d_values[j];
                if (!in.d_values_in_rows) {
                    std::copy_n(in.d_values + at, count, d_value);
                    std::fill(d_value + count, d_value + kExamples, 0.0f);
                }
                for (int lane = 0; lane < kExamples; ++lane) d[lane] += d_value[lane] * slope[lane];
            }
        }
        for (int lane = 0; lane < kExamples; ++lane) {
            sum[j][lane] += d[lane];
            sum_eps[j][lane] += d[lane] * eps[lane];
        }
    }
}

// Sum of a row of a tile, in double: incoming gradients of both signs cancel.
STN_FAST_INLINE double total(const float* STN_FAST_RESTRICT row) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int lane = 0; lane < kExamples; ++lane) sum += static_cast<double>(row[lane]);
    return sum;
}

STN_FAST_CLONES void backward_chunk(const Backward& in, std::int64_t first) {
    const std::int64_t last = std::min(first + kChunk, in.batch);
    for (std::int64_t k0 = 0; k0 < in.n; k0 += kGroup) {
        const int members = static_cast<int>(std::min<std::int64_t>(kGroup, in.n - k0));
        Tile sum = {}, sum_eps = {};
        for (std::int64_t b = first; b < last; b += kExamples) {
            const int count = static_cast<int>(std::min<std::int64_t>(kExamples, last - b));
            backward_tile(in, k0, members, b, count, sum, sum_eps);
        }
        double* to = in.sums + 2 * ((first / kChunk) * in.n + k0);
        for (int j = 0; j < members; ++j) {
            to[2 * j] = total(sum[j]);
            to[2 * j + 1] = total(sum_eps[j]);
        }
    }
}

std::vector<float> scales(const float* raw_scale, std::int64_t n, float rho_min, float rho_max) {
    std::vector<float> scale(static_cast<std::size_t>(n));
    for (std::int64_t k = 0; k < n; ++k) {
        const double rho = std::min(std::max(raw_scale[k], rho_min), rho_max);
        scale[k] = static_cast<float>(std::max(rho, 0.0) + std::log1p(std::exp(-std::abs(rho))));
    }
    return scale;
}

}  // namespace

void perturb_forward(const float* location, const float* raw_scale, const float* center, const float* table, float* values,
                     float* response, float* noise, std::int64_t n, std::int64_t batch, std::uint64_t first_example,
                     std::uint64_t seed, std::uint64_t step, float rho_min, float rho_max, int threads) {
    const std::vector<float> scale = scales(raw_scale, n, rho_min, rho_max);
    const Task task{location,
                    scale.data(),
                    table,
                    n,
                    batch,
                    static_cast<std::uint32_t>(first_example),
                    Generator(seed, step, 0)};
    const Forward out{center, values, response, noise};
#pragma omp parallel for num_threads(threads) schedule(static) if (batch > kSerial)
    for (std::int64_t first = 0; first < batch; first += kChunk) forward_chunk(task, out, first);
}

void perturb_backward(const float* d_values, bool d_values_in_rows, const float* d_response, const float* location,
                      const float* raw_scale, const float* table, const float* noise, float* d_location, float* d_raw_scale,
                      std::int64_t n, std::int64_t batch, float rho_min, float rho_max, int threads) {
    const std::vector<float> scale = scales(raw_scale, n, rho_min, rho_max);
    const std::int64_t chunks = (batch + kChunk - 1) / kChunk;
    std::vector<double> sums(static_cast<std::size_t>(2 * chunks * n));
    const Backward in{d_values, d_values && d_values_in_rows, d_response, location, scale.data(), table, noise, n, batch,
                      sums.data()};
#pragma omp parallel for num_threads(threads) schedule(static) if (batch > kSerial)
    for (std::int64_t first = 0; first < batch; first += kChunk) backward_chunk(in, first);

    for (std::int64_t k = 0; k < n; ++k) {
        double sum = 0.0, sum_eps = 0.0;
        for (std::int64_t c = 0; c < chunks; ++c) {
            sum += sums[2 * (c * n + k)];
            sum_eps += sums[2 * (c * n + k) + 1];
        }
        const double rho = raw_scale[k];
        const bool inside = raw_scale[k] >= rho_min && raw_scale[k] <= rho_max;
        if (d_location) d_location[k] = static_cast<float>(sum);
        if (d_raw_scale) d_raw_scale[k] = inside ? static_cast<float>(sum_eps / (1.0 + std::exp(-rho))) : 0.0f;
    }
}

}  // namespace stn_fast
