"""Fixtures shared by the tests."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import devices
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """scripts/train_gpt2.py, the PyTorch reference, as a module."""
    spec = importlib.util.spec_from_file_location("train_gpt2", ROOT / "scripts" / "train_gpt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt2"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of the operations run on every device; those of the number of threads are about the CPU."""
    if metafunc.module.__name__.startswith("test_ops_"):
        metafunc.fixturenames.append("device")
        gpu = pytest.param("gpu", marks=pytest.mark.gpu)
        on_cpu_only = "thread" in metafunc.function.__name__
        metafunc.parametrize("device", ["cpu"] if on_cpu_only else ["cpu", "cudasim", gpu], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of `devices.ops` during the test."""
    choices = {"cpu": lambda: None, "cudasim": devices.simulator, "gpu": devices.gpu}
    devices.ops.device = choices[request.param]()
    yield request.param
    devices.ops.device = None
