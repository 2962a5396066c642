// Element types. Storage is fp32 or bf16 (chosen at run time), arithmetic is always fp32; indices are int32. Factors of
// products on a GPU may be FP8: E4M3 (4 bits of exponent, 3 of mantissa) or E5M2.
#pragma once

#include <cstdint>
#include <cstring>

// The kernel files of csrc/cpu are compiled once per instruction set. Whatever they include from shared headers must be
// inlined into them: an out-of-line copy compiled for AVX-512 could be the one the linker keeps for everybody.
// CUDA kernels call the same functions on the device.
#define LLMC_HOST_INLINE inline __attribute__((always_inline))
#ifdef __CUDACC__
#define LLMC_INLINE __host__ __device__ LLMC_HOST_INLINE
#else
#define LLMC_INLINE LLMC_HOST_INLINE
#endif

namespace llmc {

enum class DType : uint8_t { F32, BF16, I32, E4M3, E5M2 };

LLMC_INLINE constexpr bool is_fp8(DType dtype) { return dtype == DType::E4M3 || dtype == DType::E5M2; }

LLMC_INLINE constexpr int64_t size_of(DType dtype) { return dtype == DType::BF16 ? 2 : is_fp8(dtype) ? 1 : 4; }

LLMC_INLINE constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"fp32", "bf16", "int32", "e4m3", "e5m2"};
  return kNames[int(dtype)];
}

// The upper half of an IEEE binary32.
struct bf16 {
  uint16_t bits;
};

LLMC_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

LLMC_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

LLMC_INLINE bool is_finite(float x) { return (float_bits(x) & 0x7F800000) != 0x7F800000; }

LLMC_INLINE float to_float(float x) { return x; }
LLMC_INLINE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
LLMC_INLINE void store(float* p, float x) { *p = x; }
LLMC_INLINE void store(bf16* p, float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
}

// *p = x, or *p += x with one rounding.
template <typename X>
LLMC_INLINE void add_to(X* p, float x, bool accumulate) {
  store(p, accumulate ? to_float(*p) + x : x);
}

}  // namespace llmc
