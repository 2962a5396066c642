"""Full, read-only, vanished and lying disks in the middle of a run: it says so, goes on, and no checkpoint is lost.

Real small file systems where they can be mounted (as root), and everywhere the limit on the size of files.
"""

import contextlib
import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_testing import run_ranks
from training_data import write_data

import llmc.train
from llmc import snapshot
from llmc.checkpoint_writer import CheckpointWriter
from llmc.checksum import verify
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.errors import RunError
from llmc.ranks import Ranks

# A checkpoint takes 30592 * 16 bytes of fp32 and two headers: half a MiB.
BASE = (
    "-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -g 8 -v 5 -s 0 -m 2 "
    "-l 3e-3 -k constant -n 5"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path)


@pytest.fixture
def small_disk(directory):
    """A file system of 1 MiB in "disk": two checkpoints fit."""
    disk = directory / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


IN_BACKGROUND = ["", "--async-checkpoint 1"]


@pytest.fixture(params=IN_BACKGROUND)
def train(request, monkeypatch):
    """Checkpoints written by the run itself, or by a thread, for which each step waits: what happens when is known."""
    monkeypatch.setattr(CheckpointWriter, "after_step", lambda self, busy: self.complete())
    return lambda flags, output: command([*BASE.split(), *request.param.split(), *flags.split(), "-o", str(output)])


def steps(output):
    """Of the checkpoints, each of which must be as it was written."""
    for path in output.glob("*.bin"):
        assert verify(path)
    found = sorted(int(path.name[5:]) for path in output.glob("DONE_*"))
    files = {f"{kind}_{step:08d}" for step in found for kind in ("model", "state", "DONE")}
    names = {re.sub(r"(_\d{5})?\.bin$", "", path.name) for path in output.iterdir()}
    assert names == {*files, "main.log", "config.toml"}
    return found


def log(output):
    return (output / "main.log").read_text()


def warnings(capsys):
    return re.findall(r"^WARNING: (?!sequence)(.*)$", capsys.readouterr().out, re.M)


def full(name):
    return f"cannot write {name}: No space left on device"


def test_a_full_disk(small_disk, after_step, capsys, train):
    train("-x 20", "straight")
    capsys.readouterr()
    output = small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(450_000))
    after_step[12] = filler.unlink
    train("-x 15 -nk 1", output)
    assert warnings(capsys) == [f"there is no checkpoint of step 10: {full(output / 'model_00000010.bin')}"]
    assert steps(output) == [15]
    assert log(output) == log(Path("straight"))[: len(log(output))]
    # No room for another one at the end: status 1, and what is there stays, although -nk 1 would have deleted it.
    filler.write_bytes(bytes(400_000))
    with pytest.raises(RunError, match=r"the last checkpoint is missing: cannot write .* No space left on device"):
        train("-x 20 -nk 1 -y 1", output)
    assert warnings(capsys) == [f"there is no checkpoint of step 20: {full(output / 'state_00000020_00000.bin')}"]
    assert steps(output) == [15]
    filler.unlink()
    train("-x 20 -nk 1 -y 1", output)
    assert steps(output) == [20]
    for name in ("model_00000020.bin", "state_00000020_00000.bin"):
        assert (output / name).read_bytes() == (Path("straight") / name).read_bytes()


def test_a_disk_that_becomes_read_only(small_disk, after_step, capsys, train):
    output = small_disk / "out"

    def cover():  # a mount of its own: the one below has a file open, which is locked
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)

    after_step[7] = cover
    after_step[12] = lambda: subprocess.run(["umount", small_disk], check=True)
    train("-x 15 -nk 1", output)
    reason = "Read-only file system"
    assert warnings(capsys) == [
        f"cannot write {output / 'main.log'}: {reason}; its lines wait",
        f"there is no checkpoint of step 10: cannot write {output / 'model_00000010.bin'}: {reason}",
    ]
    assert steps(output) == [15]
    assert len(log(output).splitlines()) == 15 + 4


def test_a_directory_that_vanishes(directory, after_step, capsys, train):
    output = directory / "out"
    after_step[7] = lambda: output.rename(directory / "elsewhere")
    after_step[12] = lambda: (directory / "elsewhere").rename(output)
    train("-x 15", output)
    assert [line.split(": ")[-1] for line in warnings(capsys)] == [
        "No such file or directory; its lines wait",
        "No such file or directory",
    ]
    assert steps(output) == [5, 15]
    assert len(log(output).splitlines()) == 15 + 4


@contextlib.contextmanager
def limited(size):
    """Files of this process can have so many bytes, as with a quota: then File too large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "file"), [(100_000, "model_00000010.bin"), (300_000, "state_00000010_00000.bin")])
def test_a_quota(directory, after_step, capsys, size, file, train):
    """Of which the model or the state is too much."""
    limit = contextlib.ExitStack()
    after_step[7] = lambda: limit.enter_context(limited(size))
    after_step[12] = limit.close
    train("-x 15 -nk 1", "out")
    assert warnings(capsys) == [f"there is no checkpoint of step 10: cannot write out/{file}: File too large"]
    assert steps(directory / "out") == [15]


def test_the_stale_marker_of_an_earlier_write_goes(directory, capsys, train):
    """What is written over a damaged checkpoint and fails is not to be taken for one, neither by llm.c."""
    train("-x 10", "out")
    raw = bytearray((directory / "out" / "model_00000010.bin").read_bytes())
    raw[5000] ^= 1
    (directory / "out" / "model_00000010.bin").write_bytes(raw)
    with limited(300_000), pytest.raises(RunError, match=r"the last checkpoint is missing: .*File too large"):
        train("-x 10 -y 1", "out")
    assert steps(directory / "out") == [5]


def test_stdout_on_a_full_disk(directory):
    """The lines that fit are there, and the run goes on."""
    program = "from llmc.cli.train import *; outlast_full_disk(); [print('0123456789', flush=True) for _ in range(500)]"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # noqa: E731
    with open("printed", "wb") as printed:
        subprocess.run([sys.executable, "-c", program], stdout=printed, preexec_fn=limit, check=True)
    assert Path("printed").read_text() == (500 * "0123456789\n")[:1024]


@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_disk_that_lies(directory, monkeypatch, capsys, kind, train):
    """It says that the data are written, but they are not: what -nk would have deleted stays; the run tries again."""

    def damage_and_verify(path, past_cache):
        assert past_cache
        if path.name.startswith(f"{kind}_00000010"):
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 128
            path.write_bytes(raw)
        return verify(path, past_cache)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "verify", damage_and_verify)
        with pytest.raises(RunError, match=rf"the last checkpoint is missing: out/{kind}_00000010\S* is damaged"):
            train("-x 10 -nk 1", "out")
    assert steps(directory / "out") == [5]
    train("-x 10 -nk 1 -y 1", "out")
    assert steps(directory / "out") == [10]


def test_a_deletion_that_fails(directory, monkeypatch, capsys, train):
    """Of an old checkpoint: the run goes on, and deletes it the next time."""
    unlink, refuse = Path.unlink, {"DONE_00000005"}

    def unlink_some(self, missing_ok=False):
        if self.name in refuse:
            refuse.remove(self.name)
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_some)
    train("-x 15 -nk 1", "out")
    (line,) = warnings(capsys)
    assert line.startswith("cannot delete the checkpoint of step 5: ")
    assert steps(directory / "out") == [15]


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def train_rank(ranks, directory, victim, stage, flags):
    """Of a quota that rank `victim` has from step 7 to 12 on; what this rank printed."""
    os.chdir(directory)
    limit, update = contextlib.ExitStack(), llmc.train.update

    def counted(run, step, *arguments):
        if ranks.rank == victim and step == 7:
            limit.enter_context(limited(50_000))
        if ranks.rank == victim and step == 12:
            limit.close()
        return update(run, step, *arguments)

    llmc.train.update = counted
    CheckpointWriter.after_step = lambda self, busy: self.complete()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        flags = f"{BASE} -x 15 -nk 1 -z {stage} -o out{stage}{victim} {flags}"
        llmc.train.train(parse_args(flags.split()).config, ranks)
    return out.getvalue()


@pytest.mark.parametrize("flags", IN_BACKGROUND)
@pytest.mark.parametrize(("victim", "stage", "file"), [(0, 3, "model_00000010"), (1, 1, "state_00000010_00001")])
def test_one_rank_cannot_write(directory, victim, stage, file, flags):
    """All go on together; rank 0 says what it was. At stage 3 the others need rank 0 while the model is gathered."""
    printed = run_ranks(2, train_rank, directory, victim, stage, flags)
    output = Path(f"out{stage}{victim}")
    (line,) = re.findall(r"^WARNING: there is .*$", printed[0], re.M)
    assert line == f"WARNING: there is no checkpoint of step 10: cannot write {output}/{file}.bin: File too large"
    assert steps(output) == [15]
    assert len(list(output.glob("state*"))) == 2


def damaged_on(ranks, directory, path):
    """What each rank takes for the newest good checkpoint."""
    os.chdir(directory)
    stored, passed_over = snapshot.newest_good(Path("out"), ranks)
    return stored and stored.step, [passed.problem for passed in passed_over]


def test_a_damaged_file_is_passed_over_by_all_ranks(directory):
    run_ranks(3, make, directory)
    raw = bytearray(Path("out/state_00000010_00002.bin").read_bytes())
    raw[20_000] ^= 2
    Path("out/state_00000010_00002.bin").write_bytes(raw)
    for ranks in (1, 2, 3):  # one of which sees it
        found = run_ranks(ranks, damaged_on, directory, None)
        assert [step for step, _ in found] == [5] * ranks
        ((problem,),) = {tuple(problems) for _, problems in found}
        assert problem.startswith("out/state_00000010_00002.bin is damaged: its checksum is ")


def make(ranks: Ranks, directory):
    os.chdir(directory)
    llmc.train.train(parse_args(f"{BASE} -b 1 -x 10 -z 2 -o out".split()).config, ranks)
