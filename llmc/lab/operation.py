"""What the laboratory knows of an operation: its arguments, PyTorch's own way to do it, its bytes and flops."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmc import _C
from llmc.model_file import ModelShape

EPS = 1e-5  # of layernorm
Arguments = dict[str, Any]  # by the names of llmc._C.ops and in its order


@dataclass(frozen=True)
class Step:
    """A training step of a model on B rows of T tokens, whose shapes an operation can be measured at."""

    shape: ModelShape
    B: int
    T: int

    @property
    def N(self) -> int:
        return self.B * self.T

    @property
    def C(self) -> int:
        return self.shape.channels

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(N,IC,OC) of qkv, the projection of attention, fc and its projection."""
        N, C = self.N, self.C
        return [(N, C, 3 * C), (N, C, C), (N, C, 4 * C), (N, 4 * C, C)]

    @property
    def block_parameters(self) -> int:
        """What AdamW updates in one call."""
        return 12 * self.C**2 + 13 * self.C

    def logits_rows(self, **options: Any) -> int:
        """Of a chunk of the loss head, by default in fp32 on a CPU."""
        plan = _C.plan(_C.GPT2Config(**vars(self.shape)), _C.Options(batch_size=self.B, seq_len=self.T, **options))
        return next(shape[0] for name, _, _, shape, _, _ in plan if name == "logits")


class Draw:
    """Makes tensors: normal values in the precision X or in fp32, room for results, ids.

    Room is filled with NaN, so that a result that nobody wrote is seen. device "meta": for their sizes only.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, *shape: int, scale: float = 1, offset: float = 0, dtype: torch.dtype | None = None) -> Tensor:
        if self.device == "meta":
            return self.room(*shape, dtype=dtype)
        values = torch.randn(shape, generator=self.generator) * scale + offset
        return values.to(self.device, dtype or self.dtype)

    def normal32(self, *shape: int, scale: float = 1, offset: float = 0) -> Tensor:
        return self.normal(*shape, scale=scale, offset=offset, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=self.device)

    def room32(self, *shape: int) -> Tensor:
        return self.room(*shape, dtype=torch.float32)

    def ids(self, *shape: int, below: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.int32, device="meta")
        ids = torch.randint(below, shape, generator=self.generator, dtype=torch.int32)
        return ids.to(self.device)


class Operation(ABC):
    """An operation of llmc._C.ops. Its sizes are numbers by the names of the contract, csrc/ops/ops.h."""

    sizes: ClassVar[tuple[str, ...]]
    written: ClassVar[tuple[str, ...]] = ()  # arguments that are written
    updated: ClassVar[tuple[str, ...]] = ()  # arguments that are read and written; gradients that accumulate
    returns: ClassVar[bool] = False  # a number
    fp8: ClassVar[bool] = False  # in bf16 only, on GPUs that have it

    @property
    def name(self) -> str:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def core(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(_C.ops, self.name)
        return function

    @abstractmethod
    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        """For the core, and for every variant."""

    @abstractmethod
    def torch(self, a: Arguments) -> Callable[[], Any]:
        """PyTorch's own, as people would write it: a function that returns what is in `results`, None where it has no
        such result. Prepared for these arguments, which it leaves alone but for those that an optimizer updates."""

    @property
    def results(self) -> tuple[str, ...]:
        return ("the result",) if self.returns else (*self.updated, *self.written)

    def results_of(self, a: Arguments, returned: Any) -> tuple[Tensor | None, ...]:
        """Of the core or a variant, after it was called with these arguments."""
        return (torch.tensor(returned),) if self.returns else tuple(a[name] for name in self.results)

    @abstractmethod
    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        """The sizes that it has in a training step, one of each kind."""

    def flops(self, *sizes: int) -> float:
        """Of products; elementwise arithmetic does not count. As in csrc/ops/timed_ops.h."""
        return 0

    def bytes(self, a: Arguments) -> float:
        """That must be moved at least: each tensor is read or written once, what is updated twice."""
        return sum(bytes_of(value) * (2 if name in self.updated else 1) for name, value in a.items())


def bytes_of(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(bytes_of, value))
    return value.nbytes if isinstance(value, Tensor) else 0
