"""The trainer on several ranks: the run of one process, every checkpoint resumable on any number of ranks and stage."""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from ranks_testing import Processes, run_ranks
from training_data import write_data

from llmc import cli
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.errors import RunError, UsageError
from llmc.model_file import load_model, read_model_header
from llmc.train import train

# 24 rows of 16 tokens a step, however many ranks share them.
BASE = (
    "-e custom:l=2,c=48,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -t 16 -d 384 -g 8 -v 5 -s 0 -m 2 "
    "-l 1e-4 -c 0.1 -lg 0"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path, train=(3000, 1700, 900), val=2000)


def train_rank(ranks, directory, runs):
    """One rank's part of several runs; what each printed, or the refusal."""
    os.chdir(directory)
    printed = []
    for flags in runs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                train(parse_args(f"{BASE} {flags}".split()).config, ranks)
            except (RunError, UsageError) as error:
                out.write(f"{type(error).__name__}: {error}")
        printed.append(out.getvalue())
    return printed


def run(world_size, *runs):
    """What rank 0 printed in each run."""
    return run_ranks(world_size, train_rank, Path.cwd(), list(runs))[0]


def losses(*printed):
    """step -> training loss, of the lines of one run or the parts of one."""
    lines = re.findall(r"^step +(\d+)/\d+ \| loss ([\d.]+) ", "\n".join(printed), re.M)
    return {int(step): float(loss) for step, loss in lines}


def parameters(path):
    shape, _ = read_model_header(path)
    found = {name: torch.empty(size) for name, size in shape.parameters()}
    load_model(path, found)
    return found


def header(path):
    return struct.unpack("<256i", Path(path).read_bytes()[:1024])


def assert_close(a, b):
    """Losses of about 4.2 in fp32, summed in another order, over 15 updates that follow the sign of tiny gradients."""
    assert a.keys() == b.keys() and len(a) > 0
    assert max(abs(a[step] - b[step]) for step in a) <= 1e-4


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_batch_on_any_number_of_ranks(world_size):
    """-a 1: the same consecutive tokens."""
    flags = "-a 1 -x 12 -b 4 -n 12 -m -1 -s 6"
    (printed,) = run(1, f"{flags} -o one")
    one, expected = losses(printed), parameters("one/model_00000012.bin")
    printed = run(world_size, *(f"{flags} -z {stage} -o z{stage}" for stage in range(4)))
    for stage in range(4):
        assert_close(losses(printed[stage]), one)
        # Adam moves each value by about 1e-4 a step whatever its gradient is, so noise in tiny gradients shows.
        for name, value in parameters(f"z{stage}/model_00000012.bin").items():
            assert (value - expected[name]).abs().mean() < 1e-5, (stage, name)
        assert f"| num_processes         | {world_size} " in printed[stage]
        assert f"| zero_stage            | {stage} " in printed[stage]
        samples = re.findall(r"generating:\n---\n(.*?)\n---", printed[stage], re.S)
        assert len(samples) == 2 and samples == re.findall(r"generating:\n---\n(.*?)\n---", printed[0], re.S)
        state = header(f"z{stage}/state_00000012_{world_size - 1:05d}.bin")
        assert state[1:4] == (1 if stage == 0 else 2, world_size, world_size - 1) and state[6] == stage


def test_same_ranks_and_stage_resume_to_the_bit():
    flags = "-b 4 -k constant -n 6 -v 0"
    kinds = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    for stage, precision in kinds:
        each = f"{flags} -z {stage} --precision {precision} -o {stage}{precision}"
        run(2, f"{each}a -x 12", f"{each}b -x 6", f"{each}b -x 12 -y 1")
        a, b = Path(f"{stage}{precision}a"), Path(f"{stage}{precision}b")
        for name in ("model_00000012.bin", "state_00000012_00000.bin", "state_00000012_00001.bin"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), (a, name)


CHAINS = [  # (ranks, -z)
    [(4, 0), (2, 0), (3, 0)],
    [(2, 1), (2, 3), (2, 0)],
    [(4, 3), (1, 0), (3, 2)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"{P}z{stage}" for P, stage in chain))
def test_resume_on_other_ranks_and_stages(chain):
    """-a 1, so that the data are the same: the curve of the unbroken run of one process goes on."""
    flags = "-a 1 -k constant -n 5 -m -1"
    (printed,) = run(1, f"{flags} -x 15 -b 8 -o one")
    one, parts = losses(printed), []
    for part, (world_size, stage) in enumerate(chain):
        parts += run(world_size, f"{flags} -x {5 * part + 5} -b 2 -z {stage} -y 1 -o parts")
        assert ("resuming at step" in parts[-1]) == (part > 0)
    assert_close(losses(*parts), one)
    found, expected = parameters("parts/model_00000015.bin"), parameters("one/model_00000015.bin")
    for name in expected:
        assert (found[name] - expected[name]).abs().mean() < 1e-5, name


def test_refusals():
    """Every rank gives the same reason."""
    run(2, "-b 4 -n 2 -x 2 -z 1 -o run")
    Path("run/state_00000002_00001.bin").unlink()
    printed = run_ranks(2, train_rank, Path.cwd(), ["-b 5", "-b 4 -n 2 -x 4 -z 1 -y 1 -o run"])
    assert printed[0] == printed[1]
    assert "UsageError: -d 384 is not a multiple of 160" in printed[0][0]
    assert "state_00000002_00001.bin is not" in printed[0][1]


def run_command(directory, arguments):
    os.chdir(directory)
    cli.run("llmc-train", command, arguments)


@pytest.mark.parametrize("stage", [0, 3])
def test_kill_any_rank_at_random_moments(tmp_path, stage):
    """Of a run that writes checkpoints most of the time: it ends quickly, with the reason; the next one goes on."""
    flags = f"{BASE} -d 96 -b 1 -z {stage} -x 200 -n 2 -nk 2 -v 0 --precision bf16 -y 1 -pm fs -pp {tmp_path} -pn 3"

    def start(output):
        arguments = [(str(tmp_path), [*flags.split(), "-pr", str(rank), "-o", output]) for rank in range(3)]
        return Processes(tmp_path, run_command, arguments, {}), time.monotonic()

    started, began = start("straight")
    assert started.wait() == ([0, 0, 0], "")
    whole = time.monotonic() - began
    generator = random.Random(stage)
    kills = {"started": 0, "running": 0}
    for victim in (0, 1, 2, 1, 0, 2, 1, 0, 2):
        if kills["running"] == 4:
            break
        started, _ = start("killed")
        time.sleep(whole * generator.uniform(0.1, 0.6))
        running = "step " in started.read("out")
        started.processes[victim].kill()
        statuses, errors = started.wait(10)
        if statuses == [0, 0, 0]:  # the run was over: from the start again
            shutil.rmtree("killed")
            continue
        kills["running" if running else "started"] += 1
        assert statuses[victim] == -signal.SIGKILL and all(status in (1, -signal.SIGKILL) for status in statuses)
        assert not running or f"llmc-train: error: rank {victim} (process " in errors
        assert "Traceback" not in errors
    assert kills["running"] >= 2, kills
    started, _ = start("killed")
    assert started.wait() == ([0, 0, 0], "")
    for name in ("model_00000200.bin", *(f"state_00000200_{rank:05d}.bin" for rank in range(3))):
        assert Path("straight", name).read_bytes() == Path("killed", name).read_bytes(), name
    assert set(os.listdir("straight")) == set(os.listdir("killed"))
