"""Tests, trains and measures llmc on the GPU of this machine and writes a report: the second half of check_gpu.sh.

The measurements are training steps of random tokens at T = 1024 in bf16, of llmc as llmc-train runs it by default and
of PyTorch (the model of scripts/train_gpt2.py: torch.compile, flash attention, autocast to bf16, fused AdamW), at the
largest micro-batch up to 64 that fits both. Each runs in a process of its own.

Usage: python scripts/check_gpu.py
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import models  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import benchmark_cases  # isort: skip
import pynvml  # isort: skip
import torch
import torch_peer
import train_gpt2

from llmc.build import core_config, core_options
from llmc.config import TrainConfig
from llmc.device import Device, choose_device
from llmc.errors import RunError
from llmc.peak import peak_flops

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"124M": "d12", "350M": "d24", "1558M": "d48"}
VARIANTS: dict[str, dict[str, Any]] = {  # of llmc, by their flags
    "--cuda-graphs 1": {"cuda_graphs": True},
    "--attention cudnn": {"attention": "cudnn"},
    "--fp8 1": {"fp8": 1},
    "--fp8 2": {"fp8": 2},
}
T = 1024
LARGEST_B = 64
WARMUP_STEPS, STEPS = 5, 20
OUT_OF_MEMORY = re.compile(r"out of memory|MiB of memory left|does not fit", re.IGNORECASE)


# --- one measurement, in a process of its own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    milliseconds: float  # median of a step
    mebibytes: float  # of the device's memory, all that the process takes


def measure(contender: str, descriptor: str, B: int, device: Device) -> Measurement:
    """contender: llmc, one of VARIANTS, or torch."""
    before = used_memory(device)
    shape = models.resolve(descriptor, None)
    length = min(T, shape.max_seq_len)
    tokens = torch.randint(shape.vocab_size, (B, length + 1), generator=torch.Generator().manual_seed(1))
    if contender == "torch":
        step = torch_step(descriptor, tokens, device)
    else:
        step = llmc_step(descriptor, tokens, device, VARIANTS.get(contender, {}))
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return Measurement(1e3 * statistics.median(seconds), (used_memory(device) - before) / 2**20)


def llmc_step(
    descriptor: str, tokens: torch.Tensor, device: Device, settings: Mapping[str, Any]
) -> Callable[[], float]:
    from llmc import _C

    B, length = tokens.shape[0], tokens.shape[1] - 1
    config = TrainConfig(model=descriptor, batch_size=B, seq_len=length, **settings)
    shape = models.resolve(descriptor, None)
    model = _C.GPT2(core_config(descriptor, shape), core_options(config, "bf16", device))
    model.init_random()
    return benchmark_cases.steps_of(model, tokens)


def torch_step(descriptor: str, tokens: torch.Tensor, device: Device) -> Callable[[], float]:
    kind = "cuda" if device.is_cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    model = train_gpt2.make_model(descriptor, flash=True)[0].to(kind)
    optimizer = train_gpt2.make_optimizer(model, weight_decay=0.1, fused=True, sharded=False)
    if device.is_cuda:  # on a CPU, for the tests of this file, compiling takes too long
        model = torch.compile(model)
    x, y = tokens[:, :-1].to(kind), tokens[:, 1:].to(kind)
    return lambda: torch_peer.train_step(InBf16(model, kind), optimizer, x, y, benchmark_cases.LEARNING_RATE)


class InBf16(torch.nn.Module):
    """The model with its matrix products in bf16."""

    def __init__(self, model: torch.nn.Module, kind: str) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.kind, torch.bfloat16):
            return self.model(x, y)


def used_memory(device: Device) -> int:
    """Bytes of the device's memory that all processes together have; 0 for a CPU."""
    if not device.is_cuda:
        return 0
    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByPciBusId(device.pci_bus_id)).used)


# --- all measurements -------------------------------------------------------------------------------------------------


DOES_NOT_FIT = "does not fit"


class DoesNotFitError(Exception):
    pass


def in_a_process(contender: str, descriptor: str, B: int) -> Measurement:
    """Raises DoesNotFitError, or RunError with the last line that the process wrote."""
    command = [sys.executable, __file__, "measure", contender, descriptor, str(B)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return Measurement(**json.loads(result.stdout.splitlines()[-1]))
    if OUT_OF_MEMORY.search(result.stderr):
        raise DoesNotFitError
    lines = result.stderr.strip().splitlines()
    raise RunError(lines[-1] if lines else f"ended with status {result.returncode}")


@dataclass(frozen=True)
class Row:
    """Results of a model; a text instead of a measurement says why there is none."""

    model: str
    B: int
    llmc: Measurement | str
    variants: Mapping[str, Measurement | str]
    torch: Measurement | str


Run = Callable[[str, str, int], Measurement]  # contender, descriptor, B


def compare(model: str, run: Run = in_a_process) -> Row:
    """Both at the largest batch that fits both, and llmc's variants there. If PyTorch never fits: llmc at the largest
    that it can do."""
    descriptor = MODELS[model]

    def row(B: int, ours: Measurement | str, theirs: Measurement | str) -> Row:
        variants: dict[str, Measurement | str] = dict.fromkeys(VARIANTS, ours)
        if isinstance(ours, Measurement):
            variants = {name: attempt(run, name, descriptor, B) or DOES_NOT_FIT for name in VARIANTS}
        return Row(model, B, ours, variants, theirs)

    alone = None
    for B in halves(LARGEST_B):
        ours = attempt(run, "llmc", descriptor, B)
        if ours is None:
            continue
        theirs = attempt(run, "torch", descriptor, B)
        if theirs is not None:
            return row(B, ours, theirs)
        alone = alone or row(B, ours, DOES_NOT_FIT)
    return alone or row(1, DOES_NOT_FIT, attempt(run, "torch", descriptor, 1) or DOES_NOT_FIT)


def attempt(run: Run, contender: str, descriptor: str, B: int) -> Measurement | str | None:
    """None: it does not fit."""
    print(f"check_gpu: {contender}, {descriptor}, B = {B}", flush=True)
    try:
        return run(contender, descriptor, B)
    except DoesNotFitError:
        return None
    except RunError as error:
        return str(error)


def halves(largest: int) -> Iterator[int]:
    while largest >= 1:
        yield largest
        largest //= 2


# --- the report -------------------------------------------------------------------------------------------------------


def speed_table(rows: list[Row], gpu: str) -> str:
    """Markdown: milliseconds, tokens per second, utilisation and memory of both, and how much longer PyTorch takes."""
    lines = ["| model | B | | ms/step | tokens/s | MFU | MiB | time / llmc's |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        ours = row.llmc.milliseconds if isinstance(row.llmc, Measurement) else None
        results = {
            "llmc": row.llmc,
            **{f"llmc, {name}": result for name, result in row.variants.items()},
            "PyTorch, compiled": row.torch,
        }
        for name, result in results.items():
            start = f"| {row.model} | {row.B} | {name} |"
            if isinstance(result, str):
                lines.append(f"{start} {result} | | | | |")
                continue
            seconds = result.milliseconds / 1e3
            ratio = f"{result.milliseconds / ours:.2f}" if ours else ""
            lines.append(
                f"{start} {result.milliseconds:.1f} | {row.B * T / seconds:.0f} | {utilisation(row, seconds, gpu)} "
                f"| {result.mebibytes:.0f} | {ratio} |"
            )
    return "\n".join(lines)


def utilisation(row: Row, seconds: float, gpu: str) -> str:
    peak = peak_flops(gpu, "bf16")
    if peak is None:
        return "n/a"
    flops = row.B * T * models.resolve(MODELS[row.model], None).flops_per_token(T)
    return f"{100 * flops / seconds / peak:.1f}%"


@dataclass(frozen=True)
class Command:
    """A command and what came of it."""

    line: str
    output: str
    passed: bool

    def markdown(self, last_lines: int) -> str:
        shown = "\n".join(self.output.strip().splitlines()[-last_lines:])
        verdict = "" if self.passed else " (failed)"
        return f"`{self.line}`{verdict}\n\n```\n{shown}\n```"


def execute(*command: str, cwd: Path = ROOT) -> Command:
    """Runs it, showing the output as it comes."""
    line = " ".join(command)
    print(f"check_gpu: {line}", flush=True)
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = []
    for text in process.stdout:
        print(text, end="", flush=True)
        output.append(text)
    return Command(line, "".join(output), process.wait() == 0)


def run_tests() -> list[Command]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    commands = [execute(*pytest)]
    if shutil.which("compute-sanitizer"):
        operations = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_ops_*.py"))
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
            sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
            commands.append(execute(*sanitizer, *pytest, *operations))
    else:
        print("check_gpu: compute-sanitizer is not installed: skipped")
    return commands


def run_training() -> list[Command]:
    """GPT-2 124M on Shakespeare with telemetry and checkpoints, and a resume."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        made = execute("llmc-data", "shakespeare", "--encoding", "gpt2", "--out", data)
        files = ["-i", f"{data}/*_train_*.bin", "-j", f"{data}/*_val_*.bin", "-o", f"{folder}/log"]
        train = ["llmc-train", "--device", "cuda", "-e", "d12", *files, "-b", "8", "-v", "50", "-s", "100", "-lg", "10"]
        schedule = ["-l", "3e-4", "-u", "20", "-n", "100"]
        return [
            made,
            execute(*train, *schedule, "-x", "100"),
            execute(*train, *schedule, "-x", "120", "-y", "1"),
        ]


def write_report(gpu: str, tests: list[Command], training: list[Command], rows: list[Row], info: Command) -> Path:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    date = time.strftime("%Y-%m-%d")
    sections = [
        f"# llmc on {gpu}, {date}",
        f"`scripts/check_gpu.sh` at commit {commit.stdout.strip() or 'unknown'}.",
        "## Tests",
        *(command.markdown(15) for command in tests),
        "## Training",
        *(command.markdown(40) for command in training),
        "## Speed",
        f"Median of {STEPS} training steps of random tokens, T = {T}, bf16. "
        "MFU: flops of the model over the GPU's peak. MiB: device memory of the process.",
        speed_table(rows, gpu),
        "## Machine",
        info.markdown(100),
    ]
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = ROOT / "docs" / "gpu" / f"{name}-{date}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n")
    return path


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["measure"]:
        contender, descriptor, B = arguments[1:]
        print(json.dumps(asdict(measure(contender, descriptor, int(B), choose_device(TrainConfig(device="cuda"))))))
        return
    try:
        gpu = choose_device(TrainConfig(device="cuda")).name
    except RunError as error:
        sys.exit(f"check_gpu: {error}")
    if not torch.cuda.is_available():
        sys.exit(f"check_gpu: torch {torch.__version__} cannot use the GPU: install torch with CUDA into .venv")
    info = execute("llmc-info")
    tests = run_tests()
    training = run_training()
    rows = [compare(model) for model in MODELS]
    print(speed_table(rows, gpu))
    path = write_report(gpu, tests, training, rows, info)
    passed = all(command.passed for command in (*tests, *training))
    print(f"check_gpu: {'passed' if passed else 'FAILED'}; the report is {path}")
    sys.exit(not passed)


if __name__ == "__main__":
    main(sys.argv[1:])
