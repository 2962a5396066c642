#!/usr/bin/env bash
# GPT-2 (124M) on two nodes of 8 GPUs, started by mpirun, which reaches the nodes by ssh. HOSTFILE names them, one a
# line: "node1:8" for MPICH's mpirun, "node1 slots=8" for Open MPI's.
# All nodes must see the working directory and the environment that llmc is installed in, under the same paths.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
HOSTFILE=${HOSTFILE:-hostfile}
flags+=( # as llm.c's script of this name
  -q 0.1
  -y 0
)
prepare "$@"
[ -f "$HOSTFILE" ] || stop "there is no file $HOSTFILE: write one with the names of the nodes, as the script says"
exec mpirun --hostfile "$HOSTFILE" -np "$NPROC" "$(command -v llmc-train)" "${flags[@]}"
