"""--async-checkpoint 1: the files of a run that waits for its checkpoints, written while training goes on.

How many steps that takes is decided here, not by the disk: threads wait for a step.
"""

import contextlib
import io
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks_testing import run_ranks
from training_data import write_data

import llmc.train
from llmc import _C, checkpoint_writer, snapshot
from llmc.checkpoint_writer import CheckpointWriter
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.errors import RunError
from llmc.ranks import Ranks

BASE = (
    "-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -g 8 -v 10 -s 0 -m 2 "
    "-l 3e-3 -k constant -n 5 -x 18"
)
IN_BACKGROUND = "--async-checkpoint 1"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path)


def train(flags, output):
    command([*BASE.split(), *flags.split(), "-o", output])


def files(output):
    return {path.name: path.read_bytes() for path in Path(output).iterdir() if path.name != "config.toml"}


@pytest.fixture
def hold(monkeypatch, after_step):
    """hold(c, s): the thread that is to write the checkpoint of step c waits for the end of step s."""
    events, write = {}, snapshot.write

    def wait_and_write(run, checkpoint, contents):
        if checkpoint.step in events:
            assert events[checkpoint.step].wait(20)
        return write(run, checkpoint, contents)

    def hold(step, until):
        events[step] = threading.Event()
        after_step[until] = events[step].set

    monkeypatch.setattr(snapshot, "write", wait_and_write)
    return hold


@pytest.mark.parametrize("flags", ["", "--precision bf16", "--precision bf16 -w 0", "-nk 2", "-sl 9 -sg 9 -d 64 -a 1"])
def test_the_same_files(directory, hold, capsys, flags):
    """Though the model has gone on for four steps when the writing begins."""
    train(flags, "waiting")
    capsys.readouterr()
    hold(5, until=9)
    hold(10, until=14)
    train(f"{flags} {IN_BACKGROUND}", "going_on")
    assert files("going_on") == files("waiting")
    printed = capsys.readouterr().out
    order = re.findall(r"^(?:Writing checkpoint at step|step +|the checkpoint of step) ?(\d+)", printed, re.M)
    begin = order.index("5", order.index("5") + 1)  # the step, then its checkpoint
    assert order[begin : begin + 7] == ["5", "6", "7", "8", "9", "10", "5"]
    assert printed.endswith(
        "the checkpoint of step 18 is complete\n" + "Deleting checkpoint at step 10\n" * ("-nk" in flags)
    )


def test_there_is_no_marker_before_the_files(directory, hold, after_step):
    hold(5, until=8)
    seen = {}
    for step in (5, 6, 7):
        after_step[step] = lambda step=step: seen.update({step: list(Path("out").glob("DONE*"))})
    train(IN_BACKGROUND, "out")
    assert seen == {5: [], 6: [], 7: []}
    assert Path("out/DONE_00000005").exists()


def test_the_next_one_waits(directory, monkeypatch, capsys):
    """That of step 10 until that of step 5 is there: no file of it before, and both as they should be."""
    train("", "waiting")
    capsys.readouterr()
    write, mark_done, order = snapshot.write, snapshot.mark_done, []
    complete, waited_for = CheckpointWriter.complete, threading.Event()

    def slow(run, checkpoint, contents):
        order.append(f"write {checkpoint.step}")
        assert waited_for.wait(20)
        return write(run, checkpoint, contents)

    monkeypatch.setattr(snapshot, "write", slow)
    monkeypatch.setattr(
        CheckpointWriter, "complete", lambda self: (waited_for.set() if self.busy else None, complete(self))
    )
    monkeypatch.setattr(snapshot, "mark_done", lambda this: (order.append(f"done {this.step}"), mark_done(this)))
    train(IN_BACKGROUND, "going_on")
    assert order == [f"{what} {step}" for step in (5, 10, 15, 18) for what in ("write", "done")]
    assert files("going_on") == files("waiting")
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("waiting for the checkpoint of step 5, which is still being written")
    assert lines[begin - 1].startswith("val loss") and lines[begin - 2].startswith("step   10/18")
    assert lines[begin + 1 : begin + 3] == ["the checkpoint of step 5 is complete", "Writing checkpoint at step 10"]


@pytest.mark.parametrize("step", [5, 7])
def test_a_signal_while_one_is_being_written(directory, hold, after_step, capsys, step):
    """Both that one and the last one are there, unless they are the same."""
    hold(5, until=9)  # which does not come: see asked()

    def asked():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.5, after_step.pop(9)).start()

    after_step[step + 1] = asked
    with pytest.raises(SystemExit) as end:
        train(IN_BACKGROUND, "out")
    assert end.value.code == 75
    printed = capsys.readouterr().out
    assert f"SIGTERM: stopping after step {step + 1}/18\nwaiting for the checkpoint of step 5" in printed
    done = sorted(path.name for path in Path("out").glob("DONE_*"))
    assert done == ["DONE_00000005", f"DONE_{step + 1:08d}"]
    train("", "straight")
    train(f"{IN_BACKGROUND} -y 1", "out")
    for name in ("model_00000018.bin", "state_00000018_00000.bin", "main.log"):
        assert Path("out", name).read_bytes() == Path("straight", name).read_bytes()


def test_an_error_of_the_run_while_one_is_being_written(directory, hold, monkeypatch, after_step, capsys):
    """It is completed before the run ends, and with it the lock."""
    hold(5, until=9)  # which does not come
    update = llmc.train.update

    def broken(run, step, *arguments):
        if step == 7:
            threading.Timer(0.3, after_step.pop(9)).start()
            raise RunError("a shard is gone")
        return update(run, step, *arguments)

    monkeypatch.setattr(llmc.train, "update", broken)
    with pytest.raises(RunError, match="a shard is gone"):
        train(IN_BACKGROUND, "out")
    assert capsys.readouterr().out.endswith("the checkpoint of step 5 is complete\n")
    assert Path("out/DONE_00000005").exists()


def test_an_error_in_the_thread_ends_the_run(directory, monkeypatch):
    """Not of the disk, but of the program: as without the thread, whatever it is."""

    def broken(*arguments):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(snapshot, "write", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        train(IN_BACKGROUND, "out")
    assert not list(Path("out").glob("DONE_*"))


def test_the_time_for_a_last_one(directory, monkeypatch):
    """As long as the slowest one took, not the steps before that is seen; twice that while another one is written.

    By a clock that a write takes 10 seconds of and a step 1000.
    """
    now, seconds, go = [0.0], [], threading.Event()

    class Observed(CheckpointWriter):
        def after_step(self, busy):
            seconds.append(self.seconds)
            if len(seconds) == 5:
                go.set()
            while self.busy:
                time.sleep(0.001)
            now[0] += 1000
            super().after_step(False)

    def write(*arguments):
        assert go.wait(20)
        now[0] += 10
        return "no disk"

    monkeypatch.setattr(checkpoint_writer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(checkpoint_writer, "expected_seconds", lambda run: 60.0)
    monkeypatch.setattr(llmc.train, "CheckpointWriter", Observed)
    monkeypatch.setattr(snapshot, "write", write)
    with pytest.raises(RunError, match="the last checkpoint is missing: no disk"):
        train(f"{IN_BACKGROUND} -x 7 -n 4 -v 0", "out")
    # Before the first checkpoint, while it is written, while what is there of it is deleted, after that.
    assert seconds == [60] * 4 + [120, 20, 10]


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def train_rank(ranks: Ranks, directory, flags, slow):
    """Rank `slow` writes nothing of step 5 before step 10; the markers that this rank sees before each step."""
    os.chdir(directory)
    write, update, go, seen = snapshot.write, llmc.train.update, threading.Event(), {}

    def wait_and_write(run, checkpoint, contents):
        if ranks.rank == slow and checkpoint.step == 5:
            assert go.wait(20)
        return write(run, checkpoint, contents)

    def counted(run, step, *arguments):
        seen[step] = sorted(path.name for path in Path("out").glob("DONE_*"))
        if step == 9:
            go.set()
        return update(run, step, *arguments)

    snapshot.write, llmc.train.update = wait_and_write, counted
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        llmc.train.train(parse_args(f"{BASE} -b 1 -n 5 -o out {flags}".split()).config, ranks)
    return seen, out.getvalue()


@pytest.mark.parametrize(("slow", "flags"), [(0, "-z 3"), (2, "-z 2 --precision bf16"), (1, "-nk 1")])
def test_several_ranks(directory, slow, flags):
    """One is slower: no marker before its files are there, all go on, and the files are the same."""
    expected = run_ranks(3, train_rank, directory, flags, None)
    Path("out").rename("waiting")
    found = run_ranks(3, train_rank, directory, f"{flags} {IN_BACKGROUND}", slow)
    assert files("out") == files("waiting")
    for seen, _ in found:
        assert all(seen[step] == [] for step in range(9))  # on the slow one until it writes
    assert found[0][1].count("is complete") == 4
    losses = [re.findall(r"^step .*? loss (\S+)", printed, re.M) for _, printed in (expected[0], found[0])]
    assert losses[0] == losses[1] and len(losses[0]) == 18


def test_an_error_of_the_guard_is_one_of_all_ranks(directory):
    """Rank 1 is slow, then the run stops: all wait, and the checkpoint is there."""
    for error in run_ranks(2, stop_rank, directory):
        assert error.startswith("the loss is nan at step 8: ")
    assert Path("out/DONE_00000005").exists()


def stop_rank(ranks: Ranks, directory):
    os.chdir(directory)
    write, update = snapshot.write, llmc.train.update
    snapshot.write = lambda *arguments: (time.sleep(0.5 * ranks.rank), write(*arguments))[1]

    def broken(run, step, *arguments):
        if step == 7:
            run.model.parameters()["lnfw"].fill_(float("nan"))
            run.model.forward(run.train_loader.next_batch()[0])
            run.model.backward(run.train_loader.next_batch()[1])
        return update(run, step, *arguments)

    llmc.train.update = broken
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            llmc.train.train(parse_args(f"{BASE} -b 1 -o out {IN_BACKGROUND}".split()).config, ranks)
        except RunError as error:
            return str(error)
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# The memory


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_host_memory(dtype):
    """Zeroed, the caller's own, and given back."""
    sizes = dict(max_seq_len=8, vocab_size=65, padded_vocab_size=128, num_layers=1, num_heads=1, channels=32)
    model = _C.GPT2(_C.GPT2Config(**sizes), _C.Options(batch_size=1, seq_len=8))
    before = model.allocated_bytes()
    one, two = model.host_memory(1001, dtype), model.host_memory(1001, dtype)
    assert (
        one.shape == (1001,)
        and not one.any()
        and str(one.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
    )
    one.fill_(1)
    assert not two.any()
    assert model.allocated_bytes() - before == 2 * one.nbytes
    del one, two
    assert model.allocated_bytes() == before
    with pytest.raises(_C.Error, match="host memory for 0 values: it must be at least one"):
        model.host_memory(0, dtype)
