"""Resuming to the bit: after a clean end, after kill -9 at any moment, in another precision; and what is refused."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import V, expect_refusal, text, write_shard, write_tokenizer

import llmc.train
from llmc import _C
from llmc.cli.train import _main as command
from llmc.errors import RunError, UsageError
from llmc.model_file import read_model_header, save_model

BASE = (
    "-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -g 8 -v 7 -s 0 -m 2 "
    "-l 3e-3 -k linear -q 0.1 -c 0.1"
)
MODES = {"fp32": "", "bf16": "--precision bf16", "bf16 without master": "--precision bf16 -w 0"}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Three training shards of unequal size (15, 9 and 3 batches), so that a resume rarely stands in the first one."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for i, batches in enumerate((15, 9, 3)):
        write_shard(data / f"t_train_{i}.bin", text(i, 32 * batches + 7))
    write_shard(data / "t_val_0.bin", text(9, 300))
    write_tokenizer(data / "tokenizer.bin", V)
    return tmp_path


def train(flags, output):
    command([*BASE.split(), *flags.split(), "-o", output])


def files(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def merged_log(output):
    """The last line of each stream and step, as tools read a log that was written twice in parts."""
    lines = {}
    for line in (output / "main.log").read_text().splitlines():
        step, stream, value = re.fullmatch(r"s:(\d+) (tel|trl):(.+)", line).groups()
        lines[int(step), stream] = value
    return lines


def assert_same_end(one, other, step):
    for name in (f"model_{step:08d}.bin", f"state_{step:08d}_00000.bin", f"DONE_{step:08d}"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert merged_log(one) == merged_log(other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "extra", ["", "-d 64 -r 2", "-a 1", "-sl 0.5 -sg 0.5 -l 1e-5"], ids=["plain", "accumulate", "overfit", "skip"]
)
def test_resume_is_bit_identical(directory, mode, extra, capsys):
    """Longer than the outliers' window of 128, whose values must survive, and than several epochs of 27 batches."""
    flags = f"{MODES[mode]} {extra} -x 150 -n 35"
    train(flags, "straight")
    straight = capsys.readouterr().out
    for stop in (35, 140):  # before the window is full, and after
        shutil.copytree("straight", f"from_{stop}")
        for path in (directory / f"from_{stop}").iterdir():
            number = re.search(r"_(\d{8})", path.name)
            if number and int(number[1]) > stop:
                path.unlink()
        log = directory / f"from_{stop}" / "main.log"
        log.write_text("".join(line for line in log.read_text().splitlines(True) if int(line[2:].split()[0]) < stop))
        train(f"{flags} -y 1", f"from_{stop}")
        assert_same_end(directory / "straight", directory / f"from_{stop}", 150)
        resumed = capsys.readouterr().out
        assert f"resuming at step {stop}" in resumed.splitlines()
        assert "| weight init method    | intermediate checkpoint " in resumed
        # Loss, norm and their z-scores on the console.
        numbers = [re.findall(r"^step +(\d+)/150 (.*?\| lr \S+) ", out, re.M) for out in (straight, resumed)]
        assert numbers[0][stop:] == numbers[1]
        skips = [re.findall(r"^skipping .*", out, re.M) for out in (straight, resumed)]
        assert skips[0][-len(skips[1]) :] == skips[1] or not skips[1]
        if "-sl" in extra:
            assert skips[1]
        # The checkpoint it came from was not written again.
        assert f"Writing checkpoint at step {stop}" not in resumed


def run_in_child(flags, output):
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        train(flags, output)


@pytest.fixture(scope="module")
def children():
    """Children that have everything imported already: torch takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llmc.train", "llmc._C"])
    return context


@pytest.mark.parametrize("mode", ["bf16", "bf16 without master"])
def test_kill_at_random_moments(directory, mode, children, monkeypatch):
    """kill -9 at 20 random moments of one run, checkpoints being written most of the time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = f"{MODES[mode]} -x 400 -n 2 -nk 2 -nm 100"

    generator = random.Random(mode)

    def start(output):
        in_background = f"--async-checkpoint {generator.randrange(2)}"
        child = children.Process(target=run_in_child, args=(f"{flags} {in_background} -y 1", output))
        started = time.monotonic()
        child.start()
        return child, started

    child, started = start("straight")
    child.join()
    assert child.exitcode == 0
    whole = time.monotonic() - started

    kills = 0
    while kills < 20:
        child, started = start("killed")
        time.sleep(whole * generator.uniform(0.02, 0.25))
        child.kill()
        child.join()
        if child.exitcode == 0:  # the run was over: another one, more kills
            assert_same_end(directory / "straight", directory / "killed", 400)
            shutil.rmtree("killed")
            continue
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    child, _ = start("killed")
    child.join()
    assert child.exitcode == 0
    assert_same_end(directory / "straight", directory / "killed", 400)
    # The two newest checkpoints and the major ones; nothing of the killed writes.
    steps = (100, 200, 300, 396, 398, 400)
    names = ("model_{:08d}.bin", "state_{:08d}_00000.bin", "DONE_{:08d}")
    assert set(os.listdir("killed")) == {"main.log", "config.toml", *(n.format(step) for step in steps for n in names)}


class Resumed:
    """What a resumed run holds before its first step."""

    def __init__(self, monkeypatch):
        self.runs = []
        prepare = llmc.train.prepare
        monkeypatch.setattr(
            llmc.train, "prepare", lambda *arguments: self.runs.append(prepare(*arguments)) or self.runs[-1]
        )

    def model(self, flags, output):
        train(f"{flags} -y 1", output)
        return self.runs[-1].model


@pytest.fixture
def resumed(monkeypatch):
    return Resumed(monkeypatch)


def stored_arrays(path, names):
    """m, v and master of a state file, cut at the offsets of the format."""
    N = read_model_header(path.with_name(path.name.replace("state", "model").replace("_00000.bin", ".bin")))[0]
    N = N.num_parameters
    raw = path.read_bytes()
    return {name: np.frombuffer(raw, "<f4", N, 1024 + 4 * N * i) for i, name in enumerate(names)}


def in_file_order(tensors, shape):
    return np.concatenate([tensors[name].float().numpy().ravel() for name, _ in shape.parameters()])


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_resume_in_another_precision(directory, resumed, before, after):
    """Master weights carry the run over: fp32 parameters are them, bf16 parameters are them stochastically rounded."""
    train(f"--precision {before} -x 5 -n 5", "out")
    state = directory / "out" / "state_00000005_00000.bin"
    stored = stored_arrays(state, ("m", "v", "master"))
    rng_state, last_update = struct.unpack_from("<QQ", state.read_bytes(), 4 * 20)
    model = resumed.model(f"--precision {after} -x 5", "out")
    shape = resumed.runs[-1].shape
    for name in ("m", "v"):
        assert np.array_equal(in_file_order(model.optimizer_state(name), shape), stored[name])
    assert (model.rng_state, model.last_update_rng_state) == (rng_state, last_update)
    parameters = in_file_order(model.parameters(), shape)
    if after == "fp32":
        assert np.array_equal(parameters, stored["master"])
        return
    assert np.array_equal(in_file_order(model.optimizer_state("master"), shape), stored["master"])
    # Every parameter is one of the two neighbours in bf16, the nearer one more often.
    bits = stored["master"].view(np.uint32)
    below = (bits & 0xFFFF0000).view(np.float32)
    above = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
    up = parameters == above
    assert np.all(up | (parameters == below))
    # The chance to round up is the discarded part; 30,592 coins miss their expectation by 1% once in 10^12.
    assert up.mean() == pytest.approx(((bits & 0xFFFF) / 65536).mean(), abs=0.02)
    # The seed of a tensor is its number's draw: wte, the first, by the formula.
    seed, _ = _C.random.xorshift64(last_update)
    wte = model.parameters()["wte"].flatten()
    master = model.optimizer_state("master")["wte"].flatten()
    for i in (0, 1, 511, 512, 2000):
        noise = _C.random.noise_2d(i % 512, i // 512 * 512, seed)
        expected = _C.random.stochastic_round(float(master[i]), noise & 0xFFFF)
        assert wte[i].view(torch.int16).item() & 0xFFFF == expected


def test_a_run_of_llm_c_goes_on(directory, capsys):
    """The files as llm.c writes them: no trailer, no number of parameters in the header."""
    train("-x 40 -n 20", "straight")
    (directory / "out").mkdir()
    for name in ("model_00000020.bin", "state_00000020_00000.bin", "DONE_00000020"):
        raw = bytearray((directory / "straight" / name).read_bytes())
        if name.startswith("model"):
            raw[4 * 8 : 1024] = bytes(1024 - 4 * 8)
        if name.startswith("state"):
            for slot in (6, 12, 13, 40, 41):
                raw[4 * slot : 4 * slot + 4] = bytes(4)
            raw = raw[: raw.rindex(struct.pack("<i", 20261124))]
        (directory / "out" / name).write_bytes(raw)
    train("-x 40 -n 20 -y 1", "out")
    # All but the trailer, whose windows lack the first 20 steps, and so the checksum.
    for name in ("model_00000040.bin", "state_00000040_00000.bin"):
        one, other = ((directory / output / name).read_bytes() for output in ("straight", "out"))
        end = one.rindex(struct.pack("<i", 20261124)) if name.startswith("state") else None
        assert one[:160] + one[168:end] == other[:160] + other[168:end]


def test_resume_without_a_checkpoint_is_a_new_run_that_appends(directory, capsys):
    (directory / "out").mkdir()
    (directory / "out" / "main.log").write_text("s:0 tel:9.0000\n")
    train("-x 2 -y 1", "out")
    assert "no checkpoint in out: a new run" in capsys.readouterr().out
    assert (directory / "out" / "main.log").read_text().startswith("s:0 tel:9.0000\ns:0 tel:")


def test_a_new_run_moves_an_old_one_aside(directory, capsys):
    train("-x 30 -n 10", "out")
    old = files(directory / "out")
    train("-x 2 -n 10", "out")
    assert "moved the checkpoints and the log in out to out/previous_1" in capsys.readouterr().out
    assert files(directory / "out" / "previous_1") == old
    assert {name for name in files(directory / "out") if name.startswith("DONE")} == {"DONE_00000002"}
    # Which a resume cannot take for the old, longer one.
    train("-x 4 -n 10 -y 1", "out")
    assert "resuming at step 2" in capsys.readouterr().out


def test_the_end_is_evaluated_again(directory, capsys):
    train("-x 10 -n 5", "out")
    before = files(directory / "out")
    capsys.readouterr()
    train("-x 10 -n 5 -y 1", "out")
    assert "val loss" in (out := capsys.readouterr().out)
    assert "step   " not in out and "average iteration time" not in out
    after = files(directory / "out")
    for name in before:
        assert name in ("main.log", "config.toml") or after[name] == before[name]


def test_pruning(directory, capsys):
    train("-x 23 -n 5 -nk 2 -nm 10", "out")
    out = capsys.readouterr().out
    deleted = [int(step) for step in re.findall(r"^Deleting checkpoint at step (\d+)$", out, re.M)]
    assert deleted == [5]
    assert sorted(name for name in os.listdir("out") if name.startswith("DONE")) == [
        f"DONE_{step:08d}" for step in (10, 15, 20, 23)
    ]
    assert re.findall(r"^Writing .*$", out, re.M)[:3] == [
        "Writing checkpoint at step 5",
        "Writing model to out/model_00000005.bin",
        "Writing state to out/state_00000005_00000.bin",
    ]


def damage(path, change):
    raw = bytearray(Path(path).read_bytes())
    Path(path).write_bytes(change(raw) or raw)


def put(slot, value):
    def change(raw):
        raw[4 * slot : 4 * slot + 4] = struct.pack("<i", value)

    return change


MODEL, STATE, OLD_MODEL, OLD_STATE = (
    f"out/{kind}"
    for kind in ("model_00000020.bin", "state_00000020_00000.bin", "model_00000010.bin", "state_00000010_00000.bin")
)


def flip(bit):
    """One bit of the file, as a cosmic ray or a bad cable does."""

    def change(raw):
        raw[bit // 8] ^= 1 << bit % 8

    return change


DAMAGES = {  # name: (what happens to the newest checkpoint, what the run must say of it)
    "model truncated": (lambda: damage(MODEL, lambda raw: raw[:-1]), f"{MODEL} is truncated"),
    "model too long": (lambda: damage(MODEL, lambda raw: raw + b"x"), f"{MODEL} is too long"),
    "model version": (lambda: damage(MODEL, put(1, 4)), f"{MODEL}: model checkpoint of version 4"),
    "a bit of the model": (lambda: damage(MODEL, flip(8 * 5000 + 3)), f"{MODEL} is damaged: its checksum is "),
    "a bit of the model's end": (lambda: damage(MODEL, flip(-1)), f"{MODEL} is damaged: its checksum is "),
    "state truncated": (lambda: damage(STATE, lambda raw: raw[:-1]), f"{STATE} is truncated"),
    "state cut in m": (lambda: damage(STATE, lambda raw: raw[:9999]), f"{STATE} is truncated"),
    "state empty": (lambda: damage(STATE, lambda raw: raw[:5]), f"{STATE} is not a training state: it has 5"),
    "state too long": (lambda: damage(STATE, lambda raw: raw + b"x"), f"{STATE} is too long"),
    "state version": (lambda: damage(STATE, put(1, 9)), f"{STATE}: training state of version 9"),
    "state of ranks": (lambda: damage(STATE, put(3, 1)), f"{STATE} is of rank 1 of 1, not of 0 of 1"),
    "a bit of m": (lambda: damage(STATE, flip(8 * 1024)), f"{STATE} is damaged: its checksum is "),
    "a random number": (lambda: damage(STATE, put(20, 7)), f"{STATE} is damaged: its checksum is "),
    "the kind of checksum": (lambda: damage(STATE, put(40, 1)), f"{STATE} is damaged: its header names a checksum of"),
    "files swapped": (
        lambda: (os.rename(MODEL, "x"), os.rename(STATE, MODEL), os.rename("x", STATE)),
        f"{MODEL} is not a model checkpoint: it is a training state",
    ),
    "model of another step": (lambda: shutil.copy(OLD_MODEL, MODEL), f"{MODEL} is of step 10, not of 20"),
    "state of another step": (lambda: shutil.copy(OLD_STATE, STATE), f"{STATE} is of step 10, not of 20"),
    "model of another shape": (lambda: save_another_model(), f"{STATE} is of another model"),
    "model missing": (lambda: os.remove(MODEL), f"{MODEL} is not there"),
    "state missing": (lambda: os.remove(STATE), f"{STATE} is not there"),
}


def save_another_model():
    shape = read_model_header(MODEL)[0]
    shape = type(shape)(**{**vars(shape), "num_layers": 1})
    save_model(MODEL, shape, "fp32", {name: torch.zeros(size) for name, size in shape.parameters()})


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory):
    """Its files, once it has been made."""
    return {}


@pytest.fixture
def finished(directory, twenty_steps):
    """The directory "out" of a run of 20 steps with two checkpoints."""
    if not twenty_steps:
        train("-x 20 -n 10", "out")
        twenty_steps["out"] = files(directory / "out")
    (directory / "out").mkdir(exist_ok=True)
    for name, raw in twenty_steps["out"].items():
        (directory / "out" / name).write_bytes(raw)
    return directory / "out"


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(directory, finished, capsys, case):
    """The one before it is there; the run computes the same steps again and ends with the same bits."""
    expected = files(finished)
    change, message = DAMAGES[case]
    change()
    capsys.readouterr()
    train("-x 20 -n 10 -nk 1 -y 1", "out")
    out = capsys.readouterr().out
    assert f"\nWARNING: passing over out/DONE_00000020: {message}" in out
    assert "resuming at step 10\n" in out
    for path in (MODEL, STATE):
        assert Path(path).read_bytes() == expected[Path(path).name], path
    assert not Path(OLD_MODEL).exists()


def test_no_good_checkpoint_is_no_new_run(directory, finished, capsys):
    """Hours of training should not silently begin anew; the message is about the newest one."""
    damage(OLD_STATE, flip(8 * 2000))
    damage(STATE, flip(8 * 3000))
    before = files(finished)
    message = f"out/DONE_00000020 is there, but {STATE} is damaged: its checksum is "
    expect_refusal(capsys, f"{BASE} -x 30 -n 10 -y 1 -o out".split(), 1, message)
    assert files(finished) == before


REFUSALS = {  # name: (what happens, further flags, status, what the message must contain)
    "other -e": (lambda: None, "-e custom:l=2,c=64,h=2,t=32", 1, f"{MODEL} is not the model -e"),
    "fewer shards": (lambda: os.remove("data/t_train_2.bin"), "", 1, f"{STATE} is of a run over 3 shards"),
    "overfit": (lambda: None, "-a 1", 1, f"{STATE} is of a run with -a 0"),
    "shorter run": (lambda: None, "-x 15", 2, "is at step 20, the run would end at step 15: raise -x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_another_run_is_refused(directory, finished, capsys, case):
    """Nothing is wrong with the checkpoint: an older one would not help."""
    change, flags, status, message = REFUSALS[case]
    change()
    before = files(finished)
    capsys.readouterr()
    expect_refusal(capsys, f"{BASE} -x 30 -n 10 -y 1 -o out {flags}".split(), status, message)
    assert files(finished) == before


@pytest.mark.parametrize("missing", ["model_00000020.bin", "state_00000020_00000.bin", "DONE_00000020"])
def test_an_incomplete_checkpoint_is_no_checkpoint(directory, capsys, missing):
    train("-x 20 -n 10", "out")
    (directory / "out" / missing).unlink()
    capsys.readouterr()
    train("-x 20 -n 10 -y 1", "out")
    out = capsys.readouterr().out
    assert "resuming at step 10" in out
    # A write that was killed leaves no marker; where there is one, a file was lost.
    warned = f"WARNING: passing over out/DONE_00000020: out/{missing} is not there" in out
    assert warned == (not missing.startswith("DONE"))


def test_a_marker_without_files_is_no_new_run(directory):
    train("-x 5 -n 5", "out")
    (directory / "out" / "state_00000005_00000.bin").unlink()
    before = files(directory / "out")
    message = r"DONE_00000005 is there, but out/state_00000005_00000\.bin is not there, and no older .*, or begin anew"
    with pytest.raises(RunError, match=message):
        train("-x 5 -n 5 -y 1", "out")
    assert files(directory / "out") == before


def test_a_new_run_does_not_move_its_own_model(directory):
    train("-x 5 -n 5", "out")
    before = files(directory / "out")
    with pytest.raises(UsageError, match=r"-e out/model_00000005\.bin is a checkpoint in -o out, which a new run"):
        train("-x 0 -e out/model_00000005.bin", "out")
    assert files(directory / "out") == before
    train("-x 0 -e out/model_00000005.bin", "elsewhere")


def test_a_stale_marker_does_not_complete_a_killed_write(directory, monkeypatch):
    """The model of a checkpoint is lost; the run that writes it again dies before the state, with other weights."""
    train("-x 10 -n 5", "out")
    (directory / "out" / "model_00000010.bin").unlink()
    monkeypatch.setattr("llmc.snapshot.write_state", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train("-x 10 -n 5 -l 0.1 -y 1", "out")
    assert not (directory / "out" / "DONE_00000010").exists()


def test_master_weights_must_be_there(directory, capsys):
    train("-x 5 -n 5 --precision bf16 -w 0", "out")
    for flags in ("--precision bf16", "--precision fp32"):
        with pytest.raises(
            RunError, match="has no master weights: go on with --precision bf16 -w 0, or begin a new run"
        ):
            train(f"-x 6 -y 1 {flags}", "out")
    # The other way round they are left aside, and the data is still found behind them.
    train("-x 5 -n 5 --precision bf16", "masters")
    train("-x 6 -n 5 -y 1 --precision bf16 -w 0", "masters")
    assert "WARNING: -w 0: the master weights of the checkpoint are left aside" in capsys.readouterr().out
