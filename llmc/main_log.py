"""Readers of what a run logs: main.log, as llm.c and its PyTorch reference write it too, and the JSON log.

After a crash and a resume steps are there twice: the later line counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmc import json_text
from llmc.errors import RunError

JSON_LOG = "main.jsonl"  # in the output directory, with --json-log 1

NUMBER = r"-?(?:[0-9]+(?:\.[0-9]+)?(?:e[-+][0-9]+)?|nan|inf)"
LINE = re.compile(
    rf"s:(?P<step>[0-9]{{1,18}}) (?:tel:(?P<val_loss>{NUMBER})|eval:(?P<hellaswag>{NUMBER})"
    rf"|trl:(?P<loss>{NUMBER})(?: lr:(?P<lr>{NUMBER}) norm:(?P<norm>{NUMBER}))?)"
)


@dataclass
class Log:
    """What a run has logged.

    series: {step: value} of each stream that has any, in the order of steps (0-based: after so many updates), by the
    keys of the JSON log: loss, val_loss, hellaswag, norm, lr, and from a JSON log only ms, tokens_per_s, mfu.
    """

    path: Path
    series: dict[str, dict[int, float]]
    tokens_per_step: float | None = None  # None if the log does not say it
    notes: list[str] = field(default_factory=list)  # what was passed over


def read_main_log(path: Path) -> Log:
    """Raises RunError if it cannot be read or has a damaged line, but for one at the end that a crash has cut off."""
    lines, notes = complete_lines(path)
    series: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None:
            raise damaged(path, number, line, "of a main.log, such as s:20 tel:3.5000")
        step, *values = match.groupdict().items()
        for name, text in values:
            if text is not None:
                series.setdefault(name, {})[int(step[1])] = float(text)
    return Log(path, in_order(series), notes=notes)


def read_json_log(path: Path) -> Log:
    """Raises RunError as read_main_log does."""
    lines, notes = complete_lines(path)
    series: dict[str, dict[int, float]] = {}
    tokens_per_step = None
    for number, line in enumerate(lines, 1):
        record = read_record(path, number, line)
        step = int(record["step"])
        if step > 0 and "tokens" in record:
            tokens_per_step = record["tokens"] / step
        for name, value in record.items():
            if name not in ("step", "tokens"):
                series.setdefault(name, {})[step] = value
    return Log(path, in_order(series), tokens_per_step, notes)


def read_record(path: Path, number: int, line: str) -> dict[str, float]:
    """The numbers of one line of a JSON log, "step" among them; what is null was not known. RunError for any other."""
    try:
        record = json_text.parse(line)
    except ValueError:
        record = None
    numbers = {key: value for key, value in record.items() if value is not None} if isinstance(record, dict) else {}
    right = all(map(is_number, numbers.values()))
    if not right or not isinstance(numbers.get("step"), int) or numbers["step"] < 0:
        raise damaged(path, number, line, 'of a JSON log, such as {"step": 20, "tokens": 10240, "val_loss": 3.5}')
    return numbers


def is_number(value: object) -> bool:
    """False also for whole numbers that are too large for most of the things that are done with numbers."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def complete_lines(path: Path) -> tuple[list[str], list[str]]:
    """The lines, and a note if the last one was cut off: it has no end."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"cannot read the log {path}: {error.strerror or error}") from error
    *lines, rest = text.split("\n")
    notes = [f"{path} line {len(lines) + 1} was cut off in the middle and is passed over"] if rest else []
    return lines, notes


def damaged(path: Path, number: int, line: str, expected: str) -> RunError:
    shown = repr(line if len(line) <= 60 else line[:60] + "...")
    return RunError(f"{path} line {number} is damaged: {shown} is no line {expected}; correct or delete it")


def in_order(series: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """A resumed run goes back to earlier steps."""
    return {name: dict(sorted(values.items())) for name, values in series.items()}
