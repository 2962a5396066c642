"""--max-time: how long a run may take, and when it must end for a checkpoint to be written before that."""

import re
import time
from collections.abc import Callable

STARTED = time.monotonic()  # when the program was loaded
FORMATS = "minutes, minutes:seconds, hours:minutes:seconds or days-hours, after which :minutes:seconds may follow"
CHECKPOINT = 1.5  # times the longest one so far is what the last one may take
RESERVE = 1.0  # seconds for all else


def read_wall_time(text: str) -> int | None:
    """Seconds of a duration as Slurm writes it, by FORMATS; None if it is none."""
    match = re.fullmatch(r"(?:([0-9]{1,4})-)?([0-9]{1,6})(?::([0-9]{1,2}))?(?::([0-9]{1,2}))?", text)
    if match is None:
        return None
    days, first, second, third = match.groups()
    if days is not None or third is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = "0", first, second
    return ((int(days or 0) * 24 + int(hours)) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)


class WallTime:
    """Of a run that may take `limit` seconds from STARTED on; None: any time."""

    def __init__(self, limit: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._end = None if limit is None else STARTED + limit
        self._now = now
        # Seconds from the end of one step to that of the next, with evaluations, without checkpoints.
        self._longest = 0.0
        self._last = now()

    def after_step(self) -> None:
        self._longest = max(self._longest, self._now() - self._last)

    def before_step(self) -> None:
        self._last = self._now()

    def is_near(self, checkpoint_seconds: float) -> bool:
        """True if after this step and the next there would be no time for a checkpoint, which has taken that long."""
        if self._end is None:
            return False
        return self._now() + 2 * self._longest + CHECKPOINT * checkpoint_seconds + RESERVE > self._end
