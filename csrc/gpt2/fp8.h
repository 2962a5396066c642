// FP8 products with delayed scaling (Micikevicius et al. 2022): what of a model has a scale, and where.
//
// Each of a block's four products has three tensors with a scale of their own: its input and its weight, in E4M3, and the
// gradient of its result, in E5M2. What computes the input converts it at once if nothing else needs it; weights, gradients
// and the input that attention computes, which stay in bf16, are converted where a product needs them.
//
// At level 2 of Options::fp8 the loss head's input and weight have a scale each, too, in E4M3. The gradient of its result,
// in E5M2, needs none from a history: it is bounded (Ops::fp8_classifier).
#pragma once

#include <algorithm>
#include <cstdint>

#include "gpt2/config.h"
#include "gpt2/layout.h"

namespace llmc {

enum Fp8Role { kFp8Input, kFp8Weight, kFp8Gradient };

constexpr ParameterKind kProducts[] = {kQkvw, kAttprojw, kFcw, kFcprojw};  // by their weights
constexpr int64_t kNumProducts = 4;
inline int64_t product_of(ParameterKind weight) {
  return std::find(kProducts, kProducts + kNumProducts, weight) - kProducts;
}

// Updates whose largest values a scale allows for. Enough that batches that are alike do not saturate each other, and few
// enough that the large gradients of the first steps are soon forgotten.
constexpr int64_t kFp8Window = 16;

// Roles lie one behind the other: inputs, weights, the loss head's input and weight, and in E5M2 gradients.
inline int64_t first_fp8_weight(const GPT2Config& config) { return config.num_layers * kNumProducts; }
inline int64_t first_fp8_head(const GPT2Config& config) { return 2 * first_fp8_weight(config); }
inline int64_t first_fp8_gradient(const GPT2Config& config, int level) {
  return first_fp8_head(config) + (level >= 2 ? 2 : 0);
}
inline int64_t fp8_tensors(const GPT2Config& config, int level) {
  return first_fp8_gradient(config, level) + config.num_layers * kNumProducts;
}

// Of the product with that weight, wte for the loss head's.
inline int64_t fp8_tensor(const GPT2Config& config, int level, Fp8Role role, ParameterKind weight, int64_t layer) {
  if (weight == kWte) return first_fp8_head(config) + role;
  const int64_t first = role == kFp8Gradient ? first_fp8_gradient(config, level) : role * first_fp8_weight(config);
  return first + layer * kNumProducts + product_of(weight);
}

// Where a weight is among those of a block, in values; all together are 12·C².
inline int64_t fp8_weight_offset(const GPT2Config& config, ParameterKind weight) {
  const int64_t begins[] = {0, 3, 4, 8};
  return begins[product_of(weight)] * config.channels * config.channels;
}

// Bytes of all that is converted at a time, for products over N rows. Forward, input and weight; backward, the gradient of
// the result as it lies and transposed, and first the weight, then the input, transposed, unless they are kept so.
inline int64_t fp8_operand_bytes(const GPT2Config& config, int64_t N) {
  const int64_t C = config.channels;
  int64_t bytes = 0;
  const int64_t shapes[][2] = {{3 * C, C}, {C, C}, {4 * C, C}, {C, 4 * C}};  // of the weights
  for (const auto& [OC, IC] : shapes) {
    bytes = std::max({bytes, N * IC + OC * IC, 2 * N * OC + std::max(OC * IC, N * IC)});
  }
  return bytes;
}

// In the loss head, over chunks of so many rows: weight and input as they lie and transposed, and the logits' gradient.
inline int64_t fp8_head_bytes(const GPT2Config& config, int64_t rows) {
  return 2 * (config.padded_vocab_size + rows) * config.channels + rows * config.padded_vocab_size;
}

}  // namespace llmc
