"""A plugin of pytest for scripts/sanitize.sh: what is different with the core that it has built."""

import pytest

from llmc import _C

# Sanitizers keep the compiler from vectors, so a sum is one chain of additions instead of 4 to 16, and rounds more than
# these tests allow. They run all the same: what a sanitizer reports fails the run, not the test.
ONE_CHAIN = ("test_ops_reduce.py::test_sum_of_squares", "test_ops_layernorm.py::test_forward[")

if "/build/sanitize/" not in _C.__file__:
    raise SystemExit(f"{_C.__file__} is not the core with sanitizers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(name in item.nodeid for name in ONE_CHAIN):
            item.add_marker(pytest.mark.xfail(raises=AssertionError, reason="sums of a single chain"))
