#pragma once
#include <cstdint>

namespace stn_fast {

// Draws every example's own hyperparameters, lam = location + softplus(clamp(raw_scale, rho_min, rho_max)) * eps, and maps them
// into their ranges. One row of `table` (n, 6) per hyperparameter: kind (0 no bound, 1 lower, 2 upper, 3 both), low, high,
// integer, per_example, responds_with_value. `unconstrained` and `response` are (batch, n); `values` is (n, batch).
void perturb_forward(const float* location, const float* raw_scale, const float* center, const float* table,
                     float* unconstrained, float* values, float* response, std::int64_t n, std::int64_t batch,
                     std::uint64_t first_example, std::uint64_t seed, std::uint64_t step, float rho_min, float rho_max,
                     int threads);

// d_location[k] = sum over examples of d_lam, d_raw_scale[k] = sum of d_lam * eps * sigmoid(raw_scale) inside [rho_min, rho_max],
// where eps is drawn again. d_values is (n, batch) like `values`, or (batch, n) where it lies in rows. Any of the three incoming gradients may be absent (null), and either result unwanted.
void perturb_backward(const float* d_unconstrained, const float* d_values, bool d_values_in_rows, const float* d_response,
                      const float* location, const float* raw_scale, const float* table, float* d_location,
                      float* d_raw_scale, std::int64_t n, std::int64_t batch, std::uint64_t first_example, std::uint64_t seed,
                      std::uint64_t step, float rho_min, float rho_max, int threads);

}  // namespace stn_fast
