// GELU in its tanh form (Hendrycks and Gimpel 2016), and its derivative.
//
// With u the argument of tanh, 0.5·(1 + tanh u) = 1/(1 + e^(-2u)): one exponential, and nothing cancels for negative u.
// X says how exact they are. For results in bf16, and in FP8, the fast exponential and division serve: their relative error
// is below 2^-16 while |2u| < 87, and a bf16 has 8 bits; beyond, the result is x, or below 1e-35 and perhaps 0.
#pragma once

#include <cuda_runtime.h>

namespace llmc::cuda {

constexpr float kSlope = 1.59576912f;  // 2·√(2/π)
constexpr float kCubic = 0.044715f;

template <typename X>
__device__ float exponential(float x) {
  if constexpr (sizeof(X) == 2) {
    return __expf(x);
  } else {
    return expf(x);
  }
}
template <typename X>
__device__ float divide(float a, float b) {
  if constexpr (sizeof(X) == 2) {
    return __fdividef(a, b);
  } else {
    return a / b;
  }
}

template <typename X>
__device__ float gelu(float x) {
  const float u2 = kSlope * x * fmaf(kCubic, x * x, 1.0f);
  return divide<X>(x, 1.0f + exponential<X>(-u2));
}

// s + x·s·(1 - s)·(2u)' with s = 1/(1 + e^(-2u)). Beyond |x| = 10 it is 0 or 1 to within 1e-35; the clamp keeps every
// intermediate value finite, and NaN stays NaN.
template <typename X>
__device__ float gelu_grad(float x) {
  x = x > 10.0f ? 10.0f : x;
  x = x < -10.0f ? -10.0f : x;
  const float square = x * x;
  const float u2 = kSlope * x * fmaf(kCubic, square, 1.0f);
  const float du2 = kSlope * fmaf(3.0f * kCubic, square, 1.0f);
  const float e = exponential<X>(-u2);
  const float s = divide<X>(1.0f, 1.0f + e);
  return s * fmaf(x * du2, e * s, 1.0f);
}

}  // namespace llmc::cuda
