// AdamW: one pass over each element's data; an element is independent of all others.
//
// The slices travel as a table in the kernel's parameters, so that all tensors of a unit are one launch. Every block works
// on one slice. A thread takes four elements: m, v and master are read and written by 128-bit accesses of consecutive
// addresses (bf16 parameters and gradients, 4 of the 28 bytes of an element, by 64-bit ones).
#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "core/random.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int W = kWidth<float>;
constexpr int kMaxSlices = 48;  // the parameters of a kernel may take 4 KB, on every driver

struct Slice {
  void* param;       // X
  const void* grad;  // G
  float* m;
  float* v;
  float* master;  // or null
  int64_t n;
  float weight_decay;
  uint32_t seed, layer, first;  // of the stochastic rounding (ops.h)
  unsigned first_block;
  bool aligned;
};

struct Table {
  Slice slices[kMaxSlices];
  int count;
};

struct Step {
  float lr, beta1, beta2, eps;
  float correction1, correction2;  // 1/(1 - βᵗ)
};
static_assert(sizeof(Table) + sizeof(Step) + sizeof(float*) <= 4096);

// The slice of this block.
__device__ const Slice& find(const Table& table) {
  int i = 0;
  while (i + 1 < table.count && blockIdx.x >= table.slices[i + 1].first_block) i++;
  return table.slices[i];
}

// The elements of this thread in the slice.
__device__ Span<W> span_of(const Slice& slice) {
  return {int64_t(blockIdx.x - slice.first_block) * kThreads + threadIdx.x, slice.n, slice.aligned};
}

// param = w, rounded stochastically to bf16.
__device__ void store_rounded(float* param, const float (&w)[W], const Span<W>& span, const Slice&) {
  span.store(param, w);
}
__device__ void store_rounded(bf16* param, const float (&w)[W], const Span<W>& span, const Slice& slice) {
  float rounded[W];
  for (int i = 0; i < W; i++) {
    const uint32_t index = slice.first + uint32_t(span.begin()) + uint32_t(i);
    const uint32_t noise = noise_2d(index % 512, index / 512 * 512 + slice.layer, slice.seed);
    rounded[i] = to_float(stochastic_round(w[i], noise));
  }
  span.store(param, rounded);
}

template <typename X, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Table table, const Step step, const float* grad_scale) {
  const Slice& slice = find(table);
  const Span<W> span = span_of(slice);
  X* param = static_cast<X*>(slice.param);
  float g[W], m[W], v[W], w[W];
  span.load(g, static_cast<const G*>(slice.grad));
  span.load(m, slice.m);
  span.load(v, slice.v);
  if (slice.master) {
    span.load(w, slice.master);
  } else {
    span.load(w, param);
  }
  const float scale = *grad_scale;
  for (int i = 0; i < W; i++) {
    const float gradient = scale * g[i];
    m[i] = fmaf(step.beta1, m[i], fmaf(-step.beta1, gradient, gradient));
    const float square = gradient * gradient;
    v[i] = fmaf(step.beta2, v[i], fmaf(-step.beta2, square, square));
    const float direction = m[i] * step.correction1 / (sqrtf(v[i] * step.correction2) + step.eps);
    w[i] -= step.lr * (direction + slice.weight_decay * w[i]);
  }
  span.store(slice.m, m);
  span.store(slice.v, v);
  if (slice.master) span.store(slice.master, w);
  store_rounded(param, w, span, slice);
}

template <typename X>
__global__ void __launch_bounds__(kThreads) round_parameters_kernel(const __grid_constant__ Table table) {
  const Slice& slice = find(table);
  const Span<W> span = span_of(slice);
  float w[W];
  span.load(w, slice.master);
  store_rounded(static_cast<X*>(slice.param), w, span, slice);
}

template <typename X, typename G>
bool all_aligned(const AdamWSlice& slice) {  // absent tensors are null pointers, which are aligned
  return is_aligned<W>(slice.param.as<X>()) && is_aligned<W>(slice.grad.as<G>()) && is_aligned<W>(slice.m.as<float>()) &&
         is_aligned<W>(slice.v.as<float>()) && is_aligned<W>(slice.master.as<float>());
}

// Calls launch_blocks(table, blocks) for the slices, as many at a time as a table can hold.
template <typename X, typename G, typename F>
void for_each_table(const AdamWSlice* slices, int64_t count, F launch_blocks) {
  for (int64_t start = 0; start < count; start += kMaxSlices) {
    Table table = {};
    table.count = int(std::min(count - start, int64_t(kMaxSlices)));
    unsigned blocks = 0;
    for (int i = 0; i < table.count; i++) {
      const AdamWSlice& slice = slices[start + i];
      table.slices[i] = {slice.param.data,
                         slice.grad.data,
                         slice.m.as<float>(),
                         slice.v.as<float>(),
                         slice.master.as<float>(),
                         slice.param.numel(),
                         slice.weight_decay,
                         slice.seed,
                         uint32_t(slice.layer),
                         uint32_t(slice.first),
                         blocks,
                         all_aligned<X, G>(slice)};
      blocks += blocks_for(slice.param.numel(), kThreads * W);
    }
    launch_blocks(table, blocks);
  }
}

}  // namespace

void CudaOps::adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) {
  if (count == 0) return;
  const Step constants = {step.lr,
                          step.beta1,
                          step.beta2,
                          step.eps,
                          float(1 / (1 - std::pow(double(step.beta1), double(step.t)))),
                          float(1 / (1 - std::pow(double(step.beta2), double(step.t))))};
  dispatch(slices->param.dtype, slices->grad.dtype, [&](auto x, auto g) {
    using X = decltype(x);
    using G = decltype(g);
    for_each_table<X, G>(slices, count, [&](const Table& table, unsigned blocks) {
      launch(adamw_kernel<X, G>, blocks, kThreads, 0, stream_, table, constants, step.grad_scale.as<float>());
    });
  });
}

void CudaOps::round_parameters(const AdamWSlice* slices, int64_t count) {
  if (count == 0) return;
  dispatch(slices->param.dtype, [&](auto x) {
    using X = decltype(x);
    for_each_table<X, X>(slices, count, [&](const Table& table, unsigned blocks) {
      launch(round_parameters_kernel<X>, blocks, kThreads, 0, stream_, table);
    });
  });
}

}  // namespace llmc::cuda
