// Scratch memory of the CUDA operations in bytes, so that a memory plan can be made without a GPU. The operations of a
// step run one after the other and share it: a model needs the largest.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llmc::workspace {

constexpr int64_t kCublas = int64_t(32) << 20;  // what NVIDIA recommends for Hopper; smaller GPUs need less

// Sums over the N rows of a matrix are formed in groups of rows, which are then added. Many groups keep a GPU busy when
// there are few columns; few make the second step cheap, and the memory for their sums small when there are many
// columns. The cut depends on the shape alone, so the result is the same on every GPU.
constexpr int64_t kGroupRows = 16;  // fewest rows of a group
constexpr int64_t kMaxGroups = 512;
constexpr int64_t kMaxGroupSums = int64_t(1) << 20;  // groups · columns, unless one group has more
inline int64_t groups(int64_t N, int64_t columns) {
  return std::clamp(std::min(kMaxGroups, kMaxGroupSums / columns), int64_t(1), (N + kGroupRows - 1) / kGroupRows);
}
inline int64_t layernorm_backward(int64_t N, int64_t C) { return groups(N, C) * 2 * C * 4; }
inline int64_t bias_backward(int64_t N, int64_t OC) { return groups(N, OC) * OC * 4; }
// cuBLASLt's, and behind it the bias's gradient before it is added.
inline int64_t matmul_bias_backward_weight(int64_t OC) { return kCublas + OC * 4; }

// Of a gradient that is converted to FP8: every row of tiles has its own sums.
constexpr int kFp8TileRows = 64;
inline int64_t quantize_gradient(int64_t N, int64_t OC) { return (N + kFp8TileRows - 1) / kFp8TileRows * OC * 4; }

// Blocks of the reductions of whole buffers to one number, a block's number of threads at most.
constexpr int64_t kReduceBlocks = 1024;
inline int64_t reduce() { return kReduceBlocks * 4; }

// Σ dout·out of each row and head.
inline int64_t attention_backward(int64_t B, int64_t NH, int64_t T) { return B * NH * T * 4; }

// The same through cuDNN: what its deterministic kernels take on GPUs before Blackwell, for the gradients of the scores in
// bf16, rounded up to tiles, and Σ dout·out; on Blackwell it is the latter alone. cuDNN 9.20's plans: tests/test_cudnn.py.
inline int64_t cudnn_attention(int64_t B, int64_t NH, int64_t T) {
  const int64_t queries = (T + 63) / 64 * 64, keys = (T + 127) / 128 * 128;
  return B * NH * queries * keys * 2 + attention_backward(B, NH, T) + 256;
}

// What the step of a model with batches (B,T) needs.
inline int64_t step(int64_t B, int64_t T, int64_t C, int64_t NH, bool cudnn, bool fp8) {
  return std::max({matmul_bias_backward_weight(4 * C), layernorm_backward(B * T, C), bias_backward(B * T, 4 * C),
                   reduce(), cudnn ? cudnn_attention(B, NH, T) : attention_backward(B, NH, T),
                   fp8 ? quantize_gradient(B * T, 4 * C) : 0});
}

}  // namespace llmc::workspace
