"""The operations of llmc._C.ops on FP8, for the catalogue: of GPUs that have it, in bf16."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmc.lab.operation import EPS, Arguments, Draw, Operation, Step

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALE, UNSCALE = 2.0**5, 2.0**-5  # normal values times it stay in both formats


def scale_of(draw: Draw) -> Tensor:
    """A scale and its inverse."""
    return torch.tensor([SCALE, UNSCALE], device=draw.device)


def converted(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x·scale in FP8, but in fp64, the truth, as it is."""
    scaled = x * scale[0]
    return scaled if x.dtype == torch.float64 else scaled.to(dtype)


def largest(amax: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(amax, x.abs().max().to(amax.dtype))


class Conversion(Operation):
    """To FP8, with the largest value."""

    sizes = ("N", "C")
    written: ClassVar[tuple[str, ...]] = ("out", "transposed")
    updated: ClassVar[tuple[str, ...]] = ("amax",)
    fp8 = True

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, step.C)]


class Quantize(Conversion):
    """Of x (N,C), as it lies and transposed."""

    dtype: ClassVar[torch.dtype] = E4M3

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        out, transposed = draw.room(N, C, dtype=self.dtype), draw.room(C, N, dtype=self.dtype)
        return {
            **{"out": out, "transposed": transposed, "amax": torch.zeros(1, device=draw.device)},
            **self.source(draw, N, C),
            "scale": scale_of(draw),
        }

    def source(self, draw: Draw, N: int, C: int) -> Arguments:
        return {"x": draw.normal(N, C)}

    def value(self, a: Arguments) -> Tensor:
        x: Tensor = a["x"]
        return x

    def torch(self, a: Arguments) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            x = self.value(a)
            out = converted(x, a["scale"], self.dtype)
            return largest(a["amax"], x), out, out.T.contiguous(), *self.others(x)

        return run

    def others(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()


class QuantizeGelu(Quantize):
    def source(self, draw: Draw, N: int, C: int) -> Arguments:
        return {"pre": draw.normal(N, C)}

    def value(self, a: Arguments) -> Tensor:
        return F.gelu(a["pre"], approximate="tanh")

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, 4 * step.C)]


class QuantizeGradient(QuantizeGelu):
    """Through the GELU, whose input is pre."""

    written = ("out", "transposed", "dbias")
    dtype = E5M2

    def source(self, draw: Draw, N: int, C: int) -> Arguments:
        return {"dbias": draw.room(C), "dout": draw.normal(N, C), "pre": draw.normal(N, C)}

    def value(self, a: Arguments) -> Tensor:
        x: Tensor = torch.ops.aten.gelu_backward(a["dout"], a["pre"], approximate="tanh")
        return x

    def others(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.sum(0),)


class Fp8LayernormForward(Conversion):
    written = ("out", "residual", "mean", "rstd")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        return {
            **{"out": draw.room(N, C, dtype=E4M3), "amax": torch.zeros(1, device=draw.device)},
            **{"residual": draw.room(N, C), "mean": draw.room32(N), "rstd": draw.room32(N)},
            **{"a": draw.normal(N, C), "b": draw.normal(N, C), "weight": draw.normal(C, offset=1)},
            **{"bias": draw.normal(C), "scale": scale_of(draw)},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            residual = a["a"] + a["b"]
            x, mean, rstd = torch.native_layer_norm(residual, residual.shape[-1:], a["weight"], a["bias"], EPS)
            return largest(a["amax"], x), converted(x, a["scale"], E4M3), residual, mean[:, 0], rstd[:, 0]

        return run


class Fp8Transpose(Conversion):
    written = ("out",)
    updated = ()

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        return {"out": draw.room(C, N, dtype=E4M3), "x": draw.normal(N, C, dtype=E4M3)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["x"].T.contiguous(),)


def product(a: Tensor, unscale_a: Tensor, b: Tensor, unscale_b: Tensor, fast: bool) -> Tensor:
    """a (N,K)·b (M,K)ᵀ in bf16, but of fp64 in that."""
    if a.dtype == torch.float64:
        return a @ b.T * unscale_a * unscale_b
    return torch._scaled_mm(a, b.T, unscale_a, unscale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


class Fp8Product(Operation):
    """Of numbers that stand for values of 2^-5 of them."""

    written = ("out",)
    fp8 = True

    def unscale(self, draw: Draw) -> Tensor:
        return torch.tensor([UNSCALE], device=draw.device)

    def flops(self, *sizes: int) -> float:
        return 2.0 * math.prod(sizes)


class Fp8MatmulForward(Fp8Product):
    sizes = ("N", "IC", "OC")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        x, weight = draw.normal(N, IC, scale=SCALE, dtype=E4M3), draw.normal(OC, IC, scale=SCALE, dtype=E4M3)
        unscale = {"unscale_x": self.unscale(draw), "weight": weight, "unscale_weight": self.unscale(draw)}
        return {"out": draw.room(N, OC), "x": x, **unscale, "bias": draw.normal(OC)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        factors = a["x"], a["unscale_x"], a["weight"], a["unscale_weight"]
        return lambda: (product(*factors, fast=True) + a["bias"],)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return step.products


class Fp8MatmulBackward(Fp8Product):
    sizes = ("N", "K", "M")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, K, M = sizes
        a, b = draw.normal(N, K, scale=SCALE, dtype=E5M2), draw.normal(M, K, scale=SCALE, dtype=E4M3)
        unscale = {"unscale_a": self.unscale(draw), "b": b, "unscale_b": self.unscale(draw)}
        return {"out": draw.room(N, M), "a": a, **unscale, "accumulate": False}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (product(a["a"], a["unscale_a"], a["b"], a["unscale_b"], fast=False),)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        """The gradients of fc's input and weight."""
        N, C = step.N, step.C
        return [(N, 4 * C, C), (4 * C, N, C)]


OPERATIONS: tuple[Operation, ...] = (
    Quantize(),
    QuantizeGelu(),
    QuantizeGradient(),
    Fp8LayernormForward(),
    Fp8Transpose(),
    Fp8MatmulForward(),
    Fp8MatmulBackward(),
)
