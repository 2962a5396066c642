// Layer normalisation.
//
// Forward: rows in parallel; a row stays in L1 for its passes: mean, variance about the mean (which does not cancel for
// rows far from zero), output.
// Backward: the rows are cut into a fixed number of groups. One thread takes a group: for each row it forms the two
// means, adds to the group's own dweight and dbias, and writes dx, so that every tensor is read from memory once. The
// groups' sums are then added in order. The cut depends on N alone, so the result does not depend on the number of
// threads.
#include <cmath>
#include <cstdint>

#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/scratch.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr float kEps = 1e-5f;
constexpr int64_t kParallelWork = 1 << 13;  // elements below which threads do not pay
constexpr int64_t kGroupRows = 16;          // fewest rows of a group of the backward pass
constexpr int64_t kMaxGroups = 64;

// Σ f(c) over c < n, as four sums side by side: the additions of one would wait for each other.
template <typename F>
LLMC_INLINE float sum_of(int64_t n, F f) {
  const int64_t quarter = n / 4;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < quarter; c++) {
    s0 += f(c);
    s1 += f(c + quarter);
    s2 += f(c + 2 * quarter);
    s3 += f(c + 3 * quarter);
  }
  for (int64_t c = 4 * quarter; c < n; c++) s0 += f(c);
  return (s0 + s1) + (s2 + s3);
}

// One row. Both forms of the forward pass share it, so that they give the same bits.
template <typename X>
LLMC_INLINE void normalise(X* out, float* mean_out, float* rstd_out, const X* x, const X* weight, const X* bias,
                           int64_t C) {
  const float mean = sum_of(C, [=](int64_t c) { return to_float(x[c]); }) / float(C);
  const float square = sum_of(C, [=](int64_t c) { return (to_float(x[c]) - mean) * (to_float(x[c]) - mean); });
  const float rstd = 1.0f / std::sqrt(square / float(C) + kEps);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    store(&out[c], (to_float(x[c]) - mean) * rstd * to_float(weight[c]) + to_float(bias[c]));
  }
  *mean_out = mean;
  *rstd_out = rstd;
}

template <typename X>
void forward(X* out, float* mean, float* rstd, const X* x, const X* weight, const X* bias, int64_t N, int64_t C) {
#pragma omp parallel for schedule(static) if (N * C >= kParallelWork)
  for (int64_t n = 0; n < N; n++) {
    normalise(out + n * C, &mean[n], &rstd[n], x + n * C, weight, bias, C);
  }
}

template <typename X>
void residual_forward(X* residual, X* out, float* mean, float* rstd, const X* a, const X* b, const X* weight,
                      const X* bias, int64_t N, int64_t C) {
#pragma omp parallel for schedule(static) if (N * C >= kParallelWork)
  for (int64_t n = 0; n < N; n++) {
    X* row = residual + n * C;
    const X* a_row = a + n * C;
    const X* b_row = b + n * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(&row[c], to_float(a_row[c]) + to_float(b_row[c]));
    normalise(out + n * C, &mean[n], &rstd[n], row, weight, bias, C);
  }
}

// One row: dx, and the row's share of dweight and dbias added to fp32 sums.
template <typename X>
LLMC_INLINE void backward_row(X* dx, float* dweight, float* dbias, const X* dout, const X* x, const X* weight,
                              float mean, float rstd, int64_t C) {
  float g_sum = 0;
  float gx_sum = 0;
#pragma omp simd reduction(+ : g_sum, gx_sum)
  for (int64_t c = 0; c < C; c++) {
    const float d = to_float(dout[c]);
    const float xhat = (to_float(x[c]) - mean) * rstd;
    const float g = d * to_float(weight[c]);
    g_sum += g;
    gx_sum += g * xhat;
    dweight[c] += d * xhat;
    dbias[c] += d;
  }
  const float g_mean = g_sum / float(C);
  const float gx_mean = gx_sum / float(C);
#pragma omp simd
  for (int64_t c = 0; c < C; c++) {
    const float xhat = (to_float(x[c]) - mean) * rstd;
    const float g = to_float(dout[c]) * to_float(weight[c]);
    store(&dx[c], to_float(dx[c]) + rstd * (g - g_mean - xhat * gx_mean));
  }
}

// sums: fp32 (groups, 2, C)
template <typename X, typename G>
void backward(X* dx, G* dweight, G* dbias, const X* dout, const X* x, const X* weight, const float* mean,
              const float* rstd, float* sums, int64_t groups, int64_t N, int64_t C, bool accumulate) {
#pragma omp parallel if (N * C >= kParallelWork)
  {
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
      float* group_dweight = sums + group * 2 * C;
      float* group_dbias = group_dweight + C;
      for (int64_t c = 0; c < 2 * C; c++) group_dweight[c] = 0;
      for (int64_t n = group * N / groups; n < (group + 1) * N / groups; n++) {
        backward_row(dx + n * C, group_dweight, group_dbias, dout + n * C, x + n * C, weight, mean[n], rstd[n], C);
      }
    }
#pragma omp for simd schedule(static)
    for (int64_t c = 0; c < C; c++) {
      float dweight_sum = 0;
      float dbias_sum = 0;
      for (int64_t group = 0; group < groups; group++) {
        dweight_sum += sums[(group * 2) * C + c];
        dbias_sum += sums[(group * 2 + 1) * C + c];
      }
      add_to(&dweight[c], dweight_sum, accumulate);
      add_to(&dbias[c], dbias_sum, accumulate);
    }
  }
}

}  // namespace

void CpuOps::layernorm_forward(Tensor out, Tensor mean, Tensor rstd, Tensor x, Tensor weight, Tensor bias) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward(out.as<X>(), mean.as<float>(), rstd.as<float>(), x.as<X>(), weight.as<X>(), bias.as<X>(), x.rows(),
            x.last());
  });
}

void CpuOps::residual_layernorm_forward(Tensor residual, Tensor out, Tensor mean, Tensor rstd, Tensor a, Tensor b,
                                        Tensor weight, Tensor bias) {
  dispatch(out.dtype, [&](auto zero) {
    using X = decltype(zero);
    residual_forward(residual.as<X>(), out.as<X>(), mean.as<float>(), rstd.as<float>(), a.as<X>(), b.as<X>(),
                     weight.as<X>(), bias.as<X>(), out.rows(), out.last());
  });
}

void CpuOps::layernorm_backward(Tensor dx, Tensor dweight, Tensor dbias, Tensor dout, Tensor x, Tensor weight,
                                Tensor mean, Tensor rstd, bool accumulate) {
  const int64_t N = x.rows();
  const int64_t C = x.last();
  const int64_t wanted = (N + kGroupRows - 1) / kGroupRows;
  const int64_t groups = wanted < kMaxGroups ? wanted : kMaxGroups;
  float* sums = thread_scratch(groups * 2 * C);
  dispatch(x.dtype, dweight.dtype, [&](auto a, auto b) {
    using X = decltype(a);
    using G = decltype(b);
    backward(dx.as<X>(), dweight.as<G>(), dbias.as<G>(), dout.as<X>(), x.as<X>(), weight.as<X>(), mean.as<float>(),
             rstd.as<float>(), sums, groups, N, C, accumulate);
  });
}

}  // namespace llmc::cpu::LLMC_ISA
