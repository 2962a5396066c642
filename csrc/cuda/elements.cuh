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

// x = p[0..N-1]. p must be aligned to the N elements, 16 bytes at most.
template <int N, typename T>
__device__ inline void load_vector(float (&x)[N], const T* p) {
  if constexpr (N < Packed<T>::size) {
    static_assert(N * sizeof(T) == 8);
    const int2 bits = *reinterpret_cast<const int2*>(p);
    T half[N];
    memcpy(half, &bits, sizeof bits);
    for (int i = 0; i < N; i++) x[i] = to_float(half[i]);
  } else {
    for (int first = 0; first < N; first += Packed<T>::size) {
      const Packed<T> pack = load128(p + first);
      for (int i = 0; i < Packed<T>::size; i++) x[first + i] = to_float(pack[i]);
    }
  }
}

// p[0..N-1] = x, rounded to nearest. p as above.
template <int N, typename T>
__device__ inline void store_vector(T* p, const float (&x)[N]) {
  if constexpr (N < Packed<T>::size) {
    static_assert(N * sizeof(T) == 8);
    T half[N];
    for (int i = 0; i < N; i++) half[i] = from_float<T>(x[i]);
    int2 bits;
    memcpy(&bits, half, sizeof bits);
    *reinterpret_cast<int2*>(p) = bits;
  } else {
    for (int first = 0; first < N; first += Packed<T>::size) {
      Packed<T> pack;
      for (int i = 0; i < Packed<T>::size; i++) pack[i] = from_float<T>(x[first + i]);
      store128(p + first, pack);
    }
  }
}

// For the host: whether load_vector<N> and store_vector<N> may be used from p on.
template <int N, typename T>
inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % std::min(N * sizeof(T), size_t(16)) == 0;
}

// The share of one thread in an elementwise kernel over n elements: N of them, fewer at the end, none beyond it.
template <int N>
class Span {
 public:
  // thread: index in the whole launch; aligned: all tensors are (is_aligned).
  __device__ Span(int64_t thread, int64_t n, bool aligned)
      : begin_(thread * N), count_(int(max(0, min(n - begin_, N)))), vector_(aligned && count_ == N) {}

  __device__ int64_t begin() const { return begin_; }

  // Values beyond the end are 0.
  template <typename T>
  __device__ void load(float (&x)[N], const T* tensor) const {
    if (vector_) {
      load_vector(x, tensor + begin_);
    } else {
      for (int i = 0; i < N; i++) x[i] = i < count_ ? to_float(tensor[begin_ + i]) : 0.0f;
    }
  }

  template <typename T>
  __device__ void store(T* tensor, const float (&x)[N]) const {
    if (vector_) {
      store_vector(tensor + begin_, x);
    } else {
      for (int i = 0; i < N; i++) {
        if (i < count_) tensor[begin_ + i] = from_float<T>(x[i]);
      }
    }
  }

 private:
  int64_t begin_;
  int count_;
  bool vector_;
};

// Index of this thread in a launch of one-dimensional blocks.
__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

}  // namespace llmc::cuda
