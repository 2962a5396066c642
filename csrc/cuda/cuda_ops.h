// CudaOps: every operation of ops/ops.h on one NVIDIA GPU (compute capability 8.0 or newer), one file per operation.
//
// All work goes to one stream; nothing but download(), allocate() and free() waits for the device. Kernels use 128-bit accesses:
// tensors start at multiples of 16 bytes and C is a multiple of 8; any N, B, T and V work.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "cuda/cudnn_attention.h"
#include "cuda/graphs.h"
#include "cuda/host_copies.h"
#include "cuda/staging.h"
#include "ops/ops.h"

namespace llmc::cuda {

class CublasLt;
struct Product;

class CudaOps final : public Ops {
 public:
  // name: the device's, for messages. tf32: fp32 products and attention may round their operands to TF32.
  CudaOps(int device, std::string name, bool tf32);
  ~CudaOps() override;
  CudaOps(const CudaOps&) = delete;
  CudaOps& operator=(const CudaOps&) = delete;

  // The stream of the calls that follow, instead of the one made by the constructor.
  void use_stream(cudaStream_t stream) { stream_ = stream; }
  void allow_tf32(bool allowed) { tf32_ = allowed; }
  // Attention of this shape in bf16 by cuDNN; of every other one by our own kernels, as without this call.
  void use_cudnn_attention(const AttentionShape& shape);

  const char* name() const override { return name_.c_str(); }
  double peak_flops() override { return 0; }
  void* allocate(size_t bytes) override;
  void free(void* data) override;
  size_t allocated_bytes() const override { return allocated_bytes_; }
  int make_current() override;
  void restore_current(int device) override;
  void* stream() override { return stream_; }
  void use_workspace(Tensor workspace) override;
  void fill_zero(Tensor x) override;
  void upload(Tensor x, const void* host) override;
  void download(void* host, Tensor x) override;
  void* allocate_host(size_t bytes) override;
  void free_host(void* memory) override;
  void fetch(int slot, const HostCopy* copies, int64_t count) override;
  void store(int slot, const HostCopy* copies, int64_t count) override;
  void finish_stores() override;
  void choose_algorithms(const Algorithms& known, bool timing) override;
  Algorithms algorithms() const override;
  void repeat(const std::string& name, Arguments arguments, const std::function<void()>& work) override {
    graphs_.repeat(name, arguments, stream_, work);
  }
  void begin_range(const char* name) override;
  void end_range() override;

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
  void quantize(const Fp8Out& out, Tensor x) override;
  void quantize_gelu(const Fp8Out& out, Tensor pre) override;
  void quantize_gradient(const Fp8Out& out, Tensor dbias, Tensor dout, Tensor pre, bool accumulate) override;
  void fp8_layernorm_forward(const Fp8Out& out, Tensor residual, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                             Tensor weight, Tensor bias) override;
  void fp8_transpose(Tensor out, Tensor x) override;
  void fp8_scale(Tensor scale, Tensor amax, DType format) override;
  void raise_amax(Tensor amax, Tensor other) override;
  void update_fp8_scales(Tensor scales, Tensor history, Tensor amax, Tensor grad_scale, int64_t first_e5m2) override;
  void fp8_matmul_forward(Tensor out, Fp8Matrix x, Fp8Matrix weight, Tensor bias) override;
  void fp8_matmul_backward(Tensor out, Fp8Matrix a, Fp8Matrix b, bool accumulate) override;
  void gelu_forward(Tensor out, Tensor x) override;
  void gelu_backward(Tensor dx, Tensor x) override;
  void attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) override;
  void attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) override;
  void fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                        bool write_dlogits) override;
  void fp8_classifier(Fp8Matrix dlogits, Tensor losses, Tensor logits, Tensor targets, int64_t vocab_size,
                      float dloss) override;
  void adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) override;
  void round_parameters(const AdamWSlice* slices, int64_t count) override;
  void sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) override;
  void clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) override;
  void cast(Tensor out, Tensor x) override;
  void accumulate(Tensor out, Tensor x) override;
  void sum(Tensor sum, Tensor x) override;

 private:
  // Device memory for the duration of one operation, aligned to 256 bytes: the workspace, or one of our own that grows.
  void* scratch(int64_t bytes);

  // False if what is fused with the product is to be computed apart, by `apart` where it is given (cublas_lt.h).
  bool multiply(const Product& product, const std::function<void()>& apart = {});

  // What computes the attention of all positions of qkv (B,T,3C): cuDNN, or nullptr for our own kernels.
  CudnnAttention* cudnn_for(Tensor qkv, int64_t num_heads);

  int device_;
  std::string name_;
  bool tf32_;
  cudaStream_t own_stream_ = nullptr;
  cudaStream_t stream_ = nullptr;
  size_t allocated_bytes_ = 0;
  std::map<void*, size_t> allocations_;
  Tensor workspace_;
  void* own_workspace_ = nullptr;
  int64_t own_workspace_bytes_ = 0;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<HostCopies> host_copies_;  // of models that have host memory
  std::unique_ptr<CublasLt> cublas_;
  std::unique_ptr<CudnnAttention> cudnn_;
  Graphs graphs_;
};

// Throws Error that names the operation unless C, the length of the rows, suits 128-bit accesses.
void check_channels(const char* operation, int64_t C);

}  // namespace llmc::cuda
