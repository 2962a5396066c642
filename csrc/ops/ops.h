// The contract of every operation of the training step. csrc/cpu implements it with CpuOps, csrc/cuda with CudaOps.
//
// Conventions
//   B batch rows, T sequence length, C channels, NH heads, HS = C / NH head size, V vocabulary, Vp padded vocabulary,
//   N = B·T rows, IC / OC input / output channels of a matrix product.
//   X   storage type of parameters and activations: fp32 or bf16, the same for all X tensors of a call
//   G   storage type of parameter gradients: X or fp32
//   f32 statistics, losses, optimizer state; i32 tokens, targets, indices
//   All tensors are contiguous, row-major and on the ops' device. Arithmetic is fp32; a result is rounded once, when it
//   is stored. "=" overwrites, "+=" accumulates: gradients of the residual stream accumulate, and those of parameters
//   if `accumulate` is set ("+=?"), so that the first gradients of a step need no zeros; all other results overwrite. Inputs and outputs do not overlap unless "in place" is said.
//   Every operation is deterministic: same inputs, same device, same bits.
//
// The operations trust their arguments: shapes come from the memory plan (csrc/gpt2/plan.h) or were checked by the
// bindings (csrc/bindings/ops.cpp), token and target ids were checked to be in [0, V) by the caller.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <functional>
#include <string>

#include "core/tensor.h"

namespace llmc {

// One slice of a parameter tensor in an AdamW call. All tensors have the same number n of elements.
struct AdamWSlice {
  Tensor param;            // X (n)
  Tensor grad;             // G (n)
  Tensor m, v;             // f32 (n)
  Tensor master;           // f32 (n), or absent: then param itself is the value that is updated
  float weight_decay = 0;  // decoupled
  uint32_t seed = 0;       // of the stochastic rounding (bf16 only)
  int64_t layer = 0;       // block index of the tensor, 0 outside the blocks
  int64_t first = 0;       // index of the slice's first element in the unsharded tensor of that layer
};

struct AdamWStep {
  float lr, beta1, beta2, eps;
  int64_t t;          // 1-based step of the bias correction
  Tensor grad_scale;  // f32 (1): gradients are multiplied by it; NaN: there is no update
  Tensor non_finite;  // f32 (1): becomes 1 if a parameter is written that is not finite, otherwise stays
};

// A matrix (N,K) in FP8: its numbers are values·unscale.
struct Fp8Matrix {
  Tensor values;   // E4M3 or E5M2 (N,K)
  Tensor unscale;  // f32 (1)
};

// Where a tensor (N,C) goes in FP8: x·scale, rounded to nearest, and beyond the largest number of the format to that; what
// is not finite becomes NaN. What is absent is not written.
struct Fp8Out {
  Tensor values;      // E4M3 or E5M2 (N,C)
  Tensor transposed;  // the same (C,N)
  Tensor amax;        // f32 (1) = max(amax, |x|), where infinity and NaN count as larger than all numbers
  Tensor scale;  // f32 (2): a power of two, by which a product loses nothing, and its inverse; absent for amax alone
};

// A place in host memory from Ops::allocate_host and the same number of bytes on the device.
struct HostCopy {
  Tensor device;
  void* host;
};

// Which of a library's algorithms computes a product, by a description of the product that names everything the choice
// depends on. An algorithm is what the library made of it, and of use with the same version on the same kind of device
// only. Zeros: the product has no part in it, what would be fused is computed apart.
using Algorithm = std::array<uint64_t, 8>;
using Algorithms = std::map<std::string, Algorithm>;
enum class Arguments { Same, New };

class Ops {
 public:
  virtual ~Ops();  // out of line (ops.cpp), the key function of the class

  // For reports: device, instruction set, BLAS.
  virtual const char* name() const = 0;
  // fp32 multiply-add rate in flop/s that all threads together reach in registers; measured in about 50 ms; 0 where it
  // is not measured.
  virtual double peak_flops() = 0;

  // --- memory -------------------------------------------------------------------------------------------------------
  // Device memory, zeroed, aligned to 256 bytes at least. Throws Error with the size if there is not enough.
  virtual void* allocate(size_t bytes) = 0;
  virtual void free(void* data) = 0;
  // Bytes that allocate has given out and free has not taken back, without headers and the rounding to pages.
  virtual size_t allocated_bytes() const = 0;
  // Makes the device current for the calling thread, and returns the number of the one that was. Class OnDevice (below)
  // pairs them. The CPU has nothing to do, here and in the next five (ops.cpp).
  virtual int make_current();
  virtual void restore_current(int device);
  // The queue of the operations, a cudaStream_t; null where they are done when they return.
  virtual void* stream();
  // Scratch memory of the operations to come (ops/workspace.h says how much), for devices that need it: without it they
  // allocate their own.
  virtual void use_workspace(Tensor workspace);
  virtual void fill_zero(Tensor x) = 0;
  // Copies x.bytes() bytes from or to the host. upload has read host when it returns; download waits for all earlier
  // operations.
  virtual void upload(Tensor x, const void* host) = 0;
  virtual void download(void* host, Tensor x) = 0;

  // --- host memory that the device copies from and to while it works (pinned); GPUs only -----------------------------
  // Zeroed. Throws Error with the size if there is not enough. free_host waits for the copies.
  virtual void* allocate_host(size_t bytes);
  virtual void free_host(void* memory);
  // Copies run beside the operations, through slots on the device that take turns: slot 0 or 1 is the caller's from fetch,
  // which waits for the last store from that slot and all before it, to store. Operations see what was fetched before, and
  // store sees what they did.
  virtual void fetch(int slot, const HostCopy* copies, int64_t count);  // device = host
  virtual void store(int slot, const HostCopy* copies, int64_t count);  // host = device
  virtual void finish_stores();                                         // the host waits

  // --- algorithms of products, where a library offers several; GPUs only ---------------------------------------------
  // Forgets what was chosen before. A product to come takes the algorithm that is known of it, if the library still
  // accepts that; otherwise, if `timing`, the fastest, which is found when the product is first seen: its result is then
  // computed many times, so none may be of use; otherwise the library's first. Algorithms round differently.
  virtual void choose_algorithms(const Algorithms& known, bool timing);
  // Those known or timed that products have taken since.
  virtual Algorithms algorithms() const;
  // Does `work`, which calls operations of this object on the device and nothing else that a GPU would see. There what it
  // launches becomes a graph that the host launches as one (cuda/graphs.h). All work of a name is the same operations on
  // the same memory, with the Same arguments, so that `work` need not be called again, or with New ones. Inside of some
  // other work it is a part of that.
  virtual void repeat(const std::string& name, Arguments arguments, const std::function<void()>& work);

  // Names what happens until the matching end_range, for profilers. Class Range (below) pairs them.
  virtual void begin_range(const char* name);
  virtual void end_range();

  // --- embedding ----------------------------------------------------------------------------------------------------
  // out[b,t,:] = wte[tokens[b,t],:] + wpe[t,:]
  //   out X (B,T,C); tokens i32 (B,T); wte X (Vp,C); wpe X (maxT,C)
  virtual void embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) = 0;

  // dwte[v,:] += sum of dout[b,t,:] over tokens[b,t] == v;  dwpe[t,:] += sum of dout[b,t,:] over b
  //   dwte G (Vp,C); dwpe G (maxT,C); dout X (B,T,C); tokens i32 (B,T)
  //   order i32 (B·T): the positions of tokens sorted by token, ties in order of position (core/token_order.h)
  //   G = bf16: each sum is formed in fp32 and added with one stochastic rounding, noise_2d(c, row, seed); wpe uses seed + 1.
  virtual void embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor tokens, Tensor order,
                                  uint32_t seed) = 0;

  // --- layernorm (Ba et al. 2016), eps = 1e-5 -----------------------------------------------------------------------
  // mean = Σx/C, rstd = 1/sqrt(Σ(x-mean)²/C + eps), out = (x - mean)·rstd·weight + bias, per row
  //   out, x X (N,C); mean, rstd f32 (N); weight, bias X (C)
  virtual void layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias) = 0;

  // residual = a + b (rounded to X first), then layernorm_forward of residual
  //   residual, a, b X (N,C). residual may be a or b.
  virtual void residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                          Tensor weight, Tensor bias) = 0;

  // With xhat = (x - mean)·rstd and g = dout·weight:
  //   dx += rstd·(g - mean_C(g) - xhat·mean_C(g·xhat));  dweight +=? Σ_N dout·xhat;  dbias +=? Σ_N dout
  //   dx, dout, x X (N,C); dweight, dbias G (C)
  virtual void layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dout, Tensor x, Tensor weight,
                                  Tensor mean, Tensor rstd, bool accumulate) = 0;

  // --- matrix products; weights are (out_features, in_features) -----------------------------------------------------
  // out = x·weightᵀ + bias
  //   out X (N,OC); x X (N,IC); weight X (OC,IC); bias X (OC) or absent
  virtual void matmul_forward(Tensor out, Tensor x, Tensor weight, Tensor bias) = 0;

  // pre = x·weightᵀ + bias, out = gelu(pre). The fused form of matmul_forward and gelu_forward.
  virtual void matmul_gelu_forward(Tensor out, Tensor pre, Tensor x, Tensor weight, Tensor bias) = 0;

  // dx = dout·weight
  //   dx X (N,IC); dout X (N,OC)
  virtual void matmul_backward_input(Tensor dx, Tensor dout, Tensor weight) = 0;

  // dpre = (dout·weight) · gelu'(pre). The fused form of matmul_backward_input and gelu_backward.
  virtual void matmul_gelu_backward_input(Tensor dpre, Tensor dout, Tensor weight, Tensor pre) = 0;

  // dweight +=? doutᵀ·x
  //   dweight G (OC,IC)
  virtual void matmul_backward_weight(Tensor dweight, Tensor dout, Tensor x, bool accumulate) = 0;

  // dbias +=? Σ_N dout
  //   dbias G (OC); dout X (N,OC)
  virtual void bias_backward(Tensor dbias, Tensor dout, bool accumulate) = 0;

  // The fused form of matmul_backward_weight and bias_backward. With `accumulate` the sum over the rows may be rounded to G
  // before it is added.
  virtual void matmul_bias_backward_weight(Tensor dweight, Tensor dbias, Tensor dout, Tensor x, bool accumulate) = 0;

  // --- FP8 (Micikevicius et al. 2022), on GPUs of compute capability 8.9 and newer; all sizes are multiples of 16 -------
  //   x BF16 (N,C)
  virtual void quantize(const Fp8Out& out, Tensor x);

  // gelu(pre), in E4M3
  //   pre BF16 (N,C)
  virtual void quantize_gelu(const Fp8Out& out, Tensor pre);

  // x = dout, or with pre: dout·gelu'(pre), in E5M2; dbias +=? Σ_N x
  //   dout, pre BF16 (N,OC), pre may be absent; dbias G (OC), or absent
  virtual void quantize_gradient(const Fp8Out& out, Tensor dbias, Tensor dout, Tensor pre, bool accumulate);

  // residual_layernorm_forward to E4M3, or without b and residual layernorm_forward of a
  //   residual, a, b BF16 (N,C); mean, rstd f32 (N); weight, bias BF16 (C)
  virtual void fp8_layernorm_forward(const Fp8Out& out, Tensor residual, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                     Tensor weight, Tensor bias);

  // out = xᵀ
  //   out E4M3 or E5M2 (C,N); x the same (N,C)
  virtual void fp8_transpose(Tensor out, Tensor x);

  // scale = the largest by which amax is not beyond the format's numbers, and its inverse; 1 if amax is 0 or not finite
  //   scale f32 (2); amax f32 (1)
  virtual void fp8_scale(Tensor scale, Tensor amax, DType format);

  // amax = max(amax, other), as Fp8Out has it
  //   f32 (n)
  virtual void raise_amax(Tensor amax, Tensor other);

  // Delayed scaling: amax takes the place of the oldest in the history, which is first, unless it or grad_scale is not
  // finite; then scale = that of a tensor with the largest of the history. Of n tensors, from first_e5m2 on E5M2.
  //   scales f32 (n,2); history f32 (n,window); amax f32 (n), grad_scale f32 (1), or both absent: the history stays
  virtual void update_fp8_scales(Tensor scales, Tensor history, Tensor amax, Tensor grad_scale, int64_t first_e5m2);

  // As matmul_forward. The sums may be rounded to fewer bits than fp32 has (cuBLASLt's "fast accumulation").
  //   out X (N,OC); bias X (OC) or absent
  virtual void fp8_matmul_forward(Tensor out, Fp8Matrix x, Fp8Matrix weight, Tensor bias);

  // out (=, +=) a·bᵀ: the input's gradient from dout and weightᵀ, or the weight's from doutᵀ and xᵀ.
  //   out X or G (N,M); a (N,K), b (M,K), one of them E4M3
  virtual void fp8_matmul_backward(Tensor out, Fp8Matrix a, Fp8Matrix b, bool accumulate);

  // --- GELU, tanh form (Hendrycks and Gimpel 2016) ------------------------------------------------------------------
  // out = 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
  virtual void gelu_forward(Tensor out, Tensor x) = 0;

  // dx = dx·gelu'(x), in place: dx holds the gradient of the output on entry
  virtual void gelu_backward(Tensor dx, Tensor x) = 0;

  // --- causal self-attention without a (T,T) matrix (FlashAttention-2, Dao 2023) ------------------------------------
  // p[t,u] = softmax over u <= t of (q[t]·k[u]/√HS); out[t] = Σ_u p[t,u]·v[u]; lse[t] = log Σ_u exp(q[t]·k[u]/√HS)
  //   out X (B,T,C); lse f32 (B,NH,T); qkv X (B,T,3C): all q, then all k, then all v channels, head h at [h·HS, (h+1)·HS)
  // Only the positions t from `first` on are asked for; those before may be computed again.
  virtual void attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) = 0;

  // dqkv = gradient of the above, probabilities recomputed from lse
  //   dqkv X (B,T,3C); dout, out X (B,T,C)
  virtual void attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) = 0;

  // --- loss head ----------------------------------------------------------------------------------------------------
  // For each row, p = softmax(logits[:V]): losses += -log p[target]; if write_dlogits, in place
  // logits = (p - onehot(target))·dloss for columns < V and 0 for the padding columns
  //   logits X (N,Vp); losses f32 (N); targets i32 (N)
  virtual void fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                                bool write_dlogits) = 0;

  // As fused_classifier, but the gradients come apart and in FP8, rounded to nearest: dlogits = (p - onehot(target))·dloss
  // times the largest power of two by which dloss is a finite number of E5M2. So is then all of it, as no |p - onehot| is
  // beyond 1. What is not finite becomes NaN.
  //   dlogits E5M2 (N,Vp), its unscale is an output, too; losses f32 (N); logits BF16 (N,Vp); targets i32 (N); dloss > 0;
  //   Vp a multiple of 16
  virtual void fp8_classifier(Fp8Matrix dlogits, Tensor losses, Tensor logits, Tensor targets, int64_t vocab_size,
                              float dloss);

  // --- optimizer ----------------------------------------------------------------------------------------------------
  // AdamW (Loshchilov and Hutter 2019), all slices in one call. With g = grad_scale·grad:
  //   m = β1·m + (1-β1)·g;  v = β2·v + (1-β2)·g²;  w = w_old - lr·(m/(1-β1ᵗ)/(√(v/(1-β2ᵗ)) + eps) + weight_decay·w_old)
  // w goes to master exactly and to param rounded: bf16 stochastically, with
  // noise_2d(i mod 512, 512·⌊i/512⌋ + layer, seed) for element i of the layer's unsharded tensor.
  // With a grad_scale of NaN nothing changes.
  virtual void adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) = 0;

  // param = master, rounded exactly as adamw rounds it. Of the slices only param, master, seed, layer and first are used.
  virtual void round_parameters(const AdamWSlice* slices, int64_t count) = 0;

  // sum += Σ x² over all tensors of the list (F32 or BF16)
  //   sum f32 (1)
  virtual void sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) = 0;

  // norm = √sum; scale = max_norm/norm if norm > max_norm, else 1; NaN if norm or loss is not finite, so that a broken step
  // changes nothing (adamw). A finite gradient whose sum of squares is beyond fp32 counts as such: norms from 1.8e19 on.
  //   norm, scale, sum, loss f32 (1)
  virtual void clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) = 0;

  // --- small ones ---------------------------------------------------------------------------------------------------
  // out = x, converted between fp32 and bf16 (nearest)
  virtual void cast(Tensor out, Tensor x) = 0;

  // out += x; F32 or BF16 each
  virtual void accumulate(Tensor out, Tensor x) = 0;

  // sum = Σ x
  //   sum f32 (1); x f32
  virtual void sum(Tensor sum, Tensor x) = 0;

 private:
  [[noreturn]] void no_fp8() const;
};

// The device of the operations is the calling thread's current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(Ops& ops) : ops_(ops), previous_(ops.make_current()) {}
  ~OnDevice() { ops_.restore_current(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  Ops& ops_;
  int previous_;
};

// A named range of the profiler's time line, as long as it lives.
class Range {
 public:
  Range(Ops& ops, const char* name) : ops_(ops) { ops_.begin_range(name); }
  ~Range() { ops_.end_range(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Ops& ops_;
};

}  // namespace llmc
