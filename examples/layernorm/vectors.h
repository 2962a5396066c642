// Four floats at once: the widest load and store that a thread can make, 128 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

// kWidth floats: 4, or 1 for rows that do not begin at multiples of 16 bytes.
template <int kWidth>
struct Floats {
  float values[kWidth];
  __device__ float& operator[](int i) { return values[i]; }
  __device__ float operator[](int i) const { return values[i]; }
};

template <int kWidth>
__device__ inline Floats<kWidth> load(const float* p) {
  Floats<kWidth> result;
  if constexpr (kWidth == 4) {
    const int4 bits = *reinterpret_cast<const int4*>(p);
    memcpy(&result, &bits, sizeof bits);
  } else {
    result[0] = *p;
  }
  return result;
}

template <int kWidth>
__device__ inline void store(float* p, const Floats<kWidth>& x) {
  if constexpr (kWidth == 4) {
    int4 bits;
    memcpy(&bits, &x, sizeof bits);
    *reinterpret_cast<int4*>(p) = bits;
  } else {
    *p = x[0];
  }
}
