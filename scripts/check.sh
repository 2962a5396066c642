#!/usr/bin/env bash
# Formatting, lint and types. With --fix it repairs what can be repaired.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
mapfile -t sources < <(find csrc examples scripts tests/cudasim tests/cudnn tests/fuzz -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
status=0
if [ "${1:-}" = --fix ]; then
  { ruff check --fix . && ruff format . && clang-format -i "${sources[@]}"; } || status=1
else
  ruff check . || status=1
  ruff format --check . || status=1
  clang-format --dry-run --Werror "${sources[@]}" || status=1
fi
mypy || status=1
exit $status
