// llmc._C.ops: every operation of ops/ops.h on torch tensors, arguments in the order of the contract.
#include <cinttypes>
#include <cmath>
#include <optional>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "core/check.h"
#include "core/token_order.h"
#include "ops/ops.h"

namespace llmc::bindings {
namespace {

using TensorArg = const at::Tensor&;
using OptionalTensorArg = const std::optional<at::Tensor>&;

// Numbers in the device's memory for the duration of a call.
class Scalars {
 public:
  Scalars(const CurrentOps& ops, Device device, size_t count) : ops_(*ops), host_(device.cuda ? 0 : count) {
    memory_ = device.cuda ? ops_.allocate(count * sizeof(float)) : host_.data();
  }
  ~Scalars() {
    if (host_.empty()) ops_.free(memory_);
  }
  Scalars(const Scalars&) = delete;
  Scalars& operator=(const Scalars&) = delete;

  Tensor operator[](int64_t i) const { return make_tensor(static_cast<float*>(memory_) + i, DType::F32, 1); }
  void set(int64_t i, float value) const { ops_.upload((*this)[i], &value); }
  float get(int64_t i) const {
    float value;
    ops_.download(&value, (*this)[i]);
    return value;
  }

 private:
  Ops& ops_;
  std::vector<float> host_;  // of the CPU
  void* memory_;
};

void check_positions(const Arguments& a, const char* operation) {
  LLMC_CHECK(a.dimension("T") <= a.dimension("maxT"), "%s: T=%" PRId64 " exceeds maxT=%" PRId64, operation,
             a.dimension("T"), a.dimension("maxT"));
}

void check_heads(const Arguments& a, const char* operation, int64_t num_heads) {
  const int64_t C = a.dimension("C"), NH = a.dimension("NH");
  LLMC_CHECK(NH == num_heads, "%s: lse has %" PRId64 " heads, num_heads is %" PRId64, operation, NH, num_heads);
  LLMC_CHECK(C % NH == 0 && C / NH % 8 == 0 && C / NH <= 128,
             "%s: C=%" PRId64 " and num_heads=%" PRId64 ": head sizes must be multiples of 8 up to 128", operation, C,
             NH);
}

void embedding_forward(TensorArg out, TensorArg tokens, TensorArg wte, TensorArg wpe) {
  Arguments a("embedding_forward");
  const Tensor tokens_ = a.in("tokens", tokens, "i32", "B T");
  const Tensor wte_ = a.in("wte", wte, "X", "Vp C");
  const Tensor wpe_ = a.in("wpe", wpe, "X", "maxT C");
  const Tensor out_ = a.out("out", out, "X", "B T C");
  check_positions(a, "embedding_forward");
  a.checked_ids("tokens", tokens_, a.dimension("Vp"));
  CurrentOps(a.device())->embedding_forward(out_, tokens_, wte_, wpe_);
}

void embedding_backward(TensorArg dwte, TensorArg dwpe, TensorArg dout, TensorArg tokens, uint32_t seed) {
  Arguments a("embedding_backward");
  const Tensor dout_ = a.in("dout", dout, "X", "B T C");
  const Tensor tokens_ = a.in("tokens", tokens, "i32", "B T");
  const Tensor dwte_ = a.out("dwte", dwte, "G", "Vp C");
  const Tensor dwpe_ = a.out("dwpe", dwpe, "G", "maxT C");
  LLMC_CHECK(dwte_.dtype == dwpe_.dtype, "embedding_backward: dwte and dwpe must have the same dtype");
  check_positions(a, "embedding_backward");
  const std::vector<int32_t> ids = a.checked_ids("tokens", tokens_, a.dimension("Vp"));
  std::vector<int32_t> order(ids.size());
  sort_by_token(order.data(), ids.data(), int64_t(ids.size()));
  const CurrentOps ops(a.device());
  const Scalars memory(ops, a.device(), order.size());
  const Tensor order_ = make_tensor(memory[0].data, DType::I32, int64_t(order.size()));
  ops->upload(order_, order.data());
  ops->embedding_backward(dwte_, dwpe_, dout_, tokens_, order_, seed);
}

void layernorm_forward(TensorArg out, TensorArg mean, TensorArg rstd, TensorArg x, TensorArg weight, TensorArg bias) {
  Arguments a("layernorm_forward");
  const Tensor x_ = a.in("x", x, "X", "N C");
  const Tensor weight_ = a.in("weight", weight, "X", "C");
  const Tensor bias_ = a.in("bias", bias, "X", "C");
  const Tensor out_ = a.out("out", out, "X", "N C");
  const Tensor mean_ = a.out("mean", mean, "f32", "N");
  const Tensor rstd_ = a.out("rstd", rstd, "f32", "N");
  CurrentOps(a.device())->layernorm_forward(out_, mean_, rstd_, x_, weight_, bias_);
}

void residual_layernorm_forward(TensorArg residual, TensorArg out, TensorArg mean, TensorArg rstd, TensorArg left,
                                TensorArg right, TensorArg weight, TensorArg bias) {
  Arguments a("residual_layernorm_forward");
  const Tensor left_ = a.in("a", left, "X", "N C");
  const Tensor right_ = a.in("b", right, "X", "N C");
  const Tensor weight_ = a.in("weight", weight, "X", "C");
  const Tensor bias_ = a.in("bias", bias, "X", "C");
  const Tensor residual_ = a.out("residual", residual, "X", "N C", {"a", "b"});
  const Tensor out_ = a.out("out", out, "X", "N C");
  const Tensor mean_ = a.out("mean", mean, "f32", "N");
  const Tensor rstd_ = a.out("rstd", rstd, "f32", "N");
  CurrentOps(a.device())->residual_layernorm_forward(residual_, out_, mean_, rstd_, left_, right_, weight_, bias_);
}

void layernorm_backward(TensorArg dx, TensorArg dweight, TensorArg dbias, TensorArg dout, TensorArg x, TensorArg weight,
                        TensorArg mean, TensorArg rstd, bool accumulate) {
  Arguments a("layernorm_backward");
  const Tensor dout_ = a.in("dout", dout, "X", "N C");
  const Tensor x_ = a.in("x", x, "X", "N C");
  const Tensor weight_ = a.in("weight", weight, "X", "C");
  const Tensor mean_ = a.in("mean", mean, "f32", "N");
  const Tensor rstd_ = a.in("rstd", rstd, "f32", "N");
  const Tensor dx_ = a.out("dx", dx, "X", "N C");
  const Tensor dweight_ = a.out("dweight", dweight, "G", "C");
  const Tensor dbias_ = a.out("dbias", dbias, "G", "C");
  LLMC_CHECK(dweight_.dtype == dbias_.dtype, "layernorm_backward: dweight and dbias must have the same dtype");
  CurrentOps(a.device())->layernorm_backward(dx_, dweight_, dbias_, dout_, x_, weight_, mean_, rstd_, accumulate);
}

Tensor optional_bias(Arguments& a, OptionalTensorArg bias) { return bias ? a.in("bias", *bias, "X", "OC") : Tensor{}; }

void matmul_forward(TensorArg out, TensorArg x, TensorArg weight, OptionalTensorArg bias) {
  Arguments a("matmul_forward");
  const Tensor x_ = a.in("x", x, "X", "N IC");
  const Tensor weight_ = a.in("weight", weight, "X", "OC IC");
  const Tensor bias_ = optional_bias(a, bias);
  const Tensor out_ = a.out("out", out, "X", "N OC");
  CurrentOps(a.device())->matmul_forward(out_, x_, weight_, bias_);
}

void matmul_gelu_forward(TensorArg out, TensorArg pre, TensorArg x, TensorArg weight, OptionalTensorArg bias) {
  Arguments a("matmul_gelu_forward");
  const Tensor x_ = a.in("x", x, "X", "N IC");
  const Tensor weight_ = a.in("weight", weight, "X", "OC IC");
  const Tensor bias_ = optional_bias(a, bias);
  const Tensor out_ = a.out("out", out, "X", "N OC");
  const Tensor pre_ = a.out("pre", pre, "X", "N OC");
  CurrentOps(a.device())->matmul_gelu_forward(out_, pre_, x_, weight_, bias_);
}

void matmul_backward_input(TensorArg dx, TensorArg dout, TensorArg weight) {
  Arguments a("matmul_backward_input");
  const Tensor dout_ = a.in("dout", dout, "X", "N OC");
  const Tensor weight_ = a.in("weight", weight, "X", "OC IC");
  const Tensor dx_ = a.out("dx", dx, "X", "N IC");
  CurrentOps(a.device())->matmul_backward_input(dx_, dout_, weight_);
}

void matmul_gelu_backward_input(TensorArg dpre, TensorArg dout, TensorArg weight, TensorArg pre) {
  Arguments a("matmul_gelu_backward_input");
  const Tensor dout_ = a.in("dout", dout, "X", "N OC");
  const Tensor weight_ = a.in("weight", weight, "X", "OC IC");
  const Tensor pre_ = a.in("pre", pre, "X", "N IC");
  const Tensor dpre_ = a.out("dpre", dpre, "X", "N IC");
  CurrentOps(a.device())->matmul_gelu_backward_input(dpre_, dout_, weight_, pre_);
}

void matmul_backward_weight(TensorArg dweight, TensorArg dout, TensorArg x, bool accumulate) {
  Arguments a("matmul_backward_weight");
  const Tensor dout_ = a.in("dout", dout, "X", "N OC");
  const Tensor x_ = a.in("x", x, "X", "N IC");
  const Tensor dweight_ = a.out("dweight", dweight, "G", "OC IC");
  CurrentOps(a.device())->matmul_backward_weight(dweight_, dout_, x_, accumulate);
}

void bias_backward(TensorArg dbias, TensorArg dout, bool accumulate) {
  Arguments a("bias_backward");
  const Tensor dout_ = a.in("dout", dout, "X", "N OC");
  const Tensor dbias_ = a.out("dbias", dbias, "G", "OC");
  CurrentOps(a.device())->bias_backward(dbias_, dout_, accumulate);
}

void matmul_bias_backward_weight(TensorArg dweight, TensorArg dbias, TensorArg dout, TensorArg x, bool accumulate) {
  Arguments a("matmul_bias_backward_weight");
  const Tensor dout_ = a.in("dout", dout, "X", "N OC");
  const Tensor x_ = a.in("x", x, "X", "N IC");
  const Tensor dweight_ = a.out("dweight", dweight, "G", "OC IC");
  const Tensor dbias_ = a.out("dbias", dbias, "G", "OC");
  CurrentOps(a.device())->matmul_bias_backward_weight(dweight_, dbias_, dout_, x_, accumulate);
}

void check_fp8(const Arguments& a, const char* operation, std::initializer_list<const char*> symbols) {
  LLMC_CHECK(a.device().cuda, "%s needs a GPU of compute capability 8.9 or newer", operation);
  for (const char* symbol : symbols) {
    LLMC_CHECK(a.dimension(symbol) % 16 == 0, "%s: %s=%" PRId64 " must be a multiple of 16", operation, symbol,
               a.dimension(symbol));
  }
}

// BF16 only.
Tensor fp8_source(Arguments& a, const char* operation, const char* name, TensorArg x) {
  const Tensor x_ = a.in(name, x, "X", "N C");
  LLMC_CHECK(x_.dtype == DType::BF16, "%s: %s is %s, it must be bf16", operation, name, name_of(x_.dtype));
  check_fp8(a, operation, {"N", "C"});
  return x_;
}

Tensor fp8_scale_pair(Arguments& a, const char* operation, TensorArg scale, bool written) {
  const Tensor result = written ? a.out("scale", scale, "f32", "2S") : a.in("scale", scale, "f32", "2S");
  LLMC_CHECK(result.numel() == 2, "%s: scale must have two values", operation);
  return result;
}

// With `only`, of that type.
Fp8Out fp8_out(Arguments& a, const char* operation, OptionalTensorArg out, OptionalTensorArg transposed,
               OptionalTensorArg amax, OptionalTensorArg scale, std::optional<DType> only = {}) {
  LLMC_CHECK(out || transposed || amax, "%s: neither out nor transposed nor amax is there", operation);
  LLMC_CHECK(scale || !(out || transposed), "%s: out and transposed need a scale", operation);
  Fp8Out result;
  if (scale) result.scale = fp8_scale_pair(a, operation, *scale, false);
  if (out) result.values = a.out("out", *out, "fp8", "N C");
  if (transposed) result.transposed = a.out("transposed", *transposed, "fp8", "C N");
  if (amax) result.amax = a.out("amax", *amax, "f32", "S");
  LLMC_CHECK(!out || !transposed || result.values.dtype == result.transposed.dtype,
             "%s: out and transposed must have the same dtype", operation);
  for (const Tensor& tensor : {result.values, result.transposed}) {
    LLMC_CHECK(!tensor || !only || tensor.dtype == *only, "%s: the result is %s, it must be %s", operation,
               name_of(tensor.dtype), name_of(*only));
  }
  return result;
}

void quantize(OptionalTensorArg out, OptionalTensorArg transposed, OptionalTensorArg amax, TensorArg x,
              OptionalTensorArg scale) {
  Arguments a("quantize");
  const Tensor x_ = fp8_source(a, "quantize", "x", x);
  const Fp8Out out_ = fp8_out(a, "quantize", out, transposed, amax, scale);
  CurrentOps(a.device())->quantize(out_, x_);
}

void quantize_gelu(OptionalTensorArg out, OptionalTensorArg transposed, OptionalTensorArg amax, TensorArg pre,
                   OptionalTensorArg scale) {
  Arguments a("quantize_gelu");
  const Tensor pre_ = fp8_source(a, "quantize_gelu", "pre", pre);
  const Fp8Out out_ = fp8_out(a, "quantize_gelu", out, transposed, amax, scale, DType::E4M3);
  CurrentOps(a.device())->quantize_gelu(out_, pre_);
}

void quantize_gradient(OptionalTensorArg out, OptionalTensorArg transposed, OptionalTensorArg amax,
                       OptionalTensorArg dbias, TensorArg dout, OptionalTensorArg pre, OptionalTensorArg scale,
                       bool accumulate) {
  Arguments a("quantize_gradient");
  const Tensor dout_ = fp8_source(a, "quantize_gradient", "dout", dout);
  const Tensor pre_ = pre ? fp8_source(a, "quantize_gradient", "pre", *pre) : Tensor{};
  const Fp8Out out_ = fp8_out(a, "quantize_gradient", out, transposed, amax, scale, DType::E5M2);
  const Tensor dbias_ = dbias ? a.out("dbias", *dbias, "G", "C") : Tensor{};
  CurrentOps(a.device())->quantize_gradient(out_, dbias_, dout_, pre_, accumulate);
}

void fp8_layernorm_forward(OptionalTensorArg out, OptionalTensorArg amax, OptionalTensorArg residual, TensorArg mean,
                           TensorArg rstd, TensorArg left, OptionalTensorArg right, TensorArg weight, TensorArg bias,
                           OptionalTensorArg scale) {
  Arguments a("fp8_layernorm_forward");
  LLMC_CHECK(bool(residual) == bool(right), "fp8_layernorm_forward: residual needs b");
  const Tensor left_ = fp8_source(a, "fp8_layernorm_forward", "a", left);
  const Tensor right_ = right ? a.in("b", *right, "X", "N C") : Tensor{};
  const Tensor weight_ = a.in("weight", weight, "X", "C");
  const Tensor bias_ = a.in("bias", bias, "X", "C");
  const Tensor residual_ = residual ? a.out("residual", *residual, "X", "N C") : Tensor{};
  const Fp8Out out_ = fp8_out(a, "fp8_layernorm_forward", out, {}, amax, scale, DType::E4M3);
  const Tensor mean_ = a.out("mean", mean, "f32", "N");
  const Tensor rstd_ = a.out("rstd", rstd, "f32", "N");
  CurrentOps(a.device())->fp8_layernorm_forward(out_, residual_, mean_, rstd_, left_, right_, weight_, bias_);
}

void fp8_transpose(TensorArg out, TensorArg x) {
  Arguments a("fp8_transpose");
  const Tensor x_ = a.in("x", x, "fp8", "N C");
  const Tensor out_ = a.out("out", out, "fp8", "C N");
  check_fp8(a, "fp8_transpose", {"N", "C"});
  LLMC_CHECK(out_.dtype == x_.dtype, "fp8_transpose: out and x must have the same dtype");
  CurrentOps(a.device())->fp8_transpose(out_, x_);
}

void fp8_scale(TensorArg scale, TensorArg amax, bool e5m2) {
  Arguments a("fp8_scale");
  const Tensor amax_ = a.in("amax", amax, "f32", "S");
  const Tensor scale_ = fp8_scale_pair(a, "fp8_scale", scale, true);
  check_fp8(a, "fp8_scale", {});
  CurrentOps(a.device())->fp8_scale(scale_, amax_, e5m2 ? DType::E5M2 : DType::E4M3);
}

void raise_amax(TensorArg amax, TensorArg other) {
  Arguments a("raise_amax");
  const Tensor other_ = a.in("other", other, "f32", "tensors");
  const Tensor amax_ = a.out("amax", amax, "f32", "tensors");
  check_fp8(a, "raise_amax", {});
  CurrentOps(a.device())->raise_amax(amax_, other_);
}

void update_fp8_scales(TensorArg scales, TensorArg history, OptionalTensorArg amax, OptionalTensorArg grad_scale,
                       int64_t first_e5m2) {
  Arguments a("update_fp8_scales");
  const Tensor history_ = a.out("history", history, "f32", "tensors window");
  const Tensor scales_ = a.out("scales", scales, "f32", "tensors 2S");
  check_fp8(a, "update_fp8_scales", {});
  LLMC_CHECK(scales_.last() == 2, "update_fp8_scales: a tensor has a scale and its inverse");
  LLMC_CHECK(bool(amax) == bool(grad_scale), "update_fp8_scales: amax needs grad_scale");
  const Tensor amax_ = amax ? a.in("amax", *amax, "f32", "tensors") : Tensor{};
  const Tensor grad_scale_ = grad_scale ? a.in("grad_scale", *grad_scale, "f32", "S") : Tensor{};
  CurrentOps(a.device())->update_fp8_scales(scales_, history_, amax_, grad_scale_, first_e5m2);
}

Fp8Matrix fp8_factor(Arguments& a, const char* name, TensorArg values, TensorArg unscale, const char* shape) {
  return {a.in(name, values, "fp8", shape), a.in("unscale", unscale, "f32", "S")};
}

void fp8_matmul_forward(TensorArg out, TensorArg x, TensorArg unscale_x, TensorArg weight, TensorArg unscale_weight,
                        OptionalTensorArg bias) {
  Arguments a("fp8_matmul_forward");
  const Fp8Matrix x_ = fp8_factor(a, "x", x, unscale_x, "N IC");
  const Fp8Matrix weight_ = fp8_factor(a, "weight", weight, unscale_weight, "OC IC");
  const Tensor bias_ = optional_bias(a, bias);
  const Tensor out_ = a.out("out", out, "X", "N OC");
  check_fp8(a, "fp8_matmul_forward", {"N", "IC", "OC"});
  CurrentOps(a.device())->fp8_matmul_forward(out_, x_, weight_, bias_);
}

void fp8_matmul_backward(TensorArg out, TensorArg left, TensorArg unscale_left, TensorArg right,
                         TensorArg unscale_right, bool accumulate) {
  Arguments a("fp8_matmul_backward");
  const Fp8Matrix left_ = fp8_factor(a, "a", left, unscale_left, "N K");
  const Fp8Matrix right_ = fp8_factor(a, "b", right, unscale_right, "M K");
  const Tensor out_ = a.out("out", out, "any", "N M");
  check_fp8(a, "fp8_matmul_backward", {"N", "M", "K"});
  CurrentOps(a.device())->fp8_matmul_backward(out_, left_, right_, accumulate);
}

void gelu_forward(TensorArg out, TensorArg x) {
  Arguments a("gelu_forward");
  const Tensor x_ = a.in("x", x, "X", "N");
  const Tensor out_ = a.out("out", out, "X", "N");
  CurrentOps(a.device())->gelu_forward(out_, x_);
}

void gelu_backward(TensorArg dx, TensorArg x) {
  Arguments a("gelu_backward");
  const Tensor x_ = a.in("x", x, "X", "N");
  const Tensor dx_ = a.out("dx", dx, "X", "N");
  CurrentOps(a.device())->gelu_backward(dx_, x_);
}

void attention_forward(TensorArg out, TensorArg lse, TensorArg qkv, int64_t num_heads, int64_t first) {
  Arguments a("attention_forward");
  const Tensor qkv_ = a.in("qkv", qkv, "X", "B T 3C");
  const Tensor out_ = a.out("out", out, "X", "B T C");
  const Tensor lse_ = a.out("lse", lse, "f32", "B NH T");
  check_heads(a, "attention_forward", num_heads);
  LLMC_CHECK(first >= 0 && first < a.dimension("T"),
             "attention_forward: first is %" PRId64 ", it must be in [0, %" PRId64 ")", first, a.dimension("T"));
  CurrentOps(a.device())->attention_forward(out_, lse_, qkv_, num_heads, first);
}

void attention_backward(TensorArg dqkv, TensorArg dout, TensorArg out, TensorArg lse, TensorArg qkv,
                        int64_t num_heads) {
  Arguments a("attention_backward");
  const Tensor qkv_ = a.in("qkv", qkv, "X", "B T 3C");
  const Tensor dout_ = a.in("dout", dout, "X", "B T C");
  const Tensor out_ = a.in("out", out, "X", "B T C");
  const Tensor lse_ = a.in("lse", lse, "f32", "B NH T");
  const Tensor dqkv_ = a.out("dqkv", dqkv, "X", "B T 3C");
  check_heads(a, "attention_backward", num_heads);
  CurrentOps(a.device())->attention_backward(dqkv_, dout_, out_, lse_, qkv_, num_heads);
}

void fused_classifier(TensorArg logits, TensorArg losses, TensorArg targets, int64_t vocab_size, float dloss,
                      bool write_dlogits) {
  Arguments a("fused_classifier");
  const Tensor targets_ = a.in("targets", targets, "i32", "N");
  const Tensor logits_ = a.out("logits", logits, "X", "N Vp");
  const Tensor losses_ = a.out("losses", losses, "f32", "N");
  LLMC_CHECK(vocab_size >= 1 && vocab_size <= a.dimension("Vp"),
             "fused_classifier: vocab_size=%" PRId64 " must be in [1, Vp=%" PRId64 "]", vocab_size, a.dimension("Vp"));
  a.checked_ids("targets", targets_, vocab_size);
  CurrentOps(a.device())->fused_classifier(logits_, losses_, targets_, vocab_size, dloss, write_dlogits);
}

void fp8_classifier(TensorArg dlogits, TensorArg unscale, TensorArg losses, TensorArg logits, TensorArg targets,
                    int64_t vocab_size, float dloss) {
  Arguments a("fp8_classifier");
  const Tensor targets_ = a.in("targets", targets, "i32", "N");
  const Tensor logits_ = a.in("logits", logits, "X", "N Vp");
  LLMC_CHECK(logits_.dtype == DType::BF16, "fp8_classifier: logits is %s, it must be bf16", name_of(logits_.dtype));
  const Tensor dlogits_ = a.out("dlogits", dlogits, "fp8", "N Vp"), unscale_ = a.out("unscale", unscale, "f32", "S");
  LLMC_CHECK(dlogits_.dtype == DType::E5M2, "fp8_classifier: dlogits must be float8_e5m2");
  const Tensor losses_ = a.out("losses", losses, "f32", "N");
  check_fp8(a, "fp8_classifier", {"Vp"});
  LLMC_CHECK(vocab_size >= 1 && vocab_size <= a.dimension("Vp"),
             "fp8_classifier: vocab_size=%" PRId64 " must be in [1, Vp=%" PRId64 "]", vocab_size, a.dimension("Vp"));
  LLMC_CHECK(std::isnormal(dloss) && dloss > 0, "fp8_classifier: dloss is %g, it must be positive", dloss);
  a.checked_ids("targets", targets_, vocab_size);
  CurrentOps(a.device())->fp8_classifier({dlogits_, unscale_}, losses_, logits_, targets_, vocab_size, dloss);
}

void check_element(const char* operation, int64_t layer, int64_t first) {
  LLMC_CHECK(layer >= 0 && first >= 0, "%s: layer=%" PRId64 " and first=%" PRId64 " must not be negative", operation,
             layer, first);
}

bool adamw(TensorArg param, TensorArg grad, TensorArg m, TensorArg v, OptionalTensorArg master, float lr, float beta1,
           float beta2, float eps, float weight_decay, int64_t t, float grad_scale, uint32_t seed, int64_t layer,
           int64_t first) {
  Arguments a("adamw");
  LLMC_CHECK(t >= 1, "adamw: t=%" PRId64 ", steps are counted from 1", t);
  LLMC_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "adamw: beta1=%g and beta2=%g must be in [0, 1)",
             beta1, beta2);
  check_element("adamw", layer, first);
  AdamWSlice slice;
  slice.param = a.out("param", param, "X", "N");
  slice.grad = a.in("grad", grad, "G", "N");
  slice.m = a.out("m", m, "f32", "N");
  slice.v = a.out("v", v, "f32", "N");
  if (master) slice.master = a.out("master", *master, "f32", "N");
  slice.weight_decay = weight_decay;
  slice.seed = seed;
  slice.layer = layer;
  slice.first = first;
  const CurrentOps ops(a.device());
  const Scalars scalars(ops, a.device(), 2);
  scalars.set(0, grad_scale);
  scalars.set(1, 0);
  ops->adamw(&slice, 1, AdamWStep{lr, beta1, beta2, eps, t, scalars[0], scalars[1]});
  return scalars.get(1) == 0;
}

void round_parameters(TensorArg param, TensorArg master, uint32_t seed, int64_t layer, int64_t first) {
  Arguments a("round_parameters");
  check_element("round_parameters", layer, first);
  AdamWSlice slice;
  slice.master = a.in("master", master, "f32", "N");
  slice.param = a.out("param", param, "X", "N");
  slice.seed = seed;
  slice.layer = layer;
  slice.first = first;
  CurrentOps(a.device())->round_parameters(&slice, 1);
}

float sum_of_squares(const std::vector<at::Tensor>& tensors) {
  std::vector<Tensor> views;
  Device device;
  for (const at::Tensor& tensor : tensors) {
    Arguments a("sum_of_squares");
    views.push_back(a.in("tensor", tensor, "any", "N"));
    if (views.size() == 1) device = a.device();
    LLMC_CHECK(a.device() == device, "sum_of_squares: the tensors are on %s and on %s", name_of(device).c_str(),
               name_of(a.device()).c_str());
  }
  const CurrentOps ops(device);
  const Scalars result(ops, device, 1);
  ops->sum_of_squares(result[0], views.data(), int64_t(views.size()));
  return result.get(0);
}

std::pair<float, float> clip_scale(float sum, float loss, float max_norm, const std::string& device) {
  LLMC_CHECK(max_norm > 0, "clip_scale: max_norm=%g must be positive", max_norm);
  const Device on = parse_device(device);
  const CurrentOps ops(on);
  const Scalars values(ops, on, 4);
  values.set(0, sum);
  values.set(1, loss);
  ops->clip_scale(values[2], values[3], values[0], values[1], max_norm);
  return {values.get(2), values.get(3)};
}

void cast(TensorArg out, TensorArg x) {
  Arguments a("cast");
  const Tensor x_ = a.in("x", x, "any", "N");
  const Tensor out_ = a.out("out", out, "any", "N");
  CurrentOps(a.device())->cast(out_, x_);
}

void accumulate(TensorArg out, TensorArg x) {
  Arguments a("accumulate");
  const Tensor x_ = a.in("x", x, "any", "N");
  const Tensor out_ = a.out("out", out, "any", "N");
  CurrentOps(a.device())->accumulate(out_, x_);
}

float sum(TensorArg x) {
  Arguments a("sum");
  const Tensor x_ = a.in("x", x, "f32", "N");
  const CurrentOps ops(a.device());
  const Scalars result(ops, a.device(), 1);
  ops->sum(result[0], x_);
  return result.get(0);
}

}  // namespace

void register_ops(py::module_& module) {
  py::module_ m = module.def_submodule("ops", "Every operation of the training step on torch tensors.");
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("embedding_forward", &embedding_forward, no_gil, "out"_a, "tokens"_a, "wte"_a, "wpe"_a,
        "out[b,t] = wte[tokens[b,t]] + wpe[t]");
  m.def("embedding_backward", &embedding_backward, no_gil, "dwte"_a, "dwpe"_a, "dout"_a, "tokens"_a, "seed"_a = 0,
        "dwte[v] += sum of dout where tokens == v; dwpe[t] += sum of dout over b");
  m.def("layernorm_forward", &layernorm_forward, no_gil, "out"_a, "mean"_a, "rstd"_a, "x"_a, "weight"_a, "bias"_a,
        "out = (x - mean) * rstd * weight + bias per row of x (N,C), eps 1e-5");
  m.def("residual_layernorm_forward", &residual_layernorm_forward, no_gil, "residual"_a, "out"_a, "mean"_a, "rstd"_a,
        "a"_a, "b"_a, "weight"_a, "bias"_a, "residual = a + b; out = layernorm(residual)");
  m.def("layernorm_backward", &layernorm_backward, no_gil, "dx"_a, "dweight"_a, "dbias"_a, "dout"_a, "x"_a, "weight"_a,
        "mean"_a, "rstd"_a, "accumulate"_a = true,
        "dx += ..., dweight += ..., dbias += ..., the last two = without accumulate");
  m.def("matmul_forward", &matmul_forward, no_gil, "out"_a, "x"_a, "weight"_a, "bias"_a = py::none(),
        "out (N,OC) = x (N,IC) @ weight (OC,IC).T + bias");
  m.def("matmul_gelu_forward", &matmul_gelu_forward, no_gil, "out"_a, "pre"_a, "x"_a, "weight"_a, "bias"_a = py::none(),
        "pre = x @ weight.T + bias; out = gelu(pre)");
  m.def("matmul_backward_input", &matmul_backward_input, no_gil, "dx"_a, "dout"_a, "weight"_a, "dx = dout @ weight");
  m.def("matmul_gelu_backward_input", &matmul_gelu_backward_input, no_gil, "dpre"_a, "dout"_a, "weight"_a, "pre"_a,
        "dpre = (dout @ weight) * gelu'(pre)");
  m.def("matmul_backward_weight", &matmul_backward_weight, no_gil, "dweight"_a, "dout"_a, "x"_a, "accumulate"_a = true,
        "dweight += dout.T @ x, = without accumulate");
  m.def("bias_backward", &bias_backward, no_gil, "dbias"_a, "dout"_a, "accumulate"_a = true,
        "dbias += dout.sum over rows, = without accumulate");
  m.def("matmul_bias_backward_weight", &matmul_bias_backward_weight, no_gil, "dweight"_a, "dbias"_a, "dout"_a, "x"_a,
        "accumulate"_a = true, "dweight += dout.T @ x; dbias += dout.sum over rows; = without accumulate");
  m.def("quantize", &quantize, no_gil, "out"_a, "transposed"_a, "amax"_a, "x"_a, "scale"_a,
        "out = x * scale[0] in FP8, saturated; transposed = out.T; amax = max(amax, |x|); each may be None");
  m.def("quantize_gelu", &quantize_gelu, no_gil, "out"_a, "transposed"_a, "amax"_a, "pre"_a, "scale"_a,
        "quantize of gelu(pre), to E4M3");
  m.def("quantize_gradient", &quantize_gradient, no_gil, "out"_a, "transposed"_a, "amax"_a, "dbias"_a, "dout"_a,
        "pre"_a, "scale"_a, "accumulate"_a = false,
        "quantize of dout, or with pre of dout * gelu'(pre), to E5M2; dbias = or += its sum over rows");
  m.def("fp8_layernorm_forward", &fp8_layernorm_forward, no_gil, "out"_a, "amax"_a, "residual"_a, "mean"_a, "rstd"_a,
        "a"_a, "b"_a, "weight"_a, "bias"_a, "scale"_a,
        "residual = a + b; out = layernorm(residual), in E4M3; without residual and b that of a");
  m.def("fp8_transpose", &fp8_transpose, no_gil, "out"_a, "x"_a, "out = x.T");
  m.def("fp8_scale", &fp8_scale, no_gil, "scale"_a, "amax"_a, "e5m2"_a,
        "scale = the largest power of two by which amax fits the format, and its inverse");
  m.def("raise_amax", &raise_amax, no_gil, "amax"_a, "other"_a, "amax = max(amax, other), NaN above all");
  m.def("update_fp8_scales", &update_fp8_scales, no_gil, "scales"_a, "history"_a, "amax"_a, "grad_scale"_a,
        "first_e5m2"_a,
        "history (n,window) takes amax, unless that or grad_scale is not finite; scales (n,2) = those of its maxima");
  m.def("fp8_matmul_forward", &fp8_matmul_forward, no_gil, "out"_a, "x"_a, "unscale_x"_a, "weight"_a,
        "unscale_weight"_a, "bias"_a = py::none(),
        "out (N,OC) = x (N,IC) @ weight (OC,IC).T + bias of FP8 values times their scales");
  m.def("fp8_matmul_backward", &fp8_matmul_backward, no_gil, "out"_a, "a"_a, "unscale_a"_a, "b"_a, "unscale_b"_a,
        "accumulate"_a = false, "out (N,M) = or += a (N,K) @ b (M,K).T");
  m.def("gelu_forward", &gelu_forward, no_gil, "out"_a, "x"_a, "out = gelu(x), tanh form");
  m.def("gelu_backward", &gelu_backward, no_gil, "dx"_a, "x"_a, "dx *= gelu'(x), in place");
  m.def("attention_forward", &attention_forward, no_gil, "out"_a, "lse"_a, "qkv"_a, "num_heads"_a, "first"_a = 0,
        "Causal self-attention of the positions from first on: out (B,T,C), lse (B,NH,T) from qkv (B,T,3C)");
  m.def("attention_backward", &attention_backward, no_gil, "dqkv"_a, "dout"_a, "out"_a, "lse"_a, "qkv"_a, "num_heads"_a,
        "dqkv = gradient of attention_forward");
  m.def("fused_classifier", &fused_classifier, no_gil, "logits"_a, "losses"_a, "targets"_a, "vocab_size"_a, "dloss"_a,
        "write_dlogits"_a, "losses += cross entropy; logits = (softmax - onehot) * dloss in place if write_dlogits");
  m.def("fp8_classifier", &fp8_classifier, no_gil, "dlogits"_a, "unscale"_a, "losses"_a, "logits"_a, "targets"_a,
        "vocab_size"_a, "dloss"_a, "losses += cross entropy; dlogits * unscale = (softmax - onehot) * dloss, in E5M2");
  m.def("adamw", &adamw, no_gil, "param"_a, "grad"_a, "m"_a, "v"_a, "master"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
        "weight_decay"_a, "t"_a, "grad_scale"_a, "seed"_a = 0, "layer"_a = 0, "first"_a = 0,
        "One AdamW step of one tensor; bf16 parameters are rounded stochastically. With a grad_scale of NaN nothing "
        "changes. Whether all that was written to param is finite.");
  m.def("round_parameters", &round_parameters, no_gil, "param"_a, "master"_a, "seed"_a = 0, "layer"_a = 0,
        "first"_a = 0, "param = fp32 master, rounded exactly as adamw rounds it");
  m.def("sum_of_squares", &sum_of_squares, no_gil, "tensors"_a, "Sum of squares over a list of tensors");
  m.def("clip_scale", &clip_scale, no_gil, "sum"_a, "loss"_a, "max_norm"_a, "device"_a = "cpu",
        "(norm, scale) of a sum of squares; a scale of NaN if norm or loss is not finite");
  m.def("cast", &cast, no_gil, "out"_a, "x"_a, "out = x, between fp32 and bf16");
  m.def("accumulate", &accumulate, no_gil, "out"_a, "x"_a, "out += x, fp32 or bf16 each");
  m.def("sum", &sum, no_gil, "x"_a, "Sum of an fp32 tensor");
  m.def("allow_tf32", &allow_tf32, no_gil, "allowed"_a,
        "Let fp32 products and attention on CUDA tensors round their operands to TF32; off at first, as in torch.");
}

}  // namespace llmc::bindings
