// What the attention kernels share: tiles in shared memory, and products of tiles in three arithmetics.
//
// A warp computes 16 rows of a result. Its accumulators have the layout of the tensor cores (PTX ISA, "Matrix Fragments for
// mma.m16n8k16", accumulators C and D): for each block of 8 columns a thread has the values
//   acc[0], acc[1]: row lane / 4,     columns 2·(lane % 4), +1
//   acc[2], acc[3]: row lane / 4 + 8, the same columns
// so that the elementwise work between two products is the same code for all arithmetics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace llmc::cuda::attention {

constexpr int kWarpRows = 16;
constexpr float kLog2e = 1.4426950408889634f;

// Head sizes are padded with zeros to one of these in shared memory, so that few kernels serve all: 64 is GPT-2's; 96 and
// 128 are those of larger GPT-3 models; 32 is for small models.
template <typename F>
void dispatch_head_size(int64_t HS, F&& f) {
  if (HS <= 32) {
    f(std::integral_constant<int, 32>{});
  } else if (HS <= 64) {
    f(std::integral_constant<int, 64>{});
  } else if (HS <= 96) {
    f(std::integral_constant<int, 96>{});
  } else {
    f(std::integral_constant<int, 128>{});
  }
}

// Rows of a tile, kHS elements each, in shared memory. A row is padded by 16 bytes: an odd number of 16-byte units apart,
// the same column of 8 successive rows falls into 8 different groups of 4 banks. That is what ldmatrix and `products` in
// TF32 read at a time; `accumulate` in TF32 reads 8 columns of every other row, 4 rows: 4 different groups of 8 banks.
// (Permuted columns instead of padding take more registers than there are.)
template <typename X, int kRows_, int kHS>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kPitch = kHS + 16 / int(sizeof(X));  // elements
  static constexpr int kElements = kRows * kPitch;
  X* data;

  __device__ X* at(int row, int column) const { return data + row * kPitch + column; }
};

// One head's part of a matrix in global memory: rows of HS elements, row_stride apart; rows [0, T).
template <typename X>
struct Head {
  X* data;
  int64_t row_stride;
  int T, HS;

  __device__ X* at(int row, int column) const { return data + row * row_stride + column; }
};

// Row and column, in vectors, of the i-th vector of a tile that threads copy one after the other. Eight threads fill all
// banks at a time: with eight vectors of a row or, where a row has not a multiple of eight, with four each of two rows, the
// second one 4 rows further and so 4 times an odd number of units.
struct VectorPlace {
  int row, column;
};
template <int kVectors>  // of a row
__device__ VectorPlace place_of_vector(int i) {
  if constexpr (kVectors % 8 == 0) {
    return {i / kVectors, i % kVectors};
  } else {
    return {i / (8 * kVectors) * 8 + i / 4 % 2 * 4 + i / (2 * kVectors) % 4, i / 8 % (kVectors / 4) * 4 + i % 4};
  }
}

// Starts to copy rows [first_row, first_row + kRows) into the tile; rows beyond T and columns beyond HS become zeros.
template <int kThreads, typename X, int kRows, int kHS>
__device__ void load_tile(Tile<X, kRows, kHS> tile, Head<const X> head, int first_row) {
  constexpr int W = Packed<X>::size;
  constexpr int kVectors = kHS / W;
  static_assert(kRows * kVectors % kThreads == 0 && kRows % 8 == 0);
#pragma unroll 4
  for (int i = 0; i < kRows * kVectors; i += kThreads) {
    const VectorPlace place = place_of_vector<kVectors>(i + threadIdx.x);
    const int row = place.row, column = place.column * W;
    const bool valid = first_row + row < head.T && column < head.HS;
    cp_async_16(tile.at(row, column), valid ? head.at(first_row + row, column) : head.data, valid);
  }
}

// What a block works on. The grid has one dimension, of tiles times heads, with all heads of a tile side by side.
struct Place {
  int64_t head;  // b·NH + h
  int tile, tiles;

  // heads = B·NH
  __device__ explicit Place(int heads)
      : head(blockIdx.x % heads), tile(int(blockIdx.x / heads)), tiles(int(gridDim.x / heads)) {}
};

// The matrices of one head: qkv (B,T,3C), out (B,T,C) or its gradient.
struct HeadViews {
  int64_t b, h, C;
  int T, HS;

  __device__ HeadViews(Place place, int T_, int NH, int HS_)
      : b(place.head / NH), h(place.head % NH), C(int64_t(NH) * HS_), T(T_), HS(HS_) {}

  // part: 0 q, 1 k, 2 v
  template <typename Y>
  __device__ Head<Y> of_qkv(Y* qkv, int part) const {
    return {qkv + b * T * 3 * C + part * C + h * HS, 3 * C, T, HS};
  }
  template <typename Y>
  __device__ Head<Y> of_out(Y* out) const {
    return {out + b * T * C + h * HS, C, T, HS};
  }
};

// --- arithmetics --------------------------------------------------------------------------------------------------------
// Each offers, for a warp:
//   products(acc, a, row, b)   acc += A·Bᵀ, A = rows [row, row + 16) of tile a, B = tile b
//   accumulate(acc, p, b)      acc += P·B, P (16 x rows of b) in accumulator layout, B = tile b

// Two values as the bits of two bf16, the first one low.
__device__ inline uint32_t pack(float low, float high) {
  return from_float<bf16>(low).bits | uint32_t(from_float<bf16>(high).bits) << 16;
}

// bf16 operands, fp32 sums.
struct Bf16 {
  using X = bf16;

  template <int kHS, int kRowsA, int kColumns>
  __device__ static void products(float (&acc)[kColumns / 8][4], Tile<X, kRowsA, kHS> a, int row,
                                  Tile<X, kColumns, kHS> b) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kHS; k += 16) {
      uint32_t fragment_a[4];
      ldmatrix<4, false>(fragment_a, a.at(row + lane % 16, k + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kColumns; n += 16) {
        // Matrices 0 and 1: columns n.. of the result, k and k + 8; matrices 2 and 3: columns n + 8.. .
        uint32_t fragment_b[4];
        ldmatrix<4, false>(fragment_b, b.at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
        mma_m16n8k16_bf16(acc[n / 8], fragment_a, {fragment_b[0], fragment_b[1]});
        mma_m16n8k16_bf16(acc[n / 8 + 1], fragment_a, {fragment_b[2], fragment_b[3]});
      }
    }
  }

  template <int kInner, int kHS>
  __device__ static void accumulate(float (&acc)[kHS / 8][4], const float (&p)[kInner / 8][4], Tile<X, kInner, kHS> b) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < kInner; k += 16) {
      // Two blocks of accumulators, rounded, are just the fragment of A.
      const float (&left)[4] = p[k / 8];
      const float (&right)[4] = p[k / 8 + 1];
      const uint32_t fragment_a[4] = {pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]),
                                      pack(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kHS; n += 16) {
        uint32_t fragment_b[4];
        ldmatrix<4, true>(fragment_b, b.at(k + lane % 16, n + lane / 16 * 8));
        mma_m16n8k16_bf16(acc[n / 8], fragment_a, {fragment_b[0], fragment_b[1]});
        mma_m16n8k16_bf16(acc[n / 8 + 1], fragment_a, {fragment_b[2], fragment_b[3]});
      }
    }
  }
};

// fp32 operands rounded to TF32, fp32 sums.
struct Tf32 {
  using X = float;

  template <int kHS, int kRowsA, int kColumns>
  __device__ static void products(float (&acc)[kColumns / 8][4], Tile<X, kRowsA, kHS> a, int row,
                                  Tile<X, kColumns, kHS> b) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
#pragma unroll 4
    for (int k = 0; k < kHS; k += 8) {
      const X* p = a.at(row + group, k + member);
      const X* q = a.at(row + group + 8, k + member);
      const uint32_t fragment_a[4] = {to_tf32(p[0]), to_tf32(q[0]), to_tf32(p[4]), to_tf32(q[4])};
#pragma unroll
      for (int n = 0; n < kColumns; n += 8) {
        const X* r = b.at(n + group, k + member);
        mma_m16n8k8_tf32(acc[n / 8], fragment_a, {to_tf32(r[0]), to_tf32(r[4])});
      }
    }
  }

  template <int kInner, int kHS>
  __device__ static void accumulate(float (&acc)[kHS / 8][4], const float (&p)[kInner / 8][4], Tile<X, kInner, kHS> b) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
#pragma unroll
    for (int k = 0; k < kInner; k += 8) {
      // The order of the inner index is free: with 2·member and 2·member + 1 for the fragments' member and member + 4 the
      // accumulators are just the fragment of A.
      const float (&block)[4] = p[k / 8];
      const uint32_t fragment_a[4] = {to_tf32(block[0]), to_tf32(block[2]), to_tf32(block[1]), to_tf32(block[3])};
#pragma unroll
      for (int n = 0; n < kHS; n += 8) {
        const X* r = b.at(k + 2 * member, n + group);
        mma_m16n8k8_tf32(acc[n / 8], fragment_a, {to_tf32(r[0]), to_tf32(r[b.kPitch])});
      }
    }
  }
};

// Plain fp32, without tensor cores.
struct Fp32 {
  using X = float;

  // The value at `column` (0 to 7) of a block of accumulators, in this thread's row (first = 0) or 8 below (first = 2).
  __device__ static float column_of(const float (&block)[4], int first, int column) {
    const int lane = threadIdx.x % kWarp, owner = lane / 4 * 4 + column / 2;
    const float even = __shfl_sync(kFullMask, block[first], owner);
    const float odd = __shfl_sync(kFullMask, block[first + 1], owner);
    return column % 2 == 0 ? even : odd;
  }

  template <int kHS, int kRowsA, int kColumns>
  __device__ static void products(float (&acc)[kColumns / 8][4], Tile<X, kRowsA, kHS> a, int row,
                                  Tile<X, kColumns, kHS> b) {
    const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
#pragma unroll 1
    for (int k = 0; k < kHS; k += 4) {
      const Packed<X> upper = load128(a.at(row + group, k)), lower = load128(a.at(row + group + 8, k));
#pragma unroll
      for (int n = 0; n < kColumns; n += 8) {
        const Packed<X> left = load128(b.at(n + 2 * member, k)), right = load128(b.at(n + 2 * member + 1, k));
        float (&c)[4] = acc[n / 8];
        for (int i = 0; i < 4; i++) {
          c[0] = fmaf(upper[i], left[i], c[0]);
          c[1] = fmaf(upper[i], right[i], c[1]);
          c[2] = fmaf(lower[i], left[i], c[2]);
          c[3] = fmaf(lower[i], right[i], c[3]);
        }
      }
    }
  }

  template <int kInner, int kHS>
  __device__ static void accumulate(float (&acc)[kHS / 8][4], const float (&p)[kInner / 8][4], Tile<X, kInner, kHS> b) {
    const int member = threadIdx.x % 4;
#pragma unroll
    for (int block = 0; block < kInner / 8; block++) {
#pragma unroll 1
      for (int column = 0; column < 8; column++) {
        const float upper = column_of(p[block], 0, column), lower = column_of(p[block], 2, column);
#pragma unroll
        for (int n = 0; n < kHS; n += 8) {
          const X* r = b.at(block * 8 + column, n + 2 * member);
          float (&c)[4] = acc[n / 8];
          c[0] = fmaf(upper, r[0], c[0]);
          c[1] = fmaf(upper, r[1], c[1]);
          c[2] = fmaf(lower, r[0], c[2]);
          c[3] = fmaf(lower, r[1], c[3]);
        }
      }
    }
  }
};

// --- results ------------------------------------------------------------------------------------------------------------

// p is even.
__device__ inline void store_pair(float* p, float first, float second) {
  *reinterpret_cast<float2*>(p) = make_float2(first, second);
}
__device__ inline void store_pair(bf16* p, float first, float second) {
  *reinterpret_cast<uint32_t*>(p) = pack(first, second);
}

// Writes a warp's 16 rows of accumulators, times scale[i] for the upper (0) and lower (1) row of a thread, to rows [first, ...)
// of the head. They go through rows [row, row + 16) of a tile that nobody else uses any more, so that global memory is
// written 128 bits at a time.
template <typename X, int kRows, int kHS>
__device__ void store_rows(Head<X> head, int first, const float (&acc)[kHS / 8][4], const float (&scale)[2],
                           Tile<X, kRows, kHS> tile, int row) {
  constexpr int W = Packed<X>::size;
  constexpr int kVectors = kHS / W;
  const int lane = threadIdx.x % kWarp, group = lane / 4, member = lane % 4;
  const auto at = [=](int r, int column) {
    if constexpr (sizeof(X) == 2) return tile.at(row + r, column);
    // In fp32 half a warp writes two vectors each of four rows at a time. They fall into different banks if rows follow
    // each other without padding and the pairs of vectors change places.
    return tile.at(row, 0) + r * kHS + (column / W ^ r % 4 * 2) * W + column % W;
  };
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kHS; n += 8) {
    const float (&c)[4] = acc[n / 8];
    store_pair(at(group, n + 2 * member), c[0] * scale[0], c[1] * scale[0]);
    store_pair(at(group + 8, n + 2 * member), c[2] * scale[1], c[3] * scale[1]);
  }
  __syncwarp();
  for (int i = lane; i < kWarpRows * kVectors; i += kWarp) {
    const VectorPlace place = place_of_vector<kVectors>(i);
    const int r = place.row, column = place.column * W;
    if (first + r < head.T && column < head.HS) store128(head.at(first + r, column), load128(at(r, column)));
  }
}

// How the tiles are cut. Beside the tile of its own rows a block has two sets of the other tiles, one of which is loaded
// while it works on the other; that and the registers limit their rows. All fit into the smallest shared memory that a block
// may have on GPUs of compute capability 8.0 and more.
constexpr size_t kSmallestSharedMemory = 99 << 10;

template <typename Arithmetic, int kHS>
struct Shape {
  using X = typename Arithmetic::X;
  static constexpr bool kLarge = sizeof(X) * kHS > 128;
  static constexpr int kOther = (kLarge ? 32 : 64) / (int(sizeof(X)) / 2);
};

// Over the four threads that share a row of accumulators.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullMask, x, 2));
}
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(kFullMask, x, 1);
  return x + __shfl_xor_sync(kFullMask, x, 2);
}

}  // namespace llmc::cuda::attention
