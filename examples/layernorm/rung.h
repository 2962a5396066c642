// What the rungs share: launches, the sum over a warp, names.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

// The function that a rung is called by: from Python through ctypes, from torch_binding.h, by the name it has in C.
#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr float kEps = 1e-5f;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Σ over the 32 lanes of a warp, which must all call. Every lane gets the result: in five steps each lane adds what the
// lane at distance 16, 8, 4, 2, 1 has. No shared memory, no barrier.
__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Blocks that cover n items, per_block each.
inline unsigned blocks_for(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}
