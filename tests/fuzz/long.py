"""A million damaged files for every reader, over as many sessions as that takes: `python tests/fuzz/long.py`.

docs/fuzz.csv keeps count, and each reader goes on from there. After a change of a reader its line is to be removed.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import native
import run
from targets import TARGETS

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "fuzz.csv"
READERS = [*TARGETS, *native.SEEDS]
COLUMNS = ("reader", "inputs", "failures", "date")
PIECE = 300  # seconds, after which the table is written
STATISTIC = r"number_of_executed_units: *(\d+)"


def main() -> None:
    arguments = parser().parse_args()
    end = time.monotonic() + arguments.seconds
    for reader in arguments.readers or READERS:
        while (seconds := min(PIECE, int(end - time.monotonic()))) > 0:
            rows = read_table()
            row = rows[reader]
            done, failures = int(row["inputs"]), int(row["failures"])
            if done >= arguments.inputs or failures > 0:
                break
            executed, failed = feed(reader, arguments.inputs - done, seconds, seed=done + 1)
            row |= {"inputs": str(done + executed), "failures": str(failures + failed), "date": str(date.today())}
            write_table(rows)
            print(*row.values(), flush=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument(
        "readers", nargs="*", type=known, metavar="READER", help="in this order; all of them if none is named"
    )
    result.add_argument("--inputs", type=int, default=1_000_000, help="for each reader")
    result.add_argument("--seconds", type=int, default=3600, help="end after so many")
    return result


def known(reader: str) -> str:
    if reader not in READERS:
        raise argparse.ArgumentTypeError(f"{reader!r} is none of {', '.join(READERS)}")
    return reader


def feed(reader: str, inputs: int, seconds: int, seed: int) -> tuple[int, bool]:
    """How many inputs the reader got in one run, and whether it failed."""
    command = [
        run.__file__,
        "--reader",
        reader,
        "--inputs",
        str(inputs),
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()  # all that it needs is imported, which takes longer than some thousand inputs
        if child == 0:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            sys.argv = command
            try:
                run.main()
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        printed = output.read()
    executed = re.search(STATISTIC, printed)
    if executed is None or status != 0:
        print(printed[-4000:])
    return (int(executed[1]) if executed else 0), status != 0


def read_table() -> dict[str, dict[str, str]]:
    rows = {reader: {"reader": reader, "inputs": "0", "failures": "0", "date": ""} for reader in READERS}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows |= {row["reader"]: row for row in csv.DictReader(file)}
    return rows


def write_table(rows: dict[str, dict[str, str]]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


if __name__ == "__main__":
    main()
