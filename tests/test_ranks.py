"""What the ranks of one run do together on the host, with real processes."""

import math
import os
from datetime import timedelta

import pytest
from ranks_testing import run_ranks

from llmc.errors import RunError
from llmc.ranks import Ranks


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


def test_a_single_process():
    ranks = Ranks()
    ranks.barrier("start")
    ranks.agree("steps", 3)
    assert (ranks.mean(0.1, "loss"), ranks.broadcast([1], "list"), ranks.gather("a", "all")) == (0.1, [1], ["a"])


def disagree(ranks):
    ranks.agree("the step", [ranks.size])
    with pytest.raises(RunError) as caught:
        ranks.agree("the step", 5 if ranks.rank < 2 else 6 + ranks.rank)
    return str(caught.value)


def test_ranks_that_do_not_agree():
    assert run_ranks(4, disagree) == ["the ranks do not agree on the step: 5 on rank 0, 8 on rank 2"] * 4


def lose_step(ranks):
    ranks.store.set_timeout(timedelta(seconds=1))
    with pytest.raises(RunError) as caught:
        ranks.barrier("the checkpoint" if ranks.rank == 1 else "the end")
    return str(caught.value)


def test_ranks_out_of_step():
    first, second = run_ranks(2, lose_step)
    assert first == "the ranks are out of step: the end on rank 0, the checkpoint on rank 1"
    assert second.startswith("the checkpoint: no answer from rank 0: ")


def wait_in_vain(ranks):
    ranks.store.set_timeout(timedelta(seconds=1))
    if ranks.rank == 2:
        return ""
    with pytest.raises(RunError) as caught:
        ranks.barrier("the end")
    return str(caught.value)


def test_a_wait_is_bounded_and_names_the_operation_and_the_rank():
    first, second, _ = run_ranks(3, wait_in_vain)
    assert first.startswith("the end: no answer from rank 2: ") and "\n" not in first
    assert second.startswith("the end: no answer from rank 0: ") and "\n" not in second


def count_keys(ranks):
    ranks.barrier("start")
    counts = []
    for _ in range(3):
        for i in range(20):
            ranks.mean(i, "loss")
        counts.append(ranks.store.num_keys())
        ranks.barrier("counted")
    return counts


def test_the_store_does_not_grow():
    counts = run_ranks(2, count_keys)[0]
    assert max(counts) == min(counts)


def fail(ranks):
    if ranks.rank == 1:
        raise ValueError("broken on purpose")
    ranks.barrier("never")


def die(ranks):
    if ranks.rank == 1:
        os._exit(7)
    ranks.barrier("never")


@pytest.mark.parametrize(("function", "text"), [(fail, "ValueError: broken on purpose"), (die, "died with status 7")])
def test_the_helper_fails_with_its_ranks(function, text):
    with pytest.raises(pytest.fail.Exception, match=f"(?s)rank 1: .*{text}"):
        run_ranks(2, function)
