#!/usr/bin/env bash
# GPT-2 (124M) on two nodes of 8 GPUs, started by torchrun. Run it on both nodes, in a directory that both see, with the
# name or address of one of them: HEAD=node1 scripts/multi_node/run_gpt2_124M_torchrun.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare "$@"
[ -n "${HEAD:-}" ] || stop "set HEAD to the name or address of one node, the same on all nodes"
exec torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" --rdzv-id gpt2_124M \
  --no-python llmc-train "${flags[@]}"
