"""When a run writes its checkpoints, and what becomes of it when it cannot."""

import threading
import time
from collections.abc import Generator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import snapshot
from llmc.checkpoint import Checkpoint, prune
from llmc.checkpoint_copies import Copies
from llmc.errors import RunError
from llmc.model_file import ITEM_BYTES
from llmc.snapshot import Work

if TYPE_CHECKING:
    from llmc.prepare import Run

SLOW_DISK = 100e6  # bytes per second


class CheckpointWriter:
    """Writes the checkpoints of a run into `directory`, on all ranks together.

    With --async-checkpoint 1 a thread on each rank writes the files, from copies, while training goes on. It knows
    neither the model nor the other ranks: what needs them is done between two steps, when the threads of all are ready.
    """

    def __init__(self, run: "Run", directory: Path) -> None:
        self.run, self.directory = run, directory
        self.problem = ""  # why the newest one was not written
        self.came_from = run.resumed.step if run.resumed else None
        self.damaged = {passed.checkpoint.step for passed in run.passed_over}  # by what was found at the start
        self._copies = Copies(run.model, run.buffers) if run.config.async_checkpoint else None
        # Of the checkpoint that is being written, if there is one: its part between two steps, and what that waits for.
        self._saving: Generator[Work, str, None] | None = None
        self._background: Background | None = None
        self._step = 0  # of the newest one, and how many seconds it took so far
        self._seconds = 0.0
        self._slowest = 0.0

    def write(self, step: int) -> None:
        """Save the run as it is before `step`, then delete what -nk does not keep.

        A full disk or the like is no reason to end the run: the older checkpoints stay, and the next one may succeed.
        """
        if step == self.came_from:
            return
        if self.busy:
            print(f"waiting for the checkpoint of step {self._step}, which is still being written", flush=True)
        self.complete()
        self._saving, self._step, self._seconds = self._save(step), step, 0.0
        self._go_on()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._background is not None and not self._background.done

    def after_step(self, busy: bool) -> None:
        """busy: whether any rank was, at some moment of the step; the same on all of them."""
        if self._saving and not busy:
            self._go_on()

    def complete(self) -> None:
        """Wait until no checkpoint is being written."""
        while self._saving:
            self._go_on()

    def finish(self) -> None:
        """RunError if the last checkpoint is not there."""
        self.complete()
        if self.problem:
            raise RunError(f"the last checkpoint is missing: {self.problem}")

    def go_back(self) -> int:
        """Make the run what it was at its newest good checkpoint, but for its data; that step. RunError without one."""
        self.complete()
        self.came_from = snapshot.roll_back(self.run, self.directory)
        return self.came_from

    @property
    def seconds(self) -> float:
        """That a last checkpoint may take: as long as the slowest one, and what is being written comes before it."""
        return (self._slowest or expected_seconds(self.run)) * (2 if self._saving else 1)

    def _go_on(self) -> None:
        """Up to the next work for the thread; without copies, to the end."""
        assert self._saving is not None
        result = None
        if self._background:
            result = self._background.wait()
            self._seconds += self._background.seconds
        started = time.perf_counter()
        try:
            work = next(self._saving) if result is None else self._saving.send(result)
            while not self._copies:
                work = self._saving.send(work())
            self._background = Background(work)
        except StopIteration:
            self._saving = self._background = None
        self._seconds += time.perf_counter() - started
        self._slowest = max(self._slowest, self._seconds)

    def _save(self, step: int) -> Generator[Work, str, None]:
        self.problem = yield from snapshot.save(self.run, Checkpoint(self.directory, step), self._copies)
        if self.problem:
            print(f"WARNING: there is no checkpoint of step {step}: {self.problem}", flush=True)
            return
        if self._copies:
            print(f"the checkpoint of step {step} is complete", flush=True)
        self.damaged.discard(step)
        if lines := (yield lambda: self._prune(step) if self.run.ranks.rank == 0 else ""):
            print(lines, flush=True)

    def _prune(self, step: int) -> str:
        config = self.run.config
        try:
            deleted = prune(self.directory, step, config.keep_checkpoints, config.major_every, self.damaged)
        except RunError as error:
            return f"WARNING: {error}"  # the next one tries again
        return "\n".join(f"Deleting checkpoint at step {step}" for step in deleted)


class Background:
    """Work that a thread does."""

    def __init__(self, work: Work) -> None:
        self.seconds = 0.0
        self._result: Future[str] = Future()
        threading.Thread(target=self._do, args=(work,), name="checkpoint").start()

    def _do(self, work: Work) -> None:
        started = time.perf_counter()
        try:
            result = work()
            self.seconds = time.perf_counter() - started
            self._result.set_result(result)
        except BaseException as error:
            self._result.set_exception(error)

    @property
    def done(self) -> bool:
        return self._result.done()

    def wait(self) -> str:
        """Its result, or what it raised."""
        return self._result.result()


def expected_seconds(run: "Run") -> float:
    """For the first checkpoint, on a slow disk."""
    parts = run.ranks.size if run.model.options.zero_stage > 0 else 1
    return run.shape.num_parameters * (ITEM_BYTES[run.precision] + 12 / parts) / SLOW_DISK
