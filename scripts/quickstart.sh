#!/usr/bin/env bash
# From nothing to a small GPT that writes Shakespeare, on a CPU: installs llmc into .venv, prepares the text, trains for
# about three minutes (SECONDS_OF_TRAINING) and prints a sample. Further flags go to llmc-train; later flags win.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
SECONDS_OF_TRAINING=${SECONDS_OF_TRAINING:-180}
[ -f dev/data/shakespeare/tokenizer.bin ] || llmc-data shakespeare

mapfile -t flags < <(grep -v '^#' scripts/shakespeare.flags | xargs printf '%s\n')
echo "quickstart: measuring how many steps fit"
milliseconds=$(llmc-train "${flags[@]}" -o "" -x 100 -v 0 -m 1 -s 0 | sed -n 's/^total average iteration time: \([0-9.]*\) ms$/\1/p')
steps=$(python -c "print(max(1, round($SECONDS_OF_TRAINING * 1000 / $milliseconds)))")
echo "quickstart: $steps steps"
exec llmc-train "${flags[@]}" -x "$steps" -u $((steps / 20)) -v $((steps / 8 + 1)) "$@"
