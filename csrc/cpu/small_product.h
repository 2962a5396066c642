// Products of small matrices that are in the cache already, for attention: no packing, the result in registers.
//
// All matrices are fp32 and row-major with a row stride. m is a multiple of kTileRows, n of kTileColumns, k is any; every
// element of the result is one chain of multiply-adds over k in order, so it does not depend on m and n.
#pragma once

#include <cstdint>

namespace llmc::cpu::LLMC_ISA {

// Two vectors of columns, and as many rows as hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileColumns = 32;
#elif defined(__AVX__)
constexpr int kTileRows = 4, kTileColumns = 16;
#else
constexpr int kTileRows = 4, kTileColumns = 8;
#endif

struct SmallProduct {
  int64_t m, n, k;
  const float* a;
  int64_t lda;
  const float* b;  // (k,n)
  int64_t ldb;
  float* c;  // (m,n)
  int64_t ldc;
  bool accumulate;  // c = or += the product
};

void multiply(const SmallProduct& p);             // a·b, with a (m,k)
void multiply_transposed(const SmallProduct& p);  // aᵀ·b, with a (k,m)

}  // namespace llmc::cpu::LLMC_ISA
