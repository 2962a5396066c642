// A non-owning, contiguous, row-major view of device memory.
#pragma once

#include "core/dtype.h"

namespace llmc {

struct Tensor {
  void* data = nullptr;  // nullptr: the optional tensor is absent
  DType dtype = DType::F32;
  int ndim = 0;
  int64_t shape[4] = {1, 1, 1, 1};

  LLMC_INLINE explicit operator bool() const { return data != nullptr; }

  LLMC_INLINE int64_t numel() const { return shape[0] * shape[1] * shape[2] * shape[3]; }

  LLMC_INLINE int64_t bytes() const { return numel() * size_of(dtype); }

  // Length of the last dimension, and number of rows when the tensor is seen as (rows, last).
  LLMC_INLINE int64_t last() const { return shape[ndim - 1]; }
  LLMC_INLINE int64_t rows() const { return numel() / last(); }

  template <typename T>
  LLMC_INLINE T* as() const {
    return static_cast<T*>(data);
  }
};

LLMC_INLINE Tensor make_tensor(void* data, DType dtype, int64_t d0) { return Tensor{data, dtype, 1, {d0, 1, 1, 1}}; }
LLMC_INLINE Tensor make_tensor(void* data, DType dtype, int64_t d0, int64_t d1) {
  return Tensor{data, dtype, 2, {d0, d1, 1, 1}};
}
LLMC_INLINE Tensor make_tensor(void* data, DType dtype, int64_t d0, int64_t d1, int64_t d2) {
  return Tensor{data, dtype, 3, {d0, d1, d2, 1}};
}

// Elements [begin, end) of the tensor, flat.
LLMC_INLINE Tensor slice_elements(const Tensor& x, int64_t begin, int64_t end) {
  return make_tensor(static_cast<char*>(x.data) + begin * size_of(x.dtype), x.dtype, end - begin);
}

// Rows [begin, end) of the tensor seen as (rows, last).
LLMC_INLINE Tensor slice_rows(const Tensor& x, int64_t begin, int64_t end) {
  char* data = static_cast<char*>(x.data) + begin * x.last() * size_of(x.dtype);
  return make_tensor(data, x.dtype, end - begin, x.last());
}

}  // namespace llmc
