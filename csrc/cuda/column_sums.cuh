// The second half of a sum over the rows of a matrix. The rows are cut into groups (workspace::groups); a first kernel
// leaves the sums of each group in scratch memory, this one adds them in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace llmc::cuda {

constexpr int kSumColumns = 32;  // of a block
constexpr int kSumLanes = 32;    // threads that share a column: lane l adds the groups l, l + kSumLanes, ...

// out[c] += Σ_group partials[group·stride + c] for c < columns. A thread takes four columns by 128-bit loads; the eight
// threads of a lane take a whole cache line.
template <typename G>
__global__ void __launch_bounds__(kSumColumns / 4 * kSumLanes)
    add_groups_kernel(G* out, const float* partials, int groups, int64_t stride, int64_t columns) {
  __shared__ Packed<float> sums[kSumLanes][kSumColumns / 4];
  const int quad = threadIdx.x % (kSumColumns / 4), lane = threadIdx.x / (kSumColumns / 4);
  const int64_t first = int64_t(blockIdx.x) * kSumColumns;
  Packed<float> sum = Packed<float>::zeros();
  if (first + quad * 4 < columns) {
#pragma unroll 4
    for (int group = lane; group < groups; group += kSumLanes) {
      const Packed<float> x = load128_once(partials + group * stride + first + quad * 4);
      for (int i = 0; i < 4; i++) sum[i] += x[i];
    }
  }
  store128(sums[lane][quad].values, sum);
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kSumColumns || first + column >= columns) return;
  float total = 0;
  for (int l = 0; l < kSumLanes; l++) total += sums[l][column / 4][column % 4];
  out[first + column] = from_float<G>(to_float(out[first + column]) + total);
}

// columns and stride are multiples of 4, partials is aligned to 16 bytes.
template <typename G>
void add_groups(G* out, const float* partials, int64_t groups, int64_t stride, int64_t columns, cudaStream_t stream) {
  launch(add_groups_kernel<G>, blocks_for(columns, kSumColumns), kSumColumns / 4 * kSumLanes, 0, stream, out, partials,
         int(groups), stride, columns);
}

}  // namespace llmc::cuda
