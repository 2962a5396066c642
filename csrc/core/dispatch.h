// From the run-time dtype of a tensor to the template argument of a kernel.
#pragma once

#include "core/check.h"
#include "core/dtype.h"

namespace llmc {

// Calls f(X{}) with X = float or bf16:
//   dispatch(x.dtype, [&](auto zero) {
//     using X = decltype(zero);
//     kernel(out.as<X>(), x.as<X>(), x.numel());
//   });
template <typename F>
LLMC_HOST_INLINE void dispatch(DType dtype, F&& f) {
  LLMC_CHECK(dtype == DType::F32 || dtype == DType::BF16, "unsupported dtype %s: expected fp32 or bf16",
             name_of(dtype));
  if (dtype == DType::F32) {
    f(float{});
  } else {
    f(bf16{});
  }
}

// Calls f(X{}, Y{}) for two independent dtypes, as for activations X and gradients G.
template <typename F>
LLMC_HOST_INLINE void dispatch(DType first, DType second, F&& f) {
  dispatch(first, [&](auto x) { dispatch(second, [&](auto y) { f(x, y); }); });
}

}  // namespace llmc
