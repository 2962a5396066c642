// AdamW: one pass over each element's data; an element is independent of all others.
//
// The slices travel as a table in the kernel's parameters, so that all tensors are one launch. Every block works on one
// slice. A thread takes four elements: m, v and master are read and written by 128-bit accesses of
// consecutive addresses (bf16 parameters and gradients, 4 of the 28 bytes of an element, by 64-bit ones).
#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "core/random.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int W = kWidth<float>;
constexpr int kMaxSlices = 448;  // of a launch, so that one is enough for up to 37 layers

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
static_assert(sizeof(Table) + sizeof(Step) + 2 * sizeof(float*) <= 32764);  // of every driver that CUDA 13 runs on

// The slice of this block: the last one that begins at it or before it.
__device__ const Slice& find(const Table& table) {
  int first = 0, end = table.count;
  while (end - first > 1) {
    const int middle = (first + end) / 2;
    if (blockIdx.x >= table.slices[middle].first_block) {
      first = middle;
    } else {
      end = middle;
    }
  }
  return table.slices[first];
}

// work(i, count) for the elements of this thread in the slice, as in for_elements.
template <typename F>
__device__ void for_slice_elements(const Slice& slice, F work) {
  const int64_t thread = int64_t(blockIdx.x - slice.first_block) * kThreads + threadIdx.x;
  for_elements<W>(thread, slice.n, slice.aligned, work);
}

// param[i..] = w, rounded stochastically to bf16, as is w itself then.
template <int N>
__device__ void store_rounded(float* param, float (&w)[N], int64_t i, const Slice&) {
  store_elements(param + i, w);
}
template <int N>
__device__ void store_rounded(bf16* param, float (&w)[N], int64_t i, const Slice& slice) {
  for (int k = 0; k < N; k++) {
    const uint32_t index = slice.first + uint32_t(i) + uint32_t(k);
    const uint32_t noise = noise_2d(index % 512, index / 512 * 512 + slice.layer, slice.seed);
    w[k] = to_float(stochastic_round(w[k], noise));
  }
  store_elements(param + i, w);
}

template <typename X, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Table table, const Step step, const float* grad_scale, float* non_finite) {
  after_previous_kernel();
  const Slice& slice = find(table);
  const float scale = *grad_scale;
  if (scale != scale) return;  // NaN
  for_slice_elements(slice, [&](int64_t i, auto count) {
    X* param = static_cast<X*>(slice.param);
    float g[count], m[count], v[count], w[count];
    load_elements(g, static_cast<const G*>(slice.grad) + i);
    load_elements(m, slice.m + i);
    load_elements(v, slice.v + i);
    if (slice.master) {
      load_elements(w, slice.master + i);
    } else {
      load_elements(w, param + i);
    }
    for (int k = 0; k < count; k++) {
      const float gradient = scale * g[k];
      const float square = gradient * gradient;
      m[k] = fmaf(step.beta1, m[k], fmaf(-step.beta1, gradient, gradient));
      v[k] = fmaf(step.beta2, v[k], fmaf(-step.beta2, square, square));
      const float direction = m[k] * step.correction1 / (sqrtf(v[k] * step.correction2) + step.eps);
      w[k] -= step.lr * (direction + slice.weight_decay * w[k]);
    }
    store_elements(slice.m + i, m);
    store_elements(slice.v + i, v);
    if (slice.master) store_elements(slice.master + i, w);
    store_rounded(param, w, i, slice);
    bool finite = true;
    for (int k = 0; k < count; k++) finite = finite && is_finite(w[k]);
    if (!finite) atomicExch(reinterpret_cast<unsigned*>(non_finite), float_bits(1.0f));  // from many threads
  });
}

template <typename X>
__global__ void __launch_bounds__(kThreads) round_parameters_kernel(const __grid_constant__ Table table) {
  after_previous_kernel();
  const Slice& slice = find(table);
  for_slice_elements(slice, [&](int64_t i, auto count) {
    float w[count];
    load_elements(w, slice.master + i);
    store_rounded(static_cast<X*>(slice.param), w, i, slice);
  });
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
                         are_aligned<W>(slice.param.as<X>(), slice.grad.as<G>(), slice.m.as<float>(),
                                        slice.v.as<float>(), slice.master.as<float>())};  // null is aligned
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
      launch(adamw_kernel<X, G>, blocks, kThreads, 0, stream_, table, constants, step.grad_scale.as<float>(),
             step.non_finite.as<float>());
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
