// llmc._C.ops: every operation of ops/ops.h on torch tensors, arguments in the order of the contract.
#include <c10/util/Optional.h>

#include <memory>
#include <vector>

#include "bindings/bindings.h"
#include "core/check.h"
#include "core/token_order.h"
#include "cpu/make_cpu_ops.h"
#include "ops/ops.h"

namespace llmc::bindings {
namespace {

using T = const at::Tensor&;
using Optional = const std::optional<at::Tensor>&;

Ops& ops() {
  static const std::unique_ptr<Ops> instance = make_cpu_ops();
  return *instance;
}

Tensor scalar(float* value) { return make_tensor(value, DType::F32, 1); }

void embedding_forward(T out, T tokens, T wte, T wpe) {
  Arguments a("embedding_forward");
  const Tensor o = a("out", out, "X", "B T C"), ids = a("tokens", tokens, "i32", "B T");
  const Tensor te = a("wte", wte, "X", "Vp C"), pe = a("wpe", wpe, "X", "maxT C");
  LLMC_CHECK(a.dimension("T") <= a.dimension("maxT"), "embedding_forward: T=%ld exceeds the %ld rows of wpe",
             long(a.dimension("T")), long(a.dimension("maxT")));
  a.check_ids("tokens", ids, a.dimension("Vp"));
  ops().embedding_forward(o, ids, te, pe);
}

void embedding_backward(T dwte, T dwpe, T dout, T tokens, uint32_t seed) {
  Arguments a("embedding_backward");
  const Tensor o = a("dout", dout, "X", "B T C"), ids = a("tokens", tokens, "i32", "B T");
  const Tensor te = a("dwte", dwte, "G", "Vp C"), pe = a("dwpe", dwpe, "G", "maxT C");
  LLMC_CHECK(te.dtype == pe.dtype, "embedding_backward: dwte and dwpe must have the same dtype");
  LLMC_CHECK(a.dimension("T") <= a.dimension("maxT"), "embedding_backward: T=%ld exceeds the %ld rows of dwpe",
             long(a.dimension("T")), long(a.dimension("maxT")));
  a.check_ids("tokens", ids, a.dimension("Vp"));
  std::vector<int32_t> order(ids.numel());
  sort_by_token(order.data(), ids.as<int32_t>(), ids.numel());
  ops().embedding_backward(te, pe, o, ids, make_tensor(order.data(), DType::I32, ids.numel()), seed);
}

void layernorm_forward(T out, T mean, T rstd, T x, T weight, T bias) {
  Arguments a("layernorm_forward");
  const Tensor o = a("out", out, "X", "N C"), m = a("mean", mean, "f32", "N"), r = a("rstd", rstd, "f32", "N");
  ops().layernorm_forward(o, m, r, a("x", x, "X", "N C"), a("weight", weight, "X", "C"), a("bias", bias, "X", "C"));
}

void residual_layernorm_forward(T residual, T out, T mean, T rstd, T a_, T b_, T weight, T bias) {
  Arguments a("residual_layernorm_forward");
  const Tensor sum = a("residual", residual, "X", "N C"), o = a("out", out, "X", "N C");
  const Tensor m = a("mean", mean, "f32", "N"), r = a("rstd", rstd, "f32", "N");
  ops().residual_layernorm_forward(sum, o, m, r, a("a", a_, "X", "N C"), a("b", b_, "X", "N C"),
                                   a("weight", weight, "X", "C"), a("bias", bias, "X", "C"));
}

void layernorm_backward(T dx, T dweight, T dbias, T dout, T x, T weight, T mean, T rstd) {
  Arguments a("layernorm_backward");
  const Tensor dxv = a("dx", dx, "X", "N C");
  const Tensor dw = a("dweight", dweight, "G", "C"), db = a("dbias", dbias, "G", "C");
  LLMC_CHECK(dw.dtype == db.dtype, "layernorm_backward: dweight and dbias must have the same dtype");
  ops().layernorm_backward(dxv, dw, db, a("dout", dout, "X", "N C"), a("x", x, "X", "N C"), a("weight", weight, "X", "C"),
                           a("mean", mean, "f32", "N"), a("rstd", rstd, "f32", "N"));
}

Tensor optional_bias(Arguments& a, Optional bias) { return bias ? a("bias", *bias, "X", "OC") : Tensor{}; }

void matmul_forward(T out, T x, T weight, Optional bias) {
  Arguments a("matmul_forward");
  const Tensor o = a("out", out, "X", "N OC"), xv = a("x", x, "X", "N IC"), w = a("weight", weight, "X", "OC IC");
  ops().matmul_forward(o, xv, w, optional_bias(a, bias));
}

void matmul_gelu_forward(T out, T pre, T x, T weight, Optional bias) {
  Arguments a("matmul_gelu_forward");
  const Tensor o = a("out", out, "X", "N OC"), p = a("pre", pre, "X", "N OC");
  const Tensor xv = a("x", x, "X", "N IC"), w = a("weight", weight, "X", "OC IC");
  ops().matmul_gelu_forward(o, p, xv, w, optional_bias(a, bias));
}

void matmul_backward_input(T dx, T dout, T weight) {
  Arguments a("matmul_backward_input");
  const Tensor dxv = a("dx", dx, "X", "N IC"), dov = a("dout", dout, "X", "N OC");
  ops().matmul_backward_input(dxv, dov, a("weight", weight, "X", "OC IC"));
}

void matmul_gelu_backward_input(T dpre, T dout, T weight, T pre) {
  Arguments a("matmul_gelu_backward_input");
  const Tensor dp = a("dpre", dpre, "X", "N IC"), dov = a("dout", dout, "X", "N OC");
  const Tensor w = a("weight", weight, "X", "OC IC");
  ops().matmul_gelu_backward_input(dp, dov, w, a("pre", pre, "X", "N IC"));
}

void matmul_backward_weight(T dweight, T dout, T x) {
  Arguments a("matmul_backward_weight");
  const Tensor dov = a("dout", dout, "X", "N OC"), xv = a("x", x, "X", "N IC");
  ops().matmul_backward_weight(a("dweight", dweight, "G", "OC IC"), dov, xv);
}

void bias_backward(T dbias, T dout) {
  Arguments a("bias_backward");
  const Tensor dov = a("dout", dout, "X", "N OC");
  ops().bias_backward(a("dbias", dbias, "G", "OC"), dov);
}

void gelu_forward(T out, T x) {
  Arguments a("gelu_forward");
  const Tensor o = a("out", out, "X", "N");
  ops().gelu_forward(o, a("x", x, "X", "N"));
}

void gelu_backward(T dx, T x) {
  Arguments a("gelu_backward");
  const Tensor dxv = a("dx", dx, "X", "N");
  ops().gelu_backward(dxv, a("x", x, "X", "N"));
}

void check_heads(const Arguments& a, const char* operation, int64_t num_heads) {
  const int64_t C = a.dimension("C");
  LLMC_CHECK(num_heads >= 1 && C % num_heads == 0, "%s: C=%ld is not a multiple of num_heads=%ld", operation, long(C),
             long(num_heads));
  LLMC_CHECK(C / num_heads % 8 == 0 && C / num_heads <= 128,
             "%s: the head size C/num_heads is %ld, it must be a multiple of 8 up to 128", operation, long(C / num_heads));
}

void attention_forward(T out, T lse, T qkv, int64_t num_heads) {
  Arguments a("attention_forward");
  const Tensor o = a("out", out, "X", "B T C"), l = a("lse", lse, "f32", "B NH T");
  const Tensor in = a("qkv", qkv, "X", "B T 3C");
  check_heads(a, "attention_forward", num_heads);
  LLMC_CHECK(a.dimension("NH") == num_heads, "attention_forward: lse has %ld heads, num_heads is %ld",
             long(a.dimension("NH")), long(num_heads));
  ops().attention_forward(o, l, in, num_heads);
}

void attention_backward(T dqkv, T dout, T out, T lse, T qkv, int64_t num_heads) {
  Arguments a("attention_backward");
  const Tensor dov = a("dout", dout, "X", "B T C"), o = a("out", out, "X", "B T C"), l = a("lse", lse, "f32", "B NH T");
  const Tensor in = a("qkv", qkv, "X", "B T 3C"), d = a("dqkv", dqkv, "X", "B T 3C");
  check_heads(a, "attention_backward", num_heads);
  LLMC_CHECK(a.dimension("NH") == num_heads, "attention_backward: lse has %ld heads, num_heads is %ld",
             long(a.dimension("NH")), long(num_heads));
  ops().attention_backward(d, dov, o, l, in, num_heads);
}

void fused_classifier(T logits, T losses, T targets, int64_t vocab_size, float dloss, bool write_dlogits) {
  Arguments a("fused_classifier");
  const Tensor lg = a("logits", logits, "X", "N Vp"), ls = a("losses", losses, "f32", "N");
  const Tensor ids = a("targets", targets, "i32", "N");
  LLMC_CHECK(vocab_size >= 1 && vocab_size <= a.dimension("Vp"), "fused_classifier: vocab_size=%ld must be in [1, Vp=%ld]",
             long(vocab_size), long(a.dimension("Vp")));
  a.check_ids("targets", ids, vocab_size);
  ops().fused_classifier(lg, ls, ids, vocab_size, dloss, write_dlogits);
}

void adamw(T param, T grad, T m, T v, Optional master, float lr, float beta1, float beta2, float eps, float weight_decay,
           int64_t t, float grad_scale, uint32_t seed, int64_t layer, int64_t first) {
  Arguments a("adamw");
  LLMC_CHECK(t >= 1, "adamw: t=%ld, steps are counted from 1", long(t));
  AdamWSlice slice;
  slice.param = a("param", param, "X", "N");
  slice.grad = a("grad", grad, "G", "N");
  slice.m = a("m", m, "f32", "N");
  slice.v = a("v", v, "f32", "N");
  if (master) slice.master = a("master", *master, "f32", "N");
  slice.weight_decay = weight_decay;
  slice.seed = seed;
  slice.layer = layer;
  slice.first = first;
  ops().adamw(&slice, 1, AdamWStep{lr, beta1, beta2, eps, t, scalar(&grad_scale)});
}

float sum_of_squares(const std::vector<at::Tensor>& tensors) {
  std::vector<Tensor> views;
  for (const at::Tensor& tensor : tensors) views.push_back(Arguments("sum_of_squares")("tensor", tensor, "any", "N"));
  float result = 0;
  ops().sum_of_squares(scalar(&result), views.data(), int64_t(views.size()));
  return result;
}

std::pair<float, float> clip_scale(float sum, float max_norm) {
  float norm, scale;
  ops().clip_scale(scalar(&norm), scalar(&scale), scalar(&sum), max_norm);
  return {norm, scale};
}

void cast(T out, T x) {
  Arguments a("cast");
  const Tensor o = a("out", out, "any", "N");
  ops().cast(o, a("x", x, "any", "N"));
}

void accumulate(T out, T x) {
  Arguments a("accumulate");
  const Tensor o = a("out", out, "any", "N");
  ops().accumulate(o, a("x", x, "any", "N"));
}

float sum(T x) {
  Arguments a("sum");
  float result;
  ops().sum(scalar(&result), a("x", x, "f32", "N"));
  return result;
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
        "mean"_a, "rstd"_a, "dx += ..., dweight += ..., dbias += ...");
  m.def("matmul_forward", &matmul_forward, no_gil, "out"_a, "x"_a, "weight"_a, "bias"_a = py::none(),
        "out (N,OC) = x (N,IC) @ weight (OC,IC).T + bias");
  m.def("matmul_gelu_forward", &matmul_gelu_forward, no_gil, "out"_a, "pre"_a, "x"_a, "weight"_a, "bias"_a = py::none(),
        "pre = x @ weight.T + bias; out = gelu(pre)");
  m.def("matmul_backward_input", &matmul_backward_input, no_gil, "dx"_a, "dout"_a, "weight"_a, "dx = dout @ weight");
  m.def("matmul_gelu_backward_input", &matmul_gelu_backward_input, no_gil, "dpre"_a, "dout"_a, "weight"_a, "pre"_a,
        "dpre = (dout @ weight) * gelu'(pre)");
  m.def("matmul_backward_weight", &matmul_backward_weight, no_gil, "dweight"_a, "dout"_a, "x"_a,
        "dweight += dout.T @ x");
  m.def("bias_backward", &bias_backward, no_gil, "dbias"_a, "dout"_a, "dbias += dout.sum over rows");
  m.def("gelu_forward", &gelu_forward, no_gil, "out"_a, "x"_a, "out = gelu(x), tanh form");
  m.def("gelu_backward", &gelu_backward, no_gil, "dx"_a, "x"_a, "dx *= gelu'(x), in place");
  m.def("attention_forward", &attention_forward, no_gil, "out"_a, "lse"_a, "qkv"_a, "num_heads"_a,
        "Causal self-attention: out (B,T,C), lse (B,NH,T) from qkv (B,T,3C)");
  m.def("attention_backward", &attention_backward, no_gil, "dqkv"_a, "dout"_a, "out"_a, "lse"_a, "qkv"_a, "num_heads"_a,
        "dqkv = gradient of attention_forward");
  m.def("fused_classifier", &fused_classifier, no_gil, "logits"_a, "losses"_a, "targets"_a, "vocab_size"_a, "dloss"_a,
        "write_dlogits"_a, "losses += cross entropy; logits = (softmax - onehot) * dloss in place if write_dlogits");
  m.def("adamw", &adamw, no_gil, "param"_a, "grad"_a, "m"_a, "v"_a, "master"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
        "weight_decay"_a, "t"_a, "grad_scale"_a, "seed"_a = 0, "layer"_a = 0, "first"_a = 0,
        "One AdamW step of one tensor; bf16 parameters are rounded stochastically");
  m.def("sum_of_squares", &sum_of_squares, no_gil, "tensors"_a, "Sum of squares over a list of tensors");
  m.def("clip_scale", &clip_scale, no_gil, "sum"_a, "max_norm"_a, "(norm, scale) of a sum of squares");
  m.def("cast", &cast, no_gil, "out"_a, "x"_a, "out = x, between fp32 and bf16");
  m.def("accumulate", &accumulate, no_gil, "out"_a, "x"_a, "out += x, fp32 or bf16 each");
  m.def("sum", &sum, no_gil, "x"_a, "Sum of an fp32 tensor");
}

}  // namespace llmc::bindings
