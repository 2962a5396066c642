// Kernels whose bank conflicts tests/test_cudasim_banks.py knows.
#include <cudasim/ptx.h>

#include "launch.h"

namespace {

// Lane l reads, or writes, element l·stride of shared memory; blocks of one warp or less.
template <typename T, bool kWrites>
__global__ void strided_kernel(T* x, int stride) {
  T* shared = reinterpret_cast<T*>(cudasim::dynamic_shared());
  const int lane = int(threadIdx.x);
  if (kWrites) {
    shared[lane * stride] = x[lane];
    x[lane] = T{};
  } else {
    for (int i = lane; i < 32 * stride + 1; i += int(blockDim.x)) shared[i] = x[lane];
    __syncthreads();
    x[lane] = shared[lane * stride];
  }
}

// out (32) = in (8,8) transposed, its first four rows: a tile whose columns are read, each row of 8 x 16 bytes across all
// banks. Swizzled: the columns of each row are permuted, so that no two elements of a column lie in the same banks.
template <bool kSwizzled, bool kMatrices>
__global__ void column_kernel(uint4* out, const uint4* in) {
  uint4* tile = reinterpret_cast<uint4*>(cudasim::dynamic_shared());
  const auto at = [=](int row, int column) { return tile + row * 8 + (kSwizzled ? column ^ row : column); };
  const int lane = int(threadIdx.x);
  for (int row = lane / 8; row < 8; row += 4) cudasim::cp_async_16(at(row, lane % 8), in + row * 8 + lane % 8, true);
  cudasim::cp_async_commit();
  cudasim::cp_async_wait<0>();
  __syncwarp();
  if (kMatrices) {
    uint32_t r[4];
    cudasim::ldmatrix<4, false>(r, at(lane % 8, lane / 8));
    out[lane] = uint4{r[0], r[1], r[2], r[3]};
  } else {
    out[lane] = *at(lane % 8, lane / 8);
  }
}

template <typename T>
cudaError_t run_strided(void* x, int stride, int writes, int lanes) {
  return launch(writes ? strided_kernel<T, true> : strided_kernel<T, false>, 1, unsigned(lanes), 32 << 10, nullptr,
                static_cast<T*>(x), stride);
}

template <bool kSwizzled>
cudaError_t run_columns(uint4* out, const uint4* in, int matrices) {
  return launch(matrices ? column_kernel<kSwizzled, true> : column_kernel<kSwizzled, false>, 1, 32, 1024, nullptr, out,
                in);
}

}  // namespace

// bytes: of an element.
EXPORT int strided(void* x, int bytes, int stride, int writes, int lanes) {
  switch (bytes) {
    case 2:
      return run_strided<uint16_t>(x, stride, writes, lanes);
    case 4:
      return run_strided<uint32_t>(x, stride, writes, lanes);
    case 8:
      return run_strided<uint2>(x, stride, writes, lanes);
    default:
      return run_strided<uint4>(x, stride, writes, lanes);
  }
}
EXPORT int columns(uint4* out, const uint4* in, int swizzled, int matrices) {
  return swizzled ? run_columns<true>(out, in, matrices) : run_columns<false>(out, in, matrices);
}
