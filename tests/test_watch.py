"""How the ranks of a run end when it goes wrong in less simple ways than in test_launch.py."""

import os
import signal
import time

import pytest
import torch
from ranks_testing import Processes
from test_launch import flags_of, rank, run

import llmc.launch
from llmc import _C
from llmc.errors import RunError


def wait_for_rank_0(ranks):
    ranks.barrier("ready")
    if ranks.rank == 0:
        print("ready", flush=True)
        time.sleep(60)
    ranks.barrier("the end")  # in C++, where Python does not see Ctrl-C


def test_ctrl_c_in_a_long_operation(tmp_path):
    started = run(tmp_path, wait_for_rank_0, flags_of(tmp_path, 2))
    while "ready" not in started.read("out"):
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(started.processes[1].pid, signal.SIGINT)
    assert started.wait(20) == ([130, 130], "llmc-train: error: rank 1: interrupted\n")


def fail_differently(ranks):
    if ranks.rank == 0:
        ranks.barrier("never")
    raise RunError(f"cause {ranks.rank}")


def test_two_causes_at_once(tmp_path):
    statuses, errors = run(tmp_path, fail_differently, flags_of(tmp_path, 3)).wait(20)
    assert statuses == [1, 1, 1]
    assert errors in [f"llmc-train: error: rank {rank}: cause {rank}\n" for rank in (1, 2)]


def die_in_a_reduction(ranks):
    communicator = _C.gloo_communicator(ranks.group_name)
    x = torch.ones(1 << 20)
    communicator.all_reduce_average(x, "the first")
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce_average(x, "the gradients")
    communicator.wait()


def test_errors_that_follow_from_a_death_are_not_shown(tmp_path):
    statuses, errors = run(tmp_path, die_in_a_reduction, flags_of(tmp_path, 3)).wait(20)
    assert statuses == [1, -9, 1]
    assert errors.startswith("llmc-train: error: rank 1 (process ") and errors.count("\n") == 1


def fail_late(ranks):
    if ranks.rank == 1:
        time.sleep(0.5)
        raise RunError("too late")


def test_a_failure_when_others_are_done(tmp_path):
    started = run(tmp_path, fail_late, flags_of(tmp_path, 2))
    assert started.wait(20) == ([1, 1], "llmc-train: error: rank 1: too late\n")


def has_a_bug(ranks):
    return {}["no such key"] if ranks.rank == 1 else ranks.barrier("never")


def test_a_bug_shows_its_traceback(tmp_path):
    statuses, errors = run(tmp_path, has_a_bug, flags_of(tmp_path, 2)).wait(20)
    assert statuses == [1, 1]
    assert errors.count("Traceback") == 1 and 'return {}["no such key"]' in errors
    lines = [line for line in errors.splitlines() if line.startswith("llmc-train")]
    assert lines == ["llmc-train: error: rank 1: KeyError: 'no such key'"]


def lose_the_reader(ranks):
    if ranks.rank == 0:
        raise BrokenPipeError
    ranks.barrier("never")


def test_the_reader_of_stdout_has_gone(tmp_path):
    assert run(tmp_path, lose_the_reader, flags_of(tmp_path, 2)).wait(20) == ([141, 141], "")


def die_without_a_group(flags, victim):
    if f"-pr {victim}" in flags:
        llmc.launch.join_gloo_group = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    rank(flags, time.sleep)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_before_the_group_is_made(tmp_path, victim):
    started = Processes(tmp_path, die_without_a_group, [(flags, victim) for flags in flags_of(tmp_path, 2)], {})
    statuses, errors = started.wait(20)
    assert statuses == [-9 if number == victim else 1 for number in range(2)]
    assert errors.startswith(f"llmc-train: error: rank {victim} (process ") and errors.count("\n") == 1
