#include "ops/timed_ops.h"

#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <initializer_list>

namespace llmc {
namespace {

double bytes_of(std::initializer_list<Tensor> tensors) {
  double bytes = 0;
  for (const Tensor& tensor : tensors) {
    if (tensor) bytes += double(tensor.bytes());
  }
  return bytes;
}

double bytes_of_gradients(std::initializer_list<Tensor> tensors, bool accumulate) {
  return (accumulate ? 2 : 1) * bytes_of(tensors);
}

// q·kᵀ and p·v over the causal half, of all heads and the queries from `first` on.
double attention_flops(const Tensor& qkv, int64_t first) {
  const double T = double(qkv.shape[1]), before = double(first);
  return 2 * double(qkv.shape[0]) * (T * (T + 1) - before * (before + 1)) * double(qkv.last() / 3);
}

}  // namespace

template <typename F>
void TimedOps::timed(const std::string& name, double flops, double bytes, F&& operation) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  operation();
  const std::chrono::duration<double> passed = Clock::now() - start;
  OpTime& time = times_[name];
  time.calls++;
  time.seconds += passed.count();
  time.flops += flops;
  time.bytes += bytes;
}

template <typename F>
void TimedOps::timed_product(const char* name, int64_t m, int64_t n, int64_t k, double bytes, F&& operation) {
  char text[96];
  std::snprintf(text, sizeof text, "%s %" PRId64 "x%" PRId64 "x%" PRId64, name, m, n, k);
  timed(text, 2 * double(m) * double(n) * double(k), bytes, operation);
}

void TimedOps::fill_zero(Tensor x) {
  timed("fill_zero", 0, bytes_of({x}), [&] { ops_->fill_zero(x); });
}

void TimedOps::upload(Tensor x, const void* host) {
  timed("upload", 0, 2 * bytes_of({x}), [&] { ops_->upload(x, host); });
}

void TimedOps::download(void* host, Tensor x) {
  timed("download", 0, 2 * bytes_of({x}), [&] { ops_->download(host, x); });
}

void TimedOps::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  timed("embedding_forward", 0, bytes_of({out, out, tokens}), [&] { ops_->embedding_forward(out, tokens, wte, wpe); });
}

void TimedOps::embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor tokens, Tensor order, uint32_t seed) {
  timed("embedding_backward", 0, bytes_of({dout, dout, dout, tokens, order}),
        [&] { ops_->embedding_backward(dwte, dwpe, dout, tokens, order, seed); });
}

void TimedOps::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias) {
  timed("layernorm_forward", 0, bytes_of({out, mean, rstd, x, weight, bias}),
        [&] { ops_->layernorm_forward(out, mean, rstd, x, weight, bias); });
}

void TimedOps::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                          Tensor weight, Tensor bias) {
  timed("residual_layernorm_forward", 0, bytes_of({residual, out, mean, rstd, a, b, weight, bias}),
        [&] { ops_->residual_layernorm_forward(residual, out, mean, rstd, a, b, weight, bias); });
}

void TimedOps::layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dout, Tensor x, Tensor weight,
                                  Tensor mean, Tensor rstd, bool accumulate) {
  const double bytes =
      bytes_of({dx, dx, dout, x, weight, mean, rstd}) + bytes_of_gradients({dweight, dbias}, accumulate);
  timed("layernorm_backward", 0, bytes,
        [&] { ops_->layernorm_backward(dx, dweight, dbias, dout, x, weight, mean, rstd, accumulate); });
}

void TimedOps::matmul_forward(Tensor out, Tensor x, Tensor weight, Tensor bias) {
  const int64_t m = x.rows(), n = weight.rows(), k = weight.last();
  timed_product("matmul_forward", m, n, k, bytes_of({out, x, weight, bias}),
                [&] { ops_->matmul_forward(out, x, weight, bias); });
}

void TimedOps::matmul_gelu_forward(Tensor out, Tensor pre, Tensor x, Tensor weight, Tensor bias) {
  const int64_t m = x.rows(), n = weight.rows(), k = weight.last();
  timed_product("matmul_gelu_forward", m, n, k, bytes_of({out, pre, x, weight, bias}),
                [&] { ops_->matmul_gelu_forward(out, pre, x, weight, bias); });
}

void TimedOps::matmul_backward_input(Tensor dx, Tensor dout, Tensor weight) {
  const int64_t m = dout.rows(), n = weight.last(), k = weight.rows();
  timed_product("matmul_backward_input", m, n, k, bytes_of({dx, dout, weight}),
                [&] { ops_->matmul_backward_input(dx, dout, weight); });
}

void TimedOps::matmul_gelu_backward_input(Tensor dpre, Tensor dout, Tensor weight, Tensor pre) {
  const int64_t m = dout.rows(), n = weight.last(), k = weight.rows();
  timed_product("matmul_gelu_backward_input", m, n, k, bytes_of({dpre, dout, weight, pre}),
                [&] { ops_->matmul_gelu_backward_input(dpre, dout, weight, pre); });
}

void TimedOps::matmul_backward_weight(Tensor dweight, Tensor dout, Tensor x, bool accumulate) {
  const int64_t m = dout.last(), n = x.last(), k = dout.rows();
  timed_product("matmul_backward_weight", m, n, k, bytes_of({dout, x}) + bytes_of_gradients({dweight}, accumulate),
                [&] { ops_->matmul_backward_weight(dweight, dout, x, accumulate); });
}

void TimedOps::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  timed("bias_backward", 0, bytes_of({dout}) + bytes_of_gradients({dbias}, accumulate),
        [&] { ops_->bias_backward(dbias, dout, accumulate); });
}

void TimedOps::matmul_bias_backward_weight(Tensor dweight, Tensor dbias, Tensor dout, Tensor x, bool accumulate) {
  const int64_t m = dout.last(), n = x.last(), k = dout.rows();
  timed_product("matmul_bias_backward_weight", m, n, k,
                bytes_of({dout, x}) + bytes_of_gradients({dweight, dbias}, accumulate),
                [&] { ops_->matmul_bias_backward_weight(dweight, dbias, dout, x, accumulate); });
}

void TimedOps::gelu_forward(Tensor out, Tensor x) {
  timed("gelu_forward", 0, bytes_of({out, x}), [&] { ops_->gelu_forward(out, x); });
}

void TimedOps::gelu_backward(Tensor dx, Tensor x) {
  timed("gelu_backward", 0, bytes_of({dx, dx, x}), [&] { ops_->gelu_backward(dx, x); });
}

void TimedOps::attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) {
  timed("attention_forward", attention_flops(qkv, first), bytes_of({out, lse, qkv}),
        [&] { ops_->attention_forward(out, lse, qkv, num_heads, first); });
}

void TimedOps::attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) {
  timed("attention_backward", 2.5 * attention_flops(qkv, 0), bytes_of({dqkv, dout, out, lse, qkv}),
        [&] { ops_->attention_backward(dqkv, dout, out, lse, qkv, num_heads); });
}

void TimedOps::fused_classifier(Tensor logits, Tensor losses, Tensor targets, int64_t vocab_size, float dloss,
                                bool write_dlogits) {
  const Tensor written = write_dlogits ? logits : Tensor{};
  timed("fused_classifier", 0, bytes_of({logits, written, losses, losses, targets}),
        [&] { ops_->fused_classifier(logits, losses, targets, vocab_size, dloss, write_dlogits); });
}

void TimedOps::adamw(const AdamWSlice* slices, int64_t count, const AdamWStep& step) {
  double bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const AdamWSlice& s = slices[i];
    bytes += bytes_of({s.grad, s.m, s.m, s.v, s.v, s.param}) + bytes_of({s.master ? s.master : s.param, s.master});
  }
  timed("adamw", 0, bytes, [&] { ops_->adamw(slices, count, step); });
}

void TimedOps::round_parameters(const AdamWSlice* slices, int64_t count) {
  double bytes = 0;
  for (int64_t i = 0; i < count; i++) bytes += bytes_of({slices[i].param, slices[i].master});
  timed("round_parameters", 0, bytes, [&] { ops_->round_parameters(slices, count); });
}

void TimedOps::sum_of_squares(Tensor sum, const Tensor* tensors, int64_t count) {
  double bytes = 0;
  for (int64_t i = 0; i < count; i++) bytes += bytes_of({tensors[i]});
  timed("sum_of_squares", 0, bytes, [&] { ops_->sum_of_squares(sum, tensors, count); });
}

void TimedOps::clip_scale(Tensor norm, Tensor scale, Tensor sum, Tensor loss, float max_norm) {
  timed("clip_scale", 0, bytes_of({norm, scale, sum, loss}),
        [&] { ops_->clip_scale(norm, scale, sum, loss, max_norm); });
}

void TimedOps::cast(Tensor out, Tensor x) {
  timed("cast", 0, bytes_of({out, x}), [&] { ops_->cast(out, x); });
}

void TimedOps::accumulate(Tensor out, Tensor x) {
  timed("accumulate", 0, bytes_of({out, out, x}), [&] { ops_->accumulate(out, x); });
}

void TimedOps::sum(Tensor sum, Tensor x) {
  timed("sum", 0, bytes_of({sum, x}), [&] { ops_->sum(sum, x); });
}

}  // namespace llmc
