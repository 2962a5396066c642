// Tensors in FP8: from bf16 to E4M3 or E5M2, as they lie and transposed, and the scales that this takes.
//
// A block converts a tile, and what a product would read next is computed on the way, so that it is never in memory in
// bf16: GELU, its gradient, and the sum of a gradient's rows. A thread takes 4 rows of 8 columns (128-bit loads, eight
// lanes a line of 128 bytes); the four values of a column become a word of shared memory, and four words behind each
// other 16 bytes of a row of the transpose.
#include "cuda/fp8.cuh"

#include "core/check.h"
#include "core/dispatch.h"
#include "core/integers.h"
#include "cuda/column_sums.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/gelu.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "ops/workspace.h"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = workspace::kFp8TileRows, kColumns = 128;  // of a tile
constexpr int kThreadRows = 4, kThreadColumns = 8;
constexpr int kRowGroups = kRows / kThreadRows, kColumnGroups = kColumns / kThreadColumns;
constexpr int kWords = kRowGroups + 4;  // of a column in shared memory: by the padding no bank is asked twice at once
constexpr int kSumStride = kColumnGroups + 4;  // likewise, of the sums of every eighth column
constexpr int kVector = 16;                    // values of a 128-bit store of the transpose

// The tile of a block, and a thread's part of it. Tiles of a row of tiles are behind each other.
struct Tile {
  int64_t first_row, row;
  int first_column, column;
  int lane, warp, column_group, row_group;

  __device__ explicit Tile(int C) {
    const int side_by_side = int(divide_up(int64_t(C), kColumns));
    first_row = int64_t(blockIdx.x / side_by_side) * kRows;
    first_column = int(blockIdx.x % side_by_side) * kColumns;
    lane = threadIdx.x % kWarp;
    warp = threadIdx.x / kWarp;
    column_group = lane % 8 + warp % 2 * 8;
    row_group = lane / 8 + warp / 2 * 4;
    row = first_row + row_group * kThreadRows;
    column = first_column + column_group * kThreadColumns;
  }
};

int64_t tiles(int64_t N, int64_t C) { return divide_up(N, int64_t(kRows)) * divide_up(C, int64_t(kColumns)); }

// Byte k of a word from word k.
__device__ inline uint32_t bytes_of_words(const uint32_t (&words)[4], int byte) {
  uint32_t result = 0;
  for (int k = 0; k < 4; k++) result |= (words[k] >> (8 * byte) & 0xFF) << (8 * k);
  return result;
}

// The tile from all threads' rows of it, by the whole block; N and C are multiples of 16.
__device__ inline void store_transposed(uint8_t* transposed, const uint2 (&rows)[kThreadRows], const Tile& t, int64_t N,
                                        int C) {
  alignas(16) __shared__ uint32_t tile[kColumns * kWords];
  // Columns lie in the order in which the lanes of a warp have them.
#pragma unroll
  for (int j = 0; j < kThreadColumns; j++) {
    const uint32_t words[4] = {j < 4 ? rows[0].x : rows[0].y, j < 4 ? rows[1].x : rows[1].y,
                               j < 4 ? rows[2].x : rows[2].y, j < 4 ? rows[3].x : rows[3].y};
    tile[(j * kColumnGroups + t.column_group) * kWords + t.row_group] = bytes_of_words(words, j % 4);
  }
  __syncthreads();
  // Four lanes have the 64 values of a column, the eight lanes of a wavefront columns of which none shares a bank.
  const int vector = t.lane % 4, nth = t.lane / 8 + t.lane / 4 % 2 * 4;
  const int64_t first = t.first_row + vector * kVector;
#pragma unroll
  for (int eight = t.warp; eight < kColumns / 8; eight += kWarps) {
    const int place = eight * 8 + nth;
    const int c = t.first_column + place % kColumnGroups * kThreadColumns + place / kColumnGroups;
    if (c < C && first < N) {
      store128(reinterpret_cast<uint32_t*>(transposed + c * N + first), load128(tile + place * kWords + vector * 4));
    }
  }
}

// sums[column] = the sum over the tile's rows, from all threads' sums of theirs, by the whole block.
__device__ inline void store_sums(float* sums, float (&own)[kThreadColumns], const Tile& t, int C) {
  constexpr int kParts = kRowGroups / 4;  // of the rows, each of a warp
  __shared__ float parts[kParts][kThreadColumns * kSumStride];
#pragma unroll
  for (int j = 0; j < kThreadColumns; j++) {
    own[j] += __shfl_xor_sync(kFullMask, own[j], 8);
    own[j] += __shfl_xor_sync(kFullMask, own[j], 16);
    if (t.lane < 8) parts[t.row_group / 4][j * kSumStride + t.column_group] = own[j];
  }
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kColumns || t.first_column + column >= C) return;
  const int place = column % kThreadColumns * kSumStride + column / kThreadColumns;
  float sum = 0;
  for (int p = 0; p < kParts; p++) sum += parts[p][place];
  sums[t.first_column + column] = sum;
}

// What is converted: a number of x, with one of pre if there is that tensor, too.
struct Itself {
  static constexpr bool kPre = false;
  __device__ static float value(float x, float) { return x; }
};
struct Gelu {
  static constexpr bool kPre = false;
  __device__ static float value(float x, float) { return gelu<bf16>(x); }
};
struct GeluGradient {
  static constexpr bool kPre = true;
  __device__ static float value(float x, float pre) { return x * gelu_grad<bf16>(pre); }
};

// sums f32 (rows of tiles,C): over the rows of each. out, transposed, amax and sums may be absent.
template <typename Format, typename Source>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(uint8_t* out, uint8_t* transposed, uint32_t* amax, float* sums, const bf16* x, const bf16* pre,
                    const float* scale, int64_t N, int C) {
  after_previous_kernel();
  const Tile t(C);
  uint32_t largest = 0;
  uint2 rows[kThreadRows] = {};
  float own_sums[kThreadColumns] = {};
  if (t.row < N && t.column < C) {
    Packed<bf16> xs[kThreadRows], pres[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
      const int64_t at = (t.row + i) * C + t.column;
      xs[i] = load128(x + at);
      if constexpr (Source::kPre) pres[i] = load128(pre + at);
    }
    const float factor = scale ? *scale : 1;
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
      float values[kThreadColumns];
#pragma unroll
      for (int j = 0; j < kThreadColumns; j++) {
        values[j] = Source::value(to_float(xs[i][j]), Source::kPre ? to_float(pres[i][j]) : 0);
        largest = max(largest, magnitude(values[j]));
        own_sums[j] += values[j];
      }
      rows[i] = quantized<Format>(values, factor);
      if (out) *reinterpret_cast<uint2*>(out + (t.row + i) * C + t.column) = rows[i];
    }
  }
  if (amax) raise_amax<kThreads>(amax, largest);
  if (transposed) store_transposed(transposed, rows, t, N, C);
  if (sums) store_sums(sums + t.first_row / kRows * C, own_sums, t, C);
}

__global__ void __launch_bounds__(kThreads) transpose_kernel(uint8_t* out, const uint8_t* x, int64_t N, int C) {
  after_previous_kernel();
  const Tile t(C);
  uint2 rows[kThreadRows] = {};
  if (t.row < N && t.column < C) {
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) rows[i] = *reinterpret_cast<const uint2*>(x + (t.row + i) * C + t.column);
  }
  store_transposed(out, rows, t, N, C);
}

// Of n tensors, as the bits of numbers that are not negative.
__global__ void __launch_bounds__(kThreads) raise_kernel(uint32_t* amax, const uint32_t* other, int n) {
  after_previous_kernel();
  const int i = int(thread_index());
  if (i < n) amax[i] = max(amax[i], other[i]);
}

// The largest power of two by which a number amax is still finite in the format, and its inverse; 1 where amax says
// nothing. The largest numbers are 1.75·2^8 and 1.75·2^15.
__device__ void store_scale(float* scale, float amax, bool e5m2) {
  const uint32_t bits = float_bits(amax);
  int exponent = 0;
  if (amax > 0 && is_finite(amax)) {
    exponent = (e5m2 ? 15 : 8) - (int(bits >> 23) - 127) - ((bits & 0x7FFFFF) > 0x600000 ? 1 : 0);
    exponent = min(exponent, 126);  // so that the inverse is a normal number
  }
  scale[0] = bits_float(uint32_t(127 + exponent) << 23);
  scale[1] = bits_float(uint32_t(127 - exponent) << 23);
}

__global__ void scale_kernel(float* scale, const float* amax, bool e5m2) {
  after_previous_kernel();
  store_scale(scale, *amax, e5m2);
}

// One tensor per thread.
__global__ void __launch_bounds__(kThreads)
    update_scales_kernel(float* scales, float* history, const float* amax, const float* grad_scale, int n, int window,
                         int first_e5m2) {
  after_previous_kernel();
  const int i = int(thread_index());
  if (i >= n) return;
  float* own = history + i * window;
  if (amax && is_finite(*grad_scale) && is_finite(amax[i])) {
    for (int k = 1; k < window; k++) own[k - 1] = own[k];
    own[window - 1] = amax[i];
  }
  float largest = 0;
  for (int k = 0; k < window; k++) largest = fmaxf(largest, own[k]);
  store_scale(scales + 2 * i, largest, i >= first_e5m2);
}

void check_sizes(const char* operation, Tensor x) {
  LLMC_CHECK(x.rows() % 16 == 0 && x.last() % 16 == 0, "%s: x is (%lld,%lld), both must be multiples of 16", operation,
             static_cast<long long>(x.rows()), static_cast<long long>(x.last()));
}

void check_source(const char* operation, Tensor x) {
  LLMC_CHECK(x.dtype == DType::BF16, "%s: x is %s, it must be bf16", operation, name_of(x.dtype));
  check_sizes(operation, x);
}

template <typename Format, typename Source>
void quantize_to(const Fp8Out& out, float* sums, Tensor x, Tensor pre, cudaStream_t stream) {
  launch(quantize_kernel<Format, Source>, unsigned(tiles(x.rows(), x.last())), kThreads, 0, stream,
         out.values.as<uint8_t>(), out.transposed.as<uint8_t>(), out.amax.as<uint32_t>(), sums, x.as<bf16>(),
         pre.as<bf16>(), out.scale.as<float>(), x.rows(), int(x.last()));
}

}  // namespace

void CudaOps::quantize(const Fp8Out& out, Tensor x) {
  check_source("quantize", x);
  const DType format = out.values ? out.values.dtype : out.transposed.dtype;
  if (format == DType::E5M2) {
    quantize_to<E5M2, Itself>(out, nullptr, x, Tensor{}, stream_);
  } else {
    quantize_to<E4M3, Itself>(out, nullptr, x, Tensor{}, stream_);
  }
}

void CudaOps::quantize_gelu(const Fp8Out& out, Tensor pre) {
  check_source("quantize_gelu", pre);
  quantize_to<E4M3, Gelu>(out, nullptr, pre, Tensor{}, stream_);
}

void CudaOps::quantize_gradient(const Fp8Out& out, Tensor dbias, Tensor dout, Tensor pre, bool accumulate) {
  check_source("quantize_gradient", dout);
  const int64_t N = dout.rows(), OC = dout.last();
  float* sums = dbias ? static_cast<float*>(scratch(workspace::quantize_gradient(N, OC))) : nullptr;
  if (pre) {
    quantize_to<E5M2, GeluGradient>(out, sums, dout, pre, stream_);
  } else {
    quantize_to<E5M2, Itself>(out, sums, dout, Tensor{}, stream_);
  }
  if (!dbias) return;
  dispatch(dbias.dtype, [&](auto zero) {
    using G = decltype(zero);
    add_groups<G>({dbias.as<G>()}, sums, divide_up(N, int64_t(kRows)), OC, accumulate, stream_);
  });
}

void CudaOps::fp8_transpose(Tensor out, Tensor x) {
  check_sizes("fp8_transpose", x);
  launch(transpose_kernel, unsigned(tiles(x.rows(), x.last())), kThreads, 0, stream_, out.as<uint8_t>(),
         x.as<uint8_t>(), x.rows(), int(x.last()));
}

void CudaOps::fp8_scale(Tensor scale, Tensor amax, DType format) {
  launch(scale_kernel, 1, 1, 0, stream_, scale.as<float>(), amax.as<float>(), format == DType::E5M2);
}

void CudaOps::raise_amax(Tensor amax, Tensor other) {
  const int64_t n = amax.numel();
  launch(raise_kernel, blocks_for(n, kThreads), kThreads, 0, stream_, amax.as<uint32_t>(), other.as<uint32_t>(),
         int(n));
}

void CudaOps::update_fp8_scales(Tensor scales, Tensor history, Tensor amax, Tensor grad_scale, int64_t first_e5m2) {
  const int64_t n = history.rows();
  launch(update_scales_kernel, blocks_for(n, kThreads), kThreads, 0, stream_, scales.as<float>(), history.as<float>(),
         amax.as<float>(), grad_scale.as<float>(), int(n), int(history.last()), int(first_e5m2));
}

}  // namespace llmc::cuda
