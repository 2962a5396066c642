// What is trained (GPT2Config) and how (Options).
#pragma once

#include <cstdint>

#include "core/device.h"
#include "core/dtype.h"

namespace llmc {

struct GPT2Config {
  int64_t max_seq_len = 1024;         // maxT, rows of wpe
  int64_t vocab_size = 50257;         // V
  int64_t padded_vocab_size = 50304;  // Vp, rows of wte; rows V..Vp-1 are padding
  int64_t num_layers = 12;            // L
  int64_t num_heads = 12;             // NH
  int64_t channels = 768;             // C

  int64_t head_size() const { return channels / num_heads; }

  // Parameters as the model file counts them, padding rows of wte included.
  int64_t num_parameters() const;

  // Throws Error that names the value unless the model can be built: head sizes are multiples of 8 up to 128.
  void validate() const;
};

struct Options {
  Device device;
  int64_t batch_size = 4;         // B, rows of one micro-batch at most
  int64_t seq_len = 1024;         // T at most
  DType precision = DType::F32;   // X, storage of parameters and activations
  DType grad_dtype = DType::F32;  // G, storage of parameter gradients: X or F32
  // What the backward pass computes again, each level with those before it: 0 nothing, 1 GELU, 2 layernorms, 3 the
  // projections around attention, 4 the whole block from its input.
  int recompute = 1;
  int gelu_fusion = 0;       // 0 none, 1 forward, 2 forward and backward
  bool bias_fusion = false;  // gradients of biases inside the products of the weights' gradients; not in FP8
  // On CUDA in bf16: attention of batches (B,T) by cuDNN. Other shapes, such as a sample's, by our own kernels.
  bool cudnn_attention = false;
  bool tf32 = true;            // on CUDA, fp32 products and attention may round their operands to TF32
  bool master_weights = true;  // keep an fp32 copy of bf16 parameters
  // Sharded over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters. One rank has nothing to
  // shard: there every stage runs as 0.
  int zero_stage = 0;
  bool offload_optimizer = false;  // on CUDA: optimizer state stays in host memory, and passes through the device
  bool cuda_graphs = false;        // on CUDA: the host launches a pass over a whole batch, and the update, as one
  // On CUDA in bf16, where a batch has a multiple of 16 tokens: products in FP8 (gpt2/fp8.h), 1 those of the blocks, 2 the
  // loss head's too.
  int fp8 = 0;
  // Rows of the loss head's logits chunk, at fp8 = 2 rounded up to 16; 0: the plan chooses.
  int64_t classifier_rows = 0;
  int64_t offload_piece = 0;  // elements of the optimizer state on the device at a time; 0: the plan chooses

  // The options of a model on so many ranks.
  Options on_ranks(int world_size) const;

  bool has_master() const { return master_weights && precision != DType::F32; }

  // Throws Error that names the option unless it can run with this model.
  void validate(const GPT2Config& config) const;
};

}  // namespace llmc
