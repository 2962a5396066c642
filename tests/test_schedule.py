"""Learning rates against values computed by llm.c."""

import json
import math
from pathlib import Path

import pytest

from llmc.errors import UsageError
from llmc.schedule import Schedule

VECTORS = json.loads((Path(__file__).parent / "vectors" / "schedule.json").read_text())
PEAK, STEPS = 6e-4, 50


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "fraction"), [(0, 0.0), (7, 0.1)])
def test_vectors(scheduler, warmup, fraction):
    expected = VECTORS[f"lr_{scheduler}_max6e-4_warm{warmup}_N50_frac{fraction}"]
    schedule = Schedule(scheduler, PEAK, warmup, STEPS, fraction)
    assert len(expected) == STEPS + 1
    for step, value in enumerate(expected):
        # One fp32 rounding step of the peak: numpy's cosine may differ from C's in the last bit.
        assert schedule(step) == pytest.approx(value, rel=0, abs=PEAK * 2**-23)


def test_shapes_by_formula():
    peak, N, W = 1e-3, 200, 20
    # 1e-6 relative: fp32 against double.
    assert Schedule("cosine", peak, W, N, 0.0)(110) == pytest.approx(peak / 2, rel=1e-6)
    assert Schedule("linear", peak, W, N, 0.2)(110) == pytest.approx(0.6 * peak, rel=1e-6)
    wsd = Schedule("wsd", peak, W, N, 0.0)
    assert [wsd(W), wsd(100), wsd(160)] == pytest.approx([peak] * 3, rel=1e-6)
    assert wsd(170) == pytest.approx(peak * (1 - math.sqrt(10 / 40)), rel=1e-6)
    for scheduler in ("cosine", "linear", "wsd"):
        assert Schedule(scheduler, peak, W, N, 0.5)(4) == pytest.approx(peak * 5 / 20, rel=1e-6)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "wsd"])
def test_warmup_may_fill_the_run_but_not_exceed_it(scheduler):
    full = Schedule(scheduler, PEAK, 10, 10, 0.0)
    assert [full(step) for step in (0, 9)] == pytest.approx([PEAK / 10, PEAK], rel=1e-6)
    with pytest.raises(UsageError, match="-u 11 is longer than the run of 10 steps"):
        Schedule(scheduler, PEAK, 11, 10, 0.0)
    Schedule(scheduler, PEAK, 11, 0, 0.0)  # evaluation only: no step will ask
