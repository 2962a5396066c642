"""A million damaged files for every reader, over as many sessions as that takes: `python tests/fuzz/long.py`.

docs/fuzz.csv keeps count, and each reader goes on from there. After a change of a reader its line is to be removed.
"""

import argparse
import csv
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import native
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
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py"), "--reader", reader, "--inputs", str(inputs)]
    command += ["--seconds", str(seconds), "--seed", str(seed)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    executed = re.search(STATISTIC, result.stdout)
    if executed is None or result.returncode != 0:
        print(result.stdout[-4000:])
    return (int(executed[1]) if executed else 0), result.returncode != 0


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
