// 128-bit loads and stores: the widest a thread can make, 4 fp32 or 8 bf16 values at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "core/dtype.h"

namespace llmc::cuda {

// Rounded to nearest, by one instruction.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <typename T>
struct alignas(16) Packed {
  static constexpr int size = 16 / int(sizeof(T));
  T values[size];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ T operator[](int i) const { return values[i]; }

  __device__ static Packed zeros() { return from_bits(make_int4(0, 0, 0, 0)); }

  __device__ static Packed from_bits(int4 bits) {
    Packed result;
    memcpy(&result, &bits, sizeof bits);
    return result;
  }
  __device__ int4 bits() const {
    int4 result;
    memcpy(&result, this, sizeof result);
    return result;
  }
};

// p must be aligned to 16 bytes. "once": the data will not be used again soon and need not stay in the L2 cache.
template <typename T>
__device__ inline Packed<T> load128(const T* p) {
  return Packed<T>::from_bits(*reinterpret_cast<const int4*>(p));
}
template <typename T>
__device__ inline Packed<T> load128_once(const T* p) {
  return Packed<T>::from_bits(__ldcs(reinterpret_cast<const int4*>(p)));
}
template <typename T>
__device__ inline void store128(T* p, const Packed<T>& x) {
  *reinterpret_cast<int4*>(p) = x.bits();
}
template <typename T>
__device__ inline void store128_once(T* p, const Packed<T>& x) {
  __stcs(reinterpret_cast<int4*>(p), x.bits());
}

}  // namespace llmc::cuda
