// Conversion and accumulation between fp32 and bf16, element by element. Every thread takes 128 bits of the wider type.
#include "core/dispatch.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Out, typename In>
__global__ void __launch_bounds__(kThreads) cast_kernel(Out* out, const In* x, int64_t n, bool aligned) {
  after_previous_kernel();
  for_elements<kWidth<Out, In>>(thread_index(), n, aligned, [=](int64_t i, auto count) {
    float values[count];
    load_elements(values, x + i);
    store_elements(out + i, values);
  });
}

template <typename Out, typename In>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Out* out, const In* x, int64_t n, bool aligned) {
  after_previous_kernel();
  for_elements<kWidth<Out, In>>(thread_index(), n, aligned, [=](int64_t i, auto count) {
    float sums[count], values[count];
    load_elements(sums, out + i);
    load_elements(values, x + i);
    for (int k = 0; k < count; k++) sums[k] += values[k];
    store_elements(out + i, sums);
  });
}

// Launches kernel_of(Out{}, In{}) over all elements of out and x.
template <typename F>
void launch_elements(Tensor out, Tensor x, cudaStream_t stream, F kernel_of) {
  dispatch(out.dtype, x.dtype, [&](auto a, auto b) {
    using Out = decltype(a);
    using In = decltype(b);
    constexpr int W = kWidth<Out, In>;
    const int64_t n = x.numel();
    launch(kernel_of(a, b), blocks_for(n, kThreads * W), kThreads, 0, stream, out.as<Out>(), x.as<In>(), n,
           are_aligned<W>(out.as<Out>(), x.as<In>()));
  });
}

}  // namespace

void CudaOps::cast(Tensor out, Tensor x) {
  launch_elements(out, x, stream_, [](auto a, auto b) { return cast_kernel<decltype(a), decltype(b)>; });
}

void CudaOps::accumulate(Tensor out, Tensor x) {
  launch_elements(out, x, stream_, [](auto a, auto b) { return accumulate_kernel<decltype(a), decltype(b)>; });
}

}  // namespace llmc::cuda
