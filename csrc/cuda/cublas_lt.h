// Matrix products through cuBLASLt. Descriptors and the algorithm of every shape are made once and kept.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "core/tensor.h"

namespace llmc::cuda {

// d (N,M) = a (N,K)·b (K,M), row-major, each operand possibly stored transposed, plus what the epilogue adds.
// cuBLASLt thinks column-major: its D (M,N) = op(B)·op(A) lies in memory as our d.
struct Product {
  Tensor d;  // (N,M)
  Tensor a;  // (N,K), or (K,N) if transpose_a
  Tensor b;  // (K,M), or (M,K) if transpose_b
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  // d += instead of d =
  Tensor bias;              // (M), or absent
  enum class Gelu { None, Forward, Backward } gelu = Gelu::None;
  // Forward: pre (N,M) gets the sum before the GELU. Backward: the result is multiplied by gelu'(pre).
  Tensor pre;
};

class CublasLt {
 public:
  CublasLt();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // False if cuBLASLt has no algorithm for it (a fused GELU): nothing was done then. Other failures throw.
  // tf32: fp32 operands may be rounded to TF32. The workspace is device memory, aligned to 256 bytes.
  bool run(const Product& product, bool tf32, void* workspace, size_t workspace_bytes, cudaStream_t stream);

 private:
  struct Kind;  // all that the choice of an algorithm depends on
  struct Plan;  // descriptors, layouts and the algorithm of one kind of product

  std::unique_ptr<Plan> make(const Kind& kind, const Product& product);
  static void set_pointers(Plan& plan, const Product& product);

  cublasLtHandle_t handle_ = nullptr;
  std::map<Kind, std::unique_ptr<Plan>> plans_;
};

}  // namespace llmc::cuda
