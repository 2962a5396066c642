#!/usr/bin/env bash
# GPT-2 (774M) on 150 billion tokens of FineWeb, an epoch and a half.
# llm.c on 8 A100 with 80 GB: 1.7 s a step, 5.6 days, about $2000.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-8}
memory=80
data="llmc-data fineweb --size 100B makes them; other data: -i and -j"
flags=(
  -e d36
  -i 'dev/data/fineweb100B/fineweb_train_*.bin'
  -j 'dev/data/fineweb100B/fineweb_val_*.bin'
  -o log_gpt2_774M
  -v 250     # validate every so many steps,
  -h 1       # with HellaSwag, where its file is there
  -s 300000  # sample at the end only,
  -g 144     # so many tokens
  -b 32      # rows a pass and GPU: with less memory lower this alone, -d stays
  -t 1024    # tokens a row
  -d 524288  # tokens a step, on all GPUs together
  -r 0       # recompute nothing
  -z 1       # optimizer state cut over the GPUs
  -c 0.1     # weight decay
  -l 0.00025 # highest learning rate, after
  -u 700     # so many steps,
  -q 0.0     # falling to this part of it
  -n 4000    # checkpoint every so many steps
  -x 286102
)
train "$@"
