"""Learning rate as a function of the step, in fp32 arithmetic like the optimizer that consumes it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmc.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """`Schedule(...)(step)` is the learning rate of the 0-based `step`.

    peak: highest learning rate; warmup_steps: length of the linear ramp up to it; total_steps: steps of the run;
    final_fraction: what remains of the peak at the end. Raises UsageError if the warm-up does not fit into the run.
    """

    scheduler: str
    peak: float
    warmup_steps: int
    total_steps: int
    final_fraction: float

    def __post_init__(self) -> None:
        if 0 < self.total_steps < self.warmup_steps:
            raise UsageError(
                f"-u {self.warmup_steps} is longer than the run of {self.total_steps} steps: lower it or raise -x"
            )

    def __call__(self, step: int) -> float:
        peak = np.float32(self.peak)
        if self.scheduler != "constant" and step < self.warmup_steps:
            return float(peak * np.float32(step + 1) / np.float32(self.warmup_steps))
        return SCHEDULERS[self.scheduler](self, step, peak, peak * np.float32(self.final_fraction))


def ratio(step: int, begin: int, end: int) -> np.float32:
    """How far `step` is on the way from `begin` to `end`: 0 to 1."""
    done: np.float32 = np.float32((step - begin) / (end - begin))
    return done


def cosine(schedule: Schedule, step: int, peak: np.float32, final: np.float32) -> float:
    angle = np.float32(np.pi * float(ratio(step, schedule.warmup_steps, schedule.total_steps)))
    return float(final + np.float32(0.5) * (np.float32(1) + np.cos(angle)) * (peak - final))


def linear(schedule: Schedule, step: int, peak: np.float32, final: np.float32) -> float:
    return float(peak - ratio(step, schedule.warmup_steps, schedule.total_steps) * (peak - final))


def constant(schedule: Schedule, step: int, peak: np.float32, final: np.float32) -> float:
    return float(peak)


def warmup_stable_decay(schedule: Schedule, step: int, peak: np.float32, final: np.float32) -> float:
    decay_begin = int(np.float32(0.8) * np.float32(schedule.total_steps))
    if step < decay_begin:
        return float(peak)
    left = np.float32(1) - np.sqrt(ratio(step, decay_begin, schedule.total_steps))
    return float(final + left * (peak - final))


SCHEDULERS: dict[str, Callable[[Schedule, int, np.float32, np.float32], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}
