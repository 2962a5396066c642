"""llmc-info: what a bug report needs to say about the environment."""

import importlib.metadata
import os
import platform
import sys

import llmc
from llmc.cli import run
from llmc.errors import UsageError
from llmc.machine import cpu_count, cpu_name, memory_bytes

PACKAGES = ("torch", "numpy")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    run("llmc-info", info)


def info(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print("usage: llmc-info\n\nPrints versions, machine and build switches, to be pasted into a bug report.")
        return
    if argv:
        raise UsageError(f"unknown argument {argv[0]}: llmc-info takes none")
    for key, value in {**software(), **machine(), **core()}.items():
        print(f"{key}: {value}")


def software() -> dict[str, object]:
    versions: dict[str, object] = {"llmc": llmc.__version__, "python": sys.version.replace("\n", " ")}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine() -> dict[str, object]:
    facts: dict[str, object] = {
        "os": platform.platform(),
        "cpu": cpu_name(),
        "processors": f"{cpu_count()} of {os.cpu_count()}",
        "memory": f"{memory_bytes() // 2**20} MiB",
    }
    return facts | {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def core() -> dict[str, object]:
    """torch's view of threads and devices, and the switches the compiled core was built with."""
    try:
        import torch

        facts: dict[str, object] = {"torch threads": torch.get_num_threads()}
        for index in range(torch.cuda.device_count()):
            facts[f"cuda device {index}"] = torch.cuda.get_device_name(index)
        import llmc._C as _C

        return facts | {f"core {key}": value for key, value in _C.build_info().items()}
    except ImportError as error:
        return {"core": "cannot be imported: " + str(error).replace("\n", " ")}
