// From the bit patterns of the 8-bit floating-point types to fp32, for the simulated libraries (Micikevicius et al. 2022).
#pragma once

#include <cmath>
#include <cstdint>

namespace cudasim {

// Sign, 4 bits of exponent with bias 7, 3 of mantissa. No infinities: only S.1111.111 is not finite, a NaN.
inline float float_from_e4m3(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  float value = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  if ((x & 0x7f) == 0x7f) value = NAN;
  return x & 0x80 ? -value : value;
}

// Sign, 5 bits of exponent with bias 15, 2 of mantissa: the upper half of an IEEE binary16.
inline float float_from_e5m2(uint8_t x) {
  const int exponent = x >> 2 & 31, mantissa = x & 3;
  float value = exponent == 0 ? std::ldexp(float(mantissa), -16) : std::ldexp(float(4 + mantissa), exponent - 17);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return x & 0x80 ? -value : value;
}

}  // namespace cudasim
