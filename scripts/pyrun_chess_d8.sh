#!/usr/bin/env bash
# run_chess_d8.sh with the PyTorch reference, to compare. It writes no checkpoints.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-1}
data="llmc-data lichess 2015-06 makes them"
flags=(
  --model chess:d8
  --input_bin 'dev/data/201506/201506_train_*.bin'
  --input_val_bin 'dev/data/201506/201506_val_*.bin'
  --output_dir pylog_chess_d8
  --val_loss_every 500
  --sample_every 0
  --write_tensors 0           # no files to test against
  --batch_size 14             # half of run_chess_d8.sh's: PyTorch needs more memory
  --sequence_length 1024
  --total_batch_size 28672
  --overfit_single_batch 0
  --dtype bfloat16
  --compile 1
  --tensorcores 1
  --flash 1
  --weight_decay 0.1
  --learning_rate 0.0003
  --warmup_iters 700
  --learning_rate_decay_frac 0.0
  --num_iterations 12000
)
train_reference "$@"
