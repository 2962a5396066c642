// GELU, element by element. Every thread takes 128 bits; the speed is that of memory.
#include "core/dispatch.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kSlope = 1.59576912f;  // 2·√(2/π)
constexpr float kCubic = 0.044715f;

// With u the argument of tanh, 0.5·(1 + tanh u) = 1/(1 + e^(-2u)): one exponential, and nothing cancels for negative u.
// For bf16 results the fast exponential and division serve: their relative error is below 2^-16 while |2u| < 87, and a
// bf16 has 8 bits; beyond, the result is x, or below 1e-35 and perhaps 0.
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

template <typename X>
__global__ void __launch_bounds__(kThreads) gelu_forward_kernel(X* out, const X* x, int64_t n) {
  after_previous_kernel();
  for_elements<kWidth<X>>(thread_index(), n, true, [=](int64_t i, auto count) {
    float values[count];
    load_elements(values, x + i);
    for (float& value : values) value = gelu<X>(value);
    store_elements(out + i, values);
  });
}

template <typename X>
__global__ void __launch_bounds__(kThreads) gelu_backward_kernel(X* dx, const X* x, int64_t n) {
  after_previous_kernel();
  for_elements<kWidth<X>>(thread_index(), n, true, [=](int64_t i, auto count) {
    float inputs[count], gradients[count];
    load_elements(inputs, x + i);
    load_elements(gradients, dx + i);
    for (int k = 0; k < count; k++) gradients[k] *= gelu_grad<X>(inputs[k]);
    store_elements(dx + i, gradients);
  });
}

// Launches kernel_of(X{}) over all elements of x.
template <typename F>
void launch_elements(Tensor out, Tensor x, cudaStream_t stream, F kernel_of) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    const int64_t n = x.numel();
    launch(kernel_of(zero), blocks_for(n, kThreads * kWidth<X>), kThreads, 0, stream, out.as<X>(), x.as<X>(), n);
  });
}

}  // namespace

void CudaOps::gelu_forward(Tensor out, Tensor x) {
  launch_elements(out, x, stream_, [](auto zero) { return gelu_forward_kernel<decltype(zero)>; });
}

void CudaOps::gelu_backward(Tensor dx, Tensor x) {
  launch_elements(dx, x, stream_, [](auto zero) { return gelu_backward_kernel<decltype(zero)>; });
}

}  // namespace llmc::cuda
