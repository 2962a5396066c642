// Token and position embedding.
//
// Forward: a warp per row. Backward: a warp sums the rows of dout that belong to one row of dwte or dwpe, for as many
// columns as its lanes hold by 128-bit loads, and adds the sum once. Sums of up to 32 rows, and all of dwpe, are formed
// row after row. A token that occurs more often is shared by the warps of a block: each sums every kWarps-th chunk of
// 32 rows, then the warps' sums are added in order. So the result does not depend on who runs when.
#include "core/dispatch.h"
#include "core/integers.h"
#include "core/random.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace llmc::cuda {
namespace {

constexpr int kForwardWarps = 8;  // of a block
constexpr int kWarps = 16;        // of a block of the backward kernels
constexpr int kBatch = 8;         // rows whose loads are in flight together

template <typename X>
constexpr int kColumns = kWarp * Packed<X>::size;  // of a warp

template <typename X>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    embedding_forward_kernel(X* out, const int32_t* tokens, const X* wte, const X* wpe, int64_t N, int T, int C) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int lane = threadIdx.x % kWarp;
  const int64_t n = int64_t(blockIdx.x) * kForwardWarps + threadIdx.x / kWarp;
  if (n >= N) return;
  const X* token_row = wte + int64_t(tokens[n]) * C;
  const X* position_row = wpe + n % T * C;
  for (int c = lane * W; c < C; c += kWarp * W) {
    const Packed<X> token = load128(token_row + c), position = load128(position_row + c);
    Packed<X> sum;
    for (int i = 0; i < W; i++) sum[i] = from_float<X>(to_float(token[i]) + to_float(position[i]));
    store128(out + n * C + c, sum);
  }
}

// sum += row position(i) of dout for i = 0..count-1, one after the other, in the columns from `column` on.
template <typename X, int W, typename Position>
__device__ void add_rows(float (&sum)[W], const X* dout, int count, Position position, int column, int C) {
  if (column >= C) return;
  for (int first = 0; first < count; first += kBatch) {
    Packed<X> rows[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const bool valid = first + i < count;
      rows[i] = valid ? load128(dout + int64_t(position(first + i)) * C + column) : Packed<X>::zeros();
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      for (int k = 0; k < W; k++) sum[k] += to_float(rows[i][k]);
    }
  }
}

// How many of the 32 positions from order[begin] on hold the token; they come first, as order is sorted by token and
// none before begin holds a larger one. All lanes must call.
__device__ int count_token(const int32_t* tokens, const int32_t* order, int64_t begin, int64_t N, int token) {
  const int64_t i = begin + threadIdx.x % kWarp;
  return __popc(__ballot_sync(kFullMask, i < N && tokens[order[i]] == token));
}

// x, rounded stochastically if G is bf16, for row and column of a gradient.
template <typename G>
__device__ float rounded(float x, int column, int64_t row, uint32_t seed) {
  if constexpr (sizeof(G) == 2) {
    return to_float(stochastic_round(x, noise_2d(uint32_t(column), uint32_t(row), seed)));
  } else {
    return x;
  }
}

// gradient[row, column + i] += sum[i].
template <typename G, int W>
__device__ void add_once(G* gradient, const float (&sum)[W], int64_t row, int column, int C, uint32_t seed) {
  if (column >= C) return;
  G* p = gradient + row * C + column;
  float x[W];
  load_elements(x, p);
  for (int i = 0; i < W; i++) x[i] = rounded<G>(x[i] + sum[i], column + i, row, seed);
  store_elements(p, x);
}

// Warp w of block (x,y) looks whether a token's positions start at order[x·kWarps + w], and sums them in the y-th block
// of columns.
template <typename G, typename X>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    dwte_kernel(G* dwte, const X* dout, const int32_t* tokens, const int32_t* order, int64_t N, int C, uint32_t seed) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  __shared__ int64_t shared_start;  // where the positions of a token start that all warps share, or -1
  // What each warp adds up of it: a lane's vectors in rows of their own, half of the banks apart. So neither 128 bits of
  // each lane nor 32 successive columns fall into the same banks.
  __shared__ Packed<float> sums[kWarps][W / 4][kWarp + 4];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_column = blockIdx.y * kColumns<X>, column = first_column + lane * W;
  const int64_t start = int64_t(blockIdx.x) * kWarps + warp;
  if (threadIdx.x == 0) shared_start = -1;
  __syncthreads();

  const int own_token = start < N ? tokens[order[start]] : -1;
  const bool starts = start < N && (start == 0 || tokens[order[start - 1]] != own_token);
  const int count = count_token(tokens, order, start, N, own_token);
  if (starts && count < kWarp) {
    float sum[W] = {};
    add_rows(sum, dout, count, [=](int i) { return order[start + i]; }, column, C);
    add_once(dwte, sum, own_token, column, C, seed);
  } else if (starts && lane == 0) {
    shared_start = start;  // no other warp comes here: its token would start 32 positions further at least
  }
  __syncthreads();
  if (shared_start < 0) return;

  const int token = tokens[order[shared_start]];
  float sum[W] = {};
  int64_t begin = shared_start + warp * kWarp;
  for (bool more = true; more; begin += kWarps * kWarp) {
    const int rows = count_token(tokens, order, begin, N, token);
    add_rows(sum, dout, rows, [=](int i) { return order[begin + i]; }, column, C);
    more = rows == kWarp;
  }
  for (int i = 0; i < W; i += 4) {
    store128(sums[warp][i / 4][lane].values, Packed<float>{{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}});
  }
  __syncthreads();

  const int own = threadIdx.x;
  if (own >= kColumns<X> || first_column + own >= C) return;
  float total = 0;
  for (int w = 0; w < kWarps; w++) total += sums[w][own % W / 4][own / W][own % 4];
  G* p = dwte + int64_t(token) * C + first_column + own;
  *p = from_float<G>(rounded<G>(to_float(*p) + total, first_column + own, token, seed));
}

// A warp per position t and block of columns.
template <typename G, typename X>
__global__ void __launch_bounds__(kWarps* kWarp)
    dwpe_kernel(G* dwpe, const X* dout, int B, int T, int C, uint32_t seed) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int lane = threadIdx.x % kWarp, column = blockIdx.y * kColumns<X> + lane * W;
  const int t = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (t >= T) return;
  float sum[W] = {};
  add_rows(sum, dout, B, [=](int b) { return b * T + t; }, column, C);
  add_once(dwpe, sum, t, column, C, seed);
}

}  // namespace

void CudaOps::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  const int64_t N = tokens.numel(), T = tokens.last(), C = out.last();
  check_channels("embedding_forward", C);
  dispatch(out.dtype, [&](auto zero) {
    using X = decltype(zero);
    launch(embedding_forward_kernel<X>, blocks_for(N, kForwardWarps), kForwardWarps * kWarp, 0, stream_, out.as<X>(),
           tokens.as<int32_t>(), wte.as<X>(), wpe.as<X>(), N, int(T), int(C));
  });
}

void CudaOps::embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor tokens, Tensor order, uint32_t seed) {
  const int64_t N = tokens.numel(), T = tokens.last(), C = dout.last();
  check_channels("embedding_backward", C);
  dispatch(dwte.dtype, dout.dtype, [&](auto g, auto x) {
    using G = decltype(g);
    using X = decltype(x);
    const unsigned column_blocks = blocks_for(C, kColumns<X>);
    launch(dwte_kernel<G, X>, dim3(blocks_for(N, kWarps), column_blocks), kWarps * kWarp, 0, stream_, dwte.as<G>(),
           dout.as<X>(), tokens.as<int32_t>(), order.as<int32_t>(), N, int(C), seed);
    launch(dwpe_kernel<G, X>, dim3(blocks_for(T, kWarps), column_blocks), kWarps * kWarp, 0, stream_, dwpe.as<G>(),
           dout.as<X>(), int(tokens.rows()), int(T), int(C), seed + 1);
  });
}

}  // namespace llmc::cuda
