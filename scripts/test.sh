#!/usr/bin/env bash
# Installs everything into .venv and runs the tests; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m pytest -q "$@"
