"""Two runs on one output directory: real processes, killed ones, and who comes first."""

import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
from ranks_testing import Processes, run_ranks
from training_data import expect_refusal, write_data

from llmc import cli
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.errors import RunError
from llmc.lock import Lock
from llmc.train import train

BASE = "-e custom:l=1,c=32,h=2,t=16 -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -g 8 -v 0 -s 0 -m 1"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path)


def run_command(directory, arguments):
    os.chdir(directory)
    cli.run("llmc-train", command, arguments)


def endless(directory, flags):
    """A run that has written its first checkpoint."""
    arguments = [*BASE.split(), *flags.split(), "-x", "2000000", "-n", "10", "-nk", "1"]
    started = Processes(directory, run_command, [(str(directory), arguments)], {})
    end = time.monotonic() + 40
    while not list((directory / "out").glob("DONE_*")) and time.monotonic() < end:
        time.sleep(0.02)
    return started.processes[0]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_the_second_run_is_refused_and_a_killed_one_is_not_in_the_way(directory, capsys):
    first = endless(directory, "-o out")
    try:
        message = f"-o out is in use by another run, process {first.pid} on {socket.gethostname()}: choose another -o"
        for resume in "01":  # a new one would move its checkpoints aside
            expect_refusal(capsys, f"{BASE} -x 2 -n 1 -y {resume} -o out".split(), 1, message)
        assert not (directory / "out" / "previous_1").exists()
        assert first.is_alive()
        command(f"{BASE} -x 1 -o elsewhere".split())
    finally:
        first.kill()
        first.join()
    assert (directory / "out" / ".lock").exists()
    before = contents(directory / "out")
    capsys.readouterr()
    expect_stale = f"the run before in out, process {first.pid} on {socket.gethostname()}, was killed\n"
    step = max(int(path.name[5:]) for path in (directory / "out").glob("DONE_*"))
    command(f"{BASE} -x {step} -n 1 -y 1 -o out".split())
    out = capsys.readouterr().out
    assert expect_stale in out and f"resuming at step {step}\n" in out
    after = contents(directory / "out")
    assert ".lock" not in after  # a run that ends takes it along
    assert all(after[name] == raw for name, raw in before.items() if name.startswith(("model", "state", "DONE")))


def test_the_lock_of_this_run(directory, capsys):
    """Its own second attempt to take it is none; one that is refused leaves nothing behind."""
    with Lock("out") as lock:
        lock.take()
        assert not Path("out").exists()
        Path("out").mkdir()
        lock.take()
        lock.take()
        assert Path("out/.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunError, match="-o out is in use"), Lock("out") as other:
            other.take()
        assert Path("out/.lock").exists()
    assert list(Path("out").iterdir()) == []
    with Lock("") as lock:
        lock.take()
    expect_refusal(capsys, f"{BASE} -x 2 -o out -t 999".split(), 2, "-t 999 is longer")
    assert list(Path("out").iterdir()) == []
    assert capsys.readouterr().out == ""


def rank_of_a_run(ranks, directory):
    os.chdir(directory)
    with contextlib.redirect_stdout(io.StringIO()):
        train(parse_args(f"{BASE} -x 4 -n 2 -z 3 -o out".split()).config, ranks)


def test_a_link_in_its_place_leads_nowhere(directory, capsys):
    """What it points to would be emptied."""
    (directory / "precious").write_text("text")
    (directory / "out").mkdir()
    (directory / "out" / ".lock").symlink_to("../precious")
    with Lock("out") as lock:
        lock.take()
    assert (directory / "precious").read_text() == "text"
    assert capsys.readouterr().out.startswith("WARNING: out/.lock cannot be locked")


def test_the_ranks_of_a_run_are_one_holder(directory):
    run_ranks(3, rank_of_a_run, directory)
    assert len(list(Path("out").glob("DONE_*"))) == 2


def refused_rank(ranks, directory):
    os.chdir(directory)
    try:
        train(parse_args(f"{BASE} -x 4 -n 2 -o out".split()).config, ranks)
    except RunError as error:
        return str(error)


def test_all_ranks_of_a_second_run_are_refused(directory):
    Path("out").mkdir()
    with Lock("out") as lock:
        lock.take()
        refusals = run_ranks(2, refused_rank, directory)
    assert len(set(refusals)) == 1 and f"process {os.getpid()} on " in refusals[0]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(directory, monkeypatch, capsys, number):
    """Such as NFS without its lock service."""

    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    Path("out").mkdir()
    with Lock("out") as lock:
        lock.take()
    warning = f"WARNING: out/.lock cannot be locked ({os.strerror(number)}): see to it that no other run uses -o\n"
    assert capsys.readouterr().out == warning


def contend(directory, rounds):
    """Enters `rounds` times; exits with 1 if two are inside at once."""
    os.chdir(directory)
    sys.stdout, done = None, 0
    while done < rounds:
        try:
            with Lock("out") as lock:
                lock.take()
                os.close(os.open("inside", os.O_CREAT | os.O_EXCL))
                os.unlink("inside")
                done += 1
        except RunError:
            pass
        except FileExistsError:
            os._exit(1)


def test_only_one_gets_in(directory):
    """Although each deletes the file that the others have open already."""
    Path("out").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=contend, args=(directory, 150)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
