#!/usr/bin/env bash
# GPT-2 (1558M) on 34 billion tokens of FineWeb-Edu.
# llm.c on 8 H100 with 80 GB: 2.8 s a step, 24 hours, about $672.
source "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
NPROC=${NPROC:-8}
memory=80
data="llmc-data fineweb --type edu --size 100B makes them; other data: -i and -j"
flags=(
  -e d48
  -i 'dev/data/edu_fineweb100B/edu_fineweb_train_*.bin'
  -j 'dev/data/edu_fineweb100B/edu_fineweb_val_*.bin'
  -o log_gpt2_1558M
  -v 250     # validate every so many steps,
  -h 1       # with HellaSwag, where its file is there
  -s 300000  # sample at the end only,
  -g 384     # so many tokens
  -b 16      # rows a pass and GPU: with less memory lower this alone, -d stays
  -t 1024    # tokens a row
  -d 1048576 # tokens a step, on all GPUs together
  -r 0       # recompute nothing
  -z 1       # optimizer state cut over the GPUs
  -ge 1      # GELU inside the forward matrix products
  -c 0.1     # weight decay
  -k cosine  # the learning rate
  -l 0.0006  # is at most this, after
  -u 700     # so many steps,
  -q 0.1     # and falls to this part of it
  -n 2000    # checkpoint every so many steps
  -x 32000
)
train "$@"
