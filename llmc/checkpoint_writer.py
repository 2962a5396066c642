"""When a run writes its checkpoints, and what becomes of it when it cannot."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmc import snapshot
from llmc.checkpoint import Checkpoint, prune
from llmc.errors import RunError

if TYPE_CHECKING:
    from llmc.prepare import Run


class CheckpointWriter:
    """Writes the checkpoints of a run into `directory`, on all ranks together."""

    def __init__(self, run: "Run", directory: Path) -> None:
        self.run, self.directory = run, directory
        self.problem = ""  # why the newest one was not written
        self.damaged = {passed.checkpoint.step for passed in run.passed_over}  # by what was found at the start

    def write(self, step: int) -> None:
        """Save the run as it is before `step`, then delete what -nk does not keep.

        A full disk or the like is no reason to end the run: the older checkpoints stay, and the next one may succeed.
        """
        run, config = self.run, self.run.config
        if run.resumed and step == run.resumed.step:
            return  # it came from there
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
