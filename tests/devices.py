"""Where the tests of the compiled core run: on the CPU, in the CUDA simulator, and on a GPU where there is one.

A test gives CPU tensors to `ops`, which moves them to the device of the running test and the results back.
"""

import ctypes
import platform
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch
from run_in_simulator import SIMULATOR, load_core

from llmc import _C

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
SMALL, LARGE = 99 * 1024, 227 * 1024  # shared memory of a block: consumer chips, Hopper


class SharedAccess(NamedTuple):
    """An instruction of a kernel that accesses shared memory. least: wavefronts without bank conflicts."""

    kernel: str
    place: str
    kind: str  # read or write
    bytes: int  # of a lane
    requests: int  # of warps
    wavefronts: int
    least: int

    @classmethod
    def parse(cls, line: str) -> "SharedAccess":
        kernel, place, kind, *numbers = line.split("\t")
        return cls(kernel, place, kind, *map(int, numbers))


class Simulator:
    """The core compiled for simulated CUDA devices, and the switches of the simulator (tests/cudasim/README.md).

    Its device tensors are CPU tensors over the simulator's memory.
    """

    def __init__(self, variant: str) -> None:
        self.core, self.library = load_core(variant, f"llmc_cudasim_{variant}._C")
        self.library.cudasim_report.restype = ctypes.c_char_p
        self.library.cudasim_launch_count.restype = ctypes.c_ulonglong
        self.library.cudasim_bank_conflicts.restype = ctypes.c_char_p

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.detach().contiguous()
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(host.numel() * host.element_size())
        assert self.library.cudaMalloc(ctypes.byref(pointer), size) == 0
        assert self.library.cudaMemcpy(pointer, ctypes.c_void_p(host.data_ptr()), size, HOST_TO_DEVICE) == 0
        buffer = (ctypes.c_char * size.value).from_address(pointer.value)
        device = torch.frombuffer(buffer, dtype=host.dtype).view(host.shape)
        weakref.finalize(buffer, self.library.cudaFree, pointer)
        return device

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor)
        size = ctypes.c_size_t(host.numel() * host.element_size())
        pointers = ctypes.c_void_p(host.data_ptr()), ctypes.c_void_p(tensor.data_ptr())
        assert self.library.cudaMemcpy(*pointers, size, DEVICE_TO_HOST) == 0
        return host

    def check(self) -> None:
        """Wait for all work, and fail with what the checker has seen."""
        self.library.cudaDeviceSynchronize()
        report = self.library.cudasim_report().decode()
        self.library.cudasim_clear()
        assert not report, report

    @contextmanager
    def settings(self, schedule: str = "forward", lazy: bool = False, shared_memory: int = LARGE) -> Iterator[None]:
        """The order of threads, warps and blocks; whether streams put off their work; shared memory of a block."""
        self.set(schedule, lazy, shared_memory)
        try:
            yield
        finally:
            self.set("forward", False, LARGE)

    def set(self, schedule: str, lazy: bool, shared_memory: int) -> None:
        assert self.library.cudasim_set_schedule(schedule.encode()) == 1
        self.library.cudasim_set_lazy(int(lazy))
        self.library.cudasim_set_shared_memory(shared_memory)

    def launches(self) -> int:
        return int(self.library.cudasim_launch_count())

    @contextmanager
    def shared_accesses(self) -> Iterator[list[SharedAccess]]:
        """What the kernels that run meanwhile access in shared memory: in the list afterwards."""
        accesses: list[SharedAccess] = []
        self.library.cudasim_count_bank_conflicts(1)
        try:
            yield accesses
        finally:
            self.library.cudasim_count_bank_conflicts(0)
        accesses += map(SharedAccess.parse, self.library.cudasim_bank_conflicts().decode().splitlines())


class RealGPU:
    """The core as it is, on CUDA tensors."""

    core = _C

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cuda()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu()

    def check(self) -> None:
        torch.cuda.synchronize()


@cache
def simulator(variant: str = "checked") -> Simulator:
    """variant: checked, or fast without the checker. Skips the test where the simulator is not built."""
    require_simulator()
    return Simulator(variant)


def require_simulator() -> None:
    """Skip the test where the simulator is not built."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the CUDA simulator needs Linux on x86-64")
    if not SIMULATOR.exists():
        pytest.skip(f"there is no CUDA simulator in {SIMULATOR}: scripts/test.sh builds it")


def gpu() -> RealGPU:
    if reason := _C.why_no_cuda_device():
        pytest.skip(reason)
    return RealGPU()


class Ops:
    """_C.ops on the device of the running test, with arguments and results on the CPU."""

    def __init__(self) -> None:
        self.device: Simulator | RealGPU | None = None

    def __getattr__(self, name: str):
        device = self.device
        if device is None:
            return getattr(_C.ops, name)

        def call(*arguments, **keywords):
            moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

            def move(value):
                if isinstance(value, torch.Tensor):
                    return moved.setdefault(id(value), (value, device.to_device(value)))[1]
                return [move(item) for item in value] if isinstance(value, list) else value

            try:
                result = getattr(device.core.ops, name)(*map(move, arguments), **keywords)
            except device.core.Error as error:
                if re.search(r"on CUDA it must be a multiple of 8", str(error)):
                    pytest.skip(str(error))
                raise
            device.check()
            for host, on_device in moved.values():
                host.data.copy_(device.to_host(on_device))  # inputs too: autograd must not take it for a change
            return result

        return call


ops = Ops()
