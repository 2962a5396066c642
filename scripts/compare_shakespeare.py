"""The quickstart against PyTorch on the same text: three runs in turn, validation loss over seconds of training.

1. llmc: scripts/quickstart.sh.
2. PyTorch: the model of scripts/train_gpt2.py (flash attention, fused AdamW), the same sizes, initial weights, batches,
   learning-rate curve and seconds of training. How many steps fit is measured first; the curve ends with the last one.
3. nanoGPT's recipe for a CPU in PyTorch: 4 layers, 128 channels, 4 heads, T = 64, B = 12, 2000 steps, learning rate
   1e-3 to 1e-4 after 100 steps of warm-up, AdamW betas 0.9 and 0.99, random rows.

At last a short run puts the first two on the same steps: the training losses of both over the first steps.
Writes a picture and the curves as CSV. Seconds count training steps only, not validation.

Usage: python scripts/compare_shakespeare.py [--output docs/shakespeare]
"""

import argparse
import csv
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmc import machine, models  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import matplotlib  # isort: skip
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch_peer
import train_gpt2

from llmc.cli import run
from llmc.config import TrainConfig, parse_args
from llmc.data.loader import DataLoader
from llmc.data.shards import find_shards, read_shard
from llmc.prepare import prepare
from llmc.schedule import Schedule

ROOT = Path(__file__).parent.parent
CALIBRATION_STEPS = 100
SAME_STEPS = 300

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Curve:
    """Validation losses over seconds of training."""

    name: str
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/shakespeare"), help="path without .png and .csv")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    config = parse_args(shlex.split(Path("scripts/shakespeare.flags").read_text(), comments=True))

    curves = [run_quickstart()]
    config = with_steps(config, curves[0].steps)
    curves.append(run_torch_twin(config, curves[0].seconds[-1]))
    curves.append(run_nanogpt(config))
    ours, theirs = same_steps(config)

    print(f"\n{machine.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':44}{'steps':>7}{'seconds':>9}{'val loss':>10}")
    for curve in curves:
        print(f"{curve.name:44}{curve.steps:7}{curve.seconds[-1]:9.0f}{curve.losses[-1]:10.4f}")
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"same batches, first {SAME_STEPS} steps: training losses differ by at most {difference:.1e}")
    write(args.output, curves, ours, theirs)


def run_quickstart() -> Curve:
    curve = Curve("llmc")
    with tempfile.TemporaryDirectory() as directory:
        command = ["bash", "scripts/quickstart.sh", "-o", directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seconds = 0.0
            for line in process.stdout:
                if step := re.search(r"^step +(\d+)/.*\| ([\d.]+) ms \|", line):
                    curve.steps = int(step[1])
                    seconds += float(step[2]) / 1e3
                    continue
                print(line, end="", flush=True)
                if validation := re.match(r"val loss ([\d.]+)", line):
                    curve.seconds.append(seconds)
                    curve.losses.append(float(validation[1]))
    if process.returncode:
        sys.exit(process.returncode)
    return curve


def run_torch_twin(config: TrainConfig, seconds: float) -> Curve:
    """PyTorch with llmc's batches, for as many steps as fit into `seconds`."""
    batches = shuffled_batches(config)
    model, optimizer = make_torch(config, betas=(0.9, 0.95))
    for batch in itertools.islice(batches, CALIBRATION_STEPS):  # threads, allocator, first touches
        torch_peer.train_step(model, optimizer, *batch, 1e-5)
    started = time.perf_counter()
    for batch in itertools.islice(batches, CALIBRATION_STEPS):
        torch_peer.train_step(model, optimizer, *batch, 1e-5)
    steps = int(seconds / (time.perf_counter() - started) * CALIBRATION_STEPS)

    config = with_steps(config, steps)
    schedule = Schedule(config.scheduler, config.learning_rate, config.warmup_steps, steps, config.final_lr_fraction)
    model, optimizer = make_torch(config, betas=(0.9, 0.95))
    batches = shuffled_batches(config)
    return train_torch("PyTorch, same model, batches and seconds", model, optimizer, batches, schedule, steps, config)


def with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    """The flags that scripts/quickstart.sh derives from the number of steps."""
    return replace(config, max_steps=steps, warmup_steps=steps // 20)


def shuffled_batches(config: TrainConfig) -> Iterator[Batch]:
    """llmc's batches from the beginning, in torch's int64."""
    loader = DataLoader(config.train_data, config.batch_size, config.seq_len, shuffle=True)
    while True:
        x, y = loader.next_batch()
        yield x.long(), y.long()


def run_nanogpt(config: TrainConfig) -> Curve:
    vocabulary = models.resolve(config.model, None).vocab_size
    recipe = replace(
        config,
        model=f"custom:l=4,c=128,h=4,t=64,v={vocabulary}",
        batch_size=12,
        seq_len=64,
        sample_length=64,
        weight_decay=0.1,
    )
    text = np.concatenate([read_shard(path) for path in find_shards(config.train_data)]).astype(np.int64)
    generator = torch.Generator().manual_seed(1337)

    def random_rows() -> Iterator[Batch]:
        while True:
            starts = torch.randint(len(text) - 65, (12,), generator=generator).tolist()
            rows = torch.from_numpy(np.stack([text[start : start + 65] for start in starts]))
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    model, optimizer = make_torch(recipe, betas=(0.9, 0.99))
    schedule = Schedule("cosine", 1e-3, 100, 2000, 0.1)
    return train_torch("nanoGPT's CPU recipe in PyTorch", model, optimizer, random_rows(), schedule, 2000, recipe)


def make_torch(config: TrainConfig, betas: tuple[float, float]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = torch_peer.make(models.resolve(config.model, None), config.weight_decay)
    for group in optimizer.param_groups:
        group["betas"] = betas
    return model, optimizer


def train_torch(
    name: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    schedule: Callable[[int], float],
    steps: int,
    config: TrainConfig,
) -> Curve:
    curve = Curve(name, steps)
    seconds = 0.0
    for step in range(steps + 1):
        if step % max(1, steps // 8) == 0 or step == steps:
            curve.seconds.append(seconds)
            curve.losses.append(validate(model, config))
            print(f"{name}: step {step}/{steps}, {seconds:.0f} s, val loss {curve.losses[-1]:.4f}", flush=True)
        if step < steps:
            started = time.perf_counter()
            torch_peer.train_step(model, optimizer, *next(batches), schedule(step))
            seconds += time.perf_counter() - started
    return curve


@torch.no_grad()
def validate(model: torch.nn.Module, config: TrainConfig) -> float:
    """Mean loss over the whole validation set, as llmc-train -m -1 has it."""
    loader = DataLoader(config.val_data, config.batch_size, config.seq_len)
    count = loader.num_tokens // (config.batch_size * config.seq_len)
    total = 0.0
    for _ in range(count):
        x, y = loader.next_batch()
        total += float(model(x, y.long())[1])
    return total / count


def same_steps(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Training losses of llmc and PyTorch from the same weights on the same batches."""
    prepared = prepare(config)
    model, optimizer = make_torch(config, betas=(0.9, 0.95))
    with torch.no_grad():
        for name, tensor in train_gpt2.named_tensors(model).items():
            tensor.copy_(prepared.model.parameters()[name][: tensor.shape[0]])
    ours, theirs = [], []
    for step, (x, y) in enumerate(itertools.islice(shuffled_batches(config), SAME_STEPS)):
        rate = float(prepared.schedule(step))
        prepared.model.forward(x)
        prepared.model.backward(y)
        prepared.model.update(rate, config.weight_decay, step + 1)
        ours.append(prepared.model.loss())
        theirs.append(torch_peer.train_step(model, optimizer, x, y, rate))
    return ours, theirs


def write(output: Path, curves: list[Curve], ours: list[float], theirs: list[float]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seconds", "val_loss"])
        for curve in curves:
            for seconds, loss in zip(curve.seconds, curve.losses, strict=True):
                writer.writerow([curve.name, f"{seconds:.2f}", f"{loss:.4f}"])

    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(theirs, linewidth=3, color="tab:orange", alpha=0.5, label="PyTorch")
    left.plot(ours, linewidth=1, color="tab:blue", label="llmc")
    left.set(xlabel="step", ylabel="training loss", title="Same weights, same batches")
    for curve, color in zip(curves, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        right.plot(curve.seconds[1:], curve.losses[1:], marker=".", color=color, label=curve.name)
    right.set(xlabel="seconds of training", ylabel="validation loss", title=f"Shakespeare on {machine.cpu_name()}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    run("compare_shakespeare", main)
