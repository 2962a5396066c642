// The fp32 product of two packed matrices.
//
// Panels of 16 rows of op(A) and 6 columns of op(B) meet in a block of 16 x 6 sums, which are 12 vectors of 8 floats:
// they stay in the 16 vector registers of AVX while k runs. Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008, with one level of blocking: k is cut so that the panels stay in the L2 cache.
// Compiled without contraction to fused multiply-adds, both clones compute the same bits.
#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "cublaslt.h"
#include "cudasim/ptx.h"
#include "fp8.h"

namespace cudasim::cublaslt {
namespace {

constexpr int64_t kBlock = 384;

typedef float Vector __attribute__((vector_size(32)));
typedef Vector VectorInMemory __attribute__((aligned(4), may_alias));  // anywhere in an array of floats
static_assert(kPanelA * sizeof(float) == 2 * sizeof(Vector), "two vectors high");

float load(const float* p) { return *p; }
float load(const uint16_t* p) { return float_from_bf16(*p); }
struct E4m3 {
  uint8_t bits;
};
struct E5m2 {
  uint8_t bits;
};
float load(const E4m3* p) { return float_from_e4m3(p->bits); }
float load(const E5m2* p) { return float_from_e5m2(p->bits); }

float round_to_tf32(float x) {
  const uint32_t bits = to_tf32(x);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename Element>
std::vector<float> pack_elements(const View& x, int64_t rows, int64_t k, int64_t height, bool tf32) {
  const auto* data = static_cast<const Element*>(x.data);
  const int64_t panels = (rows + height - 1) / height;
  std::vector<float> packed(panels * height * k);
  for (int64_t panel = 0; panel < panels; panel++) {
    const int64_t first = panel * height, count = std::min(height, rows - first);
    for (int64_t p = 0; p < k; p++)
      for (int64_t i = 0; i < count; i++)
        packed[(panel * k + p) * height + i] = load(data + (first + i) * x.row_stride + p * x.col_stride);
  }
  if (tf32)
    for (float& value : packed) value = round_to_tf32(value);
  return packed;
}

}  // namespace

// sum (16,6), column-major with leading dimension ld, += a (16,k)·b (k,6).
__attribute__((target_clones("avx2", "default"))) void add_product_of_panels(const float* a, const float* b, int64_t k,
                                                                             float* sum, int64_t ld) {
  // The loops over columns are unrolled so that the sums are registers.
  Vector upper[kPanelB] = {}, lower[kPanelB] = {};
  for (int64_t p = 0; p < k; p++, a += kPanelA, b += kPanelB) {
    const VectorInMemory* column = reinterpret_cast<const VectorInMemory*>(a);
    const Vector column_upper = column[0], column_lower = column[1];
#pragma GCC unroll 6
    for (int64_t j = 0; j < kPanelB; j++) {
      upper[j] += column_upper * b[j];
      lower[j] += column_lower * b[j];
    }
  }
#pragma GCC unroll 6
  for (int64_t j = 0; j < kPanelB; j++) {
    VectorInMemory* column = reinterpret_cast<VectorInMemory*>(sum + j * ld);
    column[0] += upper[j];
    column[1] += lower[j];
  }
}

std::vector<float> pack(const View& x, int64_t rows, int64_t k, int64_t height, bool tf32) {
  switch (x.type) {
    case CUDA_R_32F:
      return pack_elements<float>(x, rows, k, height, tf32);
    case CUDA_R_8F_E4M3:
      return pack_elements<E4m3>(x, rows, k, height, tf32);
    case CUDA_R_8F_E5M2:
      return pack_elements<E5m2>(x, rows, k, height, tf32);
    default:
      return pack_elements<uint16_t>(x, rows, k, height, tf32);
  }
}

std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b, int64_t m, int64_t n, int64_t k,
                            int64_t begin, int64_t end) {
  const int64_t a_panels = (m + kPanelA - 1) / kPanelA, b_panels = (n + kPanelB - 1) / kPanelB;
  const int64_t ld = a_panels * kPanelA;
  std::vector<float> sum(ld * b_panels * kPanelB);
  for (int64_t first = begin; first < end; first += kBlock)
    for (int64_t j = 0; j < b_panels; j++)
      for (int64_t i = 0; i < a_panels; i++)
        add_product_of_panels(&a[(i * k + first) * kPanelA], &b[(j * k + first) * kPanelB],
                              std::min(kBlock, end - first), &sum[j * kPanelB * ld + i * kPanelA], ld);
  return sum;
}

}  // namespace cudasim::cublaslt
