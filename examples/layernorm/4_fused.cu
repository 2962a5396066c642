// Rung 4, fused: the addition before the layernorm happens on the way.
//
// In a transformer the input of nearly every layernorm is a sum that was just formed: residual = a + b. A kernel for the
// sum would write it, and the layernorm read it back. Here the sum stays in the registers of rung 3 and is written once,
// because the next block needs it: 16 bytes for each element instead of 20, and one launch instead of two.
#include "rung.h"
#include "torch_binding.h"
#include "vectors.h"

namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block
constexpr int kKept = 8;                 // vectors of a lane that stay in registers

// residual, out, a, b (N,C); mean, rstd (N); weight, bias (C); C is a multiple of kWidth
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    residual_layernorm_kernel(float* residual, float* out, float* means, float* rstds, const float* a, const float* b,
                              const float* weight, const float* bias, int64_t N, int C) {
  constexpr int kStep = kWarp * kWidth;  // floats that the warp takes at once
  const int first = threadIdx.x % kWarp * kWidth;
  const int64_t n = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (n >= N) return;
  float* row = residual + n * C;

  // The new part: a vector of the sum, which is written, too. A lane reads back only what it wrote itself.
  const auto add = [&](int c) {
    Floats<kWidth> sum = load<kWidth>(a + n * C + c);
    const Floats<kWidth> other = load<kWidth>(b + n * C + c);
    for (int i = 0; i < kWidth; i++) sum[i] += other[i];
    store(row + c, sum);
    return sum;
  };
  Floats<kWidth> kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; k++) {
    const int c = first + k * kStep;
    if (c < C) kept[k] = add(c);
  }
  for (int c = first + kKept * kStep; c < C; c += kStep) add(c);

  // From here on it is rung 3.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int k = 0; k < kKept; k++) {
      const int c = first + k * kStep;
      if (c < C) f(c, kept[k]);
    }
    for (int c = first + kKept * kStep; c < C; c += kStep) f(c, load<kWidth>(row + c));
  };
  float sum = 0;
  for_each([&](int, const Floats<kWidth>& v) {
    for (int i = 0; i < kWidth; i++) sum += v[i];
  });
  const float mean = warp_sum(sum) / float(C);

  float square = 0;
  for_each([&](int, const Floats<kWidth>& v) {
    for (int i = 0; i < kWidth; i++) square += (v[i] - mean) * (v[i] - mean);
  });
  const float rstd = 1.0f / sqrtf(warp_sum(square) / float(C) + kEps);

  for_each([&](int c, const Floats<kWidth>& v) {
    const Floats<kWidth> w = load<kWidth>(weight + c), shift = load<kWidth>(bias + c);
    Floats<kWidth> y;
    for (int i = 0; i < kWidth; i++) y[i] = (v[i] - mean) * rstd * w[i] + shift[i];
    store(out + n * C + c, y);
  });
  if (first == 0) {
    means[n] = mean;
    rstds[n] = rstd;
  }
}

}  // namespace

EXPORT int residual_layernorm_forward(float* residual, float* out, float* mean, float* rstd, const float* a,
                                      const float* b, const float* weight, const float* bias, int64_t N, int C,
                                      cudaStream_t stream) {
  const auto kernel = C % 4 == 0 ? residual_layernorm_kernel<4> : residual_layernorm_kernel<1>;
  return launch(kernel, blocks_for(N, kRows), kThreads, stream, residual, out, mean, rstd, a, b, weight, bias, N, C);
}

#ifdef TORCH_EXTENSION_NAME
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("residual_layernorm_forward", [](at::Tensor residual, at::Tensor out, at::Tensor mean, at::Tensor rstd,
                                         at::Tensor a, at::Tensor b, at::Tensor weight, at::Tensor bias) {
    check(residual_layernorm_forward(fp32(residual), fp32(out), fp32(mean), fp32(rstd), fp32(a), fp32(b), fp32(weight),
                                     fp32(bias), a.size(0), int(a.size(1)), stream_of(a)));
  });
}
#endif
