"""The set of files of a checkpoint: names, what is complete, pruning, moving aside, kill -9 between any two steps."""

import contextlib
import io
import itertools
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmc import binfile, snapshot
from llmc.checkpoint import Checkpoint, find, mark_done, move_aside, newest, prune
from llmc.data.loader import LoaderState
from llmc.errors import RunError
from llmc.model_file import ModelShape, read_model_header, read_model_step
from llmc.outliers import OutlierDetector
from llmc.output_dir import remove_leftovers
from llmc.state_file import read_state


def make(directory, *steps, without=()):
    for step in steps:
        for name in (f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}"):
            if not name.startswith(tuple(without)):
                (directory / name).write_text(str(step))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def steps(directory):
    return [checkpoint.step for checkpoint in find(directory)]


def test_names(tmp_path):
    checkpoint = Checkpoint(tmp_path, 1234)
    files = [checkpoint.model.name, checkpoint.state.name, checkpoint.done.name]
    assert files == ["model_00001234.bin", "state_00001234_00000.bin", "DONE_00001234"]
    mark_done(checkpoint)
    assert checkpoint.done.read_bytes() == b""
    with pytest.raises(RunError, match=r"cannot write .*DONE_00000001: No such file or directory"):
        mark_done(Checkpoint(tmp_path / "absent", 1))


def test_newest_is_the_highest_complete_one(tmp_path):
    assert newest(tmp_path / "absent") is None
    assert newest(tmp_path) is None
    make(tmp_path, 5, 20, 100)
    make(tmp_path, 300, without=["DONE"])
    make(tmp_path, 400, without=["model"])
    make(tmp_path, 500, without=["state"])
    for other in ("DONE_", "DONE_x", "DONE_900", "DONE_00000900.txt", "model_00000900.bin.tmp", "main.log"):
        (tmp_path / other).write_text("")
    assert newest(tmp_path).step == 100
    make(tmp_path, 2_000_000_000)
    assert newest(tmp_path).step == 2_000_000_000
    with pytest.raises(RunError, match=r"-o .*main\.log cannot be read: Not a directory"):
        newest(tmp_path / "main.log")


@pytest.mark.parametrize(
    ("keep", "major", "current", "left"),
    [
        (0, 0, 50, [10, 20, 30, 40, 50]),
        (1, 0, 50, [50]),
        (3, 0, 50, [30, 40, 50]),
        (9, 0, 50, [10, 20, 30, 40, 50]),
        (1, 20, 50, [20, 40, 50]),
        (2, 20, 50, [20, 30, 40, 50]),  # 30 and 50 count, the major ones do not
        (1, 20, 40, [20, 30, 40, 50]),  # neither does the newest, when it is major
        (2, 30, 50, [30, 40, 50]),
        (1, 10, 50, [10, 20, 30, 40, 50]),
        (1, 0, 30, [30, 40, 50]),  # what is newer is another run's business
    ],
)
def test_prune(tmp_path, keep, major, current, left):
    make(tmp_path, 10, 20, 30, 40, 50)
    (tmp_path / "main.log").write_text("")
    deleted = prune(tmp_path, current, keep, major)
    assert steps(tmp_path) == left
    assert deleted == [step for step in (10, 20, 30, 40, 50) if step not in left]
    assert len(names(tmp_path)) == 3 * len(left) + 1


def test_the_marker_is_deleted_first(tmp_path, monkeypatch):
    """llm.c, which looks at nothing else, must not resume from a half-deleted checkpoint either."""
    make(tmp_path, 10, 20)
    deleted = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, missing_ok: deleted.append(self.name))
    prune(tmp_path, 20, 1, 0)
    assert deleted == ["DONE_00000010", "model_00000010.bin", "state_00000010_00000.bin"]


@pytest.mark.parametrize("deletions", range(6))
def test_a_failure_between_deletions(tmp_path, monkeypatch, deletions):
    make(tmp_path, 10, 20, 30)
    unlink, calls = Path.unlink, itertools.count()

    def failing(self, missing_ok):
        if next(calls) == deletions:
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", failing)
        with pytest.raises(RunError, match=r"cannot delete the checkpoint of step [12]0: .*Permission denied"):
            prune(tmp_path, 30, 1, 0)
    assert newest(tmp_path).step == 30
    assert all(checkpoint.complete for checkpoint in find(tmp_path) if checkpoint.done.exists())
    prune(tmp_path, 30, 1, 0)
    assert steps(tmp_path) == [30]


def test_the_last_step_counts_like_any_other(tmp_path):
    """Though it is no multiple, and llm.c would forget to delete."""
    make(tmp_path, 5, 10, 13)
    assert prune(tmp_path, 13, 2, 0) == [5]


def test_incomplete_older_ones_go_and_never_count(tmp_path):
    make(tmp_path, 10, 20)
    make(tmp_path, 15, without=["DONE"])
    make(tmp_path, 25, without=["DONE", "state"])
    make(tmp_path, 30)
    make(tmp_path, 40, without=["DONE"])
    assert prune(tmp_path, 30, 2, 0) == [10, 15]
    assert steps(tmp_path) == [20, 25, 30, 40]  # a model alone is what its owner kept of a checkpoint
    assert prune(tmp_path, 40, 2, 0) == []  # the current one itself is left alone


def test_move_aside(tmp_path):
    assert move_aside(tmp_path, ["main.log"]) is None
    (tmp_path / "main.log").write_text("log")
    assert move_aside(tmp_path, ["main.log"]) is None
    assert names(tmp_path) == ["main.log"]
    for number in (1, 2):
        make(tmp_path, 10, 20)
        make(tmp_path, 30, without=["DONE"])
        (tmp_path / "main.log").write_text("log")
        (tmp_path / "notes").write_text("mine")
        before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
        aside = move_aside(tmp_path, ["main.log", "config.toml"])
        assert aside == tmp_path / f"previous_{number}"
        after = {
            path.name: path.read_text() for folder in (tmp_path, aside) for path in folder.iterdir() if path.is_file()
        }
        assert after == before
        assert [name for name in names(tmp_path) if not name.startswith("previous")] == ["notes"]


@pytest.mark.parametrize("moved", range(7))
def test_a_failure_between_moves_loses_nothing(tmp_path, monkeypatch, moved):
    make(tmp_path, 10, 20)
    (tmp_path / "main.log").write_text("log")
    everything = names(tmp_path)
    rename, calls = Path.rename, itertools.count()

    def failing(self, target):
        if next(calls) == moved:
            raise PermissionError(13, "Permission denied", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", failing)
        with pytest.raises(RunError, match=r"cannot move the checkpoints in .* aside: .*; choose another -o"):
            move_aside(tmp_path, ["main.log"])
    left = names(tmp_path)
    left.remove("previous_1")
    assert sorted([*left, *names(tmp_path / "previous_1")]) == everything
    assert newest(tmp_path) is None or newest(tmp_path).step == 20  # never the older one
    if moved < 6:
        assert move_aside(tmp_path, ["main.log"]) == tmp_path / "previous_2"
        assert sorted([*names(tmp_path / "previous_1"), *names(tmp_path / "previous_2")]) == everything


SHAPE = ModelShape(max_seq_len=4, vocab_size=5, padded_vocab_size=128, num_layers=1, num_heads=1, channels=8)


class Model:
    """Of a bf16 run; its values tell the step."""

    options = SimpleNamespace(master_weights=True)

    def __init__(self, step):
        self.step, self.rng_state, self.last_update_rng_state = step, step + 1, step + 2

    def start_optimizer(self):
        pass

    def parameters(self):
        return {name: torch.full(size, float(self.step)) for name, size in SHAPE.parameters()}

    def optimizer_state(self, name):
        return {p: values + ["m", "v", "master"].index(name) for p, values in self.parameters().items()}


class Loader:
    def state(self):
        return LoaderState(True, 0, 1, np.arange(2), np.arange(3), np.arange(624, dtype=np.uint32), 5)


def save(directory, step):
    """As a run with -nk 1 does."""
    with contextlib.redirect_stdout(None):
        outliers = OutlierDetector([step / 3]), OutlierDetector([step / 7])
        snapshot.save(Checkpoint(directory, step), SHAPE, "bf16", Model(step), Loader(), *outliers)
    prune(directory, step, 1, 0)


def save_and_die(directory, step, fatal):
    """SIGKILL in place of the call number `fatal` of those that change files; ends the process in any case."""
    calls = itertools.count(1)

    def counted(function):
        def call(*arguments, **options):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    class File(io.FileIO):  # unbuffered: what was written before the kill is there
        write = counted(io.FileIO.write)

    binfile.open = counted(File)
    for owner, name in ((os, "open"), (os, "fsync"), (os, "replace"), (Path, "touch"), (Path, "unlink")):
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        save(directory, step)
        os._exit(0)
    finally:
        os._exit(1)


def contents(checkpoint):
    return [path.read_bytes() for path in (checkpoint.model, checkpoint.state, checkpoint.done)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns where earlier tests left threads
def test_kill_at_any_step_of_a_save(tmp_path):
    """kill -9 in place of every single write, flush, rename and deletion: the old checkpoint or the new is whole."""
    expected = {}
    for step in (10, 20):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step), step)
        expected[step] = contents(Checkpoint(tmp_path / str(step), step))

    seen = []
    for fatal in itertools.count(1):
        directory = tmp_path / f"killed_{fatal}"
        shutil.copytree(tmp_path / "10", directory)
        # A plain fork: it takes milliseconds, and tensors this small start no threads.
        child = os.fork()
        if child == 0:
            save_and_die(directory, 20, fatal)
        _, status = os.waitpid(child, 0)
        found = newest(directory)
        assert contents(found) == expected[found.step]
        assert read_model_header(found.model) == (SHAPE, "bf16")
        assert read_model_step(found.model) == found.step
        state = read_state(found.state, SHAPE.num_parameters)
        assert (state.step, state.rng_state, state.loss_window) == (found.step, found.step + 1, (found.step / 3,))
        # llm.c looks at markers alone.
        assert max(directory.glob("DONE_*")) == found.done
        if os.WIFEXITED(status):  # there was no such call any more
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen.append(found.step)
        # The next run goes on, writes what was not written, and nothing is left of the killed one.
        remove_leftovers(directory)
        for step in range(found.step + 10, 31, 10):
            save(directory, step)
        assert names(directory) == ["DONE_00000030", "model_00000030.bin", "state_00000030_00000.bin"]
    assert names(directory) == names(tmp_path / "20")
    # The new one counts from some call on; before it are the writes of each of 16 tensors and of each of 3 * 16.
    assert seen == sorted(seen) and seen.count(10) > 16 + 3 * 16
    assert seen.count(20) >= 3  # the deletions
