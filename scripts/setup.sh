#!/usr/bin/env bash
# Makes .venv in the repository and installs llmc into it with everything the tests need; quick when already done.
# The other scripts source it, so that one command does all the set-up. PYTHON chooses the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

missing_packages() { # Debian packages that a bare system lacks
  command -v g++ >/dev/null || echo g++
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  "$PYTHON" -c 'import os, sysconfig as s; os.stat(s.get_paths()["include"] + "/Python.h")' 2>/dev/null || echo python3-dev
}

if ! command -v "$PYTHON" >/dev/null || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "setup: Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2
  exit 1
fi
packages=$(missing_packages | xargs)
if [ -n "$packages" ]; then
  sudo=""
  if [ "$(id -u)" != 0 ]; then # without a terminal sudo must not ask for a password
    if [ -t 0 ]; then sudo="sudo"; else sudo="sudo -n"; fi
  fi
  echo "setup: installing $packages"
  # shellcheck disable=SC2086
  if ! log=$({ $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages; } 2>&1); then
    echo "setup: could not install $packages ($(echo "$log" | tail -n 1))" >&2
    echo "setup: ask an administrator for: apt-get install $packages" >&2
    exit 1
  fi
fi

# An interrupted creation leaves a Python without pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear .venv
export PATH="$PWD/.venv/bin:$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK=1
echo "setup: installing llmc into .venv (the first time takes a few minutes)"
# Without build isolation torch is installed once, and a later build only compiles what changed.
python - <<'EOF' | python -m pip install -q -r /dev/stdin
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
EOF
python -m pip install -q --no-build-isolation -e ".[dev]"
