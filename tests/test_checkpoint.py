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

from llmc import binfile
from llmc.binfile import MAGIC_STATE, header_bytes
from llmc.checkpoint import Checkpoint, find, mark_done, move_aside, prune
from llmc.checkpoint_copies import copy_buffers
from llmc.checkpoint_writer import CheckpointWriter
from llmc.config import TrainConfig
from llmc.data.loader import LoaderState
from llmc.errors import RunError
from llmc.model_file import ModelShape, read_model_header, read_model_step
from llmc.outliers import OutlierDetector
from llmc.output_dir import remove_leftovers
from llmc.ranks import Ranks
from llmc.state_file import read_state


def make(directory, *steps, without=(), ranks=1):
    for step in steps:
        states = [f"state_{step:08d}_{rank:05d}.bin" for rank in range(ranks)]
        for name in (f"model_{step:08d}.bin", f"DONE_{step:08d}", *states):
            if not name.startswith(tuple(without)):
                (directory / name).write_bytes(header_bytes({0: MAGIC_STATE, 1: 1, 2: ranks, 10: step}))


def newest(directory):
    """The complete one with the highest step; what llmc-train takes for it is in test_resume.py."""
    return next((found for found in reversed(find(directory)) if found.complete), None)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def steps(directory):
    return [checkpoint.step for checkpoint in find(directory)]


def test_names(tmp_path):
    checkpoint = Checkpoint(tmp_path, 1234)
    files = [checkpoint.model.name, checkpoint.state(0).name, checkpoint.state(123456).name, checkpoint.done.name]
    assert files == ["model_00001234.bin", "state_00001234_00000.bin", "state_00001234_123456.bin", "DONE_00001234"]
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


def test_complete_with_the_states_of_all_ranks(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, ranks=3)
    found = Checkpoint(tmp_path, 20)
    assert newest(tmp_path) == found and list(found.missing()) == []
    for rank in range(3):
        raw = found.state(rank).read_bytes()
        found.state(rank).unlink()
        assert newest(tmp_path).step == 10
        assert next(found.missing()) == found.state(rank)
        assert found.done.exists() and not found.complete
        found.state(rank).write_bytes(raw)
        assert newest(tmp_path) == found
    found.state(3).write_bytes(b"of an earlier write by more ranks")
    assert newest(tmp_path) == found


@pytest.mark.parametrize("header", [b"", b"damaged", header_bytes({0: MAGIC_STATE, 1: 1, 2: -5})])
def test_a_damaged_state_file_is_there(tmp_path, header):
    """Reading it tells what is wrong."""
    make(tmp_path, 10, 20)
    Checkpoint(tmp_path, 20).state(0).write_bytes(header)
    assert newest(tmp_path).step == 20


def test_an_absurd_number_of_ranks(tmp_path):
    make(tmp_path, 10, 20)
    Checkpoint(tmp_path, 20).state(0).write_bytes(header_bytes({0: MAGIC_STATE, 1: 1, 2: 2**31 - 1}))
    assert newest(tmp_path).step == 10
    assert next(Checkpoint(tmp_path, 20).missing()).name == "state_00000020_00001.bin"


def test_make_way(tmp_path):
    """For a new write of the same step by fewer ranks."""
    make(tmp_path, 10, 20, ranks=4)
    make(tmp_path, 100_000_000_0, ranks=2)
    before = set(names(tmp_path))
    Checkpoint(tmp_path, 20).make_way(2)
    gone = {"DONE_00000020", "state_00000020_00002.bin", "state_00000020_00003.bin"}
    assert before - set(names(tmp_path)) == gone
    Checkpoint(tmp_path, 30).make_way(2)
    assert before - set(names(tmp_path)) == gone


def test_make_way_is_refused(tmp_path, monkeypatch):
    make(tmp_path, 20)

    def failing(self, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.unlink", failing)
    with pytest.raises(RunError, match=r"cannot delete what is left of the checkpoint of step 20: .*Permission denied"):
        Checkpoint(tmp_path, 20).make_way(1)


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


def test_damaged_ones_do_not_count(tmp_path):
    """With -nk 2, what a resume has passed over must not push the last good one out."""
    make(tmp_path, 10, 20, 30, 40)
    assert prune(tmp_path, 40, 2, 0, {20, 30}) == [20, 30]
    assert steps(tmp_path) == [10, 40]


def test_the_marker_is_deleted_first(tmp_path, monkeypatch):
    """llm.c, which looks at nothing else, must not resume from a half-deleted checkpoint, nor after a power cut."""
    make(tmp_path, 10, ranks=3)
    make(tmp_path, 20)
    done = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: done.append(self.name))
    monkeypatch.setattr("llmc.checkpoint.sync_directory", lambda directory: done.append("on the disk"))
    prune(tmp_path, 20, 1, 0)
    states = [f"state_00000010_{rank:05d}.bin" for rank in range(3)]
    assert done == ["DONE_00000010", "on the disk", "model_00000010.bin", *states]


@pytest.mark.parametrize("deletions", range(9))
def test_a_failure_between_deletions(tmp_path, monkeypatch, deletions):
    """Of a checkpoint of four ranks, the state files of the highest one are the last to go."""
    make(tmp_path, 10, ranks=4)
    make(tmp_path, 20, 30)
    unlink, calls = Path.unlink, itertools.count()

    def failing(self, missing_ok=False):
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
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        aside = move_aside(tmp_path, ["main.log", "config.toml"])
        assert aside == tmp_path / f"previous_{number}"
        after = {
            path.name: path.read_bytes() for folder in (tmp_path, aside) for path in folder.iterdir() if path.is_file()
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
    """Of a bf16 run at stage 0; its values tell the step."""

    options = SimpleNamespace(master_weights=True, zero_stage=0, precision="bf16", device="cpu")
    fp8_history = ()

    def __init__(self, step):
        self.step, self.rng_state, self.last_update_rng_state = step, step + 1, step + 2

    def start_optimizer(self):
        pass

    def gather_parameters(self, unit):
        names = [("wte", "wpe"), ("h0.",), ("lnf",)][unit]
        sizes = [(n, size) for n, size in SHAPE.parameters() if n.startswith(names)]
        return {n: torch.full(size, float(self.step), dtype=torch.bfloat16) for n, size in sizes}

    def optimizer_state(self, name):
        value = self.step + ["m", "v", "master"].index(name)
        return {p: torch.full(size, float(value)) for p, size in SHAPE.parameters()}

    def host_memory(self, n, dtype):
        return torch.zeros(n, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


class Loader:
    def state(self):
        return LoaderState(True, 0, 1, np.arange(2), np.arange(3), np.arange(624, dtype=np.uint32), 5)


def save(directory, step, size=1, in_background=False):
    """As a run with -nk 1 does; of several ranks one after the other, rank 0 between what the others agree on."""

    def save_on(ranks):
        config = TrainConfig(checkpoint_every=10, keep_checkpoints=1, async_checkpoint=in_background)
        model = Model(step)
        run = SimpleNamespace(
            config=config,
            ranks=ranks,
            shape=SHAPE,
            precision="bf16",
            model=model,
            buffers=copy_buffers(SHAPE, model.options, size, ranks.rank, []),
            train_loader=Loader(),
            loss_outliers=OutlierDetector([step / 3]),
            norm_outliers=OutlierDetector([step / 7]),
            resumed=None,
            passed_over=[],
        )
        writer = CheckpointWriter(run, directory)
        writer.write(step)
        assert writer.busy <= in_background
        writer.finish()

    class InTurn(Ranks):
        def gather(self, value, what):
            if self.rank == 0 and what == f"the checkpoint of step {step}":
                for rank in range(1, size):
                    save_on(OneOf(rank, size))
            return [value]

    class OneOf(Ranks):
        def gather(self, value, what):
            return [value]

    with contextlib.redirect_stdout(None):
        save_on(InTurn(0, size))


def save_and_die(directory, step, size, in_background, fatal):
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
        save(directory, step, size, in_background)
        os._exit(0)
    finally:
        os._exit(1)


def contents(checkpoint):
    states = [checkpoint.state(rank) for rank in range(checkpoint.world_size)]
    return [path.read_bytes() for path in (checkpoint.model, checkpoint.done, *states)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns where earlier tests left threads
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(("before", "size"), [(1, 1), (3, 3), (3, 2)])
def test_kill_at_any_step_of_a_save(tmp_path, before, size, in_background):
    """kill -9 in place of every single write, flush, rename and deletion: the old checkpoint or the new is whole.

    With several ranks, also of what is left of an attempt by more ranks to write the same step.
    """
    expected = {}
    for step, ranks in ((10, before), (20, size)):
        (tmp_path / str(step)).mkdir()
        save(tmp_path / str(step), step, ranks)
        expected[step] = contents(Checkpoint(tmp_path / str(step), step))
    if size > 1:
        for rank in range(5):
            Checkpoint(tmp_path / "10", 20).state(rank).write_bytes(header_bytes({0: MAGIC_STATE, 1: 1, 2: 5}))

    seen = []
    for fatal in itertools.count(1):
        directory = tmp_path / f"killed_{fatal}"
        shutil.copytree(tmp_path / "10", directory)
        # A plain fork: it takes milliseconds, and tensors this small start no threads.
        child = os.fork()
        if child == 0:
            save_and_die(directory, 20, size, in_background, fatal)
        _, status = os.waitpid(child, 0)
        found = newest(directory)
        assert contents(found) == expected[found.step]
        assert read_model_header(found.model) == (SHAPE, "bf16")
        assert read_model_step(found.model) == found.step
        for rank in range(found.world_size):
            state = read_state(found.state(rank), SHAPE.num_parameters)
            assert (state.step, state.rank, state.rng_state) == (found.step, rank, found.step + 1)
            assert state.loss_window == (found.step / 3,)
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
            save(directory, step, size)
        states = [f"state_00000030_{rank:05d}.bin" for rank in range(size)]
        assert names(directory) == ["DONE_00000030", "model_00000030.bin", *states]
    assert names(directory) == names(tmp_path / "20")
    # The new one counts from some call on; before it are the writes of each of 16 tensors and of each of 3 * 16.
    assert seen == sorted(seen) and seen.count(10) > 16 + size * 3 * 16
    assert seen.count(20) >= 3  # the deletions
