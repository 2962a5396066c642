"""The set of files of a checkpoint: names, what is complete, pruning, moving aside, kill -9 between any two steps."""

import os
import signal
import subprocess
import sys

import pytest

from llmc.checkpoint import Checkpoint, find, mark_done, move_aside, newest, prune, remove_leftovers


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


@pytest.mark.parametrize(
    ("keep", "major", "current", "left"),
    [
        (0, 0, 50, [10, 20, 30, 40, 50]),
        (1, 0, 50, [50]),
        (3, 0, 50, [30, 40, 50]),
        (9, 0, 50, [10, 20, 30, 40, 50]),
        (1, 20, 50, [20, 40, 50]),
        (2, 20, 50, [20, 30, 40, 50]),  # 30 and 50 count, the major ones do not
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
    assert prune(tmp_path, 30, 2, 0) == [10, 15, 25]
    assert steps(tmp_path) == [20, 30, 40]


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


def test_leftovers(tmp_path):
    make(tmp_path, 10)
    keep = {*names(tmp_path), ".hidden", ".model.tmp", "model_00000010.bin.7.tmp"}
    for name in (*keep, ".model_00000020.bin.123.tmp", ".state_00000020_00000.bin.123.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == keep


# Calls that change or flush files are counted; at the k-th the process kills itself, before or after the call.
PROGRAM = """
import os, signal, sys, builtins
from pathlib import Path
import numpy as np, torch
from llmc import snapshot
from llmc.checkpoint import Checkpoint, prune
from llmc.data.loader import DataLoader, LoaderState
from llmc.model_file import ModelShape
from llmc.outliers import OutlierDetector

directory, fatal, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
calls = 0

def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

shape = ModelShape(4, 5, 128, 1, 1, 8)

class Options:
    master_weights = True

class Model:
    options, rng_state, last_update_rng_state = Options, 1, 2
    def start_optimizer(self): pass
    def parameters(self): return {name: torch.ones(size) for name, size in shape.parameters()}
    def optimizer_state(self, name): return self.parameters()

class Loader:
    def state(self): return LoaderState(False, 0, 0, *3 * [np.zeros(0, np.int32)], 624)

for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "touch"), (os, "open")):
    setattr(owner, name, counted(getattr(owner, name)))
snapshot.save(Checkpoint(directory, 20), shape, "bf16", Model(), Loader(), OutlierDetector(), OutlierDetector())
prune(directory, 20, 1, 0)
print("calls", calls)
"""


def test_kill_between_any_two_steps_of_a_save(tmp_path):
    """Whatever moment it dies at, the old checkpoint or the new one is there, whole."""
    from llmc.model_file import read_model_header, read_model_step
    from llmc.state_file import read_state

    def save(directory, fatal, when):
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(directory), str(fatal), when], stdout=subprocess.PIPE, text=True
        )

    def fresh(name):
        directory = tmp_path / name
        directory.mkdir()
        for file in (tmp_path / "first").iterdir() if name != "first" else ():
            new = file.name.replace("00000020", "00000010")
            raw = bytearray(file.read_bytes())
            if file.name.startswith("model"):
                raw[40:44] = (11).to_bytes(4, "little")
            if file.name.startswith("state"):
                raw[40:44] = (10).to_bytes(4, "little")
            (directory / new).write_bytes(raw)
        return directory

    out, _ = save(fresh("first"), 0, "after").communicate()
    assert out.splitlines()[-1].startswith("calls")
    out, _ = save(fresh("second"), 0, "after").communicate()
    calls = int(out.splitlines()[-1].split()[1])
    assert calls >= 9  # two files flushed and renamed, a marker, its directory, three deletions
    seen = set()
    for fatal in range(1, calls + 1):
        for when in ("before", "after") if fatal == calls else ("before",):
            directory = fresh(f"{when}_{fatal}")
            process = save(directory, fatal, when)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            found = newest(directory)
            assert found is not None
            seen.add(found.step)
            shape, dtype = read_model_header(found.model)
            assert (read_model_step(found.model), dtype) == (found.step, "bf16")
            assert read_state(found.state, shape.num_parameters).step == found.step
    assert seen == {10, 20}
    assert os.path.exists(tmp_path / "second" / "DONE_00000020")
    assert newest(tmp_path / "second").step == 20 and steps(tmp_path / "second") == [20]
