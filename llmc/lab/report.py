"""The laboratory's results: a table, a CSV file, a chart."""

import csv
import importlib.util
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from llmc import machine
from llmc.errors import UsageError
from llmc.lab.measure import Measurement, Row

COLUMNS = ["date", "machine", "threads", "torch", "command", "operation", "shape", "precision", "contender"]
COLUMNS += ["bytes", "flops", "peak_gflops", "copy_gbs", "median_us", "gbs", "gflops", "of_roofline", "max_error"]
ROW_INCHES = 0.16  # of a bar of the chart


def print_measurement(measurement: Measurement) -> None:
    case, limits, least = measurement.case, measurement.limits, measurement.least_seconds
    work = f"{measurement.bytes / 1e6:.4g} MB"
    rates = f"{limits.bandwidth / 1e9:.1f} GB/s"
    if measurement.flops:
        work += f", {measurement.flops / 1e9:.4g} GFLOP"
        rates += f", {limits.flops / 1e9:.0f} GFLOP/s" if limits.flops else ", an unknown peak"
    roofline = f"; {least * 1e6:.1f} us at {rates}" if least else f"; {rates}"
    print(f"\n{case}: {work}{roofline}")
    table = [cells(measurement, row) for row in measurement.rows]
    width = max(12, *(len(row.contender) for row in measurement.rows))
    for name, *numbers in (table[0], *(row.values() for row in table)):
        print(f"{name:{width}}" + "".join(f"{number:>13}" for number in numbers), flush=True)


def cells(measurement: Measurement, row: Row) -> dict[str, str]:
    """What the table says of a contender, by the heads of its columns."""
    least = measurement.least_seconds
    result = {
        "": row.contender,
        "us": f"{row.seconds * 1e6:.1f}",
        "to llmc": f"{row.seconds / measurement.rows[0].seconds:.2f}x",
        "GB/s": f"{measurement.bytes / row.seconds / 1e9:.1f}",
    }
    if measurement.flops:
        result["GFLOP/s"] = f"{measurement.flops / row.seconds / 1e9:.1f}"
    result["of roofline"] = f"{least / row.seconds:.1%}" if least else "n/a"
    result["max error"] = "WRONG" if row.mistake else f"{row.error:.1e}"
    return result


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Before the long measurement: can the results be appended?"""
    with open(path, "a+", newline="") as file:
        file.seek(0)
        if next(csv.reader(file), list(columns)) != list(columns):
            raise UsageError(f"--csv {path}: the file has other columns than this benchmark: give another name")


def append_csv(path: Path, measurement: Measurement, command: str) -> None:
    case, limits, least = measurement.case, measurement.limits, measurement.least_seconds
    machine_name = f"{machine.cpu_name()} {platform.machine()}"
    circumstances = [time.strftime("%Y-%m-%d"), machine_name, torch.get_num_threads(), torch.__version__, command]
    rates = [f"{limits.flops / 1e9:.1f}" if limits.flops else "", f"{limits.bandwidth / 1e9:.1f}"]
    with open(path, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        for row in measurement.rows:
            results = [
                f"{row.seconds * 1e6:.2f}",
                f"{measurement.bytes / row.seconds / 1e9:.2f}",
                f"{measurement.flops / row.seconds / 1e9:.2f}",
                f"{least / row.seconds:.4f}" if least else "",
                f"{row.error:.2e}",
            ]
            what = [case.operation.name, case.shape, case.precision, row.contender]
            writer.writerow([*circumstances, *what, int(measurement.bytes), int(measurement.flops), *rates, *results])


def check_chart(path: Path) -> None:
    """Before the long measurement: can it be drawn?"""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--chart needs matplotlib: pip install matplotlib")
    if not path.parent.is_dir():
        raise UsageError(f"--chart {path}: there is no directory {path.parent}")


def draw(path: Path, measurements: Sequence[Measurement], device_name: str) -> None:
    """Bars of the share of the roofline; where nothing tells it, the time relative to llmc's."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.contender for m in measurements for row in m.rows))
    figure = Figure(figsize=(9, 1.5 + ROW_INCHES * (len(names) + 1) * len(measurements)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [(place, m, row) for place, m in enumerate(measurements) for row in m.rows if row.contender == name]
        rows = [(place, m, row) for place, m, row in rows if m.least_seconds is not None]
        shares = [(m.least_seconds or math.nan) / row.seconds for _, m, row in rows]
        places = [place + (index - (len(names) - 1) / 2) * height for place, _, _ in rows]
        bars = axes.barh(places, shares, height, label=name)
        labels = [f"{row.seconds * 1e6:.0f} us" + (" WRONG" if row.mistake else "") for _, _, row in rows]
        axes.bar_label(bars, labels, fontsize=6, padding=2)
    axes.set_yticks(range(len(measurements)), [str(m.case) for m in measurements], fontsize=7)
    axes.margins(y=0.5 / len(measurements))
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xlabel("share of the roofline: copy bandwidth, or multiply-adds in registers")
    axes.set_title(f"{device_name}, {torch.get_num_threads()} threads", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right")
    figure.savefig(path, dpi=110, format="png")
