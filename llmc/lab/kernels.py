"""`llmc-bench kernels`: from the command line's words to cases, and one measurement after the other."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmc import models
from llmc.config import TrainConfig
from llmc.device import Device, choose_device
from llmc.errors import RunError, UsageError
from llmc.lab.catalogue import OPERATIONS
from llmc.lab.limits import Machine
from llmc.lab.measure import Case, Measurement, measure
from llmc.lab.operation import Draw, Operation, Step
from llmc.lab.report import COLUMNS, append_csv, check_chart, check_csv, draw, print_measurement
from llmc.lab.variants import load_variants
from llmc.model_file import FileDtype

DEFAULT_SHAPES = {"cpu": "d12:4x256", "cuda": "d12:16x1024"}
DEFAULT_PRECISIONS: dict[str, FileDtype] = {"cpu": "fp32", "cuda": "bf16"}
MAX_SIZE = 2**40  # of any size: more is a typing error


@dataclass(frozen=True)
class Settings:
    """What the command line says; empty: the default."""

    operations: Sequence[str]
    shapes: Sequence[str]
    precisions: Sequence[FileDtype]
    variants: Sequence[Path]
    device: str
    threads: int | None
    seconds: float
    csv: Path | None
    chart: Path | None


def run_kernels(settings: Settings, argv: Sequence[str]) -> None:
    """Raises RunError after the last measurement if a contender's results are wrong."""
    device = choose_device(TrainConfig(device=settings.device))
    kind = "cuda" if device.is_cuda else "cpu"
    precisions = settings.precisions or [DEFAULT_PRECISIONS[kind]]
    asked = [find(name) for name in settings.operations]
    operations = asked or list(OPERATIONS.values())
    missing = {operation.name: reason for operation in operations if (reason := why_not(operation, device, precisions))}
    if asked and missing:
        name, reason = next(iter(missing.items()))
        raise UsageError(f"{name} needs {reason}")
    operations = [operation for operation in operations if operation.name not in missing]
    shapes = settings.shapes or [DEFAULT_SHAPES[kind]]
    cases = [
        Case(operation, sizes, precision)
        for operation in operations
        for sizes in dict.fromkeys(sizes for shape in shapes for sizes in parse_shape(shape, operation))
        for precision in precisions
    ]
    if settings.csv:
        check_csv(settings.csv, COLUMNS)
    if settings.chart:
        check_chart(settings.chart)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    variants = load_variants(settings.variants, operations, device.is_cuda)
    machine = Machine(device)
    print(f"{device.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if missing:
        print(f"left out: {', '.join(missing)}, which need {next(iter(missing.values()))}")
    measurements = []
    for case in cases:
        measurement = measure(case, variants, machine, settings.seconds)
        print_measurement(measurement)
        if settings.csv:
            append_csv(settings.csv, measurement, shlex.join(["llmc-bench", *argv]))
        measurements.append(measurement)
    if settings.chart:
        draw(settings.chart, measurements, device.name)
    report_mistakes(measurements)


def find(name: str) -> Operation:
    if name not in OPERATIONS:
        raise UsageError(f"{name} is no operation: give one or more of {', '.join(OPERATIONS)}")
    return OPERATIONS[name]


def why_not(operation: Operation, device: Device, precisions: Sequence[FileDtype]) -> str:
    """What is missing for it, or ""."""
    if operation.fp8 and not device.has_fp8:
        return f"a GPU of compute capability 8.9 or newer, which {device.name} is not"
    if operation.fp8 and set(precisions) != {"bf16"}:
        return "--precision bf16 alone"
    return ""


def parse_shape(text: str, operation: Operation) -> list[tuple[int, ...]]:
    """N=1024,C=768: those sizes; MODEL:BxT: those of the operation in a training step of the model."""
    descriptor, _, rows = text.rpartition(":")
    if batch := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", rows):
        shape = models.resolve(descriptor, None)
        B, T = int(batch[1]), int(batch[2])
        if shape.max_seq_len < T:
            raise UsageError(f"--shape {text}: a row has up to {shape.max_seq_len} tokens, the model's context")
        return list(operation.of_step(Step(shape, B, T)))
    sizes = dict(re.findall(r"(\w+)=([1-9]\d*)(?:,|$)", text))
    if ",".join(f"{name}={size}" for name, size in sizes.items()) != text or set(sizes) != set(operation.sizes):
        wanted = ",".join(f"{name}=..." for name in operation.sizes)
        raise UsageError(f"--shape {text}: {operation.name} has {wanted}; or give MODEL:BxT, such as d12:4x256")
    values = tuple(int(sizes[name]) for name in operation.sizes)
    if max(values) > MAX_SIZE:
        raise UsageError(f"--shape {text}: sizes are at most {MAX_SIZE}")
    return [values]


def describe_operations() -> str:
    """A line for each operation: the arguments that a variant takes, and the sizes of --shape."""
    lines = []
    for name, operation in OPERATIONS.items():
        arguments = operation.arguments(Draw(torch.float32, "meta"), *(8 for _ in operation.sizes))
        lines.append(f"{name}({', '.join(arguments)})  {','.join(operation.sizes)}")
    return "\n".join(lines)


def report_mistakes(measurements: Sequence[Measurement]) -> None:
    mistakes = [f"{row.contender}: {m.case}: {row.mistake}" for m in measurements for row in m.rows if row.mistake]
    if mistakes:
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise RunError(mistakes[0] + more)
