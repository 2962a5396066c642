// GELU, element by element.
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/math.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 14;  // elements below which threads do not pay

template <typename X>
void forward(X* out, const X* x, int64_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : n >= kParallelWork)
  for (int64_t i = 0; i < n; i++) store(&out[i], gelu(to_float(x[i])));
}

template <typename X>
void backward(X* dx, const X* x, int64_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : n >= kParallelWork)
  for (int64_t i = 0; i < n; i++) store(&dx[i], to_float(dx[i]) * gelu_grad(to_float(x[i])));
}

}  // namespace

void CpuOps::gelu_forward(Tensor out, Tensor x) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward(out.as<X>(), x.as<X>(), x.numel());
  });
}

void CpuOps::gelu_backward(Tensor dx, Tensor x) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    backward(dx.as<X>(), x.as<X>(), x.numel());
  });
}

}  // namespace llmc::cpu::LLMC_ISA
