"""A plugin of pytest for scripts/sanitize.sh: the tests must not run with the usual core by mistake."""

from llmc import _C

if "/build/sanitize/" not in _C.__file__:
    raise SystemExit(f"{_C.__file__} is not the core with sanitizers")
