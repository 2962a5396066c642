"""What one training step launches, the bytes that must be moved, and the least time they take on two GPUs.

    python scripts/kernel_launches.py                          prints the table
    python scripts/kernel_launches.py --csv docs/launches.csv  writes it

The launches are those of the step itself: it runs in the CUDA simulator (scripts/test.sh builds it), where
scripts/launch_recorder.cpp takes the place of everything that would cost time or memory. Their bytes and flops are
those of llmc/kernels.py, which must list the very same launches. The least time is the larger of bytes / bandwidth and
flops / peak.
"""

import argparse
import csv
import ctypes
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import scipy_openblas32
import torch
from kernel_report import short_name

from llmc import kernels, models
from llmc.kernels import CUBLAS, MEMSET
from llmc.model_file import ModelShape
from llmc.roofline import GPUS, Gpu

ROOT = Path(__file__).resolve().parent.parent
SIMULATOR = ROOT / "build" / "cudasim"
LISTED_GPUS = ("A100", "H100")


@dataclass(frozen=True)
class Step:
    """A training step with -w 1."""

    name: str
    descriptor: str
    B: int
    T: int = 1024
    precision: Literal["fp32", "bf16"] = "bf16"
    tf32: bool = True
    grad_dtype: Literal["fp32", "bf16", ""] = ""  # "": as precision
    recompute: int = 1
    gelu_fusion: int = 0
    bias_fusion: bool = True  # as llmc-train has it where timing does not find it slower
    zero_stage: int = 0
    world_size: int = 1
    accumulation_steps: int = 1
    offload_piece: int = 0  # of an offloaded optimizer; 0: it is on the GPU
    cuda_graphs: bool = False
    fp8: int = 0

    @cached_property
    def shape(self) -> ModelShape:
        return models.resolve(self.descriptor, None)

    def config(self, core: Any) -> Any:
        """core: of the package or of the simulator."""
        s = self.shape
        return core.GPT2Config(
            max_seq_len=self.T,
            vocab_size=s.vocab_size,
            padded_vocab_size=s.padded_vocab_size,
            num_layers=s.num_layers,
            num_heads=s.num_heads,
            channels=s.channels,
        )

    def options(self, core: Any) -> Any:
        return core.Options(
            batch_size=self.B,
            seq_len=self.T,
            precision=self.precision,
            grad_dtype=self.grad_dtype or self.precision,
            recompute=self.recompute,
            gelu_fusion=self.gelu_fusion,
            bias_fusion=self.bias_fusion,
            zero_stage=self.zero_stage,
            device="cuda",
            tf32=self.tf32,
            offload_optimizer=self.offload_piece > 0,
            offload_piece=self.offload_piece,
            cuda_graphs=self.cuda_graphs,
            fp8=self.fp8,
        )

    def on_paper(self) -> kernels.Step:
        from llmc import _C

        return kernels.Step(self.config(_C), self.options(_C), self.world_size, self.accumulation_steps)


STEPS = [
    Step("124M", "d12", B=64),
    Step("350M", "d24", B=32),
    Step("1558M", "d48", B=16),
    Step("Shakespeare", "custom:l=4,c=128,h=4,t=128,v=65", B=4, T=128),
    Step("124M fp32", "d12", B=16, precision="fp32"),
]
# Of these only the kernels that no step above launches are listed, those of the start and of a resume included.
OTHERS = [
    Step("124M, fp32 gradients", "d12", B=4, grad_dtype="fp32"),
    Step("124M, bias gradients apart", "d12", B=4, bias_fusion=False),
    Step("124M FP8", "d12", B=4, fp8=1),
    Step("124M FP8, loss head too", "d12", B=4, fp8=2),
    Step("124M fp32, bias gradients apart", "d12", B=4, precision="fp32", bias_fusion=False),
    *(
        Step(f"{name} {mode}", descriptor, B=4, T=T, precision=precision, tf32=tf32)
        for mode, precision, tf32 in (("bf16", "bf16", True), ("fp32", "fp32", True), ("fp32 -f 0", "fp32", False))
        for name, descriptor, T in (
            ("Shakespeare", "custom:l=4,c=128,h=4,t=128,v=65", 128),
            ("124M", "d12", 1024),
            ("GPT-3 760M", "gpt3:c1536", 1024),
            ("GPT-3 1.3B", "gpt3:c2048", 1024),
            ("C = 4096", "custom:l=1,c=4096,h=32,t=1024,v=50257", 1024),
            ("C = 32768", "custom:l=1,c=32768,h=256,t=1024,v=50257", 1024),
        )
    ),
]


# --- the launches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """kernel: its short name; cuBLASLt, memset, graph or the name of a collective. dynamic_shared: bytes of a block."""

    kernel: str
    threads: int
    dynamic_shared: int
    bytes: int  # of a memset, a product, or the whole tensor of a collective
    product: tuple[int, int, int] | None  # rows and columns of the result, depth


KINDS = ["", MEMSET, CUBLAS, "all_reduce", "reduce_scatter", "all_gather", "graph"]  # launch_recorder.cpp's
COLLECTIVES = KINDS[3:6]


class Record(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("kind", "kernel", "threads", "dynamic_shared", "bytes", "rows", "columns", "depth")
    ]


class Recorder:
    """The simulated core with scripts/launch_recorder.cpp in front of it. There can be one in a process."""

    def __init__(self) -> None:
        extension = SIMULATOR / "fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not extension.exists():
            sys.exit(f"{extension} is not built: scripts/test.sh builds the CUDA simulator")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "recorder.so"
            source = ROOT / "scripts" / "launch_recorder.cpp"
            subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
            self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # before what it replaces
        self.library.recorder_begin.restype = ctypes.POINTER(Record)
        self.library.recorder_count.restype = ctypes.c_size_t
        ctypes.CDLL(str(SIMULATOR / "libcudasim.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(f"{scipy_openblas32.get_lib_dir()}/lib{scipy_openblas32.get_library()}.so")
        self.core = load(extension)
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", extension], capture_output=True, text=True, check=True
        ).stdout
        lines = (line.split(" ", 2) for line in symbols.splitlines())
        self.names = {int(address, 16): short_name(name) for address, kind, name in lines if kind in "tT"}

    def record(self, step: Step, whole_run: bool = False) -> list[Launch]:
        """The launches of one step; whole_run: also those of the start, which makes the optimizer's state, and of a
        resume."""
        self.library.recorder_clear()
        comm = None
        if step.world_size > 1:
            comm = self.core.nccl_communicator(self.core.nccl_unique_id(), 0, step.world_size, 0, 60)
        model = self.core.GPT2(step.config(self.core), step.options(self.core), comm)
        model.start_optimizer()
        if whole_run and step.precision == "bf16":
            model.restore_parameters()
        tokens = torch.zeros(step.B, step.T, dtype=torch.int64)
        # The first backward pass allocates the gradients, which clears them once more; the third step has graphs.
        for _ in range(0 if whole_run else 2):
            self.step(model, tokens, step.accumulation_steps)
            self.library.recorder_clear()
        self.step(model, tokens, step.accumulation_steps)
        records = self.library.recorder_begin()
        return [self.launch(records[i]) for i in range(self.library.recorder_count())]

    def step(self, model: Any, tokens: torch.Tensor, accumulation_steps: int) -> None:
        for micro_step in range(accumulation_steps):
            model.forward(tokens)
            model.backward(tokens, micro_step, accumulation_steps)
        model.update(1e-3, 0.1, 1)

    def launch(self, record: Record) -> Launch:
        kernel = KINDS[record.kind] or self.names[record.kernel]
        product = (record.rows, record.columns, record.depth) if kernel == CUBLAS else None
        return Launch(kernel, record.threads, record.dynamic_shared, record.bytes, product)


def load(extension: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llmc_cudasim._C", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- bytes and flops --------------------------------------------------------------------------------------------------


def differences(step: Step, launches: list[Launch]) -> list[str]:
    """Between what was launched and what llmc/kernels.py says; bytes and shapes where the recorder has seen them."""
    paper = step.on_paper()
    expected: Counter[tuple[Any, ...]] = Counter()
    patterns = set()
    for kernel, count in paper.launches().items():
        patterns.add(kernel.name)
        expected[signature(kernel.name, kernel.bytes, kernel.product)] += count
    for collective, count in paper.collectives().items():
        expected[signature(collective.operation, collective.bytes)] += count
    found: Counter[tuple[Any, ...]] = Counter()
    for launch in launches:
        matching = [pattern for pattern in patterns if fnmatchcase(launch.kernel, pattern)]
        name = matching[0] if len(matching) == 1 else launch.kernel
        found[signature(name, launch.bytes, launch.product)] += 1
    return [
        f"{step.name}: {' '.join(map(str, key))}: launched {found[key]} times, {expected[key]} in llmc/kernels.py"
        for key in sorted(expected.keys() | found.keys(), key=str)
        if expected[key] != found[key]
    ]


def signature(name: str, moved: float, product: tuple[int, int, int] | None = None) -> tuple[Any, ...]:
    """What a launch and its entry in llmc/kernels.py have in common."""
    return (name, moved, product) if name in (CUBLAS, MEMSET, *COLLECTIVES) else (name,)


@dataclass(frozen=True)
class Work:
    """All launches of a kernel in a step together."""

    bytes: float
    flops: float = 0


def work_of(name: str, paper: Counter[kernels.Kernel]) -> Work:
    own = [(kernel, count) for kernel, count in paper.items() if fnmatchcase(name, kernel.name)]
    return Work(sum(k.bytes * count for k, count in own), sum(k.flops * count for k, count in own))


def least_seconds(work: Work, gpu: Gpu, step: Step) -> float:
    return max(work.bytes / gpu.bandwidth, work.flops / gpu.peak(step.precision, step.tf32))


# --- the table --------------------------------------------------------------------------------------------------------

SIZES = ["model", "B", "T", "kernel", "threads", "dynamic_shared", "launches"]
BY_HOST = "launches of the host with --cuda-graphs 1"
HEADER = [*SIZES, "MB", "GFLOP", *(f"{gpu}_us" for gpu in LISTED_GPUS)]


def forms(step: Step, launches: list[Launch]) -> dict[str, list[str]]:
    """The first columns of the table for every kernel, in the order of the step."""
    counts = Counter(launch.kernel for launch in launches)
    found = {}
    for launch in launches:
        sizes = [str(launch.threads), str(launch.dynamic_shared)] if launch.threads else ["", ""]
        found[launch.kernel] = [step.name, str(step.B), str(step.T), launch.kernel, *sizes, str(counts[launch.kernel])]
    return found


def rows(step: Step, launches: list[Launch]) -> list[list[str]]:
    """All kernels with their work, then the sum."""
    if wrong := differences(step, launches):
        sys.exit("\n".join(wrong))
    paper = step.on_paper().launches()
    table = []
    total, times = Work(0), dict.fromkeys(LISTED_GPUS, 0.0)
    for kernel, start in forms(step, launches).items():
        work = work_of(kernel, paper)
        seconds = {gpu: least_seconds(work, GPUS[gpu], step) for gpu in LISTED_GPUS}
        table.append(start + amounts(work, seconds))
        total = Work(total.bytes + work.bytes, total.flops + work.flops)
        times = {gpu: times[gpu] + seconds[gpu] for gpu in LISTED_GPUS}
    return [*table, [step.name, str(step.B), str(step.T), "all", "", "", str(len(launches)), *amounts(total, times)]]


def amounts(work: Work, seconds: dict[str, float]) -> list[str]:
    return [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.1f}", *(f"{1e6 * seconds[gpu]:.1f}" for gpu in LISTED_GPUS)]


def report() -> list[list[str]]:
    recorder = Recorder()
    table = [HEADER]
    for step in STEPS:
        table += rows(step, recorder.record(step))
        by_host = recorder.record(replace(step, cuda_graphs=True))
        sizes = [step.name, str(step.B), str(step.T)]
        table.append([*sizes, BY_HOST, "", "", str(len(by_host))] + [""] * (len(HEADER) - len(SIZES)))
    listed = {row[SIZES.index("kernel")] for row in table}
    for step in OTHERS:
        new = forms(step, recorder.record(step, whole_run=True))
        table += [start + [""] * (len(HEADER) - len(SIZES)) for kernel, start in new.items() if kernel not in listed]
        listed |= new.keys()
    return table


def print_table(table: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    for row in table:
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(cell.ljust(width) if i in (0, 3) else cell.rjust(width) for i, (cell, width) in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the table to this file instead of printing it")
    arguments = parser.parse_args()
    table = report()
    if arguments.csv is None:
        print_table(table)
        return
    with open(arguments.csv, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)


if __name__ == "__main__":
    main()
