// Random numbers: parameter initialisation, the model's stream, and the noise of stochastic rounding.
#pragma once

#include <cstdint>
#include <random>

#include "core/dtype.h"

namespace llmc {

// Fills x with normal values as torch's CPU normal_ does with the same generator state (same draws in the same order; the
// values agree up to the last bits of log, cos and sin). std::mt19937 seeded with s equals torch.manual_seed(s).
void normal_fill(std::mt19937& generator, float* x, int64_t n, float mean, float std);

// xorshift64* (Vigna 2016), high 32 bits of the product.
struct XorShift64 {
  uint64_t state;

  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return uint32_t((state * 0x2545F4914F6CDD1Dull) >> 32);
  }
};

// Squirrel Eiserloh's position-based noise (SquirrelNoise5): a hash of (position, seed).
LLMC_INLINE uint32_t squirrel5(uint32_t position, uint32_t seed) {
  uint32_t p = position * 0xD2A80A3Fu;
  p += seed;
  p ^= p >> 9;
  p += 0xA884F197u;
  p ^= p >> 11;
  p *= 0x6C736F4Bu;
  p ^= p >> 13;
  p += 0xB79F3ABBu;
  p ^= p >> 15;
  p *= 0x1B56C4F5u;
  p ^= p >> 17;
  return p;
}

LLMC_INLINE uint32_t noise_2d(uint32_t x, uint32_t y, uint32_t seed) { return squirrel5(x + 198491317u * y, seed); }

// Rounds x to bf16 away from zero with the probability given by its discarded bits, else towards zero.
// `noise` supplies 16 random bits.
LLMC_INLINE bf16 stochastic_round(float x, uint32_t noise) {
  const uint32_t bits = float_bits(x);
  const uint32_t lifted = (bits & 0xFFFF) > (noise & 0xFFFF) ? bits | 0xFFFF : bits & ~0xFFFFu;
  bf16 result;
  store(&result, bits_float(lifted));
  return result;
}

}  // namespace llmc
