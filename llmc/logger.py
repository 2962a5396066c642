"""Everything the trainer prints for people and writes for tools: llm.c's table, its lines and its main.log."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmc.errors import RunError
from llmc.output_dir import LOG

Row = tuple[str, object] | str  # label and value, or a notice across both columns

LABEL_WIDTH, VALUE_WIDTH = 21, 50
BORDER = f"+{'-' * (LABEL_WIDTH + 2)}+{'-' * (VALUE_WIDTH + 2)}+"


def table(sections: Sequence[Sequence[Row]]) -> str:
    """The parameter table at the start of a run, one border between sections. Long values run over the right edge."""
    lines = [BORDER]
    for section in ([("Parameter", "Value")], *sections):
        for row in section:
            if isinstance(row, str):
                lines.append(f"| {row:<{LABEL_WIDTH + VALUE_WIDTH + 3}} |")
            else:
                lines.append(f"| {row[0]:<{LABEL_WIDTH}} | {row[1]!s:<{VALUE_WIDTH}} |")
        lines.append(BORDER)
    return "\n".join(lines)


@dataclass(frozen=True)
class StepReport:
    """What is known after an optimizer step."""

    step: int  # 0-based
    num_steps: int
    loss: float
    loss_z: float
    grad_norm: float  # before clipping
    grad_norm_z: float
    learning_rate: float
    seconds: float
    mfu: float | None  # part of the device's peak, None if that is not known
    tokens_per_second: float
    seconds_left: float


def step_line(report: StepReport) -> str:
    """llm.c's line (steps count from 1), then percent done and time left."""
    done = report.step + 1
    mfu = "n/a" if report.mfu is None else f"{100 * report.mfu:.1f}%"
    return (
        f"step {done:4d}/{report.num_steps} | loss {report.loss:7.6f} ({report.loss_z:+.2f}z)"
        f"| norm {report.grad_norm:6.4f} ({report.grad_norm_z:+.2f}z)| lr {report.learning_rate:.2e} "
        f"| {1000 * report.seconds:.2f} ms | {mfu} bf16 MFU | {report.tokens_per_second:.0f} tok/s "
        f"| {100 * done / report.num_steps:.1f}% done | {clock(report.seconds_left)} left"
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Tracker(Protocol):
    """What Logger needs of `llmc.trackers`."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None: ...


class Logger:
    """Prints the lines of a run and appends their short form to main.log in `output_dir` (None: prints only).

    Empties main.log first unless `append`. `tracker` gets all values, too. RunError when the log cannot be opened.
    """

    def __init__(self, output_dir: Path | None, append: bool = False, tracker: Tracker | None = None) -> None:
        self.file = LogFile(output_dir / LOG, "-o") if output_dir else None
        self.tracker = tracker
        if self.file is not None:
            open_log(self.file.path, append)

    def close(self) -> None:
        """RunError if there are lines that could not be written."""
        if self.file is not None:
            self.file.close()

    def flush(self) -> None:
        """Try again what could not be written."""
        if self.file is not None and self.file.waiting:
            self.file.append("")

    def validation(self, step: int, loss: float) -> None:
        """Report the mean loss over the validation batches before the 0-based `step`."""
        print(f"val loss {loss:f}", flush=True)
        self._log(step, f"tel:{loss:.4f}", {"val_loss": loss})

    def hellaswag(self, step: int, correct: int, total: int) -> None:
        """Report how many examples the model gets right before the 0-based `step`."""
        accuracy = correct / total
        print(f"HellaSwag: {correct}/{total} = {accuracy:f}", flush=True)
        self._log(step, f"eval:{accuracy:.4f}", {"hellaswag": accuracy})

    def training(self, report: StepReport) -> None:
        print(step_line(report), flush=True)
        values = {
            "loss": report.loss,
            "norm": report.grad_norm,
            "lr": report.learning_rate,
            "ms": 1000 * report.seconds,
            "tokens_per_s": report.tokens_per_second,
            "mfu": report.mfu,
        }
        line = f"trl:{report.loss:.4f} lr:{report.learning_rate:.6f} norm:{report.grad_norm:.2f}"
        self._log(report.step, line, values)

    def _log(self, step: int, line: str, values: Mapping[str, float | None]) -> None:
        if self.file is not None:
            self.file.append(f"s:{step} {line}\n")
        if self.tracker is not None:
            self.tracker.log(step, values)


def open_log(path: Path, append: bool) -> None:
    """Empty the log or, to append, take off what a full disk or a power cut has left of a last line."""
    if append and path.exists():
        with reported(path, "-o"), open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    else:
        with reported(path, "-o"), open(path, "w"):
            pass


class LogFile:
    """Lines appended to a file, which is complete at any moment, however the run ends.

    What a full disk or the like refuses is said once, waits in memory, and comes with the next line that can be
    written. `flag` chooses the file.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path, self.flag = path, flag
        self.waiting = ""

    def append(self, text: str) -> None:
        text = self.waiting + text
        try:
            self._write(text.encode())
        except OSError as error:
            if not self.waiting:
                print(f"WARNING: cannot write {self.path}: {error.strerror or error}; its lines wait", flush=True)
            self.waiting = text
        else:
            if self.waiting:
                print(f"{self.path} can be written again", flush=True)
            self.waiting = ""

    def close(self) -> None:
        """RunError if lines are still waiting."""
        if self.waiting:
            with reported(self.path, self.flag):
                self._write(self.waiting.encode())
            self.waiting = ""

    def _write(self, data: bytes) -> None:
        """All of it or nothing."""
        with open(self.path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise


@contextmanager
def reported(path: Path, flag: str) -> Iterator[None]:
    """What the system has against writing `path`, which `flag` chooses, as RunError."""
    try:
        yield
    except OSError as error:
        what = "directory" if flag == "-o" else "file"
        reason = error.strerror or error
        raise RunError(f"cannot write {path}: {reason}; choose another {what} with {flag}") from error


class Progress:
    """Says on a terminal what the next line waits for, in a line that is erased before it comes.

    It appears where an activity has taken a second, or has the last time. Pipes and files get none.
    """

    SLOW = 1.0  # seconds
    ERASE = "\r\x1b[K"

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty()
        self.shown = False
        self.seconds: dict[str, float] = {}  # that each activity took the last time

    @contextmanager
    def during(self, activity: str) -> Iterator[Callable[[str], None]]:
        """Gives the function that shows a text."""
        started = time.perf_counter()
        slow = self.seconds.get(activity, 0.0) >= self.SLOW

        def show(text: str) -> None:
            if self.on_terminal and (slow or time.perf_counter() - started >= self.SLOW):
                # In the last column the cursor may be on the next line already.
                print(f"{self.ERASE}{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
                self.shown = True

        try:
            yield show
        finally:
            self.seconds[activity] = time.perf_counter() - started
            self.erase()

    def erase(self) -> None:
        """To be called before anything else is printed during an activity."""
        if self.shown:
            print(self.ERASE, end="", flush=True)
            self.shown = False


class Throughput:
    """Speed of the steps since the start of this process, which a resumed run may begin in the middle.

    tokens: per step, over all ranks; flops_per_token and peak_flops (of one device, per second) give the MFU, None:
    peak not known.
    """

    def __init__(self, tokens: int, flops_per_token: float, peak_flops: float | None, num_devices: int = 1) -> None:
        self.tokens = tokens
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops if peak_flops is None else num_devices * peak_flops
        self.steps = 0
        self.seconds = 0.0  # of all steps but the first, which warms caches up
        self.first_seconds = 0.0
        self.smoothed = 0.0
        self.started = time.perf_counter()

    def update(self, seconds: float) -> float:
        """Take in the duration of a step and return tokens/s: an average that forgets 5% with every step.

        The first step is reported alone and does not enter the average.
        """
        current = self.tokens / seconds
        self.steps += 1
        if self.steps == 1:
            self.first_seconds = seconds
            return current
        self.seconds += seconds
        self.smoothed = 0.95 * self.smoothed + 0.05 * current
        return self.smoothed / (1 - 0.95 ** (self.steps - 1))

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step of that duration, as a part of the peak."""
        if self.peak_flops is None:
            return None
        return self.flops_per_token * self.tokens / seconds / self.peak_flops

    def seconds_left(self, steps_left: int) -> float:
        """Time until the end if everything, validation and sampling included, goes on at the average pace so far."""
        return (time.perf_counter() - self.started) / self.steps * steps_left

    def average_ms(self) -> float:
        """Milliseconds per step without the first one, unless there is no other."""
        return 1000 * (self.seconds / (self.steps - 1) if self.steps > 1 else self.first_seconds)
