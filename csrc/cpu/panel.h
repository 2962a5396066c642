// Copies of parts of matrices as fp32, contiguous in working memory. All matrices are row-major.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace llmc::cpu::LLMC_ISA {

// to (rows,cols) = from (rows,cols), whose rows are ld apart.
template <typename X>
LLMC_INLINE void copy_panel(float* to, const X* from, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, to += cols, from += ld) {
#pragma omp simd
    for (int64_t i = 0; i < cols; ++i) to[i] = to_float(from[i]);
  }
}

typedef float Eight __attribute__((vector_size(32)));

// By reference: without AVX, a function that returns its vectors would change the calling convention.
LLMC_INLINE void load(Eight& x, const float* from) { std::memcpy(&x, from, sizeof x); }
LLMC_INLINE void load(Eight& x, const bf16* from) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = to_float(from[i]);
}

// Perfect shuffles of the first and the last four of 8 rows, three times over, transpose 8x8.
LLMC_INLINE void transpose8(Eight (&x)[8]) {
#pragma GCC unroll 3
  for (int round = 0; round < 3; ++round) {
    Eight y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#if defined(__clang__)
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else
      typedef int32_t Indices __attribute__((vector_size(32)));
      y[2 * i] = __builtin_shuffle(x[i], x[i + 4], Indices{0, 8, 1, 9, 2, 10, 3, 11});
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 4], Indices{4, 12, 5, 13, 6, 14, 7, 15});
#endif
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
}

// to (cols,rows) = scale · fromᵀ, with from (rows,cols), whose rows are ld apart.
template <typename X>
LLMC_INLINE void copy_transposed(float* to, const X* from, int64_t ld, int64_t rows, int64_t cols, float scale = 1) {
  const int64_t whole_rows = rows / 8 * 8, whole_cols = cols / 8 * 8;
  for (int64_t row = 0; row < whole_rows; row += 8) {
    for (int64_t col = 0; col < whole_cols; col += 8) {
      Eight x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        load(x[i], from + (row + i) * ld + col);
        x[i] = x[i] * scale;
      }
      transpose8(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) std::memcpy(to + (col + i) * rows + row, &x[i], sizeof x[i]);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = row < whole_rows ? whole_cols : 0; col < cols; ++col) {
      to[col * rows + row] = scale * to_float(from[row * ld + col]);
    }
  }
}

}  // namespace llmc::cpu::LLMC_ISA
