"""Tokens per second of one process with all cores against one process per core, for every ZeRO stage, on CPUs.

All runs train the same model on the same tokens a step. They take turns for several rounds, so that a machine whose
speed drifts is fair to all, and the medians of all steps are compared.

Usage: python scripts/scaling.py [--model d12] [--batch 8] [--seq-len 64] [--ranks 2] [--rounds 3] [--steps 4]
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from llmc import machine, models
from llmc.cli import run
from llmc.data.shards import write_shard
from llmc.errors import RunError, UsageError


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12", help="a descriptor")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, over all ranks")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each run in each round, after a first one")
    args = parser.parse_args(argv)
    if args.batch % args.ranks:
        raise UsageError(f"--batch {args.batch} is not a multiple of --ranks {args.ranks}")
    print(f"{machine.cpu_name()}, {args.ranks} cores, {args.model}, {args.batch} rows of {args.seq_len} tokens a step")
    contenders = [(1, 0), *((args.ranks, stage) for stage in range(4))]
    seconds: dict[tuple[int, int], list[float]] = {contender: [] for contender in contenders}
    with tempfile.TemporaryDirectory() as folder:
        tokens = args.batch * args.seq_len * (args.steps + 2)
        vocab_size = models.resolve(args.model, None).vocab_size
        values = np.random.default_rng(0).integers(0, vocab_size, tokens, dtype=np.uint16)
        write_shard(Path(folder) / "tokens.bin", values)
        for _ in range(args.rounds):
            for ranks, stage in contenders:
                seconds[ranks, stage] += measure(args, folder, ranks, stage)
    base = statistics.median(seconds[1, 0])
    print("| ranks x threads | -z | ms per step | tokens/s | to one process |\n|---|---|---|---|---|")
    for (ranks, stage), times in seconds.items():
        median = statistics.median(times)
        rate = args.batch * args.seq_len / median
        print(f"| {ranks} x {args.ranks // ranks} | {stage} | {1000 * median:.0f} | {rate:.0f} | {base / median:.2f} |")


def measure(args: argparse.Namespace, folder: str, ranks: int, stage: int) -> list[float]:
    """Seconds of each step but the first."""
    launcher = ["mpirun", "-np", str(ranks)] if ranks > 1 else []
    flags = f"-i {folder}/tokens.bin -j {folder}/tokens.bin -b {args.batch // ranks} -t {args.seq_len} -z {stage} -m 1"
    settings = f"-x {args.steps + 1} -v 0 -s 0 -g 1 --device cpu"
    command = [*launcher, "llmc-train", "-e", args.model, "-o", "", *flags.split(), *settings.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.ranks // ranks)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    times = [float(ms) / 1000 for ms in re.findall(r"^step .*\| ([\d.]+) ms", result.stdout, re.M)]
    if result.returncode != 0 or len(times) != args.steps + 1:
        raise RunError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return times[1:]


if __name__ == "__main__":
    run("scaling.py", main, sys.argv[1:])
