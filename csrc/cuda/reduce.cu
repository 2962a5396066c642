// Sums over whole tensors, in two stages: every block adds up some chunks of the tensors into one number, then one
// block adds these numbers. Which chunks a block takes and the order of the additions depend on the sizes alone.
//
// A thread adds the few elements of its share of a chunk in fp32 and the shares in double, so the error does not grow
// with the size of the tensor.
#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 8192;     // elements; a thread's share of bf16 is four 128-bit loads
constexpr int kMaxTensors = 64;  // of one launch

struct Table {
  struct Entry {
    const void* data;
    int64_t n;
    int64_t first_chunk;
    bool is_bf16;
    bool aligned;
  };
  Entry tensors[kMaxTensors];
  int count;
  int64_t chunks;
};

// This thread's share of Σ x or Σ x² over a chunk of n elements.
template <bool kSquares, typename T>
__device__ float add_chunk(const T* x, int n, bool aligned) {
  const auto term = [](float value) { return kSquares ? value * value : value; };
  float sum = 0;
  if (aligned && n == kChunk) {
    constexpr int W = Packed<T>::size, kLoads = kChunk / (kThreads * W);
    Packed<T> packs[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; k++) packs[k] = load128(x + (k * kThreads + threadIdx.x) * W);
#pragma unroll
    for (int k = 0; k < kLoads; k++) {
      for (int i = 0; i < W; i++) sum += term(to_float(packs[k][i]));
    }
  } else {
    for (int i = threadIdx.x; i < n; i += kThreads) sum += term(to_float(x[i]));
  }
  return sum;
}

// The chunks of all tensors are numbered through; a block takes every gridDim.x-th.
template <bool kSquares>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(float* partials, const __grid_constant__ Table table) {
  after_previous_kernel();
  double sum = 0;
  int i = 0;
  for (int64_t chunk = blockIdx.x; chunk < table.chunks; chunk += gridDim.x) {
    while (i + 1 < table.count && chunk >= table.tensors[i + 1].first_chunk) i++;
    const Table::Entry& tensor = table.tensors[i];
    const int64_t begin = (chunk - tensor.first_chunk) * kChunk;
    const int n = int(min(tensor.n - begin, kChunk));
    if (tensor.is_bf16) {
      sum += double(add_chunk<kSquares>(static_cast<const bf16*>(tensor.data) + begin, n, tensor.aligned));
    } else {
      sum += double(add_chunk<kSquares>(static_cast<const float*>(tensor.data) + begin, n, tensor.aligned));
    }
  }
  const float block = block_sum(float(sum));
  if (threadIdx.x == 0) partials[blockIdx.x] = block;
}

// One block of kReduceBlocks threads. sum = or += Σ partials.
__global__ void __launch_bounds__(workspace::kReduceBlocks)
    add_partials_kernel(float* sum, const float* partials, int count, bool accumulate) {
  after_previous_kernel();
  const float total = block_sum(int(threadIdx.x) < count ? partials[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) *sum = accumulate ? *sum + total : total;
}

template <bool kSquares>
void add_tensors(float* sum, const Tensor* tensors, int64_t count, bool accumulate, float* partials,
                 cudaStream_t stream) {
  for (int64_t start = 0; start < count; start += kMaxTensors) {
    Table table = {};
    table.count = int(std::min(count - start, int64_t(kMaxTensors)));
    for (int i = 0; i < table.count; i++) {
      const Tensor& x = tensors[start + i];
      dispatch(x.dtype, [&](auto zero) {
        using T = decltype(zero);
        table.tensors[i] = {x.data, x.numel(), table.chunks, x.dtype == DType::BF16, are_aligned<kWidth<T>>(x.as<T>())};
      });
      table.chunks += divide_up(x.numel(), kChunk);
    }
    const int blocks = int(std::min(table.chunks, workspace::kReduceBlocks));
    launch(partial_sums_kernel<kSquares>, blocks, kThreads, 0, stream, partials, table);
    launch(add_partials_kernel, 1, int(workspace::kReduceBlocks), 0, stream, sum, partials, blocks, accumulate);
    accumulate = true;
  }
}

__global__ void clip_scale_kernel(float* norm, float* scale, const float* sum, const float* loss, float max_norm) {
  after_previous_kernel();
  const float value = sqrtf(*sum);
  *norm = value;
  if (is_finite(value) && is_finite(*loss)) {
    *scale = value > max_norm ? max_norm / value : 1.0f;
  } else {
    *scale = NAN;
  }
}

}  // namespace

void CudaOps::sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) {
  add_tensors<true>(sum.as<float>(), tensors, count, true, static_cast<float*>(scratch(workspace::reduce())), stream_);
}

void CudaOps::clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) {
  launch(clip_scale_kernel, 1, 1, 0, stream_, norm.as<float>(), scale.as<float>(), sum.as<float>(), loss.as<float>(),
         max_norm);
}

void CudaOps::sum(Tensor sum, Tensor x) {
  LLMC_CHECK(x.dtype == DType::F32, "unsupported dtype %s: expected fp32", name_of(x.dtype));
  add_tensors<false>(sum.as<float>(), &x, 1, false, static_cast<float*>(scratch(workspace::reduce())), stream_);
}

}  // namespace llmc::cuda
