// GELU, element by element. Every thread takes 128 bits; the speed is that of memory.
#include "core/dispatch.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;

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
