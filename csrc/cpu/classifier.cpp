// Loss head: softmax, cross-entropy and its gradient, one row per work item.
//
// A row is read from memory once: the maximum and the sum of exponentials are updated block by block (the block stays in
// the L1 cache between the two), and the second pass, which writes the gradient, finds the row in the L2 cache (200 KB for
// GPT-2's vocabulary in fp32). Each row is computed by one thread in a fixed order.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/math.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // elements

template <typename X>
void classify_row(X* logits, float* loss, int64_t target, int64_t V, int64_t Vp, float dloss, bool write_dlogits) {
  float max = -FLT_MAX, sum = 0;  // not -inf: -inf - -inf would be NaN
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const X* x = logits + begin;
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    const float previous = max;
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; ++i) max = to_float(x[i]) > max ? to_float(x[i]) : max;
    if (max > previous) sum *= probability_exp(previous - max);
    float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t i = 0; i < n; ++i) block_sum += probability_exp(to_float(x[i]) - max);
    sum += block_sum;
  }

  const float target_logit = to_float(logits[target]);
  *loss += (max - target_logit) + std::log(sum);
  if (!write_dlogits) return;

  const float scale = dloss / sum;
#pragma omp simd
  for (int64_t i = 0; i < V; ++i) store(logits + i, probability_exp(to_float(logits[i]) - max) * scale);
  store(logits + target, (probability_exp(target_logit - max) / sum - 1.0f) * dloss);
  for (int64_t i = V; i < Vp; ++i) store(logits + i, 0.0f);
}

}  // namespace

void CpuOps::fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                              bool write_dlogits) {
  dispatch(logits.dtype, [&](auto zero) {
    using X = decltype(zero);
    X* rows = logits.as<X>();
    float* loss = losses.as<float>();
    const int32_t* target = targets.as<int32_t>();
    const int64_t count = logits.rows(), Vp = logits.last();
#pragma omp parallel for schedule(static) if (count * Vp > 16384)
    for (int64_t row = 0; row < count; ++row) {
      classify_row(rows + row * Vp, loss + row, target[row], vocab_size, Vp, dloss, write_dlogits);
    }
  });
}

}  // namespace llmc::cpu::LLMC_ISA
