#!/usr/bin/env bash
# GPT-2 (124M) on 10 billion tokens of FineWeb, an epoch.
# llm.c on 8 A100 with 80 GB: 300 ms a step, 94 minutes, about $20.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-8}
memory=80
data="llmc-data fineweb makes them; other data: -i and -j"
flags=(
  -e d12
  -i 'dev/data/fineweb10B/fineweb_train_*.bin'
  -j 'dev/data/fineweb10B/fineweb_val_*.bin'
  -o log_gpt2_124M
  -v 250    # validate every so many steps,
  -h 1      # with HellaSwag, where its file is there
  -s 20000  # sample at the end only,
  -g 144    # so many tokens
  -b 64     # rows a pass and GPU: with less memory lower this alone, -d stays
  -t 1024   # tokens a row
  -d 524288 # tokens a step, on all GPUs together
  -r 0      # recompute nothing
  -z 1      # optimizer state cut over the GPUs
  -c 0.1    # weight decay
  -l 0.0006 # highest learning rate, after
  -u 700    # so many steps,
  -q 0.0    # falling to this part of it
  -n 5000   # checkpoint every so many steps
  -x 18865  # an epoch
)
train "$@"
