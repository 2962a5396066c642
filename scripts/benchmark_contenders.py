"""Who takes part in scripts/benchmark.py: contenders, each in a process of its own that rests between its turns."""

import multiprocessing
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmc import machine  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import torch  # isort: skip
from benchmark_cases import Answer, Case, Training

from llmc.errors import RunError
from llmc.failure import describe

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LONGEST_STEP = 600  # seconds without a word of a program after which it is given up


class Contender(Protocol):
    """A process that works when it is asked to."""

    def warm_up(self) -> None:
        """Returns when it is ready for the first turn."""

    def ask(self, count: int) -> Any:
        """Its turn: the seconds of each of `count` units of its work, and what else it may have to say."""

    def peak_memory(self) -> int:
        """The most bytes that it has held in main memory."""

    def close(self) -> None: ...


def peak_memory(pid: int) -> int:
    """The most bytes of main memory that a process has held since its program began.

    getrusage() would not do: a new process begins with the peak of the one that started it.
    """
    for line in machine.read_lines(Path(f"/proc/{pid}/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"/proc/{pid}/status does not tell the peak memory of a process: use Linux")


# --- in Python --------------------------------------------------------------------------------------------------------


class Worker:
    """A contender in Python: what `build` makes of a case, warm, in the new process."""

    def __init__(self, name: str, build: Callable[[Case], Answer], case: Case, threads: int) -> None:
        self.name = f"{name} of {case.name}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(build, case, threads, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def warm_up(self) -> None:
        self.receive()

    def ask(self, count: int) -> Any:
        with suppress(ConnectionError):  # if the process has ended, receive() says so
            self.pipe.send(count)
        return self.receive()

    def receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RunError(f"{self.name}: its process ended with status {self.process.exitcode}") from None
        if isinstance(answer, RunError):
            raise RunError(f"{self.name}: {answer}")
        return answer

    def peak_memory(self) -> int:
        assert self.process.pid is not None
        return peak_memory(self.process.pid)

    def close(self) -> None:
        self.pipe.close()  # which ends the process
        self.process.join()


def serve(build: Callable[[Case], Answer], case: Case, threads: int, pipe: "Connection") -> None:
    """The process of a Worker, until the pipe is closed. Sends None when it is warm, and a RunError if it must end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all processes: only the first one should speak
    torch.set_num_threads(threads)
    try:
        answer = build(case)
        pipe.send(None)
        while True:
            pipe.send(answer(pipe.recv()))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        _, line = describe(error) or (1, f"{type(error).__name__}: {str(error).strip()}")
        pipe.send(RunError(line.splitlines()[0]))


# --- a program --------------------------------------------------------------------------------------------------------

STEP_LINE = re.compile(r"step \d+: train loss \S+ \(took ([\d.]+) ms\)")


class Program:
    """llm.c's train_gpt2 for CPUs, stopped between its turns. A step during which it was stopped does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.terminal, theirs = os.openpty()  # into a pipe C would write its lines late, many at a time
        try:
            # The signals below go to its process group, for the sake of scripts that start llm.c.
            self.process = subprocess.Popen(
                [path.absolute()], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True
            )
        except OSError as error:
            raise RunError(f"{path} cannot be started: {error.strerror}") from error
        os.close(theirs)
        self.text = ""  # what it has written and nobody has looked at
        self.last_line = ""
        self.peak = 0

    def warm_up(self) -> None:
        for _ in range(Training.warmup):
            self.next_step()
        self.stop()

    def ask(self, count: int) -> list[float]:
        while self.wrote_within(0) and self.read():  # steps that had ended before the stop came
            pass
        for _ in self.lines():
            pass
        os.killpg(self.process.pid, signal.SIGCONT)
        self.next_step()  # the one that was interrupted
        seconds = [self.next_step() for _ in range(count)]
        self.stop()
        return seconds

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)
        with suppress(RunError):  # after its last step it may have ended
            self.peak = peak_memory(self.process.pid)

    def next_step(self) -> float:
        """Seconds of the next step, as it prints them."""
        deadline = time.monotonic() + LONGEST_STEP
        while True:
            for line in self.lines():
                if step := STEP_LINE.search(line):
                    return float(step[1]) / 1e3
            if not self.wrote_within(deadline - time.monotonic()):
                raise RunError(f"{self.path} has not printed the line of a step for {LONGEST_STEP} s")
            if not self.read():
                raise RunError(
                    f"{self.path} ended before it had printed enough lines like llm.c's 'step 0: train loss 5.3 (took "
                    f"100.0 ms)'; its last line: '{self.last_line}' (lower --rounds or --steps need fewer)"
                )

    def lines(self) -> Iterator[str]:
        """The whole lines that have been read."""
        while "\n" in self.text:
            line, self.text = self.text.split("\n", 1)
            self.last_line = line.strip() or self.last_line
            yield line

    def wrote_within(self, seconds: float) -> bool:
        """Whether there is something to read, be it the end."""
        return bool(select.select([self.terminal], [], [], max(0, seconds))[0])

    def read(self) -> bool:
        """Whether there was more to read than the end."""
        try:
            self.text += os.read(self.terminal, 4096).decode(errors="replace")
        except OSError:  # so Linux says that nobody can write any more
            return False
        return True

    def peak_memory(self) -> int:
        """As of the last stop before its end."""
        return self.peak

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.terminal)
