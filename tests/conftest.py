"""Fixtures shared by the tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
