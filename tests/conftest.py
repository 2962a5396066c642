"""Fixtures shared by the tests."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import devices
import pytest

from llmc.logger import Logger, StepReport

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


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instead of the user's."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    return directory


DEVICES = {"cpu": lambda: None, "cudasim": devices.simulator, "gpu": devices.gpu}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that use `device` run everywhere, but for those of the number of threads; those that use `cuda` on CUDA."""
    on_cuda = ["cudasim", pytest.param("gpu", marks=pytest.mark.gpu)]
    if "device" in metafunc.fixturenames:
        on_cpu_only = "thread" in metafunc.function.__name__
        metafunc.parametrize("device", ["cpu"] if on_cpu_only else ["cpu", *on_cuda], indirect=True)
    if "cuda" in metafunc.fixturenames:
        metafunc.parametrize("cuda", on_cuda, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of `devices.ops` during the test."""
    devices.ops.device = DEVICES[request.param]()
    yield request.param
    devices.ops.device = None


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> devices.Simulator | devices.RealGPU:
    """A CUDA device: simulated, or real where there is one."""
    return DEVICES[request.param]()


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], object]]:
    """What happens when a step of llmc-train, counted from 1, has been reported."""
    events: dict[int, Callable[[], object]] = {}
    training = Logger.training

    def report(self: Logger, values: StepReport) -> None:
        training(self, values)
        events.pop(values.step + 1, lambda: None)()

    monkeypatch.setattr(Logger, "training", report)
    return events
