// Tensors in FP8: from bf16 to E4M3 or E5M2, as they lie and transposed, and the scales that this takes.
//
// A block converts a tile. A thread reads 4 rows of 8 columns (128-bit loads, eight lanes a line of 128 bytes); the four
// values of a column become a word of shared memory, and four words behind each other 16 bytes of a row of the transpose.
#include <cuda_fp8.h>

#include <cmath>

#include "core/check.h"
#include "core/integers.h"
#include "cuda/cuda_ops.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace llmc::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 64, kColumns = 128;  // of a tile
constexpr int kThreadRows = 4, kThreadColumns = 8;
constexpr int kRowGroups = kRows / kThreadRows, kColumnGroups = kColumns / kThreadColumns;
constexpr int kWords = kRowGroups + 4;  // of a column in shared memory: by the padding no bank is asked twice at once
constexpr int kVector = 16;             // values of a 128-bit store of the transpose

struct E4M3 {
  static constexpr __nv_fp8_interpretation_t kind = __NV_E4M3;
};
struct E5M2 {
  static constexpr __nv_fp8_interpretation_t kind = __NV_E5M2;
};

// Two values in 16 bits, the first in the lower ones. The instruction makes the largest number of an infinity, which
// nobody would see any more.
template <typename Format>
__device__ uint32_t quantized(float a, float b, float scale) {
  a = is_finite(a) ? a * scale : NAN;
  b = is_finite(b) ? b * scale : NAN;
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, Format::kind);
}

// Byte k of a word from word k.
__device__ inline uint32_t bytes_of_words(const uint32_t (&words)[4], int byte) {
  uint32_t result = 0;
  for (int k = 0; k < 4; k++) result |= (words[k] >> (8 * byte) & 0xFF) << (8 * k);
  return result;
}

// The bits of numbers that are not negative are ordered as they are, infinity and NaN above all: their maximum does not
// depend on the order of the blocks.
template <typename Format, bool kOut, bool kTransposed>
__global__ void __launch_bounds__(kThreads) quantize_kernel(uint8_t* out, uint8_t* transposed, uint32_t* amax,
                                                            const bf16* x, const float* scale, int64_t N, int C) {
  after_previous_kernel();
  __shared__ uint32_t warp_max[kWarps];
  alignas(16) __shared__ uint32_t tile[kTransposed ? kColumns * kWords : 1];
  const int tiles = int(divide_up(int64_t(C), kColumns));  // side by side
  const int64_t first_row = int64_t(blockIdx.x / tiles) * kRows;
  const int first_column = int(blockIdx.x % tiles) * kColumns;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column_group = lane % 8 + warp % 2 * 8, row_group = lane / 8 + warp / 2 * 4;
  const int64_t row = first_row + row_group * kThreadRows;
  const int column = first_column + column_group * kThreadColumns;

  uint32_t largest = 0;
  uint32_t rows[kThreadRows][kThreadColumns / 4] = {};
  if (row < N && column < C) {  // N and C are multiples of 16
    Packed<bf16> packs[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) packs[i] = load128(x + (row + i) * C + column);
    const float factor = kOut || kTransposed ? *scale : 1;
#pragma unroll
    for (int i = 0; i < kThreadRows; i++) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; j += 2) {
        const float a = to_float(packs[i][j]), b = to_float(packs[i][j + 1]);
        largest = max(largest, max(float_bits(fabsf(a)), float_bits(fabsf(b))));
        if (kOut || kTransposed) rows[i][j / 4] |= quantized<Format>(a, b, factor) << (j % 4 * 8);
      }
      if (kOut) *reinterpret_cast<uint2*>(out + (row + i) * C + column) = make_uint2(rows[i][0], rows[i][1]);
    }
  }
  if (amax) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      largest = max(largest, __shfl_xor_sync(kFullMask, largest, offset));
    }
    if (lane == 0) warp_max[warp] = largest;
  }
  // Columns lie in the order in which the lanes of a warp have them.
  if constexpr (kTransposed) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; j++) {
      const uint32_t words[4] = {rows[0][j / 4], rows[1][j / 4], rows[2][j / 4], rows[3][j / 4]};
      tile[(j * kColumnGroups + column_group) * kWords + row_group] = bytes_of_words(words, j % 4);
    }
  }
  __syncthreads();
  if (amax && threadIdx.x == 0) {
    for (int w = 1; w < kWarps; w++) largest = max(largest, warp_max[w]);
    atomicMax(amax, largest);
  }
  if constexpr (kTransposed) {
    // Four lanes have the 64 values of a column, the eight lanes of a wavefront columns of which none shares a bank.
    const int vector = lane % 4, nth = lane / 8 + lane / 4 % 2 * 4;
    const int64_t first = first_row + vector * kVector;
#pragma unroll
    for (int eight = warp; eight < kColumns / 8; eight += kWarps) {
      const int place = eight * 8 + nth;
      const int c = first_column + place % kColumnGroups * kThreadColumns + place / kColumnGroups;
      if (c < C && first < N) {
        store128(reinterpret_cast<uint32_t*>(transposed + c * N + first), load128(tile + place * kWords + vector * 4));
      }
    }
  }
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

template <typename Format, bool kOut, bool kTransposed>
void launch_quantize(Tensor out, Tensor transposed, Tensor amax, Tensor x, Tensor scale, cudaStream_t stream) {
  const int64_t N = x.rows(), C = x.last();
  LLMC_CHECK(x.dtype == DType::BF16, "quantize: x is %s, it must be bf16", name_of(x.dtype));
  LLMC_CHECK(N % 16 == 0 && C % 16 == 0, "quantize: x is (%lld,%lld), both must be multiples of 16",
             static_cast<long long>(N), static_cast<long long>(C));
  const int64_t blocks = divide_up(N, int64_t(kRows)) * divide_up(C, int64_t(kColumns));
  launch(quantize_kernel<Format, kOut, kTransposed>, unsigned(blocks), kThreads, 0, stream, out.as<uint8_t>(),
         transposed.as<uint8_t>(), amax.as<uint32_t>(), x.as<bf16>(), scale.as<float>(), N, int(C));
}

template <typename Format>
void quantize_to(Tensor out, Tensor transposed, Tensor amax, Tensor x, Tensor scale, cudaStream_t stream) {
  if (out && transposed) {
    launch_quantize<Format, true, true>(out, transposed, amax, x, scale, stream);
  } else if (out) {
    launch_quantize<Format, true, false>(out, transposed, amax, x, scale, stream);
  } else {
    launch_quantize<Format, false, true>(out, transposed, amax, x, scale, stream);
  }
}

}  // namespace

void CudaOps::quantize(Tensor out, Tensor transposed, Tensor amax, Tensor x, Tensor scale) {
  const DType format = out ? out.dtype : transposed.dtype;
  if (format == DType::E4M3) {
    quantize_to<E4M3>(out, transposed, amax, x, scale, stream_);
  } else {
    quantize_to<E5M2>(out, transposed, amax, x, scale, stream_);
  }
}

void CudaOps::fp8_scale(Tensor scale, Tensor x, DType format) {
  const Tensor amax = make_tensor(scratch(sizeof(float)), DType::F32, 1);
  fill_zero(amax);
  launch_quantize<E4M3, false, false>(Tensor{}, Tensor{}, amax, x, Tensor{}, stream_);
  launch(scale_kernel, 1, 1, 0, stream_, scale.as<float>(), amax.as<float>(), format == DType::E5M2);
}

void CudaOps::update_fp8_scales(Tensor scales, Tensor history, Tensor amax, Tensor grad_scale, int64_t first_e5m2) {
  const int64_t n = history.rows();
  launch(update_scales_kernel, blocks_for(n, kThreads), kThreads, 0, stream_, scales.as<float>(), history.as<float>(),
         amax.as<float>(), grad_scale.as<float>(), int(n), int(history.last()), int(first_e5m2));
}

}  // namespace llmc::cuda
