"""What the machine can do at most, measured now: multiply-adds in registers, and the copying of memory."""

import time
from dataclasses import dataclass

import torch

from llmc.device import Device
from llmc.model_file import FileDtype

COPY_BYTES = 2**28  # far more than the caches hold
COPIES = 3


@dataclass(frozen=True)
class Limits:
    """Rates of a device; a roofline."""

    flops: float | None  # per second, None where nothing tells it
    bandwidth: float  # bytes/s, read and written by a copy

    def least_seconds(self, flops: float, moved: float) -> float | None:
        """Of work with so many flops and bytes, None where nothing tells it."""
        if not flops:
            return moved / self.bandwidth
        return None if self.flops is None else max(flops / self.flops, moved / self.bandwidth)


class Machine:
    """A device, and the memory that its copies are measured with."""

    def __init__(self, device: Device, copy_bytes: int = COPY_BYTES) -> None:
        self.device = device
        self.place = "cuda" if device.is_cuda else "cpu"
        self.source = torch.ones(copy_bytes // 4, device=self.place)
        self.target = self.source.clone()

    def limits(self, precision: FileDtype) -> Limits:
        """Measured now, in about a tenth of a second. A GPU's flops are its data sheet's, without TF32."""
        rates = [copy_rate(self.source, self.target) for _ in range(COPIES)]
        return Limits(self.device.peak_flops(precision, tf32=False), max(rates))


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes/s, read and written."""
    wait_for(source)
    started = time.perf_counter()
    target.copy_(source)
    wait_for(target)
    return (source.nbytes + target.nbytes) / (time.perf_counter() - started)


def wait_for(x: torch.Tensor) -> None:
    """Until everything is done that was asked of its device."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
