// Elementary functions that g++ and clang vectorise inside `#pragma omp simd` loops on every instruction set.
// The errors were measured against double on every 997th of all floats, for each instruction set.
#pragma once

#include "core/dtype.h"

namespace llmc::cpu::LLMC_ISA {

// a·b + c, with one rounding where the instruction set has it. (Elsewhere std::fma is a slow library call.)
LLMC_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for |x| <= 87, where it is a normal float, and for NaN; to 1.0 ulp.
LLMC_INLINE float bounded_exp(float x) {
  // x = n·ln2 + r with |r| <= ln2/2. Adding 1.5·2^23 rounds to an integer, left in the low bits. ln2 comes in two
  // parts, the first of 9 significant bits, so that its product with n is exact.
  constexpr float kShift = 12582912.0f;
  const float shifted = multiply_add(x, 1.44269504f, kShift);
  const uint32_t n = float_bits(shifted) - float_bits(kShift);
  float r = multiply_add(shifted - kShift, -0.693359375f, x);
  r = multiply_add(shifted - kShift, 2.12194440e-4f, r);

  // Polynomial for (e^r - 1 - r)/r² with the smallest maximum relative error of e^r: 3.1e-9.
  float p = 1.3814541e-3f;
  p = multiply_add(p, r, 8.3687454e-3f);
  p = multiply_add(p, r, 4.1668389e-2f);
  p = multiply_add(p, r, 1.6666521e-1f);
  p = multiply_add(p, r, 4.9999994e-1f);
  return (multiply_add(p, r * r, r) + 1.0f) * bits_float((n + 127) << 23);
}

// The same for x <= 87: 0 below -87, as for -inf.
LLMC_INLINE float probability_exp(float x) {
  const float result = bounded_exp(x < -87.0f ? -87.0f : x);
  return x < -87.0f ? 0.0f : result;
}

// 1/x for 1 <= x < 2^126, and for NaN; to 1 ulp. Takes a third of a division's time with 512-bit vectors.
LLMC_INLINE float reciprocal(float x) {
  // Subtracting from a constant negates the exponent: within 5.1 %. With e = 1 - x·y, the step y + y·(e + e²) leaves e³.
  float y = bits_float(0x7EF311C7u - float_bits(x));
  float e = multiply_add(-x, y, 1.0f);
  y = multiply_add(y, multiply_add(e, e, e), y);
  e = multiply_add(-x, y, 1.0f);
  return multiply_add(y, e, y);
}

constexpr float kGeluSlope = 1.59576912f;  // 2·√(2/π)
constexpr float kGeluCubic = 0.044715f;

// Beyond |x| = 9.9, GELU's argument of exp would leave its bounds: there GELU is 0 or x, and its slope 0 or 1, to within
// 1e-35·max(1, x).
LLMC_INLINE float gelu_bounded(float x) {
  x = x > 9.9f ? 9.9f : x;  // in this form NaN stays NaN
  return x < -9.9f ? -9.9f : x;
}

// GELU in the tanh form, to 1.5e-7·max(1, |x|); relative to the value 3 ulp for x > -1, 14 ulp for x > -3.
// With u the argument of tanh, 0.5·(1 + tanh u) = 1/(1 + e^(-2u)), which does not cancel for negative u.
LLMC_INLINE float gelu(float x) {
  const float bounded = gelu_bounded(x);
  const float u2 = kGeluSlope * bounded * multiply_add(kGeluCubic, bounded * bounded, 1.0f);
  const float result = x * reciprocal(1.0f + bounded_exp(-u2));
  return x < -9.9f ? 0.0f : result;
}

// d gelu/dx, to 2.4e-7: s + x·s·(1 - s)·(2u)' with s = 1/(1 + e^(-2u)).
LLMC_INLINE float gelu_grad(float x) {
  x = gelu_bounded(x);
  const float square = x * x;
  const float u2 = kGeluSlope * x * multiply_add(kGeluCubic, square, 1.0f);
  const float du2 = kGeluSlope * multiply_add(3.0f * kGeluCubic, square, 1.0f);
  const float e = bounded_exp(-u2);
  const float s = reciprocal(1.0f + e);
  return s * multiply_add(x * du2, e * s, 1.0f);
}

}  // namespace llmc::cpu::LLMC_ISA
