"""What one training step launches, the bytes that must be moved, and the least time they take on two GPUs.

    python scripts/kernel_launches.py                          prints the table
    python scripts/kernel_launches.py --csv docs/launches.csv  writes it

The launches are those of the step itself: it runs in the CUDA simulator (scripts/test.sh builds it), where
scripts/launch_recorder.cpp takes the place of everything that would cost time or memory. The bytes and flops are those
of the operations (csrc/ops/ops.h): every tensor is read or written once; scratch memory that stays in the L2 cache does
not count. The least time is the larger of bytes / bandwidth and flops / peak.
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
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

import scipy_openblas32
import torch
from kernel_report import short_name

from llmc import models
from llmc.model_file import ModelShape
from llmc.peak import peak_flops

ROOT = Path(__file__).resolve().parent.parent
SIMULATOR = ROOT / "build" / "cudasim"
GPUS = {  # name in the table: (name of the device, bytes/s of its memory, flop/s of fp32 without tensor cores)
    "A100": ("NVIDIA A100-SXM4-80GB", 2039e9, 19.5e12),
    "H100": ("NVIDIA H100 80GB HBM3", 3350e9, 67e12),
}  # by NVIDIA's data sheets
CUBLAS, MEMSET = "cuBLASLt", "memset"


@dataclass(frozen=True)
class Step:
    """A training step of one micro-batch with -r 1 -ge 0 -w 1."""

    name: str
    descriptor: str
    B: int
    T: int = 1024
    precision: Literal["fp32", "bf16"] = "bf16"
    tf32: bool = True
    grad_dtype: Literal["fp32", "bf16", ""] = ""  # "": as precision

    @cached_property
    def shape(self) -> ModelShape:
        return models.resolve(self.descriptor, None)

    @property
    def element(self) -> int:
        """Bytes of a parameter, activation or gradient."""
        return 2 if self.precision == "bf16" else 4


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
    """kernel: its short name, cuBLASLt or memset. dynamic_shared: bytes of a block. bytes: of a memset."""

    kernel: str
    threads: int
    dynamic_shared: int
    bytes: int


class Record(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("kernel", "threads", "dynamic_shared", "bytes")]


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
        s = step.shape
        config = self.core.GPT2Config(
            max_seq_len=step.T,
            vocab_size=s.vocab_size,
            padded_vocab_size=s.padded_vocab_size,
            num_layers=s.num_layers,
            num_heads=s.num_heads,
            channels=s.channels,
        )
        options = self.core.Options(
            batch_size=step.B,
            seq_len=step.T,
            precision=step.precision,
            grad_dtype=step.grad_dtype or step.precision,
            device="cuda",
            tf32=step.tf32,
        )
        self.library.recorder_clear()
        model = self.core.GPT2(config, options)
        model.start_optimizer()
        if whole_run and step.precision == "bf16":
            model.restore_parameters()
        tokens = torch.zeros(step.B, step.T, dtype=torch.int64)
        if not whole_run:
            model.forward(tokens)
            model.backward(tokens)
            self.library.recorder_clear()  # the gradients were allocated, which clears them once more
        model.forward(tokens)
        model.backward(tokens)
        model.update(1e-3, 0.1, 1)
        records = self.library.recorder_begin()
        return [self.launch(records[i]) for i in range(self.library.recorder_count())]

    def launch(self, record: Record) -> Launch:
        other = MEMSET if record.bytes else CUBLAS
        kernel = self.names[record.kernel] if record.kernel else other
        return Launch(kernel, record.threads, record.dynamic_shared, record.bytes)


def load(extension: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llmc_cudasim._C", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- bytes and flops of a step ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """All launches of a kernel in a step together."""

    bytes: float
    flops: float = 0


class Sizes:
    """Element counts of a step's tensors. x: bytes of an element; chunks: of the loss head."""

    def __init__(self, step: Step, chunks: int) -> None:
        s = step.shape
        self.x = step.element
        self.B, self.T, self.C, self.L, self.NH = step.B, step.T, s.channels, s.num_layers, s.num_heads
        self.N, self.V, self.Vp = step.B * step.T, s.vocab_size, s.padded_vocab_size
        self.parameters = s.num_parameters
        self.has_master = step.precision == "bf16"
        self.chunks = chunks

    @property
    def attention(self) -> float:
        """Flops of one (T,HS)·(HS,T) product of all rows, heads and layers; the causal half."""
        return self.L * self.B * self.T**2 * self.C

    def products(self) -> Work:
        """Of cuBLASLt: forward, gradient of the input, gradient of the weight."""
        moved = flops = 0
        for OC, IC in ((3, 1), (1, 1), (4, 1), (1, 4)):
            OC, IC = OC * self.C, IC * self.C
            activations, weight = self.N * (OC + IC), OC * IC
            moved += self.L * self.x * (3 * activations + 2 * weight + weight)
            flops += self.L * 3 * 2 * self.N * OC * IC
        head = self.Vp * self.C
        moved += 3 * self.x * self.N * (self.Vp + self.C)
        moved += head * (2 * self.x * self.chunks + 4 * (2 * self.chunks - 1))  # the first chunk's gradient overwrites
        flops += 3 * 2 * self.N * head
        return Work(moved, flops)


WORK: dict[str, Callable[[Sizes], Work]] = {  # by a pattern of the kernel's name
    CUBLAS: Sizes.products,
    "embedding_forward_kernel*": lambda s: Work(s.x * s.C * (s.N + min(s.N, s.V) + s.T)),
    "dwte_kernel*": lambda s: Work(s.x * s.C * (s.N + 2 * min(s.N, s.V))),
    "dwpe_kernel*": lambda s: Work(s.x * s.C * (s.N + 2 * s.T)),
    "layernorm_forward_kernel<*false>": lambda s: Work(2 * s.x * s.N * s.C),
    "layernorm_forward_kernel<*true>": lambda s: Work(2 * s.L * 4 * s.x * s.N * s.C),
    "layernorm_backward_kernel*": lambda s: Work((2 * s.L + 1) * 4 * s.x * s.N * s.C),
    "attention_forward_kernel*": lambda s: Work(s.L * s.N * (4 * s.x * s.C + 4 * s.NH), 2 * s.attention),
    "attention_delta_kernel*": lambda s: Work(s.L * s.N * (2 * s.x * s.C + 4 * s.NH)),
    "attention_dq_kernel*": lambda s: Work(s.L * s.N * (5 * s.x * s.C + 8 * s.NH), 3 * s.attention),
    "attention_dkdv_kernel*": lambda s: Work(s.L * s.N * (6 * s.x * s.C + 8 * s.NH), 4 * s.attention),
    "bias_partials_kernel*": lambda s: Work(9 * s.L * s.x * s.N * s.C),
    "add_groups_kernel*": lambda s: Work(s.x * s.C * (9 * s.L + 2 * (2 * s.L + 1))),
    "gelu_forward_kernel*": lambda s: Work(2 * s.L * 2 * s.x * s.N * 4 * s.C),
    "gelu_backward_kernel*": lambda s: Work(s.L * 3 * s.x * s.N * 4 * s.C),
    "fused_classifier_kernel*": lambda s: Work(2 * s.x * s.N * s.Vp),
    "cast_kernel*": lambda s: Work(s.Vp * s.C * (4 + s.x)),
    "partial_sums_kernel<true>": lambda s: Work(s.x * s.parameters),
    "partial_sums_kernel<false>": lambda s: Work(4 * s.N),
    "add_partials_kernel": lambda s: Work(0),
    "clip_scale_kernel": lambda s: Work(0),
    "adamw_kernel*": lambda s: Work(s.parameters * (2 * s.x + 4 * 4 + (8 if s.has_master else s.x))),
}


def work_of(kernel: str, sizes: Sizes) -> Work:
    matching = [work for pattern, work in WORK.items() if fnmatchcase(kernel, pattern)]
    if len(matching) != 1:
        sys.exit(f"{kernel} matches {len(matching)} entries of WORK in {__file__}: there must be one")
    return matching[0](sizes)


def least_seconds(work: Work, gpu: str, step: Step) -> float:
    device, bandwidth, fp32_peak = GPUS[gpu]
    peak = peak_flops(device, step.precision) if step.precision == "bf16" or step.tf32 else fp32_peak
    assert peak is not None
    return max(work.bytes / bandwidth, work.flops / peak)


# --- the table --------------------------------------------------------------------------------------------------------

SIZES = ["model", "B", "T", "kernel", "threads", "dynamic_shared", "launches"]
HEADER = [*SIZES, "MB", "GFLOP", *(f"{gpu}_us" for gpu in GPUS)]


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
    chunks = sum(launch.kernel.startswith("fused_classifier_kernel") for launch in launches)
    sizes = Sizes(step, chunks)
    memset = Work(sum(launch.bytes for launch in launches))
    table = []
    total, times = Work(0), dict.fromkeys(GPUS, 0.0)
    for kernel, start in forms(step, launches).items():
        work = memset if kernel == MEMSET else work_of(kernel, sizes)
        seconds = {gpu: least_seconds(work, gpu, step) for gpu in GPUS}
        table.append(start + amounts(work, seconds))
        total = Work(total.bytes + work.bytes, total.flops + work.flops)
        times = {gpu: times[gpu] + seconds[gpu] for gpu in GPUS}
    return [*table, [step.name, str(step.B), str(step.T), "all", "", "", str(len(launches)), *amounts(total, times)]]


def amounts(work: Work, seconds: dict[str, float]) -> list[str]:
    return [f"{work.bytes / 1e6:.1f}", f"{work.flops / 1e9:.1f}", *(f"{1e6 * seconds[gpu]:.1f}" for gpu in GPUS)]


def report() -> list[list[str]]:
    recorder = Recorder()
    table = [HEADER]
    for step in STEPS:
        table += rows(step, recorder.record(step))
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
