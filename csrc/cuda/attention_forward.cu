// Causal self-attention, forward: FlashAttention-2 (Dao 2023).
//
// A block takes 64 queries of one head, a warp 16 of them, and goes through the keys up to its last query in tiles: scores,
// online softmax in base 2, and the sum of the values weighted by it, all in registers. The next tiles of keys and values
// are loaded while the block works on the current ones. The blocks with most keys start first.
#include <cmath>

#include "core/dispatch.h"
#include "cuda/attention.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace llmc::cuda {
namespace {

using namespace attention;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kQueries = kWarps * kWarpRows;
constexpr int kBlocks = 3;  // of an SM at a time, as far as registers go

template <typename Arithmetic, int kHS>
constexpr int kKeys = Shape<Arithmetic, kHS>::kOther;

template <typename Arithmetic, int kHS>
constexpr size_t kSharedBytes =
    sizeof(typename Arithmetic::X) * (Tile<typename Arithmetic::X, kQueries, kHS>::kElements +
                                      4 * Tile<typename Arithmetic::X, kKeys<Arithmetic, kHS>, kHS>::kElements);

// The tiles of queries are taken from the last to the first, as many as there are blocks for. scale = 1/√HS.
template <typename Arithmetic, int kHS, typename X = typename Arithmetic::X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_forward_kernel(X* out, float* lse, const X* qkv, int heads, int T, int NH, int HS, float scale) {
  after_previous_kernel();
  static_assert(kSharedBytes<Arithmetic, kHS> <= kSmallestSharedMemory);
  constexpr int kKeys = llmc::cuda::kKeys<Arithmetic, kHS>;
  using KeyTile = Tile<X, kKeys, kHS>;
  LLMC_DYNAMIC_SHARED(X, shared);
  const Tile<X, kQueries, kHS> q = {shared};
  const auto k = [=](int set) { return KeyTile{shared + q.kElements + 2 * set * KeyTile::kElements}; };
  const auto v = [=](int set) { return KeyTile{shared + q.kElements + (2 * set + 1) * KeyTile::kElements}; };

  const Place place(heads);
  const HeadViews views(place, T, NH, HS);
  const Head<const X> queries = views.of_qkv(qkv, 0), keys = views.of_qkv(qkv, 1), values = views.of_qkv(qkv, 2);
  const int first_query = ((T + kQueries - 1) / kQueries - 1 - place.tile) * kQueries;
  const int tiles = (min(T, first_query + kQueries) + kKeys - 1) / kKeys;

  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows;  // the warp's rows of the tile
  const int query[2] = {first_query + row + lane / 4, first_query + row + lane / 4 + 8};
  const float scale_log2 = scale * kLog2e;
  float o[kHS / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of the scores; of this thread's columns only

  load_tile<kThreads>(q, queries, first_query);
  load_tile<kThreads>(k(0), keys, 0);
  load_tile<kThreads>(v(0), values, 0);
  cp_async_commit();
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    if (tile + 1 < tiles) {
      load_tile<kThreads>(k((tile + 1) % 2), keys, (tile + 1) * kKeys);
      load_tile<kThreads>(v((tile + 1) % 2), values, (tile + 1) * kKeys);
      cp_async_commit();
    }
    const int first_key = tile * kKeys;
    if (first_key > first_query + row + kWarpRows - 1) continue;  // all in the future of the warp's queries

    float p[kKeys / 8][4] = {};
    Arithmetic::products(p, q, row, k(tile % 2));
    if (first_key + kKeys - 1 > first_query + row) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
        for (int i = 0; i < 4; i++) {
          if (first_key + n * 8 + lane % 4 * 2 + i % 2 > query[i / 2]) p[n][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float tile_largest = largest[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) tile_largest = fmaxf(tile_largest, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
      tile_largest = row_max(tile_largest);  // finite: key 0 is in the past of every query
      const float decay = exp2_approx((largest[r] - tile_largest) * scale_log2);
      largest[r] = tile_largest;
      sum[r] *= decay;
#pragma unroll
      for (int n = 0; n < kHS / 8; n++) {
        o[n][2 * r] *= decay;
        o[n][2 * r + 1] *= decay;
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
        for (int i = 2 * r; i < 2 * r + 2; i++) {
          p[n][i] = exp2_approx(fmaf(p[n][i], scale_log2, -tile_largest * scale_log2));
          sum[r] += p[n][i];
        }
      }
    }
    Arithmetic::accumulate(o, p, v(tile % 2));
  }

  float inverse[2];
  for (int r = 0; r < 2; r++) {
    const float total = row_sum(sum[r]);
    inverse[r] = 1.0f / total;
    if (lane % 4 == 0 && query[r] < T) lse[place.head * T + query[r]] = largest[r] * scale + logf(total);
  }
  store_rows(views.of_out(out), first_query + row, o, inverse, q, row);
}

template <typename Arithmetic, typename X = typename Arithmetic::X>
void forward(X* out, float* lse, const X* qkv, int64_t B, int64_t T, int64_t NH, int64_t HS, int64_t first,
             cudaStream_t stream) {
  const unsigned tiles = blocks_for(T, kQueries) - unsigned(first / kQueries);
  dispatch_head_size(HS, [&](auto padded) {
    constexpr int kHS = decltype(padded)::value;
    launch(attention_forward_kernel<Arithmetic, kHS>, unsigned(B * NH) * tiles, kThreads, kSharedBytes<Arithmetic, kHS>,
           stream, out, lse, qkv, int(B * NH), int(T), int(NH), int(HS), 1 / std::sqrt(float(HS)));
  });
}

}  // namespace

void CudaOps::attention_forward(Tensor out, Tensor lse, Tensor qkv, int64_t num_heads, int64_t first) {
  if (CudnnAttention* cudnn = first == 0 ? cudnn_for(qkv, num_heads) : nullptr) {
    return cudnn->forward(out, lse, qkv, scratch(cudnn->workspace_bytes()), stream_);
  }
  const int64_t B = qkv.shape[0], T = qkv.shape[1], HS = out.last() / num_heads;
  if (qkv.dtype == DType::BF16) {
    forward<Bf16>(out.as<bf16>(), lse.as<float>(), qkv.as<bf16>(), B, T, num_heads, HS, first, stream_);
  } else if (tf32_) {
    forward<Tf32>(out.as<float>(), lse.as<float>(), qkv.as<float>(), B, T, num_heads, HS, first, stream_);
  } else {
    forward<Fp32>(out.as<float>(), lse.as<float>(), qkv.as<float>(), B, T, num_heads, HS, first, stream_);
  }
}

}  // namespace llmc::cuda
