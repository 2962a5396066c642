// CpuOps: every operation of ops/ops.h on the CPU, one file per operation.
//
// The files are compiled once per instruction set (CMakeLists.txt sets LLMC_ISA to portable, avx2 or avx512), each copy in
// its own namespace, and make_cpu_ops() picks one at run time. So that the copies cannot mix, these files define nothing
// outside the namespace and include nothing whose inline functions could be emitted out of line: kernels use raw pointers,
// <cmath> and OpenMP; tests/test_isa.py checks the object files for weak symbols of other namespaces.
#pragma once

#include "ops/ops.h"

namespace llmc::cpu::LLMC_ISA {

class CpuOps final : public Ops {
 public:
  const char* name() const override;
  double peak_flops() override;
  void* allocate(size_t bytes) override;
  void free(void* data) override;
  size_t allocated_bytes() const override { return allocated_bytes_; }
  void fill_zero(Tensor x) override;
  void upload(Tensor x, const void* host) override;
  void download(void* host, Tensor x) override;

  void embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) override;
  void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor tokens, Tensor order, uint32_t seed) override;
  void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias) override;
  void residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                  Tensor weight, Tensor bias) override;
  void layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dout, Tensor x, Tensor weight, Tensor mean,
                          Tensor rstd, bool accumulate) override;
  void matmul_forward(Tensor out, Tensor x, Tensor weight, Tensor bias) override;
  void matmul_gelu_forward(Tensor out, Tensor pre, Tensor x, Tensor weight, Tensor bias) override;
  void matmul_backward_input(Tensor dx, Tensor dout, Tensor weight) override;
  void matmul_gelu_backward_input(Tensor dpre, Tensor dout, Tensor weight, Tensor pre) override;
  void matmul_backward_weight(Tensor dweight, Tensor dout, Tensor x, bool accumulate) override;
  void bias_backward(Tensor dbias, Tensor dout, bool accumulate) override;
  void matmul_bias_backward_weight(Tensor dweight, Tensor dbias, Tensor dout, Tensor x, bool accumulate) override;
  void gelu_forward(Tensor out, Tensor x) override;
  void gelu_backward(Tensor dx, Tensor x) override;
  void attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) override;
  void attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) override;
  void fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                        bool write_dlogits) override;
  void adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) override;
  void round_parameters(const AdamWSlice* slices, int64_t count) override;
  void sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) override;
  void clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) override;
  void cast(Tensor out, Tensor x) override;
  void accumulate(Tensor out, Tensor x) override;
  void sum(Tensor sum, Tensor x) override;

 private:
  size_t allocated_bytes_ = 0;
};

// The factory of this instruction set's copy; the caller owns the result.
Ops* create();

}  // namespace llmc::cpu::LLMC_ISA
