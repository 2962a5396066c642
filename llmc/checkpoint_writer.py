"""When a run writes its checkpoints, and what becomes of it when it cannot."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import snapshot
from llmc.checkpoint import Checkpoint, prune
from llmc.errors import RunError
from llmc.model_file import ITEM_BYTES

if TYPE_CHECKING:
    from llmc.prepare import Run

SLOW_DISK = 100e6  # bytes per second


class CheckpointWriter:
    """Writes the checkpoints of a run into `directory`, on all ranks together."""

    def __init__(self, run: "Run", directory: Path) -> None:
        self.run, self.directory = run, directory
        self.problem = ""  # why the newest one was not written
        self._slowest = 0.0  # seconds
        self.came_from = run.resumed.step if run.resumed else None
        self.damaged = {passed.checkpoint.step for passed in run.passed_over}  # by what was found at the start

    def write(self, step: int) -> None:
        """Save the run as it is before `step`, then delete what -nk does not keep.

        A full disk or the like is no reason to end the run: the older checkpoints stay, and the next one may succeed.
        """
        if step == self.came_from:
            return
        started = time.perf_counter()
        self._write(step)
        self._slowest = max(self._slowest, time.perf_counter() - started)

    @property
    def seconds(self) -> float:
        """That the slowest one took; before there is one, what it may take."""
        return self._slowest or expected_seconds(self.run)

    def _write(self, step: int) -> None:
        config, run = self.run.config, self.run
        self.problem = snapshot.save(
            Checkpoint(self.directory, step),
            run.shape,
            run.precision,
            run.model,
            run.train_loader,
            run.loss_outliers,
            run.norm_outliers,
            run.ranks,
            read_back=config.keep_checkpoints > 0,  # older ones go: this one must be good
        )
        if self.problem:
            print(f"WARNING: there is no checkpoint of step {step}: {self.problem}", flush=True)
            return
        self.damaged.discard(step)
        if run.ranks.rank == 0:
            self._prune(step)

    def go_back(self) -> int:
        """Make the run what it was at its newest good checkpoint, but for its data; that step. RunError without one."""
        self.came_from = snapshot.roll_back(self.run, self.directory)
        return self.came_from

    def _prune(self, step: int) -> None:
        config = self.run.config
        try:
            for deleted in prune(self.directory, step, config.keep_checkpoints, config.major_every, self.damaged):
                print(f"Deleting checkpoint at step {deleted}")
        except RunError as error:
            print(f"WARNING: {error}", flush=True)  # the next one tries again

    def finish(self) -> None:
        """RunError if the last checkpoint is not there."""
        if self.problem:
            raise RunError(f"the last checkpoint is missing: {self.problem}")


def expected_seconds(run: "Run") -> float:
    """For the first checkpoint, on a slow disk."""
    parts = run.ranks.size if run.model.options.zero_stage > 0 else 1
    return run.shape.num_parameters * (ITEM_BYTES[run.precision] + 12 / parts) / SLOW_DISK
