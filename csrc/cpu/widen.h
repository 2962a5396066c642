// bf16 operands as fp32, for BLAS.
#pragma once

#include "core/dtype.h"

namespace llmc::cpu::LLMC_ISA {

// to (rows,cols), contiguous = from, whose rows are ld apart.
LLMC_INLINE void widen(float* to, const bf16* from, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, to += cols, from += ld) {
#pragma omp simd
    for (int64_t i = 0; i < cols; ++i) to[i] = to_float(from[i]);
  }
}

}  // namespace llmc::cpu::LLMC_ISA
