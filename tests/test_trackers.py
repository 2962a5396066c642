"""The JSON log, TensorBoard and Weights & Biases: real small runs against main.log; resuming; what is refused."""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
from training_data import expect_refusal, write_data

from llmc import cli, trackers
from llmc.checkpoint import Checkpoint
from llmc.cli.train import _main as command
from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.main_log import read_json_log, read_main_log
from llmc.trackers import JsonLog, check_trackers, open_trackers

BASE = (
    "-e custom:l=1,c=16,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -o out -b 2 -t 16 -g 8 -d 64 -x 6 -v 2 -s 0 "
    "-m 2 -q 0.1"
)
FORMATS = {"val_loss": ".4f", "loss": ".4f", "lr": ".6f", "norm": ".2f"}  # of main.log
KEYS = ["step", "tokens", "loss", "norm", "lr", "ms", "tokens_per_s", "mfu"]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_data(tmp_path, train=(700,))


def train(flags):
    command([*BASE.split(), *flags.split()])


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rounded(series):
    """As main.log has them."""
    return {
        name: {step: float(format(value, FORMATS[name])) for step, value in values.items()}
        for name, values in series.items()
        if name in FORMATS
    }


def lose_checkpoint(step):
    """As if the run had been killed before it was written."""
    checkpoint = Checkpoint(Path("out"), step)
    for path in (checkpoint.done, checkpoint.model, checkpoint.state(0)):
        path.unlink()


class FakeWandB(types.ModuleType):
    """Its documented behaviour: a run resumed by its id knows its next step, and steps below are dropped."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="fake")
        self.inits, self.history, self.exit_codes = [], [], []

    def init(self, **arguments):
        self.inits.append(arguments)
        fake, id = self, arguments["id"] or f"id{len(self.inits)}"
        old = [step for other, step, _ in fake.history if other == id] if arguments["resume"] else []

        class Run:
            step = max(old, default=-1) + 1

            def log(self, values, step):
                assert step >= self.step, "a step twice"
                fake.history.append((id, step, values))

            def finish(self, exit_code):
                fake.exit_codes.append(exit_code)

        Run.id = id
        return Run()


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


# ----------------------------------------------------------------------------------------------------------------------
# JSON log


def test_json_log_is_main_log(directory, capsys):
    train("--json-log 1")
    out = capsys.readouterr().out
    found = records("out/main.jsonl")
    kinds = [(record["step"], list(record)) for record in found]
    evaluation = ["step", "tokens", "val_loss"]
    expected = [(0, evaluation), (0, KEYS), (1, KEYS), (2, evaluation), (2, KEYS), (3, KEYS), (4, evaluation)]
    assert kinds == [*expected, (4, KEYS), (5, KEYS), (6, evaluation)]
    assert all(record["tokens"] == 64 * record["step"] for record in found)
    assert rounded(read_json_log(Path("out/main.jsonl")).series) == read_main_log(Path("out/main.log")).series
    # What only the console has, there with 2, 1 and 0 digits.
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    steps = [record for record in found if "loss" in record]
    for line, record in zip(lines, steps, strict=True):
        assert (
            f"| {record['ms']:.2f} ms | {100 * record['mfu']:.1f}% bf16 MFU | {record['tokens_per_s']:.0f} tok/s"
            in line
        )


def test_hellaswag_and_unknown_peak(tmp_path):
    from test_logger import report

    from llmc.logger import Logger

    with open_trackers(TrainConfig(output_dir=str(tmp_path), json_log="1"), 0, 0, 100) as tracker:
        logger = Logger(tmp_path, tracker=tracker)
        logger.hellaswag(20, 3, 8)
        logger.training(report(step=20, mfu=None))
    assert records(tmp_path / "main.jsonl") == [
        {"step": 20, "tokens": 2000, "hellaswag": 0.375},
        {"step": 20, "tokens": 2000, "loss": 10.9876543, "norm": 15.3123456, "lr": 3e-4}
        | {"ms": 234.5678, "tokens_per_s": 17462.5, "mfu": None},
    ]


def test_resume_repeats_no_step(directory, capsys):
    train("--json-log logs/a.jsonl -n 2")
    before = Path("logs/a.jsonl").read_text()
    lose_checkpoint(6)
    with open("logs/a.jsonl", "a") as file:
        file.write('{"step": 6, "tok')  # cut off
    with open("out/main.log", "a") as file:
        file.write("s:6 tr")
    train("--json-log logs/a.jsonl -n 2 -y 1")
    assert "resuming at step 4" in capsys.readouterr().out
    after = Path("logs/a.jsonl").read_text()
    kept = before[: before.index('{"step": 4')]
    assert after.startswith(kept)
    steps = [(record["step"], "loss" in record) for record in records("logs/a.jsonl")]
    assert len(steps) == len(set(steps)) == 10
    # Main.log has steps 4 to 6 twice, and of the cut off line nothing.
    log = Path("out/main.log").read_text()
    assert log.count("s:5 trl:") == 2 and "trs:" not in log
    assert rounded(read_json_log(Path("logs/a.jsonl")).series) == read_main_log(Path("out/main.log")).series
    assert [path.name for path in Path("logs").iterdir()] == ["a.jsonl"]


def test_a_new_run_moves_the_json_log_of_another_aside(directory, capsys):
    train("--json-log 1")
    first = Path("out/main.jsonl").read_text()
    train("--json-log 1 -x 1")
    assert "moved the JSON log of an earlier run to out/main.jsonl.1\n" in capsys.readouterr().out
    assert Path("out/main.jsonl.1").read_text() == first
    train("--json-log 1 -x 0")
    assert Path("out/main.jsonl.1").read_text() == first
    assert [record["step"] for record in records("out/main.jsonl.2")] == [0, 0, 1]
    assert [record["step"] for record in records("out/main.jsonl")] == [0]


def test_resume_after_half_a_line(tmp_path):
    whole = '{"step": 3, "tokens": 300, "loss": 1.0}\n'
    (tmp_path / "a.jsonl").write_text(whole + '{"st')
    JsonLog(tmp_path / "a.jsonl", 4).log(4, {"tokens": 400, "loss": None})
    assert (tmp_path / "a.jsonl").read_text() == whole + '{"step": 4, "tokens": 400, "loss": null}\n'


def test_resume_without_a_checkpoint_is_a_new_run(directory, wandb):
    train("--json-log 1 --wandb chess")
    first = Path("out/main.jsonl").read_text()
    train("--json-log 1 --wandb chess -x 1 -y 1")
    assert Path("out/main.jsonl.1").read_text() == first
    assert [record["step"] for record in records("out/main.jsonl")] == [0, 0, 1]
    assert (wandb.inits[1]["id"], wandb.inits[1]["resume"]) == (None, None)


def test_resume_without_an_older_json_log(directory):
    train("-n 2")
    lose_checkpoint(6)
    train("-n 2 -y 1 --json-log 1")
    assert [record["step"] for record in records("out/main.jsonl")] == [4, 4, 5, 6]


def test_a_json_log_that_cannot_be_written(tmp_path):
    log = JsonLog(tmp_path / "a.jsonl", 0)
    (tmp_path / "a.jsonl").mkdir()
    log.log(0, {"loss": 1.0})
    with pytest.raises(RunError, match=r"cannot write .*a\.jsonl: Is a directory; choose another file with --json-log"):
        log.close(failed=False)
    log.close(failed=True)
    (tmp_path / "a.jsonl").rmdir()
    log.log(1, {"loss": 2.0})
    log.close(failed=False)
    assert (tmp_path / "a.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'


def test_only_rank_0_logs(tmp_path, monkeypatch):
    config = TrainConfig(output_dir=str(tmp_path), json_log="1", tensorboard="tb", wandb="chess")
    monkeypatch.setattr(trackers, "TensorBoard", None)
    with open_trackers(config, 1, 0, 100) as tracker:
        tracker.log(0, {"loss": 1.0})
    assert list(tmp_path.rglob("main.jsonl")) == []


def test_without_flags_nothing_is_made(directory):
    train("")
    assert {path.name for path in Path("out").iterdir()} == {"main.log", "config.toml"}
    assert {path.name for path in directory.iterdir()} == {"data", "out"}


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


def scalars(path):
    """{tag: [(step, value)]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(directory):
    pytest.importorskip("tensorboard")
    train("--tensorboard tb/a --json-log 1 -n 2")
    log = read_json_log(Path("out/main.jsonl"))
    found = scalars("tb/a")
    assert set(found) == {*log.series, "tokens"}
    for name, series in log.series.items():
        assert dict(found[name]) == pytest.approx(series, rel=1e-6)  # fp32
        assert len(found[name]) == len(series)
    # A resumed run: no step twice.
    lose_checkpoint(6)
    train("--tensorboard tb/a --json-log 1 -n 2 -y 1")
    assert [step for step, _ in scalars("tb/a")["loss"]] == [0, 1, 2, 3, 4, 5]
    # A new one begins with nothing of the old.
    train("--tensorboard tb/a -x 2")
    assert [step for step, _ in scalars("tb/a")["loss"]] == [0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def test_wandb(directory, wandb):
    train("--wandb chess --json-log 1 -n 2")
    assert len(wandb.inits) == 1
    assert [wandb.inits[0][name] for name in ("project", "id", "resume", "name")] == ["chess", None, None, "out"]
    assert wandb.inits[0]["config"]["batch_size"] == 2
    logged = [{"step": step, **values} for _, step, values in wandb.history]
    assert logged == records("out/main.jsonl")
    assert Path("out/wandb_id").read_text() == "id1\n"
    assert wandb.exit_codes == [0]


def test_wandb_resume(directory, wandb):
    train("--wandb chess -n 2")
    lose_checkpoint(6)
    before = list(wandb.history)
    train("--wandb chess -n 2 -x 8 -y 1")
    assert (wandb.inits[1]["id"], wandb.inits[1]["resume"]) == ("id1", "allow")
    new = wandb.history[len(before) :]
    # It goes on after the evaluation of step 6, the last that W&B has seen.
    assert [(id, step) for id, step, values in new if "loss" in values] == [("id1", 7)]
    train("--wandb chess -x 1")
    assert (wandb.inits[2]["id"], wandb.inits[2]["resume"]) == (None, None)
    assert Path("out/wandb_id").read_text() == "id3\n"


def test_wandb_learns_of_a_failure(directory, wandb):
    with pytest.raises(SystemExit):
        cli.run("llmc-train", lambda argv: train("--wandb chess -l 1e30 -x 20"))
    assert wandb.exit_codes == [1]


def test_wandb_refuses(directory, wandb, capsys, monkeypatch):
    def init(**arguments):
        raise FakeWandB.Error("api_key not configured\n(no-tty).")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-train", lambda argv: train("--wandb chess"))
    assert caught.value.code == 1
    line = "--wandb chess: api_key not configured (no-tty); run wandb login, or set WANDB_MODE=offline to log on this"
    assert line in capsys.readouterr().err


def test_real_wandb_offline(directory, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("--wandb chess -x 1")
    (run,) = (directory / "wandb").glob("offline-run-*")
    id = Path("out/wandb_id").read_text().strip()
    assert run.name.endswith(id)
    assert [path.name for path in run.glob("*.wandb")] == [f"run-{id}.wandb"]


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


REFUSED = [
    ("--json-log data", "--json-log data: cannot read the log data: Is a directory, or choose another file"),
    (
        "--json-log data/tokenizer.bin",
        "data/tokenizer.bin is not the JSON log of a run; choose another file",
    ),
    ("--json-log notes.txt", "notes.txt line 1 is damaged: 'mine' is no line of a JSON log"),
    ("--json-log notes.txt/a.jsonl", "--json-log notes.txt/a.jsonl: notes.txt is not a directory; choose another file"),
    ("--json-log out/main.log", "--json-log out/main.log is where the run writes its main.log; choose another file"),
    ("--json-log ./out/config.toml", "is where the run writes its config.toml; choose another file"),
    ("--tensorboard notes.txt", "--tensorboard notes.txt: notes.txt is not a directory; choose another directory"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_refused_before_anything_on_disk_changes(directory, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(trackers, "check_package", lambda *_: None)
    Path("notes.txt").write_text("mine\n")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    expect_refusal(capsys, [*BASE.split(), *flags.split()], 1, message)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert not Path("out").exists()


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard tb", "tensorboard"), ("--wandb chess", "wandb")])
def test_missing_packages(directory, capsys, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    message = f"{flag} needs a package that is not installed: pip install {package}\n"
    expect_refusal(capsys, [*BASE.split(), *flag.split()], 1, message)
    assert not Path("out").exists()


def test_a_directory_is_no_package(directory, monkeypatch):
    """W&B makes a directory of its name in the working directory, which may be on Python's path."""
    Path("no_package").mkdir()
    monkeypatch.syspath_prepend(directory)
    with pytest.raises(RunError, match="needs a package that is not installed: pip install no_package"):
        trackers.check_package("no_package", "--wandb chess")
    trackers.check_package("json", "--wandb chess")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directories(directory):
    Path("closed").mkdir(mode=0o500)
    for config in (TrainConfig(json_log="closed/a.jsonl"), TrainConfig(json_log="closed/a/b.jsonl")):
        with pytest.raises(RunError, match="closed cannot be written; choose another file"):
            check_trackers(config)
