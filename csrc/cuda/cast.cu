// Conversion and accumulation between fp32 and bf16, element by element. Every thread takes 128 bits of the wider type.
#include "core/dispatch.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Out, typename In>
__global__ void __launch_bounds__(kThreads) cast_kernel(Out* out, const In* x, int64_t n, bool aligned) {
  constexpr int W = kWidth<Out, In>;
  const Span<W> span(thread_index(), n, aligned);
  float values[W];
  span.load(values, x);
  span.store(out, values);
}

template <typename Out, typename In>
__global__ void __launch_bounds__(kThreads) accumulate_kernel(Out* out, const In* x, int64_t n, bool aligned) {
  constexpr int W = kWidth<Out, In>;
  const Span<W> span(thread_index(), n, aligned);
  float sums[W], values[W];
  span.load(values, x);
  span.load(sums, out);
  for (int i = 0; i < W; i++) sums[i] += values[i];
  span.store(out, sums);
}

}  // namespace

void CudaOps::cast(Tensor out, Tensor x) {
  dispatch(out.dtype, x.dtype, [&](auto a, auto b) {
    using Out = decltype(a);
    using In = decltype(b);
    constexpr int W = kWidth<Out, In>;
    const int64_t n = x.numel();
    const bool aligned = is_aligned<W>(out.as<Out>()) && is_aligned<W>(x.as<In>());
    launch(cast_kernel<Out, In>, blocks_for(n, kThreads * W), kThreads, 0, stream_, out.as<Out>(), x.as<In>(), n,
           aligned);
  });
}

void CudaOps::accumulate(Tensor out, Tensor x) {
  dispatch(out.dtype, x.dtype, [&](auto a, auto b) {
    using Out = decltype(a);
    using In = decltype(b);
    constexpr int W = kWidth<Out, In>;
    const int64_t n = x.numel();
    const bool aligned = is_aligned<W>(out.as<Out>()) && is_aligned<W>(x.as<In>());
    launch(accumulate_kernel<Out, In>, blocks_for(n, kThreads * W), kThreads, 0, stream_, out.as<Out>(), x.as<In>(), n,
           aligned);
  });
}

}  // namespace llmc::cuda
