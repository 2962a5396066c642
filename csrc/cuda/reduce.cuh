// Reductions over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once

#include <cuda_runtime.h>

namespace llmc::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

// Over all 32 lanes, which must all call; every lane gets the result.
__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// Over a one-dimensional block of a multiple of 32 threads, which must all call; every thread gets the result.
__device__ inline float block_sum(float x) {
  __shared__ float warp_sums[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (lane == 0) warp_sums[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? warp_sums[lane] : 0.0f);
  __syncthreads();  // before the next call writes warp_sums
  return x;
}

}  // namespace llmc::cuda
