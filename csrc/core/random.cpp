#include "core/random.h"

#include <cmath>

namespace llmc {
namespace {

constexpr float kTwoPi = 6.283185307179586f;
constexpr int64_t kGroup = 16;

float uniform_float(std::mt19937& generator) { return float(generator() & 0xFFFFFF) * 0x1p-24f; }

double uniform_double(std::mt19937& generator) {
  const uint64_t high = generator();
  const uint64_t low = generator();
  return double(((high << 32) | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

// Box-Muller on one group of 16 uniform values.
void transform_group(float* x, float mean, float std) {
  for (int64_t j = 0; j < kGroup / 2; j++) {
    const float u1 = 1 - x[j];
    const float u2 = x[j + kGroup / 2];
    const float radius = std::sqrt(-2 * std::log(u1 + 1e-12f));
    const float theta = kTwoPi * u2;
    x[j] = radius * std::cos(theta) * std + mean;
    x[j + kGroup / 2] = radius * std::sin(theta) * std + mean;
  }
}

}  // namespace

void normal_fill(std::mt19937& generator, float* x, int64_t n, float mean, float std) {
  if (n >= kGroup) {
    for (int64_t i = 0; i < n; i++) x[i] = uniform_float(generator);
    for (int64_t i = 0; i + kGroup <= n; i += kGroup) transform_group(x + i, mean, std);
    if (n % kGroup != 0) {  // torch draws the last 16 positions again
      float* tail = x + n - kGroup;
      for (int64_t i = 0; i < kGroup; i++) tail[i] = uniform_float(generator);
      transform_group(tail, mean, std);
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 2) {
    const float a = float(uniform_double(generator));
    const float b = float(uniform_double(generator));
    const float radius = std::sqrt(-2 * std::log(1 - b + 1e-12f));
    const float theta = kTwoPi * a;
    x[i] = radius * std::cos(theta) * std + mean;
    if (i + 1 < n) x[i + 1] = radius * std::sin(theta) * std + mean;
  }
}

}  // namespace llmc
