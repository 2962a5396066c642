#!/usr/bin/env bash
# Builds the core with sanitizers into build/sanitize and runs it (scripts/setup.sh first):
#   scripts/sanitize.sh address   AddressSanitizer and UndefinedBehaviorSanitizer, below Python: a selection of tests that
#                                 reaches all of csrc but CUDA; arguments go to pytest instead
#   scripts/sanitize.sh thread    ThreadSanitizer, in tests/sanitizers/threads.cpp
# tests/sanitizers/README.md says what they see and what they do not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kind=${1:-}
case "$kind" in
  address) target=_C ;;
  thread) target=threads ;;
  *) sed -n '2,7s/^# //p' "$0" >&2; exit 2 ;;
esac
shift
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
build=$PWD/build/sanitize/$kind
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DLLMC_SANITIZE="$kind" -DLLMC_CUDA=OFF >/dev/null
cmake --build "$build" --target "$target" -j "$(nproc)"
runtime() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

if [ "$kind" = thread ]; then
  export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
  # Address space that is laid out at random can lie where the sanitizer wants its own; a container may forbid the change.
  if setarch -R true 2>/dev/null; then exec setarch -R "$build/threads"; fi
  exec "$build/threads"
fi

# llmc with this core instead of its own, for all processes that the tests start.
package=$build/package/llmc
mkdir -p "$package"
for file in llmc/*; do
  case "$file" in *.so | *__pycache__) ;; *) ln -sfn "$PWD/$file" "$package/" ;; esac
done
ln -sf "$build"/_C.*.so "$package/"
export PYTHONPATH=$build/package:$PWD/tests/sanitizers LD_PRELOAD="$(runtime asan) $(runtime stdc++)"
export PYTHONMALLOC=malloc # or Python would hand out pieces of larger blocks, whose ends nobody sees
export LLMC_CUDASIM=/nonexistent # the simulator wants addresses that the sanitizer has taken; its tests are skipped
# Python and torch leave much to the end of the process.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1
# Into files: a test may keep to itself what a process prints. UBSan's cannot go there, when libasan comes first.
reports=$build/reports
rm -rf "$reports"
mkdir "$reports"
export ASAN_OPTIONS+=:log_path=$reports/address UBSAN_OPTIONS=print_stacktrace=1
if [ $# = 0 ]; then
  set -- tests/test_ops_*.py tests/test_model.py tests/test_extend.py tests/test_timed_ops.py tests/test_plan.py \
    tests/test_bindings.py tests/test_random.py tests/test_communicators.py tests/test_chess_rules.py \
    tests/test_chess_games.py tests/test_state_file.py tests/test_model_file.py \
    tests/test_zero.py::test_master_weights_of_all_stages_are_the_same \
    tests/test_resume.py::test_a_damaged_checkpoint_is_named_and_passed_over \
    -k "not gpu and not ten_steps and not same_bits_again and not threads and not 130 and not 50257" # those are large
fi
status=0
pytest -q --capture=sys -p sanitized -p no:cacheprovider "$@" || status=$? # (python -m would find llmc in this folder first)
unset LD_PRELOAD
for report in "$reports"/*; do
  if [ -e "$report" ]; then cat "$report" && status=1; fi
done
exit "$status"
