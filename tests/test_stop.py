"""Runs that are asked to end: by signals to any rank, by --max-time. They leave a checkpoint, and status 75."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_testing import Processes, run_ranks
from training_data import expect_refusal, write_data

import llmc.train
from llmc import _C, cli, wall_time
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.ranks import Ranks
from llmc.wall_time import WallTime, read_wall_time

BASE = (
    "-e custom:l=1,c=32,h=2,t=16 -i data/t_train_*.bin -j data/t_val_*.bin -b 1 -t 16 -g 8 -v 4 -s 0 -m 1 "
    "-l 1e-3 -k linear"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path)


def train(flags, status=0):
    """In this process."""
    try:
        command([*BASE.split(), *flags.split()])
    except SystemExit as end:
        assert end.code == status
    else:
        assert status == 0


def kill_me(number):
    return lambda: os.kill(os.getpid(), number)


def files(output, step, ranks=1):
    names = [f"model_{step:08d}.bin", *(f"state_{step:08d}_{rank:05d}.bin" for rank in range(ranks))]
    return [(Path(output) / name).read_bytes() for name in names]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_writes_a_checkpoint(directory, after_step, capsys, number):
    """At a step that no -n would have, and before a validation; the next run computes what an unbroken one does."""
    before = signal.getsignal(number)
    train("-x 9 -n 5 -o straight")
    after_step[4] = kill_me(number)
    train("-x 9 -n 5 -o out", status=75)
    assert signal.getsignal(number) == before
    out = capsys.readouterr().out
    assert f"\n{number.name}: stopping after step 4/9\nWriting checkpoint at step 4\n" in out
    assert out.count("step    5/9") == 1
    train("-x 9 -n 5 -o out -y 1")
    assert files("out", 9) == files("straight", 9)
    assert Path("out/main.log").read_text() == Path("straight/main.log").read_text()


def test_the_last_step(directory, after_step):
    """There is a checkpoint, and what is left is the last validation."""
    after_step[9] = kill_me(signal.SIGTERM)
    train("-x 9 -n 5 -o out", status=75)
    assert Path("out/DONE_00000009").exists()
    train("-x 9 -n 5 -o out -y 1")
    assert Path("out/main.log").read_text().endswith("\ns:9 tel:" + Path("out/main.log").read_text()[-7:])


@pytest.mark.parametrize("output", ["", "out"])
def test_without_checkpoints(directory, after_step, capsys, output):
    after_step[3] = kill_me(signal.SIGTERM)
    train(f"-x 9 --output-dir={output}", status=75)
    out = capsys.readouterr().out
    assert "\nSIGTERM: stopping after step 3/9\nthere is no checkpoint to go on from: only runs with -o and -n" in out


def test_a_checkpoint_that_fails_then(directory, after_step, capsys):
    def trouble():
        os.kill(os.getpid(), signal.SIGTERM)
        Path("out").rename("elsewhere")

    after_step[3] = trouble
    with pytest.raises(SystemExit) as end:
        cli.run("llmc-train", command, [*BASE.split(), *["-x", "9", "-n", "5", "-o", "out"]])
    assert end.value.code == 1
    assert "the last checkpoint is missing: " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def run_command(directory, arguments, seconds=0.0):
    """Each step takes so long, which no signal ends."""
    os.chdir(directory)
    update = llmc.train.update
    llmc.train.update = lambda *values: (print("busy", flush=True), time.sleep(seconds), update(*values))[2]
    cli.run("llmc-train", command, arguments)


def wait_for(started, text):
    end = time.monotonic() + 40
    while text not in started.read("out") and time.monotonic() < end:
        time.sleep(0.02)
    assert text in started.read("out")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_ctrl_c_leaves_at_once(directory, ranks):
    """Whatever the main thread is doing; the first one waits for the end of the step."""
    several = f"-pm fs -pp {directory} -pn {ranks}" if ranks > 1 else ""
    flags = [*BASE.split(), *f"-x 9 -n 5 -o out {several}".split()]
    arguments = [(str(directory), [*flags, *(["-pr", str(rank)] if ranks > 1 else [])], 60.0) for rank in range(ranks)]
    started = Processes(directory, run_command, arguments, {})
    wait_for(started, "busy")
    victim = started.processes[-1]
    os.kill(victim.pid, signal.SIGINT)
    time.sleep(0.5)
    assert victim.is_alive()
    os.kill(victim.pid, signal.SIGINT)
    statuses, errors = started.wait(10)
    assert statuses == [130] * ranks and errors.endswith("interrupted\n") and errors.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def votes_of_rank(ranks, stage):
    config = _C.GPT2Config(max_seq_len=8, vocab_size=65, padded_vocab_size=128, num_layers=1, num_heads=1, channels=32)
    options = _C.Options(batch_size=1, seq_len=8, zero_stage=stage)
    model = _C.GPT2(config, options, _C.gloo_communicator(ranks.group_name) if ranks.size > 1 else None)
    model.init_random(1)
    tokens = torch.zeros((1, 8), dtype=torch.int32)
    result = []
    for votes in ([0, 0], [ranks.rank == 1, ranks.rank], [ranks.rank, 0], [0, 0]):
        for micro_step in range(2):
            model.vote([float(vote) for vote in votes])
            model.forward(tokens)
            model.backward(tokens, micro_step, 2)
        result.append((model.votes(), model.loss()))
    return result


@pytest.mark.parametrize("stage", [0, 3])
def test_votes(stage):
    """The averages of all ranks, of the same step, beside an undisturbed loss."""
    alone = votes_of_rank(Ranks(), 0)[0][1]
    results = run_ranks(3, votes_of_rank, stage)
    assert results[0] == results[1] == results[2]
    votes = [votes for votes, _ in results[0]]
    assert [[round(3 * x, 5) for x in vote] for vote in votes] == [[0, 0], [1, 3], [3, 0], [0, 0]]
    assert all(loss == pytest.approx(alone, rel=1e-5) for _, loss in results[0])  # fp32 in another order


@pytest.mark.parametrize(("victim", "stage"), [(0, 0), (2, 3)])
def test_a_signal_to_one_rank_stops_all(directory, victim, stage):
    """After the same step; the next run ends with the bits of an unbroken one."""
    flags = f"{BASE} -z {stage} -x 300 -n 100 -y 1 -pm fs -pp {directory} -pn 3"

    def start(output, seconds=0.0):
        arguments = [(str(directory), [*flags.split(), "-pr", str(rank), "-o", output], seconds) for rank in range(3)]
        return Processes(directory, run_command, arguments, {})

    assert start("straight").wait() == ([0, 0, 0], "")
    started = start("out", 0.02)  # or it might be over before the signal
    wait_for(started, "step   20/300")
    os.kill(started.processes[victim].pid, signal.SIGTERM)
    assert started.wait() == ([75, 75, 75], "")
    (step,) = re.findall(r"SIGTERM: stopping after step (\d+)/300", started.read("out"))
    assert Path(f"out/DONE_{int(step):08d}").exists()
    assert start("out").wait() == ([0, 0, 0], "")
    assert files("out", 300, 3) == files("straight", 300, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_through_mpirun(directory, number):
    """What a scheduler or Ctrl-C sends to mpirun."""
    program = Path(sys.executable).with_name("llmc-train")
    flags = f"{BASE} -x 200000 -n 100000 -o out".split()
    command = [Path(sys.executable).with_name("mpirun"), "-np", "2", program, *flags]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open("printed", "w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environ, start_new_session=True)
    end = time.monotonic() + 40
    while "step   20/" not in Path("printed").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    status = process.wait(30)
    printed = Path("printed").read_text()
    assert (status, list(Path("out").glob("DONE_*")) != []) == (75, True), printed[-2000:]


# ----------------------------------------------------------------------------------------------------------------------
# --max-time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("1:30", 90),
        ("3:55:00", 3 * 3600 + 55 * 60),
        ("0:00:07", 7),
        ("2-0", 2 * 86400),
        ("1-12:30", 86400 + 12 * 3600 + 30 * 60),
        ("1-00:00:01", 86401),
        ("119:59:59", 119 * 3600 + 59 * 60 + 59),
        *(
            (wrong, None)
            for wrong in ("", "x", "1:2:3:4", "-1", "1-", "1-2:3:4:5", "1.5", "1h", ":30", "1: 30", "1:2\n")
        ),
    ],
)
def test_times_of_slurm(text, seconds):
    assert read_wall_time(text) == seconds


@pytest.mark.parametrize("value", ["0", "soon", "0:0:0"])
def test_a_time_that_no_run_can_use(capsys, value):
    message = f"--max-time {value}: it must be a time in minutes,"
    expect_refusal(capsys, [*BASE.split(), "--max-time", value], 2, message)


def test_when_it_is_near(monkeypatch):
    """Steps of 10 s, one of 30 s with a validation, checkpoints of 8 s, 200 s in all."""
    monkeypatch.setattr(wall_time, "STARTED", 1000.0)
    now = [1000.0]
    time = WallTime(200, lambda: now[0])
    assert not WallTime(None, lambda: 1e9).is_near(1e9)

    def step(seconds):
        time.before_step()
        now[0] += seconds
        time.after_step()

    step(10)
    assert not time.is_near(8)
    now[0] += 8  # a checkpoint is no part of a step
    step(30)
    now[0] = 1000 + 200 - (2 * 30 + 1.5 * 8 + 1)
    assert not time.is_near(8)
    now[0] += 0.1
    assert time.is_near(8) and not time.is_near(7)


@pytest.mark.parametrize("flags", ["-n 1000 -o out", "-o out"])
def test_max_time(directory, after_step, monkeypatch, capsys, flags):
    """4 seconds, of steps of a quarter of a second: it ends in time, not far too early, with a checkpoint if it may."""
    monkeypatch.setattr(wall_time, "STARTED", time.monotonic())
    update = llmc.train.update
    monkeypatch.setattr(llmc.train, "update", lambda *values: (time.sleep(0.25), update(*values))[1])
    train(f"-x 1000 -v 0 --max-time 0:04 {flags}", status=75)
    seconds = time.monotonic() - wall_time.STARTED
    assert 1.5 < seconds < 4
    out = capsys.readouterr().out
    (step,) = re.findall(r"^--max-time 0:04: stopping after step (\d+)/1000$", out, re.M)
    assert Path(f"out/DONE_{int(step):08d}").exists() == ("-n" in flags)
    warned = "WARNING: --max-time 0:04 will end the run without a checkpoint: only -o and -n write them" in out
    assert warned == ("-n" not in flags)


def max_time_of_rank(ranks, directory):
    os.chdir(directory)
    wall_time.STARTED = time.monotonic() + 100 * ranks.rank  # their clocks do not matter
    update = llmc.train.update
    llmc.train.update = lambda *values: (time.sleep(0.1), update(*values))[1]
    with contextlib.redirect_stdout(io.StringIO()):
        return llmc.train.train(parse_args(f"{BASE} -x 1000 -n 1000 -o out --max-time 0:02".split()).config, ranks)


def test_max_time_on_several_ranks(directory):
    assert run_ranks(2, max_time_of_rank, directory) == [False, False]
    assert len(list(Path("out").glob("DONE_*"))) == 1
