// Ops that hand every operation on to other Ops and note how long it took. For operations that have finished when they
// return, as those of the CPU have.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "ops/ops.h"

namespace llmc {

// All calls of one operation at one shape. What is counted is what the contract in ops.h needs at least: a product's
// 2·m·n·k, attention's causal half (its backward pass with one recomputation, 2.5 times the forward pass), and each tensor
// read and written once; elementwise arithmetic counts no flops.
struct OpTime {
  int64_t calls = 0;
  double seconds = 0, flops = 0, bytes = 0;
};

class TimedOps final : public Ops {
 public:
  explicit TimedOps(std::unique_ptr<Ops> ops) : ops_(std::move(ops)) {}

  // By name and, of products, shape: "matmul_forward 256x3072x768" is (256,768) times (768,3072).
  const std::map<std::string, OpTime>& times() const { return times_; }
  void forget() { times_.clear(); }

  const char* name() const override { return ops_->name(); }
  double peak_flops() override { return ops_->peak_flops(); }
  void* allocate(size_t bytes) override { return ops_->allocate(bytes); }
  void free(void* data) override { ops_->free(data); }
  size_t allocated_bytes() const override { return ops_->allocated_bytes(); }
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
  template <typename F>
  void timed(const std::string& name, double flops, double bytes, F&& operation);
  template <typename F>  // (m,k) times (k,n)
  void timed_product(const char* name, int64_t m, int64_t n, int64_t k, double bytes, F&& operation);

  std::unique_ptr<Ops> ops_;
  std::map<std::string, OpTime> times_;
};

}  // namespace llmc
