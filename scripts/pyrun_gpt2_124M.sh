#!/usr/bin/env bash
# run_gpt2_124M.sh with the PyTorch reference, to compare. It writes no checkpoints.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-8}
data="llmc-data fineweb makes them"
flags=(
  --model d12
  --input_bin 'dev/data/fineweb10B/fineweb_train_*.bin'
  --input_val_bin 'dev/data/fineweb10B/fineweb_val_*.bin'
  --output_dir pylog_gpt2_124M
  --val_loss_every 250
  --sample_every 0
  --write_tensors 0           # no files to test against
  --batch_size 32             # half of run_gpt2_124M.sh's: PyTorch needs more memory
  --sequence_length 1024
  --total_batch_size 524288
  --overfit_single_batch 0
  --dtype bfloat16
  --compile 1
  --tensorcores 1
  --flash 1
  --zero_stage 1
  --weight_decay 0.1
  --learning_rate 0.0006
  --warmup_iters 700
  --learning_rate_decay_frac 0.0
  --num_iterations 18865
)
train_reference "$@"
