// AdamW: one pass over each element's data, all slices in one parallel region. An element is independent of all others.
#include <cmath>
#include <cstdint>

#include "core/random.h"
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/math.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kChunk = 2048;            // elements of a work item
constexpr int64_t kParallelWork = 1 << 13;  // elements below which threads do not pay

struct Step {
  float lr, beta1, beta2, eps;
  float correction1, correction2;  // 1/(1 - βᵗ)
  float grad_scale;
};

LLMC_INLINE void store_rounded(float* p, float x, uint32_t, uint32_t, uint32_t) { *p = x; }
LLMC_INLINE void store_rounded(bf16* p, float x, uint32_t index, uint32_t layer, uint32_t seed) {
  *p = stochastic_round(x, noise_2d(index % 512, index / 512 * 512 + layer, seed));
}

// Elements [begin, end) of the slice. Whether what is written to param is finite.
template <bool kMaster, typename X, typename G>
bool update(const AdamWSlice& slice, int64_t begin, int64_t end, const Step step) {
  X* param = slice.param.as<X>();
  const G* grad = slice.grad.as<G>();
  float* m = slice.m.as<float>();
  float* v = slice.v.as<float>();
  float* master = slice.master.as<float>();
  const float weight_decay = slice.weight_decay;
  const uint32_t first = uint32_t(slice.first), layer = uint32_t(slice.layer), seed = slice.seed;
  uint32_t largest = 0;  // bits of the largest |param|: infinity is above all numbers, NaN above infinity
#pragma omp simd reduction(max : largest)
  for (int64_t i = begin; i < end; i++) {
    const float g = step.grad_scale * to_float(grad[i]);
    const float mean = multiply_add(step.beta1, m[i], multiply_add(-step.beta1, g, g));
    const float square = multiply_add(step.beta2, v[i], multiply_add(-step.beta2, g * g, g * g));
    m[i] = mean;
    v[i] = square;
    const float direction = mean * step.correction1 / (std::sqrt(square * step.correction2) + step.eps);
    const float old = kMaster ? master[i] : to_float(param[i]);
    const float w = old - step.lr * (direction + weight_decay * old);
    if (kMaster) master[i] = w;
    store_rounded(&param[i], w, first + uint32_t(i), layer, seed);
    const uint32_t magnitude = float_bits(to_float(param[i])) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return is_finite(bits_float(largest));
}

// Elements [begin, end) of the slice: param = master.
template <typename X>
void round(const AdamWSlice& slice, int64_t begin, int64_t end) {
  X* param = slice.param.as<X>();
  const float* master = slice.master.as<float>();
  const uint32_t first = uint32_t(slice.first), layer = uint32_t(slice.layer), seed = slice.seed;
#pragma omp simd
  for (int64_t i = begin; i < end; i++) store_rounded(&param[i], master[i], first + uint32_t(i), layer, seed);
}

// Calls work(slice, begin, end) for chunks of elements of all slices, in parallel.
template <typename F>
void for_each_chunk(const AdamWSlice* slices, int64_t count, F work) {
  int64_t elements = 0;
  for (int64_t s = 0; s < count; s++) elements += slices[s].param.numel();
#pragma omp parallel if (elements >= kParallelWork)
  for (int64_t s = 0; s < count; s++) {
    const int64_t n = slices[s].param.numel();
#pragma omp for schedule(static) nowait
    for (int64_t begin = 0; begin < n; begin += kChunk) work(slices[s], begin, begin + kChunk < n ? begin + kChunk : n);
  }
}

}  // namespace

void CpuOps::adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) {
  for (int64_t s = 0; s < count; s++) {
    // What dispatch would throw for, but outside the parallel region.
    dispatch(slices[s].param.dtype, slices[s].grad.dtype, [](auto, auto) {});
  }
  const float grad_scale = *step.grad_scale.as<float>();
  if (std::isnan(grad_scale)) return;
  const Step constants = {step.lr,
                          step.beta1,
                          step.beta2,
                          step.eps,
                          float(1 / (1 - std::pow(double(step.beta1), double(step.t)))),
                          float(1 / (1 - std::pow(double(step.beta2), double(step.t)))),
                          grad_scale};
  float* non_finite = step.non_finite.as<float>();
  for_each_chunk(slices, count, [&](const AdamWSlice& slice, int64_t begin, int64_t end) {
    dispatch(slice.param.dtype, slice.grad.dtype, [&](auto x, auto g) {
      using X = decltype(x);
      using G = decltype(g);
      const bool finite = slice.master ? update<true, X, G>(slice, begin, end, constants)
                                       : update<false, X, G>(slice, begin, end, constants);
      if (!finite) {
#pragma omp atomic write
        *non_finite = 1;
      }
    });
  });
}

void CpuOps::round_parameters(const AdamWSlice* slices, int64_t count) {
  for (int64_t s = 0; s < count; s++) dispatch(slices[s].param.dtype, [](auto) {});
  for_each_chunk(slices, count, [](const AdamWSlice& slice, int64_t begin, int64_t end) {
    dispatch(slice.param.dtype, [&](auto x) { round<decltype(x)>(slice, begin, end); });
  });
}

}  // namespace llmc::cpu::LLMC_ISA
