"""The benchmark of the CPU path: llmc, PyTorch and, if given, llm.c, taking turns on this machine.

In a case like d12:4x64 each contender trains the same model on rows of the same size in a process of its own. It is
asked for a few steps at a time while the others rest, for several rounds, so that a machine whose speed drifts is fair
to all. PyTorch runs as people would run it: flash attention, fused AdamW, eager and compiled. Every round also measures
the machine itself: its multiply-adds in registers and the copying of memory. In the end llmc's step is taken apart into
its operations.

In a case like d12:sample256 each contender draws texts of 256 tokens, one in each round: llmc and Hugging Face's
generate (pip install transformers) with a cache of keys and values, PyTorch eager without one.

llm.c's program is compiled by its user with the B and T of the case, and runs in the working directory, which must have
the files that it reads. It has to do at least 3 + rounds * (steps + 1) steps.

Usage: python scripts/benchmark.py [--cases d12:4x64 ...] [--rounds 5] [--steps 4] [--csv FILE] [--chart FILE.png]
                                   [--llm-c d12:4x64=PATH]
"""

import argparse
import csv
import importlib.util
import os
import platform
import shlex
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from llmc import machine  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import torch  # isort: skip
from benchmark_cases import Case, Sampling, Training, parse_case
from benchmark_contenders import Contender, Program, Worker

from llmc.cli import Parser, run
from llmc.errors import UsageError
from llmc.lab.limits import COPY_BYTES, copy_rate
from llmc.lab.report import check_chart, check_csv

CASES = ["d12:4x64", "d12:4x256", "d12:1x1024", "chess:d8:4x256", "custom:l=4,c=128,h=4,t=64,v=65:12x64"]
CASES += ["d12:sample256"]
PEERS = list(Training.peers | Sampling.peers)
COLUMNS = ["date", "machine", "threads", "torch", "command", "case", "contender"]
COLUMNS += ["flops_per_step", "peak_gflops", "copy_gbs", "median_ms", "peak_mib"]
BYTES_PER_PARAMETER = 16  # weight, gradient, m and v in fp32, which all contenders hold
SMALL = 0.005  # share of a step or text below which an operation has no line of its own

Operation = tuple[float, ...]  # calls, seconds, flops, bytes


@dataclass(frozen=True)
class Row:
    """What came of a contender."""

    contender: str
    seconds: float  # median of a step or text
    memory: int  # bytes, peak


@dataclass(frozen=True)
class Measurement:
    """What came of a case."""

    case: Case
    peak: float  # flop/s of multiply-adds, all threads, median
    bandwidth: float  # bytes/s read and written by a copy, median
    rows: list[Row]  # that of llmc first
    operations: dict[str, Operation]  # of a step or text of llmc, means
    timed_seconds: float  # of that step or text, mean

    def share_of_peak(self, row: Row) -> float:
        return self.case.flops / row.seconds / self.peak

    def relative_seconds(self, row: Row) -> float:
        return row.seconds / self.rows[0].seconds

    def excess_memory(self, row: Row) -> int:
        """Bytes beyond what the parameters need in any program."""
        return row.memory - BYTES_PER_PARAMETER * self.case.shape.num_parameters


def main(argv: list[str]) -> None:
    args = parse(argv)
    cases = [parse_case(name) for name in args.cases]
    programs = dict(parse_program(text, cases) for text in args.llm_c)
    peers = available(args.peers, cases)
    if args.csv:
        check_csv(args.csv, COLUMNS)
    if args.chart:
        check_chart(args.chart)
    threads = args.threads or torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes to come
    torch.set_num_threads(threads)
    print(f"{machine.cpu_name()}, {threads} threads, torch {torch.__version__}")
    command = shlex.join(["scripts/benchmark.py", *argv])
    measurements = []
    for case in cases:
        turn = args.steps if isinstance(case, Training) else 1  # a text is long enough
        measurement = measure(case, peers, programs.get(case.name), threads, args.rounds, turn)
        report(measurement)
        report_operations(measurement)
        if args.csv:
            append(args.csv, measurement, threads, command)
        measurements.append(measurement)
    if args.chart:
        draw(args.chart, measurements, threads)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=CASES,
        metavar="CASE",
        help=f"MODEL:BxT (training) or MODEL:sampleN; default: {' '.join(CASES)}",
    )
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--llm-c", action="append", default=[], metavar="CASE=PATH", help="llm.c's train_gpt2 for CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of each contender in each round")
    parser.add_argument("--threads", type=int, help="of every contender; default: PyTorch's own number")
    parser.add_argument("--csv", type=Path, help="append the results to this file")
    parser.add_argument("--chart", type=Path, help="draw the times into this PNG file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < 1:
        raise UsageError("--rounds and --steps must be 1 or more")
    if args.threads is not None and args.threads < 1:
        raise UsageError("--threads must be 1 or more")
    return args


def parse_program(text: str, cases: list[Case]) -> tuple[str, Path]:
    names = [case.name for case in cases if isinstance(case, Training)]
    for name in names:
        if text.startswith(f"{name}="):
            path = Path(text.removeprefix(f"{name}="))
            if not (path.is_file() and os.access(path, os.X_OK)):
                raise UsageError(f"--llm-c {text}: '{path}' is no program")
            return name, path
    raise UsageError(f"--llm-c {text}: give CASE=PATH with CASE one of those that train: {' '.join(names) or 'none'}")


def available(peers: list[str], cases: list[Case]) -> list[str]:
    """Without Hugging Face, and a line that says so, where it would take part and is not installed."""
    takes_part = "huggingface" in peers and any("huggingface" in case.peers for case in cases)
    if takes_part and importlib.util.find_spec("transformers") is None:
        print("huggingface is left out: pip install transformers")
        return [name for name in peers if name != "huggingface"]
    return peers


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(case: Case, peers: list[str], program: Path | None, threads: int, rounds: int, turn: int) -> Measurement:
    """turn: how many steps or texts of each contender in each round."""
    from llmc import _C

    source = torch.ones(COPY_BYTES // 4)
    target = source.clone()
    peaks, bandwidths = [], []
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        for name, contender in start(case, peers, program, threads):
            contenders[name] = stack.enter_context(closing(contender))
            contender.warm_up()  # before the next one starts
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            peaks.append(_C.peak_flops())
            bandwidths.append(copy_rate(source, target))
            for name, contender in contenders.items():
                seconds[name] += contender.ask(turn)
        rows = [Row(name, statistics.median(seconds[name]), contenders[name].peak_memory()) for name in contenders]
    with closing(Worker("llmc", Case.llmc_operations, case, threads)) as timed:
        timed.warm_up()
        timed_seconds, totals = timed.ask(turn)
    return Measurement(
        case=case,
        peak=statistics.median(peaks),
        bandwidth=statistics.median(bandwidths),
        rows=rows,
        operations={name: tuple(total / turn for total in totals[name]) for name in totals},
        timed_seconds=statistics.mean(timed_seconds),
    )


def start(case: Case, peers: list[str], program: Path | None, threads: int) -> Iterator[tuple[str, Contender]]:
    """Starts the contenders of the case one by one."""
    yield "llmc", Worker("llmc", Case.llmc, case, threads)
    for name in peers:
        if name in case.peers:
            yield name, Worker(name, case.peers[name], case, threads)
    if program:
        yield "llm.c", Program(program)


# --- results ----------------------------------------------------------------------------------------------------------


def report(measurement: Measurement) -> None:
    case = measurement.case
    work = f"{case.tokens} tokens" + (f" and {case.flops / 1e9:.3g} GFLOP" if case.flops else "")
    print(
        f"\n{case.name}: {case.shape.num_parameters} parameters, {work} a {case.unit}\n"
        f"the machine: {measurement.peak / 1e9:.0f} GFLOP/s in registers (peak), "
        f"{measurement.bandwidth / 1e9:.1f} GB/s copying"
    )
    table = [cells(measurement, row) for row in measurement.rows]
    for name, *numbers in (table[0], *(row.values() for row in table)):
        print(f"{name:12}" + "".join(f"{number:>10}" for number in numbers))
    starred = f"; * {BYTES_PER_PARAMETER} bytes per parameter: weights, gradients, m and v"
    print(f"(medians{starred if isinstance(case, Training) else ''})", flush=True)


def cells(measurement: Measurement, row: Row) -> dict[str, str]:
    """What the table says of a contender, by the heads of its columns."""
    case, training = measurement.case, isinstance(measurement.case, Training)
    cells = {
        "": row.contender,
        f"ms/{case.unit}": f"{row.seconds * 1e3:.1f}",
        "tok/s": f"{case.tokens / row.seconds:.0f}",
        "to llmc": f"{measurement.relative_seconds(row):.2f}x",
    }
    if training:
        cells["GFLOP/s"] = f"{case.flops / row.seconds / 1e9:.1f}"
        cells["of peak"] = f"{measurement.share_of_peak(row):.1%}"
    cells["peak MiB"] = f"{row.memory / 2**20:.0f}"
    if training:
        excess = measurement.excess_memory(row)
        cells["beyond*"] = f"{excess / 2**20:.0f}"
        cells["to llmc*"] = f"{excess / measurement.excess_memory(measurement.rows[0]):.2f}x"
    return cells


def report_operations(measurement: Measurement) -> None:
    """Of llmc's step or text, the longest first."""
    unit, whole = measurement.case.unit, measurement.timed_seconds
    by_time = sorted(measurement.operations.items(), key=lambda item: -item[1][1])
    lines = [(name, operation) for name, operation in by_time if operation[1] >= SMALL * whole]
    if others := [operation for _, operation in by_time if operation[1] < SMALL * whole]:
        lines.append(("others", tuple(map(sum, zip(*others, strict=True)))))
    width = max(len(name) for name, _ in lines)
    print(f"\n{'llmc':{width}}{'calls':>7}{'ms':>10}{f'of {unit}':>9}{'GFLOP/s':>9}{'of peak':>9}{'GB/s':>8}")
    for name, (calls, seconds, flops, moved) in lines:
        rate = flops / seconds
        compute = f"{rate / 1e9:9.1f}{rate / measurement.peak:9.1%}" if flops else " " * 18
        print(
            f"{name:{width}}{calls:7g}{seconds * 1e3:10.3f}{seconds / whole:9.1%}{compute}{moved / seconds / 1e9:8.1f}"
        )
    between = whole - sum(seconds for _, seconds, _, _ in measurement.operations.values())
    print(f"{'between them':{width}}{'':7}{between * 1e3:10.3f}{between / whole:9.1%}", flush=True)


def append(path: Path, measurement: Measurement, threads: int, command: str) -> None:
    machine_name = f"{machine.cpu_name()} {platform.machine()}"
    case = measurement.case
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        for row in measurement.rows:
            circumstances = [time.strftime("%Y-%m-%d"), machine_name, threads, torch.__version__, command]
            limits = [f"{measurement.peak / 1e9:.1f}", f"{measurement.bandwidth / 1e9:.1f}"]
            results = [f"{row.seconds * 1e3:.3f}", f"{row.memory / 2**20:.0f}"]
            writer.writerow([*circumstances, case.name, row.contender, case.flops, *limits, *results])


def draw(path: Path, measurements: list[Measurement], threads: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 2 * len(measurements), 4.5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row.contender for measurement in measurements for row in measurement.rows))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [(place, m, row) for place, m in enumerate(measurements) for row in m.rows if row.contender == name]
        shift = (index - (len(names) - 1) / 2) * width
        bars = axes.bar(
            [place + shift for place, _, _ in rows], [m.relative_seconds(row) for _, m, row in rows], width, label=name
        )
        axes.bar_label(bars, [f"{m.share_of_peak(row):.0%}" if m.case.flops else "" for _, m, row in rows], fontsize=8)
    axes.set_xticks(range(len(measurements)), ["\n".join(m.case.name.rsplit(":", 1)) for m in measurements], fontsize=8)
    axes.set_ylabel("time relative to llmc")
    axes.set_title(f"{machine.cpu_name()}, {threads} threads\n(on the bars: share of the peak)", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    run("benchmark.py", main)
