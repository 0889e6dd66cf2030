#pragma once
#include <cstdint>

namespace stn_fast {

// Draws every example's own hyperparameters, lam = location + softplus(clamp(raw_scale, rho_min, rho_max)) * eps, and maps them
// into their ranges. One row of `table` (n, 6) per hyperparameter: kind (0 no bound, 1 lower, 2 upper, 3 both), low, high,
// integer, per_example, responds_with_value. `response` is (batch, n); `values` and `noise` are (n, batch). `noise` receives eps
// for the backward pass, and may be absent (null).
void perturb_forward(const float* location, const float* raw_scale, const float* center, const float* table, float* values,
                     float* response, float* noise, std::int64_t n, std::int64_t batch, std::uint64_t first_example,
                     std::uint64_t seed, std::uint64_t step, float rho_min, float rho_max, int threads);

// d_location[k] = sum over examples of d_lam, d_raw_scale[k] = sum of d_lam * eps * sigmoid(raw_scale) inside [rho_min, rho_max].
// d_values is (n, batch) like `values`, or (batch, n) where it lies in rows. Either of the two incoming gradients may be absent
// (null), and either result unwanted.
void perturb_backward(const float* d_values, bool d_values_in_rows, const float* d_response, const float* location,
                      const float* raw_scale, const float* table, const float* noise, float* d_location, float* d_raw_scale,
                      std::int64_t n, std::int64_t batch, float rho_min, float rho_max, int threads);

}  // namespace stn_fast
