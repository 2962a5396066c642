#include "cpu/small_product.h"

#include <cstring>

#include "core/dtype.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int kLanes = kTileColumns / 2;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// By reference: without AVX, a function that returns its vectors would change the calling convention.
template <typename V>
LLMC_INLINE void load(V& v, const float* p) {
  std::memcpy(&v, p, sizeof v);
}

template <typename V>
LLMC_INLINE void save(float* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// One tile of the result. (CMakeLists.txt lets the compiler contract its expressions to multiply-adds.)
template <bool kTransposed>
LLMC_INLINE void tile(const SmallProduct& p, const float* a, const float* b, float* c) {
  Vector sum[kTileRows][2] = {};
  const int64_t row = kTransposed ? 1 : p.lda, step = kTransposed ? p.lda : 1;
  for (int64_t i = 0; i < p.k; ++i, a += step, b += p.ldb) {
    Vector left, right;
    load(left, b);
    load(right, b + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vector x = a[r * row] - Vector{};
      sum[r][0] = sum[r][0] + x * left;
      sum[r][1] = sum[r][1] + x * right;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kTileRows; ++i) {
    float* out = c + i / 2 * p.ldc + i % 2 * kLanes;
    Vector before = {};
    if (p.accumulate) load(before, out);
    save(out, before + sum[i / 2][i % 2]);
  }
}

template <bool kTransposed>
LLMC_INLINE void tiles(const SmallProduct& p) {
  for (int64_t row = 0; row < p.m; row += kTileRows) {
    const float* a = p.a + (kTransposed ? row : row * p.lda);
    for (int64_t column = 0; column < p.n; column += kTileColumns) {
      tile<kTransposed>(p, a, p.b + column, p.c + row * p.ldc + column);
    }
  }
}

// --- transposition ------------------------------------------------------------------------------------------------------

typedef float Eight __attribute__((vector_size(32)));

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

}  // namespace

void multiply(const SmallProduct& p) { tiles<false>(p); }
void multiply_transposed(const SmallProduct& p) { tiles<true>(p); }

void transpose(float* to, int64_t ld_to, const float* from, int64_t ld_from, int64_t rows, int64_t columns,
               float scale) {
  for (int64_t row = 0; row < rows; row += 8) {
    for (int64_t column = 0; column < columns; column += 8) {
      Eight x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        load(x[i], from + (row + i) * ld_from + column);
        x[i] = x[i] * scale;
      }
      transpose8(x);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) save(to + (column + i) * ld_to + row, x[i]);
    }
  }
}

}  // namespace llmc::cpu::LLMC_ISA
