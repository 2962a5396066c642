"""What the ranks of one run do together on the host, with real processes."""

import math

from ranks_testing import run_ranks


def everything(ranks):
    ranks.barrier("start")
    return (
        ranks.mean([0.1, 0.7, 1e300, math.pi][ranks.rank], "mean"),
        ranks.mean([1.0, math.inf, 2.0, 3.0][ranks.rank], "infinite"),
        ranks.broadcast({"x": [1, None, "é"]} if ranks.rank == 0 else object(), "settings"),
        ranks.gather(ranks.rank**2, "squares"),
    )


def test_all_operations():
    results = run_ranks(4, everything)
    mean = (0.1 + 0.7 + 1e300 + math.pi) / 4
    assert results == [(mean, math.inf, {"x": [1, None, "é"]}, [0, 1, 4, 9])] * 4
