// Loss head: softmax, cross-entropy and its gradient, one row per work item.
//
// A row is read from memory once: the maximum and the sum of exponentials are updated block by block (the block stays in
// the L1 cache between the two), and the second pass, which writes the gradient, finds the row in the L2 cache (200 KB for
// GPT-2's vocabulary in fp32). Each row is computed by one thread in a fixed order.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cpu/cpu_ops.h"
#include "cpu/dispatch.h"
#include "cpu/math.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kLanes = 64;    // independent running maxima: four registers of AVX-512
constexpr int64_t kBlock = 2048;  // elements, a multiple of kLanes

// The largest of n values, ignoring NaN; at least `least`.
template <typename X>
LLMC_INLINE float maximum(const X* x, int64_t n, float least) {
  alignas(64) float lane[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = least;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) {
      const float value = to_float(x[i + j]);
      lane[j] = value > lane[j] ? value : lane[j];
    }
  }
  float result = least;
  for (int64_t j = 0; j < kLanes; ++j) result = lane[j] > result ? lane[j] : result;
  for (; i < n; ++i) result = to_float(x[i]) > result ? to_float(x[i]) : result;
  return result;
}

template <typename X>
void classify_row(X* logits, float* loss, int64_t target, int64_t V, int64_t Vp, float dloss, bool write_dlogits) {
  float max = -FLT_MAX, sum = 0;  // not -inf: -inf - -inf would be NaN
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const X* x = logits + begin;
    const int64_t n = V - begin < kBlock ? V - begin : kBlock;
    const float previous = max;
    max = maximum(x, n, max);
    if (max > previous) sum *= fast_exp(previous - max);
    float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t i = 0; i < n; ++i) block_sum += fast_exp(to_float(x[i]) - max);
    sum += block_sum;
  }

  const float target_logit = to_float(logits[target]);
  *loss += (max - target_logit) + std::log(sum);
  if (!write_dlogits) return;

  const float scale = dloss / sum;
#pragma omp simd
  for (int64_t i = 0; i < V; ++i) store(logits + i, fast_exp(to_float(logits[i]) - max) * scale);
  store(logits + target, (fast_exp(target_logit - max) / sum - 1.0f) * dloss);
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
