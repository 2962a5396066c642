"""The short form of the soak test; python tests/soak.py is the long one."""

from soak import soak


def test_soak(tmp_path):
    """Forty faults of all kinds. Another seed is another story: this one is told the same way up to timing."""
    result = soak(tmp_path, faults=40, seed=1, steady_steps=1200)
    assert result.faults() >= 40
    assert all(run.completed for run in result.runs)
