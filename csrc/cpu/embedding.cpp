// Token and position embedding.
//
// Forward: rows in parallel. Backward: one work item is one row of dwte or dwpe and one block of its columns. The item
// sums its rows of dout in a fixed order in a small buffer and adds the sum once, so nothing depends on who runs it.
#include <cstdint>

#include "core/random.h"
#include "cpu/cpu_ops.h"
#include "core/dispatch.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

constexpr int64_t kColumns = 256;           // columns of a work item
constexpr int64_t kParallelWork = 1 << 14;  // elements below which threads do not pay

template <typename X>
void forward(X* out, const int32_t* tokens, const X* wte, const X* wpe, int64_t N, int64_t T, int64_t C) {
#pragma omp parallel for schedule(static) if (N * C >= kParallelWork)
  for (int64_t n = 0; n < N; n++) {
    X* row = out + n * C;
    const X* token_row = wte + tokens[n] * C;
    const X* position_row = wpe + (n % T) * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) store(&row[c], to_float(token_row[c]) + to_float(position_row[c]));
  }
}

LLMC_INLINE void add_once(float* p, float sum, uint32_t, uint32_t, uint32_t) { *p += sum; }
LLMC_INLINE void add_once(bf16* p, float sum, uint32_t column, uint32_t row, uint32_t seed) {
  *p = stochastic_round(to_float(*p) + sum, noise_2d(column, row, seed));
}

// target[row, begin : begin + kColumns] += Σ_i dout[position(i), same columns], i = 0..count-1.
template <typename G, typename X, typename Position>
LLMC_INLINE void add_rows(G* target, const X* dout, int64_t row, int64_t begin, int64_t C, int64_t count,
                          Position position, uint32_t seed) {
  const int64_t width = C - begin < kColumns ? C - begin : kColumns;
  float sum[kColumns] = {};
  for (int64_t i = 0; i < count; i++) {
    const X* source = dout + position(i) * C + begin;
#pragma omp simd
    for (int64_t c = 0; c < width; c++) sum[c] += to_float(source[c]);
  }
  G* p = target + row * C + begin;
#pragma omp simd
  for (int64_t c = 0; c < width; c++) add_once(&p[c], sum[c], uint32_t(begin + c), uint32_t(row), seed);
}

template <typename G, typename X>
void backward(G* dwte, G* dwpe, const X* dout, const int32_t* tokens, const int32_t* order, int64_t B, int64_t T,
              int64_t C, uint32_t seed) {
  const int64_t N = B * T;
#pragma omp parallel if (N * C >= kParallelWork)
  {
    // The item of a token's first occurrence in order does all of them.
#pragma omp for collapse(2) schedule(dynamic, 32) nowait
    for (int64_t begin = 0; begin < C; begin += kColumns) {
      for (int64_t first = 0; first < N; first++) {
        const int32_t token = tokens[order[first]];
        if (first > 0 && tokens[order[first - 1]] == token) continue;
        int64_t end = first + 1;
        while (end < N && tokens[order[end]] == token) end++;
        add_rows(dwte, dout, token, begin, C, end - first, [=](int64_t i) { return order[first + i]; }, seed);
      }
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t begin = 0; begin < C; begin += kColumns) {
      for (int64_t t = 0; t < T; t++) {
        add_rows(dwpe, dout, t, begin, C, B, [=](int64_t b) { return b * T + t; }, seed + 1);
      }
    }
  }
}

}  // namespace

void CpuOps::embedding_forward(Tensor out, Tensor tokens, Tensor wte, Tensor wpe) {
  dispatch(out.dtype, [&](auto zero) {
    using X = decltype(zero);
    forward(out.as<X>(), tokens.as<int32_t>(), wte.as<X>(), wpe.as<X>(), tokens.numel(), tokens.last(), out.last());
  });
}

void CpuOps::embedding_backward(Tensor dwte, Tensor dwpe, Tensor dout, Tensor tokens, Tensor order, uint32_t seed) {
  dispatch(dwte.dtype, dout.dtype, [&](auto g, auto x) {
    using G = decltype(g);
    using X = decltype(x);
    backward(dwte.as<G>(), dwpe.as<G>(), dout.as<X>(), tokens.as<int32_t>(), order.as<int32_t>(), tokens.rows(),
             tokens.last(), dout.last(), seed);
  });
}

}  // namespace llmc::cpu::LLMC_ISA
