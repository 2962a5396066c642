// Rung 3, vectorised: a lane loads four floats at once, and keeps them.
//
// A quarter of the instructions move the same bytes. And since a lane comes back to its own elements only, it can keep
// them in registers: 8 vectors are a row of up to 1024 floats, which is then read once instead of three times. What is
// beyond is read again.
#include "rung.h"
#include "torch_binding.h"
#include "vectors.h"

namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block
constexpr int kKept = 8;                 // vectors of a lane that stay in registers

// out, x (N,C); mean, rstd (N); weight, bias (C); C is a multiple of kWidth
template <int kWidth>
__global__ void __launch_bounds__(kThreads) layernorm_kernel(float* out, float* means, float* rstds, const float* x,
                                                             const float* weight, const float* bias, int64_t N, int C) {
  constexpr int kStep = kWarp * kWidth;  // floats that the warp takes at once
  const int first = threadIdx.x % kWarp * kWidth;
  const int64_t n = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (n >= N) return;
  const float* row = x + n * C;

  Floats<kWidth> kept[kKept];
  // Calls f(c, the row's vector at c) for all of the lane's; the loop over registers must be unrolled, for they have no
  // addresses.
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int k = 0; k < kKept; k++) {
      const int c = first + k * kStep;
      if (c < C) f(c, kept[k]);
    }
    for (int c = first + kKept * kStep; c < C; c += kStep) f(c, load<kWidth>(row + c));
  };
#pragma unroll
  for (int k = 0; k < kKept; k++) {
    const int c = first + k * kStep;
    if (c < C) kept[k] = load<kWidth>(row + c);
  }

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
    const Floats<kWidth> w = load<kWidth>(weight + c), b = load<kWidth>(bias + c);
    Floats<kWidth> y;
    for (int i = 0; i < kWidth; i++) y[i] = (v[i] - mean) * rstd * w[i] + b[i];
    store(out + n * C + c, y);
  });
  if (first == 0) {
    means[n] = mean;
    rstds[n] = rstd;
  }
}

}  // namespace

EXPORT int layernorm_forward(float* out, float* mean, float* rstd, const float* x, const float* weight,
                             const float* bias, int64_t N, int C, cudaStream_t stream) {
  const auto kernel = C % 4 == 0 ? layernorm_kernel<4> : layernorm_kernel<1>;
  return launch(kernel, blocks_for(N, kRows), kThreads, stream, out, mean, rstd, x, weight, bias, N, C);
}

#ifdef TORCH_EXTENSION_NAME
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("layernorm_forward",
        [](at::Tensor out, at::Tensor mean, at::Tensor rstd, at::Tensor x, at::Tensor weight, at::Tensor bias) {
          check(layernorm_forward(fp32(out), fp32(mean), fp32(rstd), fp32(x), fp32(weight), fp32(bias), x.size(0),
                                  int(x.size(1)), stream_of(x)));
        });
}
#endif
