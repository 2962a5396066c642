// From fp32 to FP8, and the largest value of what is converted.
#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "cuda/reduce.cuh"

namespace llmc::cuda {

struct E4M3 {
  static constexpr __nv_fp8_interpretation_t kind = __NV_E4M3;
};
struct E5M2 {
  static constexpr __nv_fp8_interpretation_t kind = __NV_E5M2;
};

// Two values in 16 bits, the first in the lower ones. The instruction makes the largest number of an infinity, which
// nobody would see any more.
template <typename Format>
__device__ uint32_t quantized(float a, float b, float scale) {
  a = is_finite(a) ? a * scale : NAN;
  b = is_finite(b) ? b * scale : NAN;
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, Format::kind);
}

// Eight values in 64 bits.
template <typename Format>
__device__ uint2 quantized(const float (&x)[8], float scale) {
  return make_uint2(quantized<Format>(x[0], x[1], scale) | quantized<Format>(x[2], x[3], scale) << 16,
                    quantized<Format>(x[4], x[5], scale) | quantized<Format>(x[6], x[7], scale) << 16);
}

// The bits of numbers that are not negative are ordered as they are, infinity and NaN above all: their maximum does not
// depend on the order of the blocks.
__device__ inline uint32_t magnitude(float x) { return float_bits(fabsf(x)); }

// *amax = max(*amax, x of all threads of the block). All must call, once in a kernel.
template <int kThreads>
__device__ void raise_amax(uint32_t* amax, uint32_t x) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ uint32_t warp_max[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kFullMask, x, offset));
  if (threadIdx.x % kWarp == 0) warp_max[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; w++) x = max(x, warp_max[w]);
  atomicMax(amax, x);
}

}  // namespace llmc::cuda
