"""What becomes of a run whose numbers are not finite (--on-nan): it stops, skips the update or goes back."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from llmc import nonfinite
from llmc.errors import RunError

if TYPE_CHECKING:
    from llmc.checkpoint_writer import CheckpointWriter
    from llmc.data.loader import Position
    from llmc.prepare import Run

MAX_SKIPS = 10  # in a row: then it is not the data
MAX_RETURNS = 3  # to the same checkpoint
ADVICE = "lower the learning rate -l or the weight decay -c, or raise the warm-up -u"


class Guard:
    """Asked after every step and validation. All ranks see the same numbers, and so do the same.

    Its methods return the step to go on with if the run has gone back to a checkpoint, None if all is well or the
    update was skipped. RunError if the run must stop.
    """

    def __init__(self, run: "Run", checkpoints: "CheckpointWriter | None") -> None:
        self.run, self.checkpoints = run, checkpoints
        self.skips, self.skips_in_a_row = 0, 0
        self.returns: Counter[int] = Counter()

    def after_step(self, step: int, loss: float, grad_norm: float, batches: "Sequence[Position]") -> int | None:
        """batches: where the micro-batches of the step came from, on this rank."""
        run = self.run
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and run.model.parameters_finite():
            self.skips_in_a_row = 0
            return None
        if finite:  # the update has written it
            what = f"after the update of step {step + 1}"
            return self._go_back_or_stop(step, f"{nonfinite.broken_parameter(run)} {what}")
        name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
        cause = nonfinite.broken_step(run, batches)
        if run.config.on_nan != "skip" or nonfinite.broken_parameter(run):
            return self._go_back_or_stop(step, self._message(name, value, step, cause))
        self.skips += 1
        self.skips_in_a_row += 1
        message = self._message(name, value, step, cause)
        if self.skips_in_a_row > MAX_SKIPS:
            self._stop(f"{message}; as in the {MAX_SKIPS} steps before, whose updates were skipped: {ADVICE}")
        print(f"{message}; skipping the update ({self.skips} so far)", flush=True)
        return None

    def after_validation(self, step: int, loss: float) -> int | None:
        """There is no update to skip here."""
        if math.isfinite(loss):
            return None
        cause = nonfinite.broken_validation(self.run)
        return self._go_back_or_stop(step, self._message("validation loss", loss, step, cause))

    def _message(self, name: str, value: float, step: int, cause: str) -> str:
        if step == 0:  # what is known then is of the unchanged weights
            return f"the weights of -e {self.run.config.model} already give a {name} of {value}: {cause}"
        return f"the {name} is {value} at step {step + 1}: {cause}"

    def _go_back_or_stop(self, step: int, message: str) -> int:
        if self.run.config.on_nan != "rollback" or self.checkpoints is None:
            self._stop(f"{message}; {ADVICE if step > 0 else 'start from other weights'}")
        print(message, flush=True)
        back = self.checkpoints.go_back()
        self.returns[back] += 1
        if self.returns[back] > MAX_RETURNS:
            self._stop(f"{message}; the run has gone back to step {back} {MAX_RETURNS} times: {ADVICE}")
        print(f"going back to the checkpoint of step {back}, and on with the data behind step {step + 1}", flush=True)
        return back

    def _stop(self, message: str) -> NoReturn:
        if self.checkpoints:
            self.checkpoints.complete()
        raise RunError(message)
