// Sums over whole tensors.
//
// A tensor is cut into chunks of fixed size. Each chunk's sum is formed by one thread, in blocks of fp32 added in
// double; the chunks' sums are added in order. So the result does not depend on the number of threads.
#include <cmath>

#include "core/check.h"
#include "core/integers.h"
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kBlock = 1 << 10;     // elements added in fp32
constexpr int64_t kChunk = 1 << 14;     // elements of a work item
constexpr int64_t kChunksAtOnce = 512;  // of one parallel region: the size of its table of sums

// Σ f(x).
template <typename X, typename F>
LLMC_INLINE double reduce(const X* x, int64_t n, F f) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kChunk * kChunksAtOnce) {
    const int64_t chunks = min((n - start + kChunk - 1) / kChunk, kChunksAtOnce);
    double sums[kChunksAtOnce];
#pragma omp parallel for schedule(static) if (chunks > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t begin = start + chunk * kChunk;
      const int64_t end = min(begin + kChunk, n);
      double chunk_sum = 0;
      for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t block_end = min(i + kBlock, end);
        float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
        for (int64_t j = i; j < block_end; j++) block_sum += f(to_float(x[j]));
        chunk_sum += double(block_sum);
      }
      sums[chunk] = chunk_sum;
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += sums[chunk];
  }
  return total;
}

}  // namespace

void CpuOps::sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) {
  double total = double(*sum.as<float>());
  for (int64_t i = 0; i < count; i++) {
    dispatch(tensors[i].dtype, [&](auto zero) {
      total += reduce(tensors[i].as<decltype(zero)>(), tensors[i].numel(), [](float x) { return x * x; });
    });
  }
  *sum.as<float>() = float(total);
}

void CpuOps::clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) {
  const float value = std::sqrt(*sum.as<float>());
  *norm.as<float>() = value;
  if (is_finite(value) && is_finite(*loss.as<float>())) {
    *scale.as<float>() = value > max_norm ? max_norm / value : 1.0f;
  } else {
    *scale.as<float>() = NAN;
  }
}

void CpuOps::sum(Tensor sum, Tensor x) {
  LLMC_CHECK(x.dtype == DType::F32, "unsupported dtype %s: expected fp32", name_of(x.dtype));
  *sum.as<float>() = float(reduce(x.as<float>(), x.numel(), [](float value) { return value; }));
}

}  // namespace llmc::cpu::LLMC_ISA
