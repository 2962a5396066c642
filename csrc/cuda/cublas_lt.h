// Matrix products through cuBLASLt. Descriptors and the algorithm of every shape are made once and kept.
//
// cuBLASLt offers several algorithms for a product, the one that it takes for the fastest first. Which is the fastest is
// found by timing them on the device (Ops::choose_algorithms), so that the choice can be kept for later runs.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "core/tensor.h"
#include "ops/ops.h"

namespace llmc::cuda {

// d (N,M) = a (N,K)·b (K,M), row-major, each operand possibly stored transposed, plus what the epilogue adds.
// cuBLASLt thinks column-major: its D (M,N) = op(B)·op(A) lies in memory as our d. FP8 is only there for a·bᵀ.
struct Product {
  Tensor d;  // (N,M)
  Tensor a;  // (N,K), or (K,N) if transpose_a
  Tensor b;  // (K,M), or (M,K) if transpose_b
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  // d += instead of d =
  // FP8 only: what the numbers of a and b are multiplied by, f32 (1) on the device; sums may be rounded.
  Tensor unscale_a, unscale_b;
  bool fast_accumulation = false;
  Tensor bias;           // (M), or absent
  Tensor bias_gradient;  // (N), or absent: = the sums over K of aᵀ, whether or not d accumulates
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

  void choose_algorithms(const Algorithms& known, bool timing);  // as Ops has it
  Algorithms algorithms() const;

  // False if cuBLASLt has no algorithm for what is fused with the product, or if timing has found `apart`, which does the
  // same by other calls, to be faster: nothing was done then. Other failures throw.
  // tf32: fp32 operands may be rounded to TF32. The workspace is device memory, aligned to 256 bytes.
  bool run(const Product& product, bool tf32, void* workspace, size_t workspace_bytes, cudaStream_t stream,
           const std::function<void()>& apart = {});

 private:
  struct Kind;  // all that the choice of an algorithm depends on
  struct Plan;  // descriptors, layouts and the algorithm of one kind of product

  struct Place {  // where and with what memory a product is computed
    void* workspace;
    size_t workspace_bytes;
    cudaStream_t stream;
    const std::function<void()>& apart;
  };

  std::unique_ptr<Plan> make(const Kind& kind, const Product& product);
  static void set_pointers(Plan& plan, const Product& product);
  void choose(Plan& plan, const Kind& kind, const Product& product, const Place& place);
  bool use_known(Plan& plan, const Kind& kind, const Place& place);
  std::vector<cublasLtMatmulAlgo_t> offered(Plan& plan, const Kind& kind, int most);
  void take_fastest(Plan& plan, const std::vector<cublasLtMatmulAlgo_t>& algorithms, const Product& product,
                    const Place& place);
  cublasStatus_t multiply(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& product,
                          const Place& place);

  cublasLtHandle_t handle_ = nullptr;
  std::map<Kind, std::unique_ptr<Plan>> plans_;
  Algorithms known_;
  bool timing_ = false;
};

}  // namespace llmc::cuda
