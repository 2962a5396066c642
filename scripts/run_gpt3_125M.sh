#!/usr/bin/env bash
# GPT-3 (125M), with rows of 2048 tokens, on 300 billion tokens of FineWeb, three epochs.
# llm.c on 8 H100 with 80 GB: 150 ms a step, 24 hours, about $336.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-8}
memory=80
data="llmc-data fineweb --size 100B makes them; other data: -i and -j"
flags=(
  -e gpt3:c768
  -i 'dev/data/fineweb100B/fineweb_train_*.bin'
  -j 'dev/data/fineweb100B/fineweb_val_*.bin'
  -o log_gpt3_125M
  -v 250    # validate every so many steps,
  -h 1      # with HellaSwag, where its file is there
  -s 20000  # and sample
  -g 144    # so many tokens
  -b 32     # rows a pass and GPU: with less memory lower this alone, -d stays
  -t 2048   # tokens a row
  -d 524288 # tokens a step, on all GPUs together
  -r 0      # recompute nothing
  -z 1      # optimizer state cut over the GPUs
  -ge 1     # GELU inside the forward matrix products
  -c 0.1    # weight decay
  -l 0.0006 # highest learning rate, after
  -u 700    # so many steps,
  -q 0.1    # falling to this part of it
  -sl 7.0   # no update by a step whose loss is so many standard deviations off,
  -sg 7.0   # nor one whose gradient is
  -n 10000  # checkpoint every so many steps;
  -nk 5     # keep the newest ones,
  -nm 50000 # never delete those of every so many steps
  -x 572204
)
train "$@"
