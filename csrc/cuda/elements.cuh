// A few consecutive elements as fp32 values, whatever their storage type: for kernels whose tensors differ in it, may
// start anywhere or have any number of elements.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/integers.h"
#include "cuda/vector.cuh"

namespace llmc::cuda {

// How many elements a thread should take from tensors of these types: 128 bits of the widest type, fewer bits of the
// others. So each access of a warp covers consecutive addresses, in every tensor.
template <typename... Ts>
constexpr int kWidth = std::min({Packed<Ts>::size...});

// x = p[0..N-1]; p must be aligned to N elements or 16 bytes, whichever is less. N elements are 1, 8 bytes or 16·k
// bytes.
template <int N, typename T>
__device__ inline void load_elements(float (&x)[N], const T* p) {
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else if constexpr (N < Packed<T>::size) {
    static_assert(N * sizeof(T) == sizeof(int2));
    const int2 bits = *reinterpret_cast<const int2*>(p);
    T elements[N];
    memcpy(elements, &bits, sizeof bits);
    for (int i = 0; i < N; i++) x[i] = to_float(elements[i]);
  } else {
    for (int first = 0; first < N; first += Packed<T>::size) {
      const Packed<T> pack = load128(p + first);
      for (int i = 0; i < Packed<T>::size; i++) x[first + i] = to_float(pack[i]);
    }
  }
}

// p[0..N-1] = x, rounded to nearest. N and p as above.
template <int N, typename T>
__device__ inline void store_elements(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else if constexpr (N < Packed<T>::size) {
    static_assert(N * sizeof(T) == sizeof(int2));
    T elements[N];
    for (int i = 0; i < N; i++) elements[i] = from_float<T>(x[i]);
    int2 bits;
    memcpy(&bits, elements, sizeof bits);
    *reinterpret_cast<int2*>(p) = bits;
  } else {
    for (int first = 0; first < N; first += Packed<T>::size) {
      Packed<T> pack;
      for (int i = 0; i < Packed<T>::size; i++) pack[i] = from_float<T>(x[first + i]);
      store128(p + first, pack);
    }
  }
}

// Whether N elements at a time can be accessed from all these addresses on.
template <int N, typename... Ts>
bool are_aligned(const Ts*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % std::min(N * sizeof(Ts), size_t(16)) == 0) && ...);
}

// Index of this thread in a launch of one-dimensional blocks.
__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// N as a type: a constant expression wherever it is passed. (std::integral_constant is for the host.)
template <int N>
struct Count {
  LLMC_INLINE constexpr operator int() const { return N; }
};

// The share of one thread, its number given, in an elementwise kernel over n elements: N of them, fewer at the end.
// Calls work(i, count) for elements i to i + count - 1: once with Count<N> if the tensors are aligned, else with
// Count<1> for one after the other.
template <int N, typename F>
__device__ inline void for_elements(int64_t thread, int64_t n, bool aligned, F work) {
  const int64_t begin = thread * N;
  if (aligned && begin + N <= n) {
    work(begin, Count<N>());
  } else {
#pragma unroll 1
    for (int64_t i = begin; i < min(begin + N, n); i++) work(i, Count<1>());
  }
}

}  // namespace llmc::cuda
