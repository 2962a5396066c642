// Matrix products and the bias gradient.
//
// A product is cut into tiles of its result by a rule that looks at shape and library alone; each tile is one single-threaded
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
#include "cpu/panel.h"
#include "cpu/scratch.h"

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

// How a product is cut, and which operands of its tiles are copied to panels, contiguous fp32 in the thread's scratch. (Those
// of bf16 always are.)
struct Cut {
  TileShape largest;
  bool left_panel, right_panel;
};

// By measurement on a Xeon with AVX-512 and 2 MiB of L2 (MKL) and an EPYC of Zen 4 (OpenBLAS), at the shapes of GPT-2 124M
// and of small models. BLAS with direct kernels is fastest, at 90 % of the peak, where these can run: with up to 144 columns
// or 128 rows in a tile, and operands that are not transposed and have rows less than pages apart. So it pays to transpose
// weights for them, but not small ones, and not for a library that packs what it gets (2 % slower then): it packs the left
// operand anew for each tile, so that wider tiles are up to 5 % faster.
constexpr int64_t kLargeProduct = 256 << 20;  // operations
constexpr int64_t kFarRow = 1024;             // elements

bool suits_direct_kernels(int64_t m, int64_t n, int64_t k) {
  return 2 * m * n * k > kLargeProduct && blas::has_direct_kernels();
}

// x·weightᵀ
Cut cut_of_forward(int64_t m, int64_t n, int64_t k) {
  if (!blas::has_direct_kernels()) return {{512, 256, 0.25f}, false, false};
  return suits_direct_kernels(m, n, k) ? Cut{{512, 144, 0.25f}, false, true} : Cut{{512, 144, 0.125f}, false, false};
}

// dout·weight
Cut cut_of_backward_input(int64_t n) {
  return {n > 2 * kFarRow ? TileShape{512, 768, 3} : TileShape{128, 768, 1}, false, false};
}

// doutᵀ·x
Cut cut_of_backward_weight(int64_t m, int64_t n, int64_t k) {
  return suits_direct_kernels(m, n, k) && n <= kFarRow ? Cut{{128, 1024, 4}, m > kFarRow, false}
                                                       : Cut{{384, 768, 4}, false, false};
}

constexpr int64_t kFewTiles = 8;           // more cost 5 % for repeated packing, fewer leave cores idle
constexpr int64_t kSmallTile = 8 << 20;    // operations; a tile with less (20 us of a core) is not halved
constexpr int64_t kLargeTile = 640 << 20;  // operations; a tile with more (3 ms of a core) is halved
constexpr int64_t kLargeArea = 256 * 256;  // elements; unless it has fewer than that
template <typename X>
constexpr int64_t kDepth = std::is_same_v<X, float> ? 768 : 512;  // of the panels: one in fp32, two in bf16, for the L2
constexpr int64_t kStrip = 64;                                    // columns of a work item of the bias gradient

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

// Where an fp32 tensor can be used in place; bf16 goes through scratch.
float* fp32_or_null(float* x) { return x; }
float* fp32_or_null(bf16*) { return nullptr; }
const float* fp32_or_null(const float* x) { return x; }
const float* fp32_or_null(const bf16*) { return nullptr; }

// c (rows,cols), row stride ldc = or += the tile of the product at (row, col). The panels lie in `scratch`.
template <typename X>
void tile_product(const Product<X>& p, bool left_panel, bool right_panel, int64_t row, int64_t col, int64_t rows,
                  int64_t cols, bool accumulate, float* c, int64_t ldc, float* scratch) {
  const int64_t block = left_panel || right_panel ? min(kDepth<X>, p.k) : p.k;
  float* const a_panel = scratch;
  float* const b_panel = scratch + (left_panel ? rows * block : 0);
  for (int64_t k = 0; k < p.k; k += block) {
    const int64_t depth = min(block, p.k - k), lda = p.transpose_a ? p.m : p.k, ldb = p.transpose_b ? p.k : p.n;
    const X* a = p.a + (p.transpose_a ? k * lda + row : row * lda + k);
    const X* b = p.b + (p.transpose_b ? col * ldb + k : k * ldb + col);
    if (left_panel) copy_panel(a_panel, a, lda, p.transpose_a ? depth : rows, p.transpose_a ? rows : depth);
    if (right_panel && p.transpose_b) copy_transposed(b_panel, b, ldb, cols, depth);
    if (right_panel && !p.transpose_b) copy_panel(b_panel, b, ldb, depth, cols);
    blas::gemm(p.transpose_a, p.transpose_b && !right_panel, rows, cols, depth, left_panel ? a_panel : fp32_or_null(a),
               left_panel ? (p.transpose_a ? rows : depth) : lda, right_panel ? b_panel : fp32_or_null(b),
               right_panel ? cols : ldb, accumulate || k > 0, c, ldc);
  }
}

// Computes every tile of the product and passes its rows to finish(index of the first element in the result, its column,
// number of elements, their fp32 values). With `direct`, an fp32 tensor of the result's shape, the values are there
// (accumulate: added to what was there), and finish may overwrite them; otherwise they are in scratch.
template <typename X, typename Finish>
void multiply(const Product<X>& p, const Cut& how, float* direct, bool accumulate, Finish&& finish) {
  constexpr bool kWiden = !std::is_same_v<X, float>;
  const bool left_panel = kWiden || how.left_panel, right_panel = kWiden || how.right_panel;
  const Tiles tiles = cut(p.m, p.n, p.k, how.largest);
  const int64_t count = tiles.down * tiles.across;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t row = tile % tiles.down * tiles.rows, col = tile / tiles.down * tiles.cols;
    const int64_t rows = min(tiles.rows, p.m - row), cols = min(tiles.cols, p.n - col);
    const int64_t own = direct ? 0 : rows * cols;
    const int64_t panels = ((left_panel ? rows : 0) + (right_panel ? cols : 0)) * min(kDepth<X>, p.k);
    float* scratch = own + panels > 0 ? thread_scratch(own + panels) : nullptr;
    float* c = direct ? direct + row * p.n + col : scratch;
    const int64_t ldc = direct ? p.n : cols;
    tile_product(p, left_panel, right_panel, row, col, rows, cols, accumulate, c, ldc, scratch + own);
    for (int64_t r = 0; r < rows; ++r) finish((row + r) * p.n + col, col, cols, c + r * ldc);
  }
}

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
  multiply(product, cut_of_forward(m, n, k), fp32_or_null(linear), false,
           [&](int64_t at, int64_t col, int64_t count, const float* c) {
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
  multiply(product, cut_of_backward_input(n), fp32_or_null(dx), false,
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
  multiply(product, cut_of_backward_weight(m, n, k), direct, direct != nullptr && accumulate, add);
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

void CpuOps::matmul_bias_backward_weight(Tensor dweight, Tensor dbias, Tensor dout, Tensor x, bool accumulate) {
  matmul_backward_weight(dweight, dout, x, accumulate);
  bias_backward(dbias, dout, accumulate);
}

}  // namespace llmc::cpu::LLMC_ISA
