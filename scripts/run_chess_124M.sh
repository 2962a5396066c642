#!/usr/bin/env bash
# The chess GPT with GPT-2's 12 layers on the games of June 2015, on one GPU.
# llm.c's chess fork on a laptop's RTX 3060 with 6 GB: 400 ms a step.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-1}
memory=6
data="llmc-data lichess 2015-06 makes them; other data: -i and -j"
flags=(
  -e chess:d12
  -i 'dev/data/201506/201506_train_*.bin'
  -j 'dev/data/201506/201506_val_*.bin'
  -o log_chess_124M
  -v 500   # validate every so many steps
  -s 500   # and sample
  -g 640   # so many tokens
  -lg 500  # log the GPU's clocks, power and temperature
  -b 11    # rows a pass and GPU; without -d also those of a step
  -t 1024  # tokens a row
  -r 0     # recompute nothing
  -z 1     # optimizer state cut over the GPUs, if there are several
  -c 0.1   # weight decay
  -l 7e-5  # highest learning rate,
  -q 0     # falling to this part of it
  -n 500   # checkpoint every so many steps;
  -nk 1    # keep the newest one
  -x 30000 # llmc's choice: about an epoch of 2.3 million games
)
train "$@"
