#!/usr/bin/env bash
# Installs everything into .venv and runs the tests; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ "$(uname -sm)" = "Linux x86_64" ] && scripts/build_cudasim.sh  # elsewhere its tests are skipped
exec python -m pytest -q "$@"
