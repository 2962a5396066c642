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

}  // namespace

void multiply(const SmallProduct& p) { tiles<false>(p); }
void multiply_transposed(const SmallProduct& p) { tiles<true>(p); }

}  // namespace llmc::cpu::LLMC_ISA
