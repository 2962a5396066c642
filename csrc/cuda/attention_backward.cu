// Causal self-attention, backward: FlashAttention-2 (Dao 2023) without atomics.
//
// With p = exp(scale·q·k - lse), recomputed tile by tile, and delta = Σ dout·out over the channels of a row and head:
//   dv = pᵀ·dout;  ds = p·(dout·v - delta);  dq = scale·ds·k;  dk = scale·dsᵀ·q
// Three kernels: delta; dq, where a block takes queries and goes through the keys before them; dk and dv, where a block takes
// keys and goes through the queries after them. So every sum is formed by one warp in a fixed order. That computes the
// scores twice, which is less than what adding to dq from many blocks would cost in a deterministic order.
#include <cmath>

#include "core/dispatch.h"
#include "cuda/attention.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

using namespace attention;

// Rows of a block: 64 if their two tiles leave room for the others.
template <typename Arithmetic, int kHS>
struct Block {
  using X = typename Arithmetic::X;
  static constexpr int kWarps = sizeof(X) * kHS > 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kOther = Shape<Arithmetic, kHS>::kOther;
  using OwnTile = Tile<X, kRows, kHS>;
  using OtherTile = Tile<X, kOther, kHS>;
  static constexpr size_t kSharedBytes = sizeof(X) * (2 * OwnTile::kElements + 4 * OtherTile::kElements);
  static_assert(kSharedBytes <= kSmallestSharedMemory);

  // The two tiles of the block's own rows, and the two of each of the two sets.
  X* shared;
  __device__ OwnTile own(int which) const { return {shared + which * OwnTile::kElements}; }
  __device__ OtherTile other(int which, int set) const {
    return {shared + 2 * OwnTile::kElements + (2 * set + which) * OtherTile::kElements};
  }
};

constexpr int kDeltaThreads = 256;
constexpr int kDeltaLanes = 8;  // of a row and head: 64 bf16 channels are one vector each

// delta (B,NH,T); dout, out (N,NH·HS)
template <typename X>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(float* delta, const X* dout, const X* out, int64_t N, int T, int NH, int HS) {
  after_previous_kernel();
  constexpr int W = Packed<X>::size;
  const int64_t i = int64_t(blockIdx.x) * (kDeltaThreads / kDeltaLanes) + threadIdx.x / kDeltaLanes;  // n·NH + h
  const int lane = threadIdx.x % kDeltaLanes;
  float sum = 0;
  if (i < N * NH) {
    for (int c = lane * W; c < HS; c += kDeltaLanes * W) {
      const Packed<X> x = load128(dout + i * HS + c), y = load128(out + i * HS + c);
      for (int j = 0; j < W; j++) sum += to_float(x[j]) * to_float(y[j]);
    }
  }
  for (int offset = kDeltaLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  if (i < N * NH && lane == 0) {
    const int64_t n = i / NH, h = i % NH;
    delta[(n / T * NH + h) * T + n % T] = sum;
  }
}

// The tiles of queries are taken from the last to the first.
template <typename Arithmetic, int kHS, typename X = typename Arithmetic::X>
__global__ void __launch_bounds__(Block<Arithmetic, kHS>::kThreads, 1)
    attention_dq_kernel(X* dqkv, const X* dout, const float* lse, const float* delta, const X* qkv, int heads, int T,
                        int NH, int HS, float scale) {
  after_previous_kernel();
  using B = Block<Arithmetic, kHS>;
  LLMC_DYNAMIC_SHARED(X, shared);
  const B block = {shared};
  const Place place(heads);
  const HeadViews views(place, T, NH, HS);
  const Head<const X> q = views.of_qkv(qkv, 0), k = views.of_qkv(qkv, 1), v = views.of_qkv(qkv, 2);
  const Head<const X> d = views.of_out(dout);
  const int first_query = (place.tiles - 1 - place.tile) * B::kRows;
  const int tiles = (min(T, first_query + B::kRows) + B::kOther - 1) / B::kOther;

  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows;
  const float scale_log2 = scale * kLog2e;
  int query[2];
  float query_lse[2], query_delta[2];
  for (int r = 0; r < 2; r++) {
    query[r] = first_query + row + lane / 4 + 8 * r;
    const int64_t i = place.head * T + query[r];
    query_lse[r] = query[r] < T ? lse[i] * kLog2e : INFINITY;  // rows beyond T: p = 0
    query_delta[r] = query[r] < T ? delta[i] : 0.0f;
  }
  float dq[kHS / 8][4] = {};

  const auto load_keys = [&](int tile) {
    load_tile<B::kThreads>(block.other(0, tile % 2), k, tile * B::kOther);
    load_tile<B::kThreads>(block.other(1, tile % 2), v, tile * B::kOther);
    cp_async_commit();
  };
  load_tile<B::kThreads>(block.own(0), q, first_query);
  load_tile<B::kThreads>(block.own(1), d, first_query);
  load_keys(0);
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) load_keys(tile + 1);
    const int first_key = tile * B::kOther;
    if (first_key > first_query + row + kWarpRows - 1) continue;  // all in the future of the warp's queries

    float p[B::kOther / 8][4] = {}, ds[B::kOther / 8][4] = {};
    Arithmetic::products(p, block.own(0), row, block.other(0, tile % 2));
    Arithmetic::products(ds, block.own(1), row, block.other(1, tile % 2));
    const bool diagonal = first_key + B::kOther - 1 > first_query + row;
#pragma unroll
    for (int n = 0; n < B::kOther / 8; n++) {
      for (int i = 0; i < 4; i++) {
        const float probability = exp2_approx(fmaf(p[n][i], scale_log2, -query_lse[i / 2]));
        ds[n][i] = probability * (ds[n][i] - query_delta[i / 2]);
        const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
        if (diagonal && key > query[i / 2]) ds[n][i] = 0;
      }
    }
    Arithmetic::accumulate(dq, ds, block.other(0, tile % 2));
  }
  const float scales[2] = {scale, scale};
  store_rows(views.of_qkv(dqkv, 0), first_query + row, dq, scales, block.own(0), row);
}

// The products are transposed: rows are keys, columns are queries.
template <typename Arithmetic, int kHS, typename X = typename Arithmetic::X>
__global__ void __launch_bounds__(Block<Arithmetic, kHS>::kThreads, 1)
    attention_dkdv_kernel(X* dqkv, const X* dout, const float* lse, const float* delta, const X* qkv, int heads, int T,
                          int NH, int HS, float scale) {
  after_previous_kernel();
  using B = Block<Arithmetic, kHS>;
  LLMC_DYNAMIC_SHARED(X, shared);
  const B block = {shared};
  const Place place(heads);
  const HeadViews views(place, T, NH, HS);
  const Head<const X> q = views.of_qkv(qkv, 0), k = views.of_qkv(qkv, 1), v = views.of_qkv(qkv, 2);
  const Head<const X> d = views.of_out(dout);
  const int first_key = place.tile * B::kRows;
  const int tiles = (T + B::kOther - 1) / B::kOther;

  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows;
  const int key[2] = {first_key + row + lane / 4, first_key + row + lane / 4 + 8};
  const float scale_log2 = scale * kLog2e;
  const float* head_lse = lse + place.head * T;
  const float* head_delta = delta + place.head * T;
  // Of the queries of two tiles, lse in base 2. A head's row of lse need not be aligned to 16 bytes, so these do not come
  // by cp.async: a thread loads one query's values when the tile's copy starts, and stores them when it has ended.
  __shared__ float query_lse[2][B::kOther], query_delta[2][B::kOther];
  static_assert(B::kOther <= B::kThreads);
  float next_lse, next_delta;
  float dk[kHS / 8][4] = {}, dv[kHS / 8][4] = {};

  const auto load_queries = [&](int tile) {
    load_tile<B::kThreads>(block.other(0, tile % 2), q, tile * B::kOther);
    load_tile<B::kThreads>(block.other(1, tile % 2), d, tile * B::kOther);
    cp_async_commit();
    const int query = tile * B::kOther + threadIdx.x;
    const bool valid = threadIdx.x < B::kOther && query < T;
    next_lse = valid ? head_lse[query] : INFINITY;  // rows beyond T: p = 0
    next_delta = valid ? head_delta[query] : 0.0f;
  };
  const int first_tile = first_key / B::kOther;
  load_tile<B::kThreads>(block.own(0), k, first_key);
  load_tile<B::kThreads>(block.own(1), v, first_key);
  load_queries(first_tile);
  for (int tile = first_tile; tile < tiles; tile++) {
    cp_async_wait<0>();
    if (threadIdx.x < B::kOther) {
      query_lse[tile % 2][threadIdx.x] = next_lse * kLog2e;
      query_delta[tile % 2][threadIdx.x] = next_delta;
    }
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) load_queries(tile + 1);
    const int first_query = tile * B::kOther;
    if (first_query + B::kOther - 1 < first_key + row) continue;  // all before the warp's keys

    float p[B::kOther / 8][4] = {};
    Arithmetic::products(p, block.own(0), row, block.other(0, tile % 2));
    const bool diagonal = first_query < first_key + row + kWarpRows - 1;
#pragma unroll
    for (int n = 0; n < B::kOther / 8; n++) {
      for (int i = 0; i < 4; i++) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        p[n][i] = exp2_approx(fmaf(p[n][i], scale_log2, -query_lse[tile % 2][column]));
        if (diagonal && first_query + column < key[i / 2]) p[n][i] = 0;
      }
    }
    Arithmetic::accumulate(dv, p, block.other(1, tile % 2));
    float ds[B::kOther / 8][4] = {};
    Arithmetic::products(ds, block.own(1), row, block.other(1, tile % 2));
#pragma unroll
    for (int n = 0; n < B::kOther / 8; n++) {
      for (int i = 0; i < 4; i++) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        ds[n][i] = p[n][i] * (ds[n][i] - query_delta[tile % 2][column]);
      }
    }
    Arithmetic::accumulate(dk, ds, block.other(0, tile % 2));
  }
  const float scales[2] = {scale, scale}, ones[2] = {1, 1};
  store_rows(views.of_qkv(dqkv, 1), first_key + row, dk, scales, block.own(0), row);
  store_rows(views.of_qkv(dqkv, 2), first_key + row, dv, ones, block.own(1), row);
}

template <typename Arithmetic, typename X = typename Arithmetic::X>
void backward(X* dqkv, const X* dout, const X* out, const float* lse, const X* qkv, float* delta, int64_t B, int64_t T,
              int64_t NH, int64_t HS, cudaStream_t stream) {
  launch(attention_delta_kernel<X>, blocks_for(B * T * NH * kDeltaLanes, kDeltaThreads), kDeltaThreads, 0, stream,
         delta, dout, out, B * T, int(T), int(NH), int(HS));
  dispatch_head_size(HS, [&](auto padded) {
    constexpr int kHS = decltype(padded)::value;
    using Block = Block<Arithmetic, kHS>;
    const unsigned grid = unsigned(B * NH) * blocks_for(T, Block::kRows);
    const float scale = 1 / std::sqrt(float(HS));
    for (const auto kernel : {attention_dkdv_kernel<Arithmetic, kHS>, attention_dq_kernel<Arithmetic, kHS>}) {
      launch(kernel, grid, Block::kThreads, Block::kSharedBytes, stream, dqkv, dout, lse,
             static_cast<const float*>(delta), qkv, int(B * NH), int(T), int(NH), int(HS), scale);
    }
  });
}

}  // namespace

void CudaOps::attention_backward(Tensor dqkv, Tensor dout, Tensor out, Tensor lse, Tensor qkv, int64_t num_heads) {
  if (CudnnAttention* cudnn = cudnn_for(qkv, num_heads)) {
    return cudnn->backward(dqkv, dout, out, lse, qkv, scratch(cudnn->workspace_bytes()), stream_);
  }
  const int64_t B = qkv.shape[0], T = qkv.shape[1], HS = out.last() / num_heads;
  float* delta = static_cast<float*>(scratch(workspace::attention_backward(B, num_heads, T)));
  const auto run = [&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using X = typename Arithmetic::X;
    backward<Arithmetic>(dqkv.as<X>(), dout.as<X>(), out.as<X>(), lse.as<float>(), qkv.as<X>(), delta, B, T, num_heads,
                         HS, stream_);
  };
  if (qkv.dtype == DType::BF16) {
    run(Bf16{});
  } else if (tf32_) {
    run(Tf32{});
  } else {
    run(Fp32{});
  }
}

}  // namespace llmc::cuda
