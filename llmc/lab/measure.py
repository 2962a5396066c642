"""Times contenders in turn on the same arguments, and compares their results with PyTorch in fp64."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmc.errors import RunError, UsageError
from llmc.lab.limits import Limits, Machine, wait_for
from llmc.lab.operation import Arguments, Draw, Operation, bytes_of
from llmc.lab.variants import Variant
from llmc.model_file import FileDtype

DTYPES: dict[FileDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
# An error is a mistake from so many roundings on, of the result to its precision and of sums in fp32; or if it is twice
# as large as that of PyTorch in the same precision.
ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8}
ROUNDINGS, ROUNDINGS_OF_SUMS, TIMES_PYTORCH = 4, 64, 2
# Arguments change from call to call, so that they come from memory: sets of them that are together larger than caches.
SETS_BYTES, MAX_SETS = 2**28, 256
MIN_ROUNDS = 3
FP64_COPIES = 3  # of the arguments, that the comparison needs at once: inputs, results, what is between them


@dataclass(frozen=True)
class Case:
    """An operation at given sizes."""

    operation: Operation
    sizes: tuple[int, ...]
    precision: FileDtype

    @property
    def shape(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.operation.sizes, self.sizes, strict=True))

    def __str__(self) -> str:
        return f"{self.operation.name} {self.shape} {self.precision}"


@dataclass(frozen=True)
class Row:
    """What came of a contender."""

    contender: str
    seconds: float  # median of a call
    error: float  # largest, relative to the largest value of the result
    mistake: str  # what is wrong with it, or ""


@dataclass(frozen=True)
class Measurement:
    """What came of a case."""

    case: Case
    flops: float
    bytes: float
    limits: Limits
    rows: list[Row]  # that of llmc first

    @property
    def least_seconds(self) -> float | None:
        return self.limits.least_seconds(self.flops, self.bytes)


@dataclass(frozen=True)
class Contender:
    name: str
    prepare: Callable[[Arguments], Callable[[], Any]]  # a call with these arguments
    results: Callable[[Arguments, Any], tuple[Tensor | None, ...]]  # after it, from what it returned
    variant: Variant | None = None


def contenders_of(operation: Operation, variants: list[Variant]) -> Iterator[Contender]:
    yield Contender("llmc", lambda a: partial(operation.core, *a.values()), operation.results_of)
    yield Contender("torch", operation.torch, lambda a, returned: returned)
    for variant in variants:
        if variant.has(operation):
            yield Contender(variant.name, partial(variant.call, operation), operation.results_of, variant)


def measure(case: Case, variants: list[Variant], machine: Machine, seconds: float) -> Measurement:
    """seconds: of each contender, besides what prepares it."""
    operation = case.operation
    check_memory(case, machine.device.memory)
    arguments = operation.arguments(Draw(DTYPES[case.precision], machine.place), *case.sizes)
    contenders = list(contenders_of(operation, variants))
    found = {contender.name: check(operation, contender, arguments) for contender in contenders}
    limits = machine.limits(case.precision)
    if operation.fp8 and limits.flops is not None:
        limits = replace(limits, flops=2 * limits.flops)  # as all data sheets have it
    times = time_in_turn(operation, contenders, arguments, seconds)
    rounding = ROUNDINGS * ROUNDOFF[case.precision] + ROUNDINGS_OF_SUMS * ROUNDOFF["fp32"]
    allowed = max(rounding, TIMES_PYTORCH * max_error(found["torch"]))
    rows = [
        Row(name, median(times[name]), max_error(errors), mistake_of(errors, allowed)) for name, errors in found.items()
    ]
    return Measurement(case, operation.flops(*case.sizes), operation.bytes(arguments), limits, rows)


def check_memory(case: Case, memory: int) -> None:
    """UsageError if the case has no room."""
    on_paper = case.operation.arguments(Draw(torch.float64, "meta"), *case.sizes)
    needed = FP64_COPIES * sum(map(bytes_of, on_paper.values())) + 3 * SETS_BYTES
    if needed > memory:
        sizes = f"{needed / 2**30:.3g} GiB, there are {memory / 2**30:.3g}"
        raise UsageError(f"--shape {case.shape}: {case.operation.name} needs {sizes}; give smaller sizes")


# --- results ----------------------------------------------------------------------------------------------------------


def check(operation: Operation, contender: Contender, arguments: Arguments) -> dict[str, float]:
    """The error of every result that the contender has: the largest of a number, relative to the largest number."""
    own = clone(arguments)
    try:
        returned = contender.prepare(own)()
    except Exception as error:
        if contender.variant is None:
            raise
        raise contender.variant.explain(operation, arguments, error) from error
    if contender.variant is not None:
        check_inputs(operation, contender.variant, arguments, own)
    found = contender.results(own, returned)
    exact = operation.torch(clone(arguments, torch.float64))()
    errors = {}
    for name, ours, truth in zip(operation.results, found, exact, strict=True):
        if ours is not None and truth is not None:
            errors[name] = error_of(ours.double().flatten(), truth.flatten())
    return errors


def error_of(ours: Tensor, truth: Tensor) -> float:
    difference = float((ours - truth.to(ours.device)).abs().max())
    return difference / max(float(truth.abs().max()), 1e-30) if math.isfinite(difference) else math.inf


def max_error(errors: dict[str, float]) -> float:
    return max(errors.values())


def mistake_of(errors: dict[str, float], allowed: float) -> str:
    for name, error in errors.items():
        if error == math.inf:
            return f"{name} is not written, or not finite"
        if error > allowed:
            return f"{name} is off by {error:.1e} of its largest value; {allowed:.1e} would be rounding"
    return ""


def check_inputs(operation: Operation, variant: Variant, before: Arguments, after: Arguments) -> None:
    """RunError if what is only read has changed."""
    for name, value in before.items():
        if name in operation.results or not isinstance(value, Tensor):
            continue
        if not torch.equal(value, after[name]):
            raise RunError(f"{variant.path}: {operation.name} writes to {name}, which it may only read")


def clone(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """With memory of their own; floating tensors in another dtype, if one is given."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return value.clone() if dtype is None or not value.is_floating_point() else value.to(dtype, copy=True)

    return {name: copy(value) for name, value in arguments.items()}


# --- times ------------------------------------------------------------------------------------------------------------


def time_in_turn(
    operation: Operation, contenders: list[Contender], arguments: Arguments, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call of each contender, by round: a pass over all sets of arguments."""
    size = sum(map(bytes_of, arguments.values()))
    sets = [clone(arguments) for _ in range(min(MAX_SETS, max(1, SETS_BYTES // size)))]
    calls = {contender.name: [contender.prepare(own) for own in sets] for contender in contenders}
    marker = marker_of(arguments)

    def one_round() -> Iterator[tuple[str, float]]:
        for name, run in calls.items():
            restore(operation, sets, arguments)
            yield name, time_calls(run, marker)

    for _ in one_round():  # to warm up
        pass
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(contenders)
    while len(times["llmc"]) < MIN_ROUNDS or time.perf_counter() < deadline:
        for name, passed in one_round():
            times[name].append(passed)
    return times


def marker_of(arguments: Arguments) -> Tensor:
    """A tensor of theirs, which tells the device."""
    values = (value[0] if isinstance(value, list) else value for value in arguments.values())
    return next(value for value in values if isinstance(value, Tensor))


def time_calls(calls: list[Callable[[], Any]], marker: Tensor) -> float:
    """Mean seconds of a call."""
    wait_for(marker)
    started = time.perf_counter()
    for call in calls:
        call()
    wait_for(marker)
    return (time.perf_counter() - started) / len(calls)


def restore(operation: Operation, sets: list[Arguments], arguments: Arguments) -> None:
    """What accumulates begins anew, so that no value grows or vanishes."""
    for name in operation.updated:
        for own in sets:
            own[name].copy_(arguments[name])
