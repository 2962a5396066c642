// The multiply-add rate of the machine, for model flops utilisation.
#include <omp.h>

#include "cpu/cpu_ops.h"

namespace llmc::cpu::LLMC_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));

constexpr int kLanes = kVectorBytes / sizeof(float);
// More than latency times multiply-adds a cycle; with two operands they fit in 16 registers.
constexpr int kChains = 12;
constexpr int64_t kSteps = 1 << 18;  // of a round: half a millisecond at 6 cycles a step and 3 GHz
constexpr double kSeconds = 0.05;

// kSteps multiply-adds in each of kChains independent chains, whose values stay near 1. (CMakeLists.txt lets the compiler
// contract the expression in this file.)
__attribute__((noinline)) float multiply_add_chains(float factor, float summand) {
  const Vector a = factor - Vector{}, b = summand - Vector{};
  Vector chains[kChains];
  for (int c = 0; c < kChains; c++) chains[c] = b * float(c);
  for (int64_t step = 0; step < kSteps; step++) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; c++) chains[c] = chains[c] * a + b;
  }
  Vector sum{};
  for (int c = 0; c < kChains; c++) sum += chains[c];
  float result = 0;
  for (int lane = 0; lane < kLanes; lane++) result += sum[lane];
  return result;
}

}  // namespace

// Every thread counts with the best of its rounds: in the others something else ran, or the clock had yet to rise.
double CpuOps::peak_flops() {
  volatile float half = 0.5f, sink;  // volatile: the compiler can neither do the work beforehand nor leave it out
  double total = 0;
#pragma omp parallel reduction(+ : total)
  {
    const double begin = omp_get_wtime();
    double end = begin, best = 0;
    while (end - begin < kSeconds) {
      const double start = omp_get_wtime();
      const float result = multiply_add_chains(half, half);
#pragma omp critical
      sink = result;
      end = omp_get_wtime();
      const double rate = 2.0 * kLanes * kChains * kSteps / (end - start);
      if (rate > best) best = rate;
    }
    total += best;
  }
  (void)sink;
  return total;
}

}  // namespace llmc::cpu::LLMC_ISA
