"""How unusual is the newest loss or gradient norm among the last 128?"""

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

WINDOW = 128
MAX_Z = math.sqrt(WINDOW - 1)  # of the newest value, when all others are equal


class OutlierDetector:
    """Z-scores over a sliding window of 128 values, the newest one included (so |z| is MAX_Z at most)."""

    def __init__(self, window: Iterable[float] = ()) -> None:
        self.restore(window)

    def restore(self, window: Iterable[float]) -> None:
        """Go on with these values, oldest first."""
        self.window: deque[float] = deque(window, maxlen=WINDOW)

    def update(self, value: float) -> float:
        """Take in `value` and return its z-score: NaN until 128 earlier values are there, 0 if all are equal."""
        warmed_up = len(self.window) == WINDOW
        self.window.append(value)
        if not warmed_up:
            return math.nan
        values = np.array(self.window)
        # Not "std == 0": the mean of equal values can be off by one bit, which would give a z-score of 1.
        if values.min() == values.max():
            return 0.0
        return float((value - values.mean()) / values.std())
