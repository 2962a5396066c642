// Matrix products and the bias gradient.
//
// A product is cut into tiles of its result by a rule that looks at the shape alone, and each tile is one single-threaded
// BLAS call followed by its epilogue (bias, GELU, GELU's derivative) while the tile is in the L2 cache. Tiles share nothing,
// so which thread computes which tile does not change a bit of the result.
// bf16: panels of the operands are widened to fp32 in the thread's scratch, products accumulate in fp32 over all of k, and
// the result is rounded once. The fused forms round where the separate operations would store, so both give the same bits.
#include <cstdint>
#include <type_traits>

#include "core/integers.h"
#include "cpu/blas.h"
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"
#include "cpu/math.h"
#include "cpu/scratch.h"
#include "cpu/widen.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

// (m,n) = op(A)·op(B), where op(A) is (m,k) and op(B) is (k,n).
template <typename X>
struct Product {
  int64_t m, n, k;
  const X* a;
  bool transpose_a;
  const X* b;
  bool transpose_b;
};

// The largest tile, and how many times wider than high a smaller one should be.
struct TileShape {
  int64_t rows, cols;
  float aspect;
};

// By measurement with MKL on a Xeon with AVX-512 and 2 MiB of L2, at the shapes of GPT-2 124M and of small models. BLAS packs
// its operands anew for every tile, and packing the transposed one costs most: x·weightᵀ wants high tiles, doutᵀ·x wide ones.
// x·weightᵀ is 4 to 8 % faster up to 144 columns than beyond; dout·weight is 10 % faster in tiles of 128 rows than in higher
// ones, but not between rows that lie 12 KiB apart: there it is 15 % slower.
constexpr TileShape kForward{512, 144, 0.125f};
constexpr TileShape kBackwardInput{128, 768, 1};
constexpr TileShape kBackwardWideInput{512, 768, 3};
constexpr int64_t kWideInput = 2048;  // columns; more are wide
constexpr TileShape kBackwardWeight{384, 768, 4};

constexpr int64_t kFewTiles = 8;           // more cost 5 % for repeated packing, fewer leave cores idle
constexpr int64_t kSmallTile = 8 << 20;    // operations; a tile with less (20 us of a core) is not halved
constexpr int64_t kLargeTile = 640 << 20;  // operations; a tile with more (3 ms of a core) is halved
constexpr int64_t kLargeArea = 256 * 256;  // elements; unless it has fewer than that
constexpr int64_t kBlockK = 512;           // depth of the bf16 panels
constexpr int64_t kStrip = 64;             // columns of a work item of the bias gradient

struct Tiles {
  int64_t rows, cols;    // of one tile; those at the edges may be smaller
  int64_t down, across;  // how many
};

// Into how many parts of at most `largest` to cut n. Few parts are a power of two, for equal shares of the usual numbers of
// threads.
int64_t parts(int64_t n, int64_t largest) {
  const int64_t needed = divide_up(n, largest);
  int64_t power = 1;
  while (power < needed) power *= 2;
  return power <= kFewTiles ? power : needed;
}

Tiles cut(int64_t m, int64_t n, int64_t k, const TileShape& largest) {
  int64_t down = parts(m, largest.rows), across = parts(n, largest.cols);
  const auto too_large = [&] {
    const int64_t count = down * across, area = m * n / count;
    return count < kFewTiles ? 2 * area * k > kSmallTile : area > kLargeArea && 2 * area * k > kLargeTile;
  };
  while (too_large()) {
    const bool high = float(m) / float(down) * largest.aspect > float(n) / float(across);
    (high ? down : across) *= 2;
  }
  const int64_t rows = round_up(divide_up(m, down), 16), cols = round_up(divide_up(n, across), 16);
  return {rows, cols, divide_up(m, rows), divide_up(n, cols)};
}

// c (rows,cols), row stride ldc = or += the tile of the product at (row, col).
void tile_product(const Product<float>& p, int64_t row, int64_t col, int64_t rows, int64_t cols, bool accumulate,
                  float* c, int64_t ldc, float* /*panels*/) {
  const int64_t lda = p.transpose_a ? p.m : p.k, ldb = p.transpose_b ? p.k : p.n;
  blas::gemm(p.transpose_a, p.transpose_b, rows, cols, p.k, 1.0f, p.a + (p.transpose_a ? row : row * lda), lda,
             p.b + (p.transpose_b ? col * ldb : col), ldb, accumulate ? 1.0f : 0.0f, c, ldc);
}

void tile_product(const Product<bf16>& p, int64_t row, int64_t col, int64_t rows, int64_t cols, bool accumulate,
                  float* c, int64_t ldc, float* panels) {
  const int64_t lda = p.transpose_a ? p.m : p.k, ldb = p.transpose_b ? p.k : p.n;
  float* a = panels;
  float* b = panels + rows * kBlockK;
  for (int64_t k = 0; k < p.k; k += kBlockK) {
    const int64_t depth = min(kBlockK, p.k - k);
    if (p.transpose_a) {
      widen(a, p.a + k * lda + row, lda, depth, rows);
    } else {
      widen(a, p.a + row * lda + k, lda, rows, depth);
    }
    if (p.transpose_b) {
      widen(b, p.b + col * ldb + k, ldb, cols, depth);
    } else {
      widen(b, p.b + k * ldb + col, ldb, depth, cols);
    }
    blas::gemm(p.transpose_a, p.transpose_b, rows, cols, depth, 1.0f, a, p.transpose_a ? rows : depth, b,
               p.transpose_b ? depth : cols, accumulate || k > 0 ? 1.0f : 0.0f, c, ldc);
  }
}

// Computes every tile of the product and passes its rows to finish(index of the first element in the result, its column,
// number of elements, their fp32 values). With `direct`, an fp32 tensor of the result's shape, the values are there
// (accumulate: added to what was there), and finish may overwrite them; otherwise they are in scratch.
template <typename X, typename Finish>
void multiply(const Product<X>& p, const TileShape& largest, float* direct, bool accumulate, Finish&& finish) {
  const Tiles tiles = cut(p.m, p.n, p.k, largest);
  const int64_t count = tiles.down * tiles.across;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t row = tile % tiles.down * tiles.rows, col = tile / tiles.down * tiles.cols;
    const int64_t rows = min(tiles.rows, p.m - row), cols = min(tiles.cols, p.n - col);
    constexpr bool kPanels = !std::is_same_v<X, float>;
    const int64_t own = direct ? 0 : rows * cols, panels = kPanels ? (rows + cols) * kBlockK : 0;
    float* scratch = own + panels > 0 ? thread_scratch(own + panels) : nullptr;
    float* c = direct ? direct + row * p.n + col : scratch;
    const int64_t ldc = direct ? p.n : cols;
    tile_product(p, row, col, rows, cols, accumulate, c, ldc, scratch + own);
    for (int64_t r = 0; r < rows; ++r) finish((row + r) * p.n + col, col, cols, c + r * ldc);
  }
}

// Where an fp32 result can be computed in place; bf16 results go through scratch.
float* fp32_or_null(float* x) { return x; }
float* fp32_or_null(bf16*) { return nullptr; }

// Rounds to the storage type X, in fp32.
template <typename X>
LLMC_INLINE float rounded(float x) {
  X stored;
  store(&stored, x);
  return to_float(stored);
}

// out = x (n elements) + bias, or x alone. out may be x.
template <typename X>
LLMC_INLINE void add_bias(X* out, const float* x, const X* bias, int64_t n) {
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + i, x[i] + to_float(bias[i]));
  } else if (static_cast<const void*>(out) != x) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out + i, x[i]);
  }
}

template <typename X>
void forward(X* out, X* pre, const X* x, const X* weight, const X* bias, int64_t m, int64_t n, int64_t k) {
  X* linear = pre ? pre : out;
  const Product<X> product{m, n, k, x, false, weight, true};
  multiply(product, kForward, fp32_or_null(linear), false, [&](int64_t at, int64_t col, int64_t count, const float* c) {
    add_bias(linear + at, c, bias ? bias + col : nullptr, count);
    if (pre) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) store(out + at + i, gelu(to_float(pre[at + i])));
    }
  });
}

template <typename X>
void backward_input(X* dx, const X* dout, const X* weight, const X* pre, int64_t m, int64_t n, int64_t k) {
  const Product<X> product{m, n, k, dout, false, weight, false};
  multiply(product, n > kWideInput ? kBackwardWideInput : kBackwardInput, fp32_or_null(dx), false,
           [&](int64_t at, int64_t, int64_t count, const float* c) {
             if (pre) {
#pragma omp simd
               for (int64_t i = 0; i < count; ++i)
                 store(dx + at + i, rounded<X>(c[i]) * gelu_grad(to_float(pre[at + i])));
             } else {
               add_bias<X>(dx + at, c, nullptr, count);
             }
           });
}

template <typename X, typename G>
void backward_weight(G* dweight, const X* dout, const X* x, int64_t m, int64_t n, int64_t k, bool accumulate) {
  const Product<X> product{m, n, k, dout, true, x, false};
  float* direct = fp32_or_null(dweight);
  const auto add = [&](int64_t at, int64_t, int64_t count, const float* c) {
    if (direct) return;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) add_to(dweight + at + i, c[i], accumulate);
  };
  multiply(product, kBackwardWeight, direct, direct != nullptr && accumulate, add);
}

// One strip of columns, summed over the rows from top to bottom.
template <typename X, typename G>
void bias_strip(G* dbias, const X* dout, int64_t rows, int64_t ld, int64_t count, bool accumulate) {
  alignas(64) float sum[kStrip] = {};
  if (count == kStrip) {  // a constant count keeps the sums in registers
    for (int64_t row = 0; row < rows; ++row, dout += ld) {
#pragma omp simd
      for (int64_t i = 0; i < kStrip; ++i) sum[i] += to_float(dout[i]);
    }
  } else {
    for (int64_t row = 0; row < rows; ++row, dout += ld) {
      for (int64_t i = 0; i < count; ++i) sum[i] += to_float(dout[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) add_to(dbias + i, sum[i], accumulate);
}

}  // namespace

void CpuOps::matmul_forward(Tensor out, Tensor x, Tensor weight, Tensor bias) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward<X>(out.as<X>(), nullptr, x.as<X>(), weight.as<X>(), bias.as<X>(), x.rows(), weight.rows(), weight.last());
  });
}

void CpuOps::matmul_gelu_forward(Tensor out, Tensor pre, Tensor x, Tensor weight, Tensor bias) {
  dispatch(x.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward<X>(out.as<X>(), pre.as<X>(), x.as<X>(), weight.as<X>(), bias.as<X>(), x.rows(), weight.rows(),
               weight.last());
  });
}

void CpuOps::matmul_backward_input(Tensor dx, Tensor dout, Tensor weight) {
  dispatch(dout.dtype, [&](auto zero) {
    using X = decltype(zero);
    backward_input<X>(dx.as<X>(), dout.as<X>(), weight.as<X>(), nullptr, dout.rows(), weight.last(), weight.rows());
  });
}

void CpuOps::matmul_gelu_backward_input(Tensor dpre, Tensor dout, Tensor weight, Tensor pre) {
  dispatch(dout.dtype, [&](auto zero) {
    using X = decltype(zero);
    backward_input<X>(dpre.as<X>(), dout.as<X>(), weight.as<X>(), pre.as<X>(), dout.rows(), weight.last(),
                      weight.rows());
  });
}

void CpuOps::matmul_backward_weight(Tensor dweight, Tensor dout, Tensor x, bool accumulate) {
  dispatch(dout.dtype, dweight.dtype, [&](auto zero_x, auto zero_g) {
    using X = decltype(zero_x);
    using G = decltype(zero_g);
    backward_weight<X, G>(dweight.as<G>(), dout.as<X>(), x.as<X>(), dout.last(), x.last(), dout.rows(), accumulate);
  });
}

void CpuOps::bias_backward(Tensor dbias, Tensor dout, bool accumulate) {
  dispatch(dout.dtype, dbias.dtype, [&](auto zero_x, auto zero_g) {
    using X = decltype(zero_x);
    using G = decltype(zero_g);
    const int64_t rows = dout.rows(), channels = dout.last();
#pragma omp parallel for schedule(static) if (rows * channels > 16384)
    for (int64_t begin = 0; begin < channels; begin += kStrip) {
      bias_strip<X, G>(dbias.as<G>() + begin, dout.as<X>() + begin, rows, channels, min(kStrip, channels - begin),
                       accumulate);
    }
  });
}

}  // namespace llmc::cpu::LLMC_ISA
