#!/usr/bin/env bash
# Builds the CUDA simulator and the extension that runs in it into build/cudasim; the python on the PATH must have llmc.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -m pip install -q -r tests/cudasim/requirements.txt
# The folder of setup.py: most of the extension is compiled already.
build=build/$(python -c 'import sys, torch; print(sys.implementation.cache_tag + "-torch" + torch.__version__.split("+")[0])')
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DLLMC_CUDASIM=ON >/dev/null
cmake --build "$build" --target cudasim_all -j "$(nproc)"
