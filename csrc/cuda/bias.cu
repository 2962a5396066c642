// Gradient of a bias: the sum over the rows. A thread adds eight bf16 or four fp32 columns of a group of rows in order
// (a 128-bit load for each row, consecutive threads consecutive columns); then the groups are added (column_sums.cuh).
#include "core/dispatch.h"
#include "core/integers.h"
#include "cuda/column_sums.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 128;

// partials f32 (groups,OC). Threads are numbered through all groups, so that none is idle whatever OC is.
template <typename X>
__global__ void __launch_bounds__(kThreads)
    bias_partials_kernel(float* partials, const X* dout, int groups, int64_t N, int OC) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int64_t vectors = OC / W;  // of a row
  const int64_t group = thread_index() / vectors;
  const int64_t column = thread_index() % vectors * W;
  if (group >= groups) return;
  float sum[W] = {};
  const int64_t end = (group + 1) * N / groups;
#pragma unroll 8
  for (int64_t n = group * N / groups; n < end; n++) {
    const Packed<X> x = load128(dout + n * OC + column);
    for (int i = 0; i < W; i++) sum[i] += to_float(x[i]);
  }
  store_elements(partials + group * OC + column, sum);
}

}  // namespace

void CudaOps::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  const int64_t N = dout.rows(), OC = dout.last(), groups = workspace::groups(N, OC);
  check_channels("bias_backward", OC);
  float* partials = static_cast<float*>(scratch(workspace::bias_backward(N, OC)));
  dispatch(dout.dtype, dbias.dtype, [&](auto x, auto g) {
    using X = decltype(x);
    using G = decltype(g);
    launch(bias_partials_kernel<X>, blocks_for(groups * OC / Packed<X>::size, kThreads), kThreads, 0, stream_, partials,
           dout.as<X>(), int(groups), N, int(OC));
    add_groups<G>({dbias.as<G>()}, partials, groups, OC, accumulate, stream_);
  });
}

}  // namespace llmc::cuda
