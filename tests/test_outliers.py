"""The outlier detector against values computed by llm.c and against numpy over an explicit window."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from llmc.outliers import OutlierDetector

VECTORS = json.loads((Path(__file__).parent / "vectors" / "schedule.json").read_text())


def test_vectors():
    detector = OutlierDetector()
    for i, expected in enumerate(VECTORS["outlier_z"]):
        z = detector.update(3 + 0.5 * math.sin(0.37 * i) + (2 if i == 200 else 0))
        if expected is None:
            assert math.isnan(z)
        else:
            # The vectors come from running sums, which lose a few of the 53 bits to cancellation.
            assert z == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_values_then_an_outlier(seed):
    generator = random.Random(seed)
    detector = OutlierDetector()
    values = [generator.uniform(-1, 1) for _ in range(256)]
    for i, value in enumerate(values):
        z = detector.update(value)
        if i < 128:
            assert math.isnan(z)
        else:
            window = np.array(values[i - 127 : i + 1])
            assert z == pytest.approx((value - window.mean()) / window.std(), abs=1e-12)
            assert abs(z) <= 3
    assert detector.update(10.0) >= 5


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6])
def test_equal_values_have_no_outlier(value):
    detector = OutlierDetector()
    scores = [detector.update(value) for _ in range(300)]
    assert all(math.isnan(z) for z in scores[:128])
    assert scores[128:] == [VECTORS["outlier_constant_input_z"]] * 172


def test_a_large_value_leaves_no_trace_after_it_left_the_window():
    detector = OutlierDetector()
    detector.update(1e12)
    for i in range(256):
        z = detector.update(1.0 + (i % 2))
    assert z == pytest.approx(1.0, abs=1e-12)
