// Rung 2, a warp takes a row.
//
// Lane l takes the elements l, l + 32, l + 64, ... of the row: what a warp loads together are 32 neighbouring floats, 4
// sectors whose every byte is used. The lanes' partial sums are added with shuffles. And there are 32 times as many
// threads to hide the latency of memory with.
#include "rung.h"
#include "torch_binding.h"

namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block

// out, x (N,C); mean, rstd (N); weight, bias (C)
__global__ void __launch_bounds__(kThreads) layernorm_kernel(float* out, float* means, float* rstds, const float* x,
                                                             const float* weight, const float* bias, int64_t N, int C) {
  const int lane = threadIdx.x % kWarp;
  const int64_t n = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (n >= N) return;  // the whole warp does, so that the shuffles find all lanes
  const float* row = x + n * C;

  float sum = 0;
  for (int c = lane; c < C; c += kWarp) sum += row[c];
  const float mean = warp_sum(sum) / float(C);

  float square = 0;
  for (int c = lane; c < C; c += kWarp) square += (row[c] - mean) * (row[c] - mean);
  const float rstd = 1.0f / sqrtf(warp_sum(square) / float(C) + kEps);

  for (int c = lane; c < C; c += kWarp) out[n * C + c] = (row[c] - mean) * rstd * weight[c] + bias[c];
  if (lane == 0) {
    means[n] = mean;
    rstds[n] = rstd;
  }
}

}  // namespace

EXPORT int layernorm_forward(float* out, float* mean, float* rstd, const float* x, const float* weight,
                             const float* bias, int64_t N, int C, cudaStream_t stream) {
  return launch(layernorm_kernel, blocks_for(N, kRows), kThreads, stream, out, mean, rstd, x, weight, bias, N, C);
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
