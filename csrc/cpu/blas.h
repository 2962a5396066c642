// Single-precision matrix products, from a BLAS library. The only file that knows which one is blas.cpp.
#pragma once

#include <cstdint>

namespace llmc::blas {

// C (m,n) = or += op(A)·op(B), all row-major; op(A) is (m,k), op(B) is (k,n); ld* are row strides.
// Runs on the calling thread alone: callers split the work inside an OpenMP parallel region.
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
          const float* b, int64_t ldb, bool accumulate, float* c, int64_t ldc);

// Whether gemm computes a tile of few rows or columns without packing its operands if they allow it: MKL, not OpenBLAS.
bool has_direct_kernels();

// Name and version of the library in use, for reports.
const char* name();

}  // namespace llmc::blas
