"""The simulator's libraries through ctypes: loading, device memory, reports."""

import ctypes
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import devices
import pytest
import torch

SCRIPTS = Path(__file__).parent / "cudasim" / "library_tests"
LIBRARY = devices.SIMULATOR / "libcudasim.so"
SUCCESS = 0


@cache
def load_library() -> Any:
    """libcudasim.so, with the checker at work. Skips the test where the simulator is not built."""
    load_kernels("checked")  # a checked module starts the checker
    library: Any = ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    for function in ("cudasim_report", "cudasim_cublaslt_reason", "ncclGetLastError", "ncclGetErrorString"):
        getattr(library, function).restype = ctypes.c_char_p
    return library


def load_kernels(variant: str) -> Any:
    """The launchers of cudasim/library_tests/ptx_kernels.cu."""
    path = devices.SIMULATOR / "library_tests" / f"libptx_{variant}.so"
    if not path.exists():
        pytest.skip(f"there is no CUDA simulator in {devices.SIMULATOR}: scripts/test.sh builds it")
    ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def take_reports() -> list[str]:
    """What was reported since the last call, line by line."""
    library = load_library()
    library.cudaDeviceSynchronize()
    reports = library.cudasim_report().decode().splitlines()
    library.cudasim_clear()
    return reports


def kinds(reports: list[str]) -> list[str]:
    return sorted({report.split(":")[0] for report in reports})


class DeviceTensor:
    """Device memory with a copy of a tensor's storage, strides and gaps kept, and `room` zeros behind it."""

    def __init__(self, tensor: torch.Tensor, room: int = 0, upload: bool = True):
        library = load_library()
        self.tensor = tensor
        self.bytes = tensor.untyped_storage().nbytes()
        pointer = ctypes.c_void_p()
        assert library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(self.bytes + room)) == SUCCESS
        self.pointer = pointer.value or 0
        if upload:
            assert library.cudaMemset(pointer, 0, ctypes.c_size_t(self.bytes + room)) == SUCCESS
            self._copy(self.pointer, tensor.untyped_storage().data_ptr(), devices.HOST_TO_DEVICE)

    def download(self) -> torch.Tensor:
        self._copy(self.tensor.untyped_storage().data_ptr(), self.pointer, devices.DEVICE_TO_HOST)
        return self.tensor

    def _copy(self, to: int, source: int, direction: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
        assert load_library().cudaMemcpy(*pointers, ctypes.c_size_t(self.bytes), direction) == SUCCESS

    def __del__(self) -> None:
        load_library().cudaFree(ctypes.c_void_p(self.pointer))


def run_script(name: str, *arguments: str) -> Any:
    """The JSON that a script of cudasim/library_tests prints."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
