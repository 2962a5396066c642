// Conversion and accumulation between fp32 and bf16, element by element.
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 15;  // elements below which threads do not pay

template <typename Out, typename In>
void convert(Out* out, const In* x, int64_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : n >= kParallelWork)
  for (int64_t i = 0; i < n; i++) store(&out[i], to_float(x[i]));
}

template <typename Out, typename In>
void add(Out* out, const In* x, int64_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : n >= kParallelWork)
  for (int64_t i = 0; i < n; i++) store(&out[i], to_float(out[i]) + to_float(x[i]));
}

}  // namespace

void CpuOps::cast(Tensor out, Tensor x) {
  dispatch(out.dtype, x.dtype, [&](auto a, auto b) { convert(out.as<decltype(a)>(), x.as<decltype(b)>(), x.numel()); });
}

void CpuOps::accumulate(Tensor out, Tensor x) {
  dispatch(out.dtype, x.dtype, [&](auto a, auto b) { add(out.as<decltype(a)>(), x.as<decltype(b)>(), x.numel()); });
}

}  // namespace llmc::cpu::LLMC_ISA
