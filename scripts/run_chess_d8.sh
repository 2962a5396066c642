#!/usr/bin/env bash
# The chess GPT with 8 layers of 512 channels on the games of June 2015, on one GPU or, slowly, a CPU.
# llm.c's chess fork on a laptop's RTX 3060 with 6 GB: 380 ms a step.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-1}
memory=6
data="llmc-data lichess 2015-06 makes them; other data: -i and -j"
flags=( # as run_chess_124M.sh, but for those that are marked as llmc's choice
  -e chess:d8
  -i 'dev/data/201506/201506_train_*.bin'
  -j 'dev/data/201506/201506_val_*.bin'
  -o log_chess_d8
  -v 500    # validate every so many steps
  -s 500    # and sample
  -g 640    # so many tokens
  -b 28     # rows a pass and GPU
  -t 1024   # tokens a row
  -d 28672  # llmc's choice: tokens a step stay the same whatever -b is
  -r 0      # recompute nothing
  -z 1      # optimizer state cut over the GPUs, if there are several
  -c 0.1    # weight decay
  -l 0.0003 # llmc's choice: a smaller model learns faster; highest learning rate, after
  -u 700    # llmc's choice: so many steps,
  -q 0      # falling to this part of it
  -n 500    # checkpoint every so many steps;
  -nk 1     # keep the newest one
  -x 12000  # llmc's choice: about an epoch of 2.3 million games
)
train "$@"
