// The second half of a sum over the rows of a matrix. The rows are cut into groups (workspace::groups); a first kernel
// leaves the sums of each group in scratch memory, this one adds them in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/vector.cuh"

namespace llmc::cuda {

constexpr int kSumColumns = 32;  // of a block
constexpr int kSumLanes = 32;    // threads that share a column: lane l adds the groups l, l + kSumLanes, ...

// Where the sums of a group of columns go.
template <typename G>
struct ColumnSums {
  G* first;             // (C)
  G* second = nullptr;  // (C), or absent
};

// first[c] = or += Σ_group partials[group, 0, c], second[c] = or += Σ_group partials[group, 1, c]. Block (x,y) has some columns
// of the y-th output. A thread takes four columns by 128-bit loads; the eight threads of a lane take a whole cache
// line.
template <typename G>
__global__ void __launch_bounds__(kSumColumns / 4 * kSumLanes)
    add_groups_kernel(ColumnSums<G> out, const float* partials, int groups, int64_t C, bool accumulate) {
  after_previous_kernel();
  __shared__ Packed<float> sums[kSumLanes][kSumColumns / 4];
  const int quad = threadIdx.x % (kSumColumns / 4), lane = threadIdx.x / (kSumColumns / 4);
  const int64_t begin = int64_t(blockIdx.x) * kSumColumns, stride = gridDim.y * C;
  Packed<float> sum = Packed<float>::zeros();
  if (begin + quad * 4 < C) {
    const float* p = partials + blockIdx.y * C + begin + quad * 4;
#pragma unroll 8
    for (int group = lane; group < groups; group += kSumLanes) {
      const Packed<float> x = load128_once(p + group * stride);
      for (int i = 0; i < 4; i++) sum[i] += x[i];
    }
  }
  store128(sums[lane][quad].values, sum);
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kSumColumns || begin + column >= C) return;
  float total = 0;
  for (int l = 0; l < kSumLanes; l++) total += sums[l][column / 4][column % 4];
  G* p = (blockIdx.y == 0 ? out.first : out.second) + begin + column;
  *p = from_float<G>(accumulate ? to_float(*p) + total : total);
}

// partials f32 (groups, number of outputs, C), C a multiple of 4.
template <typename G>
void add_groups(const ColumnSums<G>& out, const float* partials, int64_t groups, int64_t C, bool accumulate,
                cudaStream_t stream) {
  launch(add_groups_kernel<G>, dim3(blocks_for(C, kSumColumns), out.second ? 2 : 1), kSumColumns / 4 * kSumLanes, 0,
         stream, out, partials, int(groups), C, accumulate);
}

}  // namespace llmc::cuda
