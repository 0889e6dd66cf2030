#pragma once
#include <cstdint>

namespace stn_fast {

// Rows of embeddings under gates. Row m belongs to word t = tokens[m], which lies within the tables, and to example
// b = (m / inner) % batch; weight and response are (words, width), s (batch, width), scale (words,) or null for ones.
// Results don't depend on `threads`.

// e[m] = scale[t] * (weight[t] + s[b] * response[t])
void gated_embedding_forward(const std::int64_t* tokens, const float* weight, const float* response, const float* s,
                             const float* scale, float* e, std::int64_t rows, std::int64_t batch, std::int64_t inner,
                             std::int64_t width, int threads);

// With g = scale[t] * de[m], added to what is there: d_weight[t] += g and d_response[t] += s[b] * g, but for the word `padding`
// (-1: none), and d_s[b] += response[t] * g. A null output isn't computed.
void gated_embedding_backward(const float* de, const std::int64_t* tokens, const float* response, const float* s,
                              const float* scale, float* d_weight, float* d_response, float* d_s, std::int64_t rows,
                              std::int64_t batch, std::int64_t inner, std::int64_t width, std::int64_t padding, int threads);

}  // namespace stn_fast
