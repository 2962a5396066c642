#!/usr/bin/env bash
# For whoever has an NVIDIA GPU: builds llmc for it, tests, trains and measures, and writes a report into docs/gpu (half an
# hour to an hour). Please send the report, whatever it says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
  echo "check_gpu: there is no NVIDIA GPU here (nvidia-smi lists none)" >&2
  exit 1
fi
bash scripts/setup.sh # .venv, in which the headers and libraries of CUDA come beside those of torch
.venv/bin/python -m pip install -q -r scripts/cuda_wheels.txt
export LLMC_CUDA=ON
# With attention through cuDNN, to compare it with our own, if that can be built.
if .venv/bin/python -m pip install -q -r scripts/cudnn_wheels.txt && LLMC_CUDNN=ON bash scripts/setup.sh; then
  export LLMC_CUDNN=ON
else
  echo "check_gpu: attention through cuDNN could not be built: going on without it" >&2
fi
source scripts/setup.sh
exec python scripts/check_gpu.py
