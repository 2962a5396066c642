"""llmc-info: what a bug report needs to say about the environment."""

import importlib.metadata
import os
import platform
import sys

import llmc
from llmc.cli import run
from llmc.errors import UsageError
from llmc.machine import cpu_count, cpu_name, memory_bytes
from llmc.peak import peak_flops

PACKAGES = ("torch", "numpy", "scipy-openblas32", "tiktoken", "pybind11")
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
    *("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LLMC_CPU_ISA"),
)


def main() -> None:
    run("llmc-info", _main)


def _main(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        print("usage: llmc-info\n\nPrints versions, machine and build switches, to be pasted into a bug report.")
        return
    if argv:
        raise UsageError(f"unknown argument {argv[0]}: llmc-info takes none")
    for part in (software, machine, environment, devices, core):
        try:
            facts = part()
        except (ImportError, OSError, RuntimeError) as error:  # a broken part is what the report is for
            facts = {part.__name__: f"{type(error).__name__}: {' '.join(str(error).split())}"}
        for key, value in facts.items():
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
    return {
        "os": platform.platform(),
        "cpu": cpu_name(),
        "processors": f"{cpu_count()} of {os.cpu_count()}",
        "memory": f"{memory_bytes() // 2**20} MiB",
    }


def environment() -> dict[str, object]:
    """The variables that change speed; GOMP_SPINCOUNT is llmc's own unless it was set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def devices() -> dict[str, object]:
    """torch's view of threads and GPUs."""
    import torch

    gpus = {f"cuda device {i}": gpu(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())}
    return {"torch threads": torch.get_num_threads(), **gpus}


def gpu(name: str) -> str:
    """A GPU's name with the peaks that its utilisation is measured against."""
    peaks = {"bf16": peak_flops(name, "bf16"), "TF32": peak_flops(name, "fp32")}
    shown = (f"{kind} {f'{peak / 1e12:.1f} TFLOP/s' if peak else 'n/a'}" for kind, peak in peaks.items())
    return f"{name} (peak {', '.join(shown)})"


def core() -> dict[str, object]:
    """The switches the compiled core was built with, and whether it can use a GPU."""
    from llmc import _C

    devices = ", ".join(device["name"] for device in _C.cuda_devices())
    facts = {**_C.build_info(), "cuda devices": _C.why_no_cuda_device() or devices}
    return {f"core {key}": value for key, value in facts.items()}
