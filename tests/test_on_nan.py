"""--on-nan: one batch of a run has a number that is not finite. What the trainer says, does, and leaves on the disk.

The batch is known by a token that stands nowhere else; whatever computes with it gets a NaN into one of its buffers, as
often as it is computed. The truth for what follows is a run that is made to pass the step over.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from ranks_testing import run_ranks
from training_data import write_shard, write_tokenizer

import llmc.train
from llmc import snapshot
from llmc.checkpoint_writer import CheckpointWriter
from llmc.command_line import parse_args
from llmc.data.loader import DataLoader
from llmc.errors import RunError
from llmc.main_log import read_main_log
from llmc.model_file import ModelShape, save_model
from llmc.ranks import Ranks

V, B, T = 65, 2, 16
MARKER = V - 1
BASE = (
    "-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -o out -b 2 -t 16 -v 0 -s 0 -m 3 -x 12 "
    "-l 1e-3 -c 0.1 -u 5"
)
BAD_STEP = 7  # 0-based
OFFSET = 21  # of the marker in its batch
ADVICE = "lower the learning rate -l or the weight decay -c, or raise the warm-up -u"


def text(seed, n):
    steps = torch.randint(1, 4, (n,), generator=torch.Generator().manual_seed(seed))
    return (steps.cumsum(0) % MARKER).tolist()


def mark(path, token):
    content = bytearray(path.read_bytes())
    content[1024 + 2 * token : 1026 + 2 * token] = MARKER.to_bytes(2, "little")
    path.write_bytes(content)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for i, tokens in enumerate((2500, 1900)):
        write_shard(Path(f"data/t_train_{i}.bin"), text(i, tokens))
    write_shard(Path("data/t_val_0.bin"), text(9, 900))
    write_tokenizer(Path("data/tokenizer.bin"), V)


def mark_batch(number, rank=0, world_size=1):
    """Mark the batch that a rank gets in its micro-step `number` of the run; file, first and marked token."""
    loader = DataLoader("data/t_train_*.bin", B, T, rank, world_size, shuffle=True)
    for _ in range(number + 1):
        loader.next_batch()
    path, start = loader.position
    mark(path, start + OFFSET)
    return path, start, start + OFFSET


class Wrapper:
    """A model with a method or two of its own."""

    def __init__(self, model, **own):
        self.__dict__.update(model=model, **own)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        setattr(self.model, name, value)


class Poisoned(Wrapper):
    """Computes `value` where the marker is in `buffer`, the first `times` times."""

    def forward(self, inputs):
        self.model.forward(inputs)
        if (inputs == MARKER).any() and self.times > 0:
            self.__dict__["times"] -= 1
            row, position = (inputs == MARKER).nonzero()[0].tolist()
            self.model.buffer(self.buffer_name)[row, position, 3] = self.value

    def evaluate(self, inputs, targets):
        losses = self.model.evaluate(inputs, targets)
        return losses * math.nan if (inputs == MARKER).any() else losses


class Deaf(Wrapper):
    """Does not hear of the update of BAD_STEP."""

    def update(self, lr, weight_decay, step):
        if step != BAD_STEP + 1:
            self.model.update(lr, weight_decay, step)


def poisoned(buffer="h1.qkv", value=math.nan, times=math.inf):
    return lambda run: dataclasses.replace(run, model=Poisoned(run.model, buffer_name=buffer, value=value, times=times))


def deaf(run):
    return dataclasses.replace(run, model=Deaf(run.model))


def ahead(batches):
    """A run that has lost the next so many batches."""

    def lose(run):
        for _ in range(batches):
            run.train_loader.next_batch()
        return run

    return lose


def train(flags, change=lambda run: run, ranks=None):
    """What a run, with something about it changed, prints, and why it ended early, or ''."""
    out, prepare, error = io.StringIO(), llmc.train.prepare, ""
    llmc.train.prepare = lambda *arguments: change(prepare(*arguments))
    try:
        with contextlib.redirect_stdout(out):
            llmc.train.train(parse_args(f"{BASE} {flags}".split()).config, ranks or Ranks())
    except RunError as found:
        error = str(found)
    finally:
        llmc.train.prepare = prepare
    return out.getvalue(), error


def steps(printed):
    return [int(step) for step in re.findall(r"^step +(\d+)/", printed, re.MULTILINE)]


def assert_same_files(a, b, step, world_size=1, state=True):
    states = [f"state_{step:08d}_{rank:05d}.bin" for rank in range(world_size)] if state else []
    for name in (f"model_{step:08d}.bin", *states):
        assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name


def content(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def test_stop_says_where_and_leaves_all_as_it_was():
    path, _, token = mark_batch(BAD_STEP)
    expected, _ = train(f"-n 1 -nk 1 -x {BAD_STEP}")
    before = content("out")
    printed, error = train("-n 1 -nk 1 -x 12", poisoned())
    cause = f"the gradient norm is nan at step 8: activation h1.qkv is not finite at token {token} of {path}"
    assert error == f"{cause}; {ADVICE}"
    assert steps(printed) == steps(expected) == list(range(1, BAD_STEP + 1))
    after = content("out")
    assert {name for name in after if "config" not in name and "previous" not in name} == {
        f"model_{BAD_STEP:08d}.bin", f"state_{BAD_STEP:08d}_00000.bin", f"DONE_{BAD_STEP:08d}", "main.log"
    }  # fmt: skip
    for name in (f"model_{BAD_STEP:08d}.bin", f"state_{BAD_STEP:08d}_00000.bin"):
        assert after[name] == before[name]
    assert before["main.log"].startswith(after["main.log"])  # and then the validation at its end


@pytest.mark.parametrize("flags", ["", "-sl 5 -sg 5", "--precision bf16", "--precision bf16 -w 0"])
def test_skip_is_a_run_without_the_update(flags):
    path, _, token = mark_batch(BAD_STEP)
    printed, error = train(f"{flags} -n 10 -o skipped --json-log 1 --on-nan skip", poisoned())
    assert error == ""
    cause = f"the gradient norm is nan at step 8: activation h1.qkv is not finite at token {token} of {path}"
    assert f"\n{cause}; skipping the update (1 so far)\n" in printed
    assert steps(printed) == list(range(1, 13))
    assert train(f"{flags} -n 12 -o expected", deaf)[1] == ""
    assert_same_files("skipped", "expected", 12, state=False)  # the state knows the norm of the step
    # The step is in the logs.
    assert math.isnan(read_main_log(Path("skipped/main.log")).series["norm"][BAD_STEP])
    records = [
        json.loads(line, parse_constant=pytest.fail) for line in Path("skipped/main.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "norm" in record and record["norm"] is None] == [BAD_STEP]
    # And a run that is resumed behind it goes on with the same bits.
    for name in ("DONE_00000012", "model_00000012.bin", "state_00000012_00000.bin"):
        Path(f"skipped/{name}").rename(name)
    assert train(f"{flags} -n 10 -o skipped -y 1 --on-nan skip")[1] == ""
    assert_same_files("skipped", ".", 12)


def test_skip_ends_a_run_that_would_skip_for_ever():
    for step in range(BAD_STEP, BAD_STEP + 11):
        mark_batch(step)
    printed, error = train("--on-nan skip -x 30", poisoned("lnf"))
    assert printed.count("; skipping the update (") == 10
    assert steps(printed) == list(range(1, BAD_STEP + 11))
    assert error.startswith("the loss is nan at step 18: activation lnf is not finite at token ")
    assert error.endswith(f"; as in the 10 steps before, whose updates were skipped: {ADVICE}")


def test_skips_that_are_not_in_a_row_do_not_end_a_run():
    for step in range(0, 30, 2):
        mark_batch(step)
    printed, error = train("--on-nan skip -x 30", poisoned())
    assert error == "" and "; skipping the update (15 so far)" in printed
    assert steps(printed) == list(range(1, 31))


@pytest.fixture
def slow_disk(monkeypatch):
    """With --async-checkpoint 1 no checkpoint is written before the run waits for it."""
    write, complete, waited_for = snapshot.write, CheckpointWriter.complete, threading.Event()

    def wait_and_write(run, *arguments):
        if run.config.async_checkpoint:
            waited_for.wait(10)
        return write(run, *arguments)

    def wait(writer):
        if writer.busy:
            waited_for.set()
        complete(writer)

    monkeypatch.setattr(snapshot, "write", wait_and_write)
    monkeypatch.setattr(CheckpointWriter, "complete", wait)


@pytest.mark.parametrize(
    "flags", ["", "-sl 5 -sg 5", "--precision bf16", "--precision bf16 -w 0", "--async-checkpoint 1"]
)
@pytest.mark.usefixtures("slow_disk")
def test_rollback_is_a_resumed_run_without_the_data(flags):
    """From step 8, the bad one, to the checkpoint of step 5, and on with the ninth batch."""
    path, _, token = mark_batch(BAD_STEP)
    printed, error = train(f"{flags} -n 5 -o back --on-nan rollback", poisoned())
    assert error == ""
    cause = f"the gradient norm is nan at step 8: activation h1.qkv is not finite at token {token} of {path}"
    printed = printed.replace("the checkpoint of step 5 is complete\n", "")
    assert f"\n{cause}\ngoing back to the checkpoint of step 5, and on with the data behind step 8\n" in printed
    assert steps(printed) == [1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12]
    assert printed.count("Writing checkpoint at step 5\n") == 1
    assert "nan" not in Path("back/main.log").read_text()
    assert train(f"{flags} -n 5 -o expected -x 5")[1] == ""
    assert train(f"{flags} -n 5 -o expected -y 1", ahead(BAD_STEP + 1 - 5))[1] == ""
    assert_same_files("back", "expected", 10)
    assert_same_files("back", "expected", 12)


def test_rollback_again_and_again():
    """Every batch from step 8 on is bad: three times back to the same checkpoint, then the run stops."""
    for step in range(BAD_STEP, 30):
        mark_batch(step)
    printed, error = train("-n 5 --on-nan rollback -x 30", poisoned())
    assert printed.count("going back to the checkpoint of step 5") == 3
    assert re.fullmatch(
        r"the gradient norm is nan at step 6: activation h1\.qkv is not finite at token \d+ of data/t_train_\d\.bin; "
        rf"the run has gone back to step 5 3 times: {ADVICE}",
        error,
    )


@pytest.mark.usefixtures("slow_disk")
def test_a_checkpoint_that_is_being_written_when_the_run_stops():
    mark_batch(BAD_STEP)
    printed, error = train("-n 5 --async-checkpoint 1", poisoned())
    assert error.startswith("the gradient norm is nan at step 8: ")
    assert printed.endswith("the checkpoint of step 5 is complete\n") and "\nstep    7/12" in printed
    assert Path("out/DONE_00000005").exists()


def test_rollback_needs_a_checkpoint():
    mark_batch(BAD_STEP)
    printed, error = train("-n 10 --on-nan rollback", poisoned())
    assert "activation h1.qkv is not finite" in printed
    assert error == "there is no checkpoint in out to go back to"


def test_validation():
    """Of the validation batches the third has the marker; they are seen first before step 6."""
    mark(Path("data/t_val_0.bin"), 2 * B * T + 5)
    path, message = "data/t_val_0.bin", "the validation loss is nan at step 7: "
    late = poisoned("h0.fch")
    for policy in ("stop", "skip", "rollback"):
        printed, error = train(f"-v 6 -n 4 -m 2 -o {policy} --on-nan {policy}", late)
        assert error == "" and "val loss" in printed  # only the first two
    for policy in ("stop", "skip"):
        printed, error = train(f"-v 6 -n 4 -y 1 -x 18 -o {policy} --on-nan {policy}", late)
        cause = (
            f"the validation loss is nan at step 13: activation h0.fch is not finite at token {2 * B * T + 5} of {path}"
        )
        assert error == f"{cause}; {ADVICE}"
        assert Path(f"{policy}/DONE_00000012").exists() and not Path(f"{policy}/DONE_00000016").exists()
    printed, error = train("-v 6 -n 4 -y 1 -x 18 -o rollback --on-nan rollback", late)
    assert printed.count("going back to the checkpoint of step 12, and on with the data behind step 13") == 3
    assert error.endswith(f"the run has gone back to step 12 3 times: {ADVICE}")
    assert message not in printed


TOKENS = "tokens {start} to {end} of {path}"
CAUSES = [
    ("lnf", math.inf, "loss is nan", "activation lnf is not finite at token {token} of {path}"),
    ("encoded", math.nan, "gradient norm is nan", "activation encoded is not finite at token {token} of {path}"),
    ("h0.atty", -math.inf, "gradient norm is nan", "activation h0.atty is not finite at token {token} of {path}"),
    ("lnf", 3e38, "loss is nan", f"the logits for {TOKENS} are not finite"),
    ("lnf", 1e25, "gradient norm is inf", f"the largest gradient, SIZE in wte, makes a norm beyond fp32 (1.8e+19) "
        f"for {TOKENS}"),
]  # fmt: skip


@pytest.mark.parametrize(("buffer", "value", "number", "cause"), CAUSES)
def test_what_is_named(buffer, value, number, cause):
    path, start, token = mark_batch(BAD_STEP)
    large_weights = "-l 3" if "logits" in cause else ""
    _, error = train(large_weights, poisoned(buffer, value))
    cause = cause.format(path=path, start=start, end=start + B * T - 1, token=token)
    assert re.sub(r"gradient, [\d.e+]+ in", "gradient, SIZE in", error) == f"the {number} at step 8: {cause}; {ADVICE}"


def test_a_number_that_does_not_come_again():
    path, start, _ = mark_batch(BAD_STEP)
    _, error = train("", poisoned(times=1))
    cause = "the gradient of h1.qkvw is not finite, but each batch, computed again by itself, is finite"
    assert error == f"the gradient norm is nan at step 8: {cause} ({path}, token {start}); {ADVICE}"


def train_rank(ranks, directory, runs):
    """One rank's part of several runs, each of flags and a change."""
    os.chdir(directory)
    return [train(flags, change(*arguments), ranks) for flags, change, *arguments in runs]


def make_deaf():
    return deaf


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_one_rank_of_three(policy):
    """In the second of two micro-steps, at every stage: all ranks do the same, and what one process would do."""
    path, _, token = mark_batch(2 * BAD_STEP + 1, rank=1, world_size=3)
    kinds = [f"-d 192 -n 5 -z {stage}{precision}" for stage in range(4) for precision in ("", " --precision bf16")]
    runs = []
    for i, kind in enumerate(kinds):
        runs.append((f"{kind} --on-nan {policy} -o found{i}", poisoned))
        if policy == "skip":
            runs.append((f"{kind} -o expected{i}", make_deaf))
        if policy == "rollback":
            runs.append((f"{kind} -o expected{i} -x 5", ahead, 0))
            runs.append((f"{kind} -o expected{i} -y 1", ahead, 2 * (BAD_STEP + 1 - 5)))
    ranks = run_ranks(3, train_rank, Path.cwd(), runs)
    cause = f"activation h1.qkv is not finite at token {token} of {path} (rank 1, micro-step 2 of 2)"
    cause = f"the gradient norm is nan at step 8: {cause}"
    for run, (flags, change, *_) in enumerate(runs):
        outcomes = [results[run] for results in ranks]
        if change is not poisoned:
            assert [error for _, error in outcomes] == ["", "", ""], flags
            continue
        assert [error for _, error in outcomes] == [f"{cause}; {ADVICE}" if policy == "stop" else ""] * 3, flags
        assert len({tuple(re.findall(r"loss (\S+) ", printed)) for printed, _ in outcomes}) == 1, flags
        last = BAD_STEP if policy == "stop" else 12
        assert all(steps(printed)[-1] == last and (policy == "stop") != (cause in printed) for printed, _ in outcomes)
    for i in range(len(kinds)):
        if policy == "stop":
            assert sorted(path.name for path in Path(f"found{i}").glob("DONE_*")) == ["DONE_00000005"]
        else:
            assert_same_files(f"found{i}", f"expected{i}", 12, 3, state=policy == "rollback")


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_weights_that_an_update_breaks(policy):
    """No loss or gradient knows it: a position that no batch reaches, turned over by decay, beyond fp32 at the second
    update. There is no checkpoint of these weights, and -nk 1 does not delete the last good one for it."""
    shape = ModelShape(32, V, 128, 2, 2, 32)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(size, generator=generator) * 0.02 for name, size in shape.parameters()}
    weights["wpe"][31] = 1e38  # times -1.5; then the difference would be 3.75e38
    save_model("model.bin", shape, "fp32", weights)
    printed, error = train(f"-e model.bin -l 25 -u 0 -n 1 -nk 1 --on-nan {policy}")
    assert steps(printed) == [1]
    assert "parameter wpe is not finite after the update of step 2" in error
    assert Path("out/DONE_00000001").exists() and not Path("out/model_00000002.bin").exists()
    assert printed.count("going back") == (3 if policy == "rollback" else 0)
