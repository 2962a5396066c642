"""A user's kernels from a file: C++ or CUDA, compiled by PyTorch, or Python.

The contract: a function with the name of the operation, which takes the arguments of llmc._C.ops' in their order, by
position, and writes the same results; or returns the same number. In C++ it is bound with
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m). A file may have several operations.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from llmc.errors import RunError, UsageError
from llmc.lab.operation import Arguments, Operation

COMPILED, CUDA, PYTHON = (".cpp", ".cc", ".cxx"), (".cu",), (".py",)
CPP_FLAGS = ["-O3", "-march=native", "-fopenmp"]
CUDA_FLAGS = ["-O3"]


class Variant:
    """The functions of a file."""

    def __init__(self, path: Path, name: str, module: ModuleType) -> None:
        self.path, self.name, self.module = path, name, module

    def has(self, operation: Operation) -> bool:
        return callable(getattr(self.module, operation.name, None))

    def call(self, operation: Operation, arguments: Arguments) -> Callable[[], Any]:
        """A call of the operation's function."""
        return partial(getattr(self.module, operation.name), *arguments.values())

    def explain(self, operation: Operation, arguments: Arguments, error: Exception) -> RunError:
        """What an exception of such a call means."""
        signature = f"{operation.name}({', '.join(arguments)})"
        if isinstance(error, TypeError):
            return RunError(f"{self.path}: it must take the arguments of {signature}: {first_line(error)}")
        return RunError(f"{self.path}: {signature} failed: {first_line(error)}")


def load_variants(paths: Sequence[Path], operations: Sequence[Operation], on_cuda: bool) -> list[Variant]:
    """RunError or UsageError for files that do not fulfil the contract for any of the operations."""
    for path in paths:
        check_file(path, on_cuda)
    stems = [path.stem for path in paths]
    variants = []
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 and path.stem not in ("llmc", "torch") else str(path)
        variant = Variant(path, name, import_file(path) if path.suffix in PYTHON else compile_file(path))
        if not any(map(variant.has, operations)):
            wanted = " or ".join(operation.name for operation in operations)
            raise RunError(f"{path} has no function {wanted}{how_to_bind(path, operations[0])}")
        variants.append(variant)
    return variants


def check_file(path: Path, on_cuda: bool) -> None:
    if path.suffix not in (*COMPILED, *CUDA, *PYTHON):
        raise UsageError(f"--variant {path}: give a .cpp, .cu or .py file")
    if not path.is_file():
        raise UsageError(f"--variant {path}: there is no such file")
    if path.suffix in CUDA and not on_cuda:
        raise UsageError(f"--variant {path}: CUDA code needs a GPU (--device cuda)")


def how_to_bind(path: Path, operation: Operation) -> str:
    if path.suffix in PYTHON:
        return ""
    return f': PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{ m.def("{operation.name}", &{operation.name}); }} adds it'


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name(path), path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RunError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


def compile_file(path: Path) -> ModuleType:
    """Compiled again only if it, or what it includes, has changed."""
    from torch.utils import cpp_extension

    if not cpp_extension.is_ninja_available():
        raise RunError(f"{path} cannot be compiled without ninja: pip install ninja")
    name = module_name(path)
    with build_directory(build_root() / name) as directory:
        try:
            module: ModuleType = cpp_extension.load(
                name,
                [str(path.absolute())],
                extra_cflags=CPP_FLAGS,
                extra_cuda_cflags=CUDA_FLAGS,
                build_directory=str(directory),
            )
        except ImportError as error:
            binding = "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def(...); }"
            raise RunError(f"{path} is no module: it needs {binding}, and all it calls: {first_line(error)}") from error
        except (RuntimeError, OSError) as error:
            raise RunError(f"{path} does not compile: {first_complaint(str(error))}") from error
    return module


def build_root() -> Path:
    """Where PyTorch compiles extensions."""
    from torch.utils import cpp_extension

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


@contextmanager
def build_directory(path: Path) -> Iterator[Path]:
    """For this process alone. PyTorch's own lock outlives a process that was killed: the next would wait for ever."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "in_use", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (path / "lock").unlink(missing_ok=True)
        yield path


def module_name(path: Path) -> str:
    place = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    return f"llmc_variant_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{place}"


def first_complaint(output: str) -> str:
    """Of a compiler or linker."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    complaints = [line for line in lines if re.search(r"\berror\b[:\s]|undefined reference|fatal:", line)]
    return (complaints or lines or ["without a word"])[0]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
