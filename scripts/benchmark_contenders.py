"""What scripts/benchmark.py compares: contenders, each in a process of its own that rests between its turns."""

import multiprocessing
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmc import machine, models  # before torch, so that PyTorch too runs with llmc's setting of libgomp

import torch  # isort: skip
import torch_peer

from llmc.errors import RunError, UsageError
from llmc.failure import describe
from llmc.model_file import ModelShape

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from llmc import _C

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
WARMUP_STEPS = 3  # allocations, compilation, first touches
LONGEST_STEP = 600  # seconds without a word of a program after which it is given up


@dataclass(frozen=True)
class Case:
    """Training steps of a model on B rows of T tokens."""

    name: str  # MODEL:BxT
    shape: ModelShape
    B: int
    T: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.B * self.T

    @property
    def flops(self) -> int:
        """Of a step."""
        return self.tokens * self.shape.flops_per_token(self.T)


def parse_case(name: str) -> Case:
    descriptor, _, sizes = name.rpartition(":")
    B, _, T = sizes.partition("x")
    if not (B.isdecimal() and T.isdecimal() and int(B) > 0):
        raise UsageError(f"--cases {name}: give MODEL:BxT, such as d12:4x64")
    shape = models.resolve(descriptor, None)
    if not 0 < int(T) <= shape.max_seq_len:
        raise UsageError(f"--cases {name}: T must be from 1 to the model's context of {shape.max_seq_len}")
    return Case(name, shape, int(B), int(T))


class Contender(Protocol):
    """A process that runs steps when it is asked to."""

    def warm_up(self) -> None:
        """Returns when it is ready for the first turn."""

    def ask(self, count: int) -> Any:
        """Its turn: the seconds of each of `count` steps, and what else it may have to say."""

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


# --- llmc and PyTorch -------------------------------------------------------------------------------------------------

Answer = Callable[[int], Any]  # to a number of steps


class Worker:
    """A contender in Python. `build` makes it, warm, in the new process."""

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


def timed(step: Callable[[], float]) -> Callable[[int], list[float]]:
    """A warm step's answer: the seconds of each."""

    def seconds() -> float:
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    for _ in range(WARMUP_STEPS):
        step()
    return lambda count: [seconds() for _ in range(count)]


def random_tokens(case: Case) -> torch.Tensor:
    """(B,T+1): inputs and, one further, targets."""
    return torch.randint(case.shape.vocab_size, (case.B, case.T + 1), generator=torch.Generator().manual_seed(1))


def llmc(case: Case) -> Callable[[int], list[float]]:
    return timed(steps_of(llmc_model(case), random_tokens(case)))


def llmc_operations(case: Case) -> Answer:
    """Answers with the seconds of each step and, of all of them, operation_times()."""
    model = llmc_model(case, timed=True)
    answer = timed(steps_of(model, random_tokens(case)))
    model.operation_times()  # those of the warm-up
    return lambda count: (answer(count), model.operation_times())


def llmc_model(case: Case, timed: bool = False) -> "_C.GPT2":
    from llmc import _C

    options = _C.Options(batch_size=case.B, seq_len=case.T, gelu_fusion=2)
    return _C.GPT2(_C.GPT2Config(**vars(case.shape)), options, timed=timed)


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
        model.update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, step=done)
        return float(model.loss())

    return step


def eager(case: Case, compiled: bool = False) -> Callable[[int], list[float]]:
    model, optimizer = torch_peer.make(case.shape, WEIGHT_DECAY)
    tokens = random_tokens(case)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if compiled:
        model = torch.compile(model)
    return timed(lambda: torch_peer.train_step(model, optimizer, x, y, LEARNING_RATE))


def compiled(case: Case) -> Callable[[int], list[float]]:
    return eager(case, compiled=True)


WORKERS = {"llmc": llmc, "eager": eager, "compiled": compiled}

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
        for _ in range(WARMUP_STEPS):
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
