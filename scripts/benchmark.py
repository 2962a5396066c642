"""Training steps of llmc, PyTorch eager and PyTorch compiled at the same model, B and T, in turn on this machine.

Each contender has a process of its own and is asked for a few steps at a time while the others sleep, for several
rounds, so that a machine whose speed drifts is fair to all. PyTorch runs as people would run it: flash attention, fused
AdamW.

Usage: python scripts/benchmark.py [--cases d12:4x64 ...] [--rounds 5] [--steps 4] [--csv FILE]
"""

import argparse
import csv
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import machine, models  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import torch  # isort: skip
import torch_peer
import train_gpt2

from llmc.cli import run
from llmc.errors import RunError, UsageError

if TYPE_CHECKING:
    from llmc import _C

CASES = ["d12:4x64", "d12:1x1024", "chess:d8:4x256"]
CONTENDERS = ["llmc", "eager", "compiled"]
COLUMNS = ["date", "machine", "threads", "torch", "command", "case", "contender", "median_ms", "peak_mib"]
LEARNING_RATE = 1e-4
WARMUP_STEPS = 3  # allocations, compilation, first touches


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL:BxT", help=f"default: {' '.join(CASES)}")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each contender in each round")
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    args = parser.parse_args(argv)
    for case in args.cases:
        parse_case(case)
    if args.rounds < 1 or args.steps < 1:
        raise UsageError("--rounds and --steps must be 1 or more")
    print(f"{machine.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in args.cases:
        rows = run_case(case, args.contenders, args.rounds, args.steps)
        report(case, rows)
        if args.csv:
            append(args.csv, case, rows)


def run_case(case: str, contenders: list[str], rounds: int, steps: int) -> dict[str, tuple[list[float], float]]:
    """Seconds of every step and peak memory in MiB, by contender."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in contenders:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, case, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that the end of the process ends the pipe
        ask(name, pipes[name])  # built and warm, before the next one starts
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            seconds[name] += ask(name, pipe, steps)
    memory = {name: ask(name, pipe, 0) for name, pipe in pipes.items()}
    for process in processes:
        process.join()
    return {name: (seconds[name], memory[name]) for name in contenders}


def ask(name: str, pipe: Connection, steps: int | None = None) -> Any:
    """The contender's answer to `steps`; without them, to having been started."""
    try:
        if steps is not None:
            pipe.send(steps)
        return pipe.recv()
    except (EOFError, OSError):
        raise RunError(f"the process of {name} ended (its error is above)") from None


def serve(name: str, case: str, pipe: Connection) -> None:
    """The process of one contender: build, warm up, then time as many steps as each message asks for."""
    descriptor, B, T = parse_case(case)
    shape = models.resolve(descriptor, None)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab_size, (B, T + 1), generator=generator)
    step = {"llmc": llmc_step, "eager": torch_step, "compiled": compiled_step}[name](descriptor, tokens)
    for _ in range(WARMUP_STEPS):
        step()
    pipe.send("ready")
    while (steps := pipe.recv()) > 0:
        timings = []
        for _ in range(steps):
            started = time.perf_counter()
            step()
            timings.append(time.perf_counter() - started)
        pipe.send(timings)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def parse_case(case: str) -> tuple[str, int, int]:
    descriptor, _, sizes = case.rpartition(":")
    B, _, T = sizes.partition("x")
    if not (B.isdecimal() and T.isdecimal() and int(B) > 0):
        raise UsageError(f"--cases {case}: give MODEL:BxT, such as d12:4x64")
    context = models.resolve(descriptor, None).max_seq_len
    if not 0 < int(T) <= context:
        raise UsageError(f"--cases {case}: T must be from 1 to the model's context of {context}")
    return descriptor, int(B), int(T)


def llmc_step(descriptor: str, tokens: torch.Tensor) -> Callable[[], float]:
    from llmc import _C

    shape = models.resolve(descriptor, None)
    B, T = tokens.shape[0], tokens.shape[1] - 1
    model = _C.GPT2(_C.GPT2Config(**vars(shape)), _C.Options(batch_size=B, seq_len=T, gelu_fusion=2))
    return steps_of(model, tokens)


def steps_of(model: "_C.GPT2", tokens: torch.Tensor) -> Callable[[], float]:
    """A step of an llmc model from random parameters on tokens (B,T+1); returns the loss."""
    model.init_random()
    x, y = tokens[:, :-1], tokens[:, 1:]
    done = 0

    def step() -> float:
        nonlocal done
        done += 1
        model.forward(x)
        model.backward(y)
        model.update(lr=LEARNING_RATE, weight_decay=0.1, step=done)
        return float(model.loss())

    return step


def torch_step(descriptor: str, tokens: torch.Tensor, compiled: bool = False) -> Callable[[], float]:
    model, _ = train_gpt2.make_model(descriptor, flash=True)
    optimizer = train_gpt2.make_optimizer(model, weight_decay=0.1, fused=True, sharded=False)
    if compiled:
        model = torch.compile(model)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: torch_peer.train_step(model, optimizer, x, y, LEARNING_RATE)


def compiled_step(descriptor: str, tokens: torch.Tensor) -> Callable[[], float]:
    return torch_step(descriptor, tokens, compiled=True)


def report(case: str, rows: dict[str, tuple[list[float], float]]) -> None:
    _, B, T = parse_case(case)
    print(f"\n{case}: {B * T} tokens a step\n{'':10}{'ms/step':>10}{'tok/s':>10}{'ratio':>8}{'peak MiB':>10}")
    ours = statistics.median(rows["llmc"][0]) if "llmc" in rows else None
    for name, (seconds, memory) in rows.items():
        median = statistics.median(seconds)
        ratio = f"{median / ours:.2f}x" if ours else ""
        print(f"{name:10}{median * 1e3:10.1f}{B * T / median:10.0f}{ratio:>8}{memory:10.0f}")
    print("(medians; ratio: time of a step relative to llmc's)", flush=True)


def append(path: Path, case: str, rows: dict[str, tuple[list[float], float]]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for name, (seconds, memory) in rows.items():
            machine_name = f"{machine.cpu_name()} {platform.machine()}"
            command = " ".join(["scripts/benchmark.py", *sys.argv[1:]])
            median = statistics.median(seconds) * 1e3
            measured = [time.strftime("%Y-%m-%d"), machine_name, torch.get_num_threads(), torch.__version__, command]
            writer.writerow([*measured, case, name, f"{median:.2f}", f"{memory:.0f}"])


if __name__ == "__main__":
    run("benchmark", main)
