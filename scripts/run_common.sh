# What the scripts of this folder share; they source it. What a run needs stands in variables that they set:
#   flags   those of llmc-train; `train` adds -y 1
#   data    where the shards come from, for whoever has none
#   memory  GiB of the GPU that the settings are for
#   NPROC   number of processes, one per GPU
# FAILURES, an environment variable, is how often `train` may fail without a new checkpoint in between (3).
# With DRY_RUN=1 a script prints steps, tokens and memory and trains nothing; it needs neither a GPU nor data.
# The arguments of a script are further flags; later flags win. Paths start in the working directory.
set -euo pipefail

stop() { # message
  echo "${0##*/}: $1" >&2
  exit 1
}

value_of() { # short and long name of a flag; prints the last value it has
  local value="" previous="" argument
  for argument in "${flags[@]}"; do
    case $previous in "$1" | "$2") value=$argument ;; esac
    case $argument in "$1="* | "$2="*) value=${argument#*=} ;; esac
    previous=$argument
  done
  echo "$value"
}

need_data() { # patterns
  local pattern
  for pattern in "$@"; do
    compgen -G "$pattern" >/dev/null || stop "no file matches $pattern: $data"
  done
}

# HellaSwag is no reason not to train: the -h 1 of a script counts where its file is there, that of an argument always.
skip_hellaswag() { # arguments of the script
  local file=dev/data/hellaswag/hellaswag_val.bin wanted given
  wanted=$(value_of -h --hellaswag)
  given=$(flags=("$@") && value_of -h --hellaswag && value_of --hellaswag-data --hellaswag-data)
  if [ "$wanted" = 1 ] && [ -z "$given" ] && [ ! -e "$file" ]; then
    echo "${0##*/}: no HellaSwag: there is no $file, which llmc-data hellaswag makes" >&2
    flags+=(-h 0)
  fi
}

prepare() { # arguments of the script; a dry run ends here, and so does a run without program or data
  command -v llmc-train >/dev/null || stop "there is no llmc-train: activate the environment that llmc is installed in"
  flags+=("$@")
  if [ "${DRY_RUN:-0}" != 0 ]; then
    exec llmc-train --dry-run --device cuda --memory "$memory" "${flags[@]}" -pn "$NPROC"
  fi
  need_data "$(value_of -i --train-data)" "$(value_of -j --val-data)"
  skip_hellaswag "$@"
}

newest_checkpoint() { # in an output directory; prints nothing if there is none
  (
    shopt -s nullglob
    printf '%s\n' "$1"/DONE_* | tail -n 1
  )
}

# A command in the background, so that this script hears signals; sets `status`, and `asked` to the first signal. The
# command is told of it: llmc-train writes a checkpoint and ends.
run() { # command
  local heard=1
  "$@" &
  child=$!
  while [ "$heard" = 1 ]; do
    heard=0 status=0
    wait "$child" || status=$?
  done
}

hear() { # signal
  heard=1 asked=${asked:-$1}
  kill -TERM "$child" 2>/dev/null || true
}

# Trains until the last checkpoint is there: after a failure the run goes on from its newest good checkpoint. After
# FAILURES of them without a new checkpoint in between it gives up; the file "failures" in the output directory counts
# them, also over several starts of the script. A wrong flag (status 2) does not get better. Who was asked to end (75),
# by a signal or --max-time, has ended.
train() { # arguments of the script
  prepare "$@"
  local output final newest failed_at=none count=0 status child="" asked="" launcher=(mpirun -np "$NPROC")
  [ "$NPROC" != 1 ] || launcher=() # one process needs no mpirun
  output=$(value_of -o --output-dir)
  final=$output/DONE_$(printf %08d "$(value_of -x --max-steps)")
  if [ -e "$output/failures" ]; then read -r failed_at count <"$output/failures" || true; fi
  trap 'hear INT' INT
  trap 'hear TERM' TERM
  trap 'hear USR1' USR1
  while [ ! -e "$final" ] && [ -z "$asked" ]; do
    run "${launcher[@]}" llmc-train "${flags[@]}" -y 1
    case $status in
      0) rm -f "$output/failures" && return ;;
      2 | 75 | 130) exit "$status" ;;
    esac
    [ "$asked" != INT ] || exit 130
    [ -z "$asked" ] || exit "$status"
    newest=$(newest_checkpoint "$output")
    newest=${newest##*/}
    [ "${newest:=none}" = "$failed_at" ] || count=0
    failed_at=$newest count=$((count + 1))
    [ ! -d "$output" ] || echo "$failed_at $count" 2>/dev/null >"$output/failures" || true # the disk may be full
    [ "$count" -lt "${FAILURES:=3}" ] ||
      stop "failed $count times (status $status) without a new checkpoint: the reason is above"
    echo "${0##*/}: failed (status $status); going on from ${newest/#none/the beginning}" >&2
    sleep 1
  done
  [ -e "$final" ] || exit 75
  rm -f "$output/failures"
  echo "${0##*/}: $final is there: the run is complete"
}

train_reference() { # arguments of the script; the flags are those of train_gpt2.py
  local steps tokens total program command
  flags+=("$@")
  program=$(dirname "${BASH_SOURCE[0]}")/train_gpt2.py
  command=(torchrun --standalone --nproc_per_node "$NPROC" "$program" "${flags[@]}")
  if [ "${DRY_RUN:-0}" != 0 ]; then
    steps=$(value_of --num_iterations --num_iterations) tokens=$(value_of --total_batch_size --total_batch_size)
    total=$(LC_ALL=C printf %.2e $((steps * tokens)) | sed 's/e+0\?/e/')
    echo "steps: $steps of $tokens tokens = $total tokens in all"
    printf '%q ' "${command[@]}"
    echo
    exit
  fi
  need_data "$(value_of --input_bin --input_bin)" "$(value_of --input_val_bin --input_val_bin)"
  exec "${command[@]}"
}
