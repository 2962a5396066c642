"""llmc-train from end to end on a tiny model and data written by hand: what each flag changes, and what is refused."""

import contextlib
import functools
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from training_data import V, expect_refusal, header, text, write_shard, write_tokenizer

import llmc.prepare
import llmc.train
from llmc import cli
from llmc.cli.train import _main as command
from llmc.data.loader import DataLoader
from llmc.errors import UsageError
from llmc.logger import Progress
from llmc.model_file import ModelShape, save_model

BASE = (
    "-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -o out -b 2 -t 16 -g 8 -x 3 -v 0 -s 0 -m 2"
)
NUMBER = r"[-+]?(?:[0-9.]+(?:e[-+][0-9]+)?|nan)"
STEP_LINE = re.compile(
    rf"step +(?P<step>\d+)/(?P<steps>\d+) \| loss +(?P<loss>{NUMBER}) \({NUMBER}z\)"
    rf"\| norm +(?P<norm>{NUMBER}) \({NUMBER}z\)\| lr (?P<lr>{NUMBER}) \| {NUMBER} ms \| {NUMBER}% bf16 MFU "
    rf"\| \d+ tok/s \| (?P<percent>{NUMBER})% done \| \d+:\d\d:\d\d left"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """A working directory with two training shards, a validation shard and their tokenizer."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "t_train_0.bin", text(0, 500))
    write_shard(data / "t_train_1.bin", text(1, 300))
    write_shard(data / "t_val_0.bin", text(2, 300))
    write_tokenizer(data / "tokenizer.bin", V)
    return tmp_path


class Result:
    """What a run printed, logged and left in memory."""

    def __init__(self, out, log, run):
        self.out, self.run = out, run
        self.lines = out.splitlines()
        self.steps = [match for match in map(STEP_LINE.fullmatch, self.lines) if match]
        self.samples = re.findall(r"generating:\n---\n(.*?)\n---\n", out, re.DOTALL)
        self.log = log

    def column(self, name):
        return [float(step[name]) for step in self.steps]

    def row(self, label):
        return re.search(rf"^\| {re.escape(label)} +\| (.*?) +\|$", self.out, re.MULTILINE)[1]

    def logged(self, stream):
        """{step: value} of a stream of main.log, read as an outside tool would."""
        return {int(m[1]): float(m[2]) for m in re.finditer(rf"^s:(\d+) {stream}:({NUMBER})", self.log, re.MULTILINE)}


@pytest.fixture
def train(capsys, monkeypatch, directory):
    """Run llmc-train with BASE and further flags."""
    runs = []
    prepare = llmc.train.prepare
    monkeypatch.setattr(llmc.train, "prepare", lambda *arguments: runs.append(prepare(*arguments)) or runs[-1])

    def run(flags="", *more):
        capsys.readouterr()
        command([*BASE.split(), *flags.split(), *more])
        log = directory / "out" / "main.log"
        return Result(capsys.readouterr().out, log.read_text() if log.exists() else "", runs[-1])

    return run


def test_console_and_log(train, directory):
    result = train("-x 4 -v 2 -s 3")
    assert [int(step["step"]) for step in result.steps] == [1, 2, 3, 4]
    assert result.column("steps") == [4] * 4
    assert result.column("percent") == [25, 50, 75, 100]
    plain = [line for line in result.lines if not line.startswith(("|", "+"))]
    assert plain[:3] == [
        "---",
        "WARNING: sequence length 16 is below the model's context 32: later positions do not train",
        "---",
    ]
    N = 128 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert plain[3:11] == [
        f"num_parameters: {N} => bytes: {4 * N}",
        "allocated 0 MiB for model parameters",
        "batch_size B=2 * seq_len T=16 * num_processes=1 and total_batch_size=32",
        "=> setting grad_accum_steps=1",
        "created directory: out",
        "allocating 0 MiB for parameter gradients",
        "allocating 0 MiB for activations",
        "allocating 0 MiB for AdamW optimizer state m",
    ]
    assert re.fullmatch(r"device memory usage: 0 MiB / \d+ MiB", plain[12])
    assert plain[13] == "memory per sequence: 0 MiB"
    assert re.fullmatch(r" -> estimated maximum batch size: \d+", plain[14])
    # Order of a step: validation, sample, update; N = 4 is the last round, without an update.
    kinds = [line.split()[0] for line in plain[15:] if re.match(r"val loss|generating:|step +\d|total average", line)]
    assert kinds == ["val", "step", "step", "val", "step", "generating:", "step", "val", "generating:", "total"]
    assert re.fullmatch(r"total average iteration time: \d+\.\d{6} ms", plain[-1])
    assert re.fullmatch(
        r"s:0 tel:\d\.\d{4}\n"
        r"s:0 trl:\d\.\d{4} lr:0\.000300 norm:\d\.\d\d\n"
        r"s:1 trl:\d\.\d{4} lr:0\.000300 norm:\d\.\d\d\n"
        r"s:2 tel:\d\.\d{4}\n"
        r"s:2 trl:\d\.\d{4} lr:0\.000300 norm:\d\.\d\d\n"
        r"s:3 trl:\d\.\d{4} lr:0\.000300 norm:\d\.\d\d\n"
        r"s:4 tel:\d\.\d{4}\n",
        result.log,
    )
    assert list(result.logged("trl").values()) == pytest.approx(result.column("loss"), abs=5.1e-5)  # four digits


def screen(raw):
    """The lines that a terminal shows of these bytes; only what the trainer uses, another escape sequence fails."""
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", raw.decode()):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    assert "\x1b" not in "".join(lines)
    return lines


def on_terminal(arguments, monkeypatch):
    """What llmc-train writes to a pseudo-terminal."""
    ours, theirs = os.openpty()
    received = []

    def receive():
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(ours, 4096):
                received.append(data)

    reader = threading.Thread(target=receive)
    reader.start()
    with open(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", terminal)
        command(arguments)
    reader.join()
    os.close(ours)
    return b"".join(received)


def without_times(lines):
    """Without the numbers that a clock has made: of the measured peak, in the step lines and at the end."""
    return [re.sub(r"peak TFlops .*|\| [0-9.]+ ms .*? tok/s|\S+ left|time: \S+", "", line) for line in lines]


def test_progress_on_a_terminal(train, monkeypatch):
    """Progress comes and goes; what stays is what a pipe gets."""
    flags = "-x 140 -v 70 -s 60 -d 64 -sg 0.01 -n 100"
    piped = without_times(train(flags).out.split("\n"))
    assert any(line.startswith("skipping update") for line in piped)
    shutil.rmtree("out")
    monkeypatch.setattr(Progress, "SLOW", 0.0)
    raw = on_terminal([*BASE.split(), *flags.split()], monkeypatch)
    assert without_times(screen(raw)) == piped
    for step in range(1, 141):
        assert raw.count(b"\x1b[Kstep %d/140: micro-batch " % step) == 2
    assert b"\x1b[Kstep 1/140: micro-batch 2/2\r\x1b[Kstep    1/140 | loss" in raw
    skipped = rb"micro-batch 2/2\r\x1b\[Kskipping update due to grad z-score of \S+\r\nstep +1\d+/140 \| loss"
    assert re.search(skipped, raw)
    for step in (0, 70, 140):
        assert b"\r\x1b[Kstep %d/140: validation batch 2/2\r\x1b[Kval loss " % step in raw
    # Fast steps need none, and no pipe ever gets it.
    shutil.rmtree("out")
    monkeypatch.setattr(Progress, "SLOW", 60.0)
    raw = on_terminal([*BASE.split(), *flags.split()], monkeypatch)
    assert without_times(raw.decode().replace("\r\n", "\n").split("\n")) == piped
    shutil.rmtree("out")
    monkeypatch.setattr(Progress, "SLOW", 0.0)
    assert without_times(train(flags).out.split("\n")) == piped


def test_a_second_run_starts_a_new_log(train):
    first, second = train("-x 3"), train("-x 1")
    assert list(first.logged("trl")) == [0, 1, 2]
    assert list(second.logged("trl")) == [0]
    assert "created directory" not in second.out


def test_it_learns(train):
    result = train("-x 60 -l 3e-3")
    assert result.column("loss")[0] == pytest.approx(np.log(V), abs=0.15)  # random weights know nothing
    # The walk has three equally likely steps: log 3 = 1.1 is the best possible.
    assert np.log(3) < result.column("loss")[-1] < 3.2


def test_model_descriptor(train):
    result = train("-e custom:l=1,c=16,h=2,t=64")
    assert [result.row(label) for label in ("num_layers L", "num_heads NH", "channels C")] == ["1", "2", "16"]
    assert [result.row(label) for label in ("vocab_size V", "padded_vocab_size Vp")] == ["65", "128"]
    assert result.row("max_sequence_length T") == "64"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_model_file(train, dtype):
    shape = ModelShape(32, V, 128, 2, 2, 32)
    generator = torch.Generator().manual_seed(1)
    weights = {name: 0.1 * torch.randn(size, generator=generator) for name, size in shape.parameters()}
    save_model("model.bin", shape, dtype, weights)
    result = train("-e model.bin -x 0")
    assert result.row("weight init method") == "model.bin"
    for name, parameter in result.run.model.parameters().items():
        stored = weights[name] if dtype == "fp32" else weights[name].bfloat16().float()
        assert torch.equal(parameter, stored), name


def mean_loss(model, batches):
    """Cross-entropy by torch from the model's logits."""
    losses = []
    for inputs, targets in batches:
        model.forward(inputs)
        logits = model.logits(0, inputs.numel()).double()
        losses.append(torch.nn.functional.cross_entropy(logits, targets.flatten().long()))
    return float(sum(losses) / len(losses))


@pytest.mark.parametrize(("flag", "batches"), [("-m 1", 1), ("-m 3", 3), ("-m -1", 9), ("-m 12", 12)])
def test_validation(train, flag, batches):
    """300 tokens hold 9 batches of 32; the tenth is the first again."""
    result = train(f"-x 0 {flag}")
    assert result.steps == []
    assert result.row("val_num_batches") == str(batches)
    tokens = torch.tensor(text(2, 300), dtype=torch.int32)
    starts = [32 * (i % 9) for i in range(batches)]
    data = [(tokens[i : i + 32].view(2, 16), tokens[i + 1 : i + 33].view(2, 16)) for i in starts]
    printed = float(re.search(r"^val loss (\d+\.\d{6})$", result.out, re.MULTILINE)[1])
    assert printed == pytest.approx(mean_loss(result.run.model, data), abs=1e-5)  # fp32 sums, six digits


@pytest.mark.parametrize(("flag", "steps"), [("-v 2", [0, 2, 4, 5]), ("-v 0", [5]), ("-v -1", [5]), ("-v 7", [0, 5])])
def test_val_every(train, flag, steps):
    assert list(train(f"-x 5 {flag}").logged("tel")) == steps


@pytest.mark.parametrize(("flag", "count"), [("-s 2", 3), ("-s 0", 0), ("-s -5", 0), ("-s 5", 1), ("-s 9", 1)])
def test_sample_every(train, flag, count):
    assert len(train(f"-x 5 {flag}").samples) == count


def test_sample_length_and_tokenizer(train, directory):
    samples = {length: train(f"-x 0 -s 1 -g {length}").samples[0] for length in (1, 5, 16)}
    assert {length: len(sample) for length, sample in samples.items()} == {1: 0, 5: 4, 16: 15}
    assert samples[16].startswith(samples[5])
    (directory / "data" / "tokenizer.bin").unlink()
    result = train("-e custom:l=2,c=32,h=2,t=32,v=65 -x 0 -s 1 -g 5")
    assert "WARNING: no tokenizer beside data/t_train_*.bin" in result.out
    assert result.samples[0] == "".join(f"{ord(letter) - 33} " for letter in samples[5])


def test_data_patterns(train, directory):
    write_shard(directory / "data" / "other.bin", [5] * 100)
    result = train("-i data/other.bin -l 1e-2 -x 8")
    assert result.row("train data pattern") == "data/other.bin"
    assert result.column("loss")[-1] < 2  # always the same token is soon learnt
    result = train("-j data/other.bin -x 0 -m 1")
    assert result.row("val data pattern") == "data/other.bin"
    fives = torch.full((2, 16), 5, dtype=torch.int32)
    assert result.logged("tel")[0] == pytest.approx(mean_loss(result.run.model, [(fives, fives)]), abs=5.1e-5)


def test_training_data_is_shuffled(train):
    result = train("-x 1")
    batch = DataLoader("data/t_train_*.bin", 2, 16, shuffle=True).next_batch()
    fresh = train("-x 0").run.model
    assert result.column("loss")[0] == pytest.approx(mean_loss(fresh, [batch]), abs=1e-5)


def test_output_dir(train, directory):
    result = train("-o deep/er")
    assert result.row("output log dir") == "deep/er"
    assert (directory / "deep" / "er" / "main.log").read_text().count("trl:") == 3
    before = snapshot(directory)
    assert train("-o", "").row("output log dir") == "NULL"
    assert snapshot(directory) == before


@pytest.mark.parametrize(
    ("flags", "total", "accumulation", "epoch"),
    [("", 32, 1, 25), ("-b 3", 48, 1, 16), ("-t 8", 16, 1, 50), ("-d 128", 128, 4, 6), ("-b 1 -d 32", 32, 2, 25)],
)
def test_batch_sizes_and_epoch(train, flags, total, accumulation, epoch):
    """An epoch is the 800 training tokens divided by the tokens of a step."""
    result = train(f"{flags} -x -1")
    assert len(result.steps) == epoch
    assert result.row("total batch size") == str(total)
    assert result.row("train_num_batches") == str(epoch)
    assert f"=> setting grad_accum_steps={accumulation}" in result.lines


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "wsd"])
def test_learning_rates(train, scheduler):
    flags = "-x 20 -l 1e-3" + ("" if scheduler == "constant" else " -u 4 -q 0.2")
    result = train(f"{flags} -k {scheduler}")
    r = [(step - 4) / 16 for step in range(20)]
    expected = {
        "cosine": [2e-4 + 0.5 * (1 + np.cos(np.pi * x)) * 8e-4 for x in r],
        "linear": [1e-3 - x * 8e-4 for x in r],
        "constant": [1e-3] * 20,
        "wsd": [1e-3 if step < 16 else 2e-4 + (1 - np.sqrt((step - 16) / 4)) * 8e-4 for step in range(20)],
    }[scheduler]
    if scheduler != "constant":
        expected[:4] = [2.5e-4, 5e-4, 7.5e-4, 1e-3]
    assert result.column("lr") == pytest.approx(expected, rel=6e-3)  # three digits are printed
    assert result.row("LR scheduler") == scheduler


def test_learning_rate_and_weight_decay_reach_the_parameters(train):
    start = {name: p.clone() for name, p in train("-x 0").run.model.parameters().items()}
    plain = {name: p.clone() for name, p in train("-x 1 -l 1e-3").run.model.parameters().items()}
    decayed = train("-x 1 -l 1e-3 -c 0.5").run.model.parameters()
    for name in start:
        # Adam's first step moves every parameter by the learning rate, or less where the gradient is tiny.
        assert 0 < (plain[name] - start[name]).abs().max() <= 1.001e-3
        decay = 1e-3 * 0.5 * start[name] if start[name].dim() == 2 else torch.zeros_like(start[name])
        # Two updates of numbers around 1 differ in their fp32 rounding.
        torch.testing.assert_close(plain[name] - decayed[name], decay, rtol=0, atol=2e-7)


def test_overfit_one_batch(train):
    result = train("-a 1 -x 40 -l 1e-2 -m 1 -v 40")
    assert result.row("train data pattern") == "data/t_val_*.bin"
    assert result.logged("trl")[0] == result.logged("tel")[0]
    assert result.logged("trl")[39] < 1.0  # below the noise: learnt by heart
    assert result.logged("tel")[40] < result.logged("trl")[39]


@pytest.mark.parametrize("recompute", [0, 2, 4])
def test_gradient_accumulation_equals_a_larger_batch(train, recompute):
    """Eight rows at once or four times two: the same tokens, up to fp32 rounding, which ten updates amplify."""
    large = train(f"-a 1 -b 8 -d 128 -x 10 -l 1e-3 -r {recompute}").column("loss")
    small = train(f"-a 1 -b 2 -d 128 -x 10 -l 1e-3 -r {recompute}").column("loss")
    assert large[0] == pytest.approx(small[0], abs=1e-5)
    assert large == pytest.approx(small, abs=1e-4)
    assert large[-1] < large[0] - 0.3  # the updates did something


def test_recompute(train):
    results = [train(f"-r {level} -x 5 -l 3e-3") for level in range(5)]
    assert all(result.column("loss") == results[0].column("loss") for result in results)
    sizes = [result.run.model.memory()["activations"] for result in results]
    assert sizes == sorted(set(sizes), reverse=True)
    assert [result.row("recompute") for result in results] == ["0", "1", "2", "3", "4"]


def test_precision_and_master_weights(train):
    fp32, auto = train("--precision fp32"), train()
    assert fp32.column("loss") == auto.column("loss")
    assert fp32.row("precision") == auto.row("precision") == "FP32"
    bf16, bare = train("--precision bf16"), train("--precision bf16 -w 0")
    assert bf16.row("precision") == bare.row("precision") == "BF16"
    assert bf16.row("use_master_weights") == "enabled"
    assert bare.row("use_master_weights") == "disabled"
    assert bf16.run.model.parameters()["wte"].dtype == torch.bfloat16
    parameters = bf16.run.shape.num_parameters
    assert bf16.run.model.memory()["optimizer"] - bare.run.model.memory()["optimizer"] >= 4 * parameters
    assert "for master copy of params" in bf16.out
    assert "for master copy of params" not in bare.out
    # bf16 keeps three digits.
    assert bf16.column("loss") == pytest.approx(fp32.column("loss"), rel=1e-2)


def test_gradient_dtype(train):
    flags = ("", "--grad-dtype bf16", "--grad-dtype fp32")
    results = [train(f"-d 128 -x 4 --precision bf16 {flag}") for flag in flags]
    dtypes = [result.run.model.gradients()["wte"].dtype for result in results]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    losses = [result.column("loss") for result in results]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)  # bf16 keeps three digits


def test_gelu_fusion(train):
    """The CPU has all three, to the same bits; by default the fastest."""
    results = [train(f"-ge {level}") for level in (-1, 0, 1, 2)]
    assert [result.row("gelu_fusion") for result in results] == ["2", "0", "1", "2"]
    assert [result.run.model.options.gelu_fusion for result in results] == [2, 0, 1, 2]
    assert len({tuple(result.column("loss")) for result in results}) == 1


def test_seed(train):
    """Weights and the order of the data."""
    default, same, other = train(), train("--seed 42"), train("--seed 7")
    assert default.column("loss") == same.column("loss") != other.column("loss")
    fresh = {seed: train(f"-x 0 --seed {seed}").run for seed in (42, 7)}
    assert not torch.equal(fresh[42].model.parameters()["wte"], fresh[7].model.parameters()["wte"])
    batch = DataLoader("data/t_train_*.bin", 2, 16, shuffle=True, seed=7).next_batch()
    assert other.column("loss")[0] == pytest.approx(mean_loss(fresh[7].model, [batch]), abs=1e-5)


def test_tokenizer_flag(train, directory):
    (directory / "other.bin").write_bytes(header(20240328, 2, V, 0) + V * b"\x01x")
    assert train("-x 0 -s 1 --tokenizer other.bin").samples == ["xxxxxxx"]


def test_zero_with_one_process(train):
    """The command line of a cluster also works alone: there is nothing to cut."""
    plain, sharded = train(), train("-z 2")
    assert "Zero Optimization is disabled: -z 2 has nothing to cut over one process" in sharded.out
    assert sharded.row("zero_stage") == "0"
    assert plain.column("loss") == sharded.column("loss")


def test_throughput_against_the_measured_peak(train):
    result = train()
    assert float(result.row("peak TFlops")) == pytest.approx(result.run.peak_flops / 1e12, abs=0.051)
    N, L, C, T = result.run.shape.num_parameters, 2, 32, 16
    ms = [float(re.search(r"\| ([0-9.]+) ms \|", line)[1]) for line in result.lines if line.startswith("step")]
    mfu = [float(re.search(r"\| ([0-9.]+)% bf16 MFU", line)[1]) for line in result.lines if line.startswith("step")]
    for milliseconds, percent in zip(ms, mfu, strict=True):
        flops = (6 * N + 6 * L * C * T) * 32
        # Milliseconds have two digits after the point, percent one.
        assert percent == pytest.approx(100 * flops / (milliseconds / 1000) / result.run.peak_flops, rel=0.05, abs=0.06)


@pytest.mark.parametrize(("flag", "name"), [("-sl", "loss"), ("-sg", "grad")])
def test_outlier_updates_are_skipped(train, directory, monkeypatch, flag, name):
    """Data that turns from one token to noise: both z-scores jump at the first noisy batch, whose update is skipped."""
    write_shard(directory / "data" / "spike.bin", [5] * (32 * 140) + text(3, 32 * 20))
    monkeypatch.setattr(llmc.prepare, "DataLoader", functools.partial(in_order, DataLoader))
    plain, skipping = train("-i data/spike.bin -x 150 -l 1e-2"), train(f"-i data/spike.bin -x 150 -l 1e-2 {flag} 6")
    assert "skipping" not in plain.out
    values = re.findall(rf"^skipping update due to {name} z-score of (\d+\.\d{{6}})$", skipping.out, re.MULTILINE)
    assert values and all(6 < float(value) <= 11.27 for value in values)
    assert skipping.out.count("skipping") == len(values)
    # The last of the 140 batches ends in the first noisy token. Nothing differs up to its loss; its update is skipped,
    # but the step counts and is reported like others.
    assert len(skipping.steps) == 150
    assert plain.column("loss")[:140] == skipping.column("loss")[:140]
    assert plain.column("loss")[140] != skipping.column("loss")[140]


@pytest.mark.parametrize(("flag", "name"), [("-sl", "loss"), ("-sg", "norm")])
def test_a_run_recovers_from_a_corrupt_batch(train, directory, monkeypatch, flag, name):
    """Batch 140 of a text is noise, with a spike of the loss, or zeros, as a disk leaves them, with one of the norm.

    By the formula, in whose window of 128 it is itself, it alone is skipped, and the run goes on as if it had not been.
    """
    tokens = text(3, 32 * 160 + 1)
    noise = [int(token) for token in np.random.default_rng(1).integers(0, V, 32)]
    tokens[32 * 140 + 1 : 32 * 141 + 1] = noise if name == "loss" else [0] * 32
    write_shard(directory / "data" / "spike.bin", tokens)
    monkeypatch.setattr(llmc.prepare, "DataLoader", functools.partial(in_order, DataLoader))
    flags = "-i data/spike.bin -x 160 -l 2e-2 -u 20 --json-log 1"
    runs = []
    for extra in ("-o plain", f"-o skipping {flag} 6"):
        printed = train(f"{flags} {extra}").out
        path = directory / extra.split()[1] / "main.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append((printed, [record for record in records if "norm" in record]))
    (plain_out, plain), (skipping_out, skipping) = runs
    values = np.array([record[name] for record in skipping])
    z = {}
    for step in range(128, 160):
        window = values[step - 127 : step + 1]
        z[step] = (values[step] - window.mean()) / window.std()
    spikes = [step for step, value in z.items() if value > 6]
    assert spikes == [140]
    printed = re.findall(r"^skipping update due to (\w+) z-score of (\S+)$", skipping_out, re.MULTILINE)
    assert [(kind, float(value)) for kind, value in printed] == [
        ({"loss": "loss", "norm": "grad"}[name], pytest.approx(z[140], abs=1e-6))  # six digits are printed
    ]
    assert "skipping" not in plain_out
    assert [r["loss"] for r in plain[:141]] == [r["loss"] for r in skipping[:141]]
    # An update with it would cost the next steps; without it they are what they were before.
    before, after, hurt = (
        np.mean([r["loss"] for r in part]) for part in (skipping[130:140], skipping[141:], plain[141:])
    )
    assert after < before + 0.1 and after < hurt


def test_an_unusually_good_loss_is_no_reason_to_skip(train):
    result = train("-x 150 -l 3e-3 -sl 0.5")
    z = [float(value) for value in re.findall(r"loss \S+ \(([-+.0-9]+)z\)\|", result.out)]
    assert len(z) == 22 and min(z) < -0.5 and max(z) < 0.5
    assert "skipping" not in result.out


def in_order(loader, *arguments, **options):
    return loader(*arguments, **{**options, "shuffle": False})


def test_a_loss_that_is_no_number_ends_the_run(train, directory, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-train", lambda argv: train("-l 1e30 -x 20"))
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert re.fullmatch(
        r"llmc-train: error: the loss is (nan|inf) at step 2: activation h\d\.\w+ is not finite at token \d+ of "
        r"data/t_train_\d\.bin; lower the learning rate -l or the weight decay -c, or raise the warm-up -u\n",
        message,
    )
    log = (directory / "out" / "main.log").read_text()
    assert log.startswith("s:0 trl:")
    assert "nan" not in log


@pytest.mark.parametrize("flags", ["-v 2", "-v 0", "-x 0"])
def test_weights_that_are_no_numbers(directory, capsys, flags):
    """Whether validation or the first step finds it: no advice about the learning rate, which was not used yet."""
    shape = ModelShape(32, V, 128, 1, 2, 16)
    save_model("model.bin", shape, "fp32", {name: torch.full(size, torch.nan) for name, size in shape.parameters()})
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-train", command, [*BASE.split(), "-e", "model.bin", *flags.split()])
    assert caught.value.code == 1
    message = capsys.readouterr().err
    expected = (
        r"the weights of -e model\.bin already give a (validation )?loss of nan: "
        r"parameter wte is not finite; start from other weights"
    )
    assert re.fullmatch(rf"llmc-train: error: {expected}\n", message)


def test_a_learning_rate_of_zero_changes_nothing(train):
    start = {name: p.clone() for name, p in train("-x 0").run.model.parameters().items()}
    for name, parameter in train("-x 3 -l 0").run.model.parameters().items():
        assert torch.equal(parameter, start[name])


def test_start_token(train, directory):
    write_tokenizer(directory / "data" / "tokenizer.bin", V, end_of_text=7)
    assert train("-x 0").run.start_token == 7
    (directory / "data" / "tokenizer.bin").unlink()
    starts = {v: train(f"-x 0 -e custom:l=1,c=8,h=1,t=32,v={v}").run.start_token for v in (65, 71, 72, 50257)}
    assert starts == {65: 0, 71: 0, 72: 2, 50257: 50256}


def test_a_tokenizer_in_the_working_directory_only_decodes(train, directory):
    """It neither gives a custom model its vocabulary nor refuses the data: llm.c leaves such files around."""
    (directory / "data" / "tokenizer.bin").unlink()
    for name in ("gpt2_tokenizer.bin", "chessGPT_tokenizer.bin"):
        write_tokenizer(directory / name, 72)
    with pytest.raises(UsageError, match="the data has no tokenizer to give the vocabulary size, so add ,v=SIZE"):
        train()
    assert train("-x 0 -e custom:l=1,c=8,h=1,t=32,v=65").run.tokenizer is None
    assert train("-x 0 -e custom:l=1,c=8,h=1,t=32,v=50257").run.tokenizer is None
    result = train("-x 0 -s 1 -e custom:l=1,c=8,h=1,t=32,v=72")
    assert str(result.run.tokenizer.path) == "chessGPT_tokenizer.bin"
    assert "WARNING: no tokenizer" not in result.out
    assert len(result.samples[0]) == 7


def test_characters_that_the_terminal_does_not_know(directory, monkeypatch):
    import io
    import sys

    (directory / "data" / "tokenizer.bin").write_bytes(header(20240328, 2, V, 0) + V * b"\x02\xc3\xa9")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli.run("llmc-train", command, [*BASE.split(), "-x", "0", "-s", "1"])
    sys.stdout.flush()
    assert b"generating:\n---\n???????\n---\n" in raw.getvalue()


def snapshot(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


REFUSED = [  # flags, exit status, what the message must contain
    ("-t 33 -g 8", 2, "-t 33 is longer than the context of the model custom:l=2,c=32,h=2,t=32: use -t 32 or less"),
    ("-d 48", 2, "-d 48 is not a multiple of 32"),
    ("-u 4", 2, "-u 4 is longer than the run of 3 steps"),
    ("-x -1 -d 1600", 2, "-d 1600 is more than the 800 tokens of data/t_train_*.bin"),
    ("-w 0", 2, "-w 0 has no effect in fp32"),
    ("-w 0 --precision fp32", 2, "-w 0 has no effect in fp32"),
    ("-e d13", 2, "-e d13 is no model"),
    ("-e custom:l=2,c=32", 2, "h= is missing"),
    (
        "-e gpt2_124M_bf16.bin",
        1,
        "-e gpt2_124M_bf16.bin: there is no such file; make it of OpenAI's weights: llmc-convert gpt2 "
        "gpt2_124M_bf16.bin; or train this model from scratch: -e gpt2:d12",
    ),
    ("-e no/chessGPT_d8_bf16.bin", 1, "make it, with random weights: llmc-init chess:d8 --out no/chessGPT_d8_bf16.bin"),
    ("-e chessGPT_d8_bf16.bin", 1, "there is no such file; make it, with random weights: llmc-init chess:d8"),
    ("-f 0", 2, "-f 0 has no effect but in fp32 on a GPU: drop it"),
    ("-lg 10", 2, "-lg 10 needs a GPU, this run is on the CPU: drop it"),
    ("-h 1", 2, "-b 2 is too small for -h 1"),
    ("-h 1 -b 4", 1, "cannot read multiple-choice evaluation file dev/data/hellaswag/hellaswag_val.bin: No such file"),
    ("-pn 2", 2, "-pn 2 has no effect with -pm mpi"),
    ("-pn 2 -pm tcp", 2, "-pm tcp needs the address of rank 0: give it with -ps"),
    ("--grad-dtype bf16", 2, "--grad-dtype bf16 needs --precision bf16"),
    ("--tokenizer no.bin", 1, "cannot read tokenizer no.bin"),
    ("--tokenizer data/t_val_0.bin", 1, "data/t_val_0.bin is not a tokenizer: it is a token shard"),
    ("--config no.toml", 1, "--config no.toml cannot be read: No such file or directory"),
    ("-j other/t_val_*.bin", 1, "have different tokens (data/tokenizer.bin and other/tokenizer.bin): give"),
    ("-e other.bin", 1, "cannot read model checkpoint other.bin: No such file or directory"),
    ("-e data/t_val_0.bin", 1, "data/t_val_0.bin is not a model checkpoint: it is a token shard"),
    ("-e data", 2, "-e data is no model"),
    ("-e d12", 1, "the model d12 has a vocabulary of 50257 tokens, the data's tokenizer data/tokenizer.bin one of 65"),
    ("-e chess:d8", 1, "vocabulary of 72 tokens, the data's tokenizer data/tokenizer.bin one of 65"),
    ("-e custom:l=2,c=32,h=2,t=32,v=64", 1, "vocabulary of 64 tokens"),
    ("-i nothing_*.bin", 1, "no token shards match nothing_*.bin"),
    ("-j nothing_*.bin", 1, "no token shards match nothing_*.bin"),
    ("-i data/tokenizer.bin", 1, "data/tokenizer.bin is not a token shard: it is a tokenizer"),
    ("-i data/short.bin", 1, "data/short.bin is truncated"),
    ("-b 100", 1, "smaller -b or -t"),
    ("-i data/t_train_0.bin -b 20", 1, "data/t_val_0.bin has 300 tokens, one batch needs 321"),
    ("-b nine", 2, "-b/--batch-size nine"),
]


@pytest.mark.parametrize(("flags", "status", "message"), REFUSED, ids=[flags for flags, *_ in REFUSED])
def test_refused_before_anything_on_disk_changes(directory, capsys, flags, status, message):
    (directory / "out").mkdir()
    (directory / "out" / "main.log").write_text("s:0 tel:1.0000\n")
    (directory / "data" / "short.bin").write_bytes(header(20240520, 1, 100) + bytes(100))
    other = directory / "other"  # as many tokens as in data, but not the same
    other.mkdir()
    write_shard(other / "t_val_0.bin", text(2, 300))
    (other / "tokenizer.bin").write_bytes(header(20240328, 2, V, 0) + V * b"\x01a")
    before = snapshot(directory)
    expect_refusal(capsys, [*BASE.split(), *flags.split()], status, message)
    assert snapshot(directory) == before


def test_a_model_larger_than_the_memory(capsys, directory):
    before = snapshot(directory)
    with pytest.raises(SystemExit):
        cli.run("llmc-train", command, [*BASE.split(), "-e", "custom:l=200,c=16384,h=128,t=32"])
    assert re.search(r"the run needs \d+ MiB of memory, this machine has \d+ MiB: lower", capsys.readouterr().err)
    assert snapshot(directory) == before


@pytest.mark.parametrize("obstacle", ["file", "file below", "log is a directory"])
def test_unusable_output_directory(capsys, directory, monkeypatch, obstacle):
    """Found before the model is built, which may take minutes."""
    monkeypatch.setattr(llmc.prepare, "memory_plan", lambda *_: pytest.fail("the model was planned"))
    if obstacle == "log is a directory":
        (directory / "out" / "main.log").mkdir(parents=True)
    else:
        (directory / "out").write_text("")
    output = "out/deeper" if obstacle == "file below" else "out"
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-train", command, [*BASE.split(), "-o", output])
    assert caught.value.code == 1
    line = rf"llmc-train: error: -o {output}: .*; choose another output directory\n"
    assert re.fullmatch(line, capsys.readouterr().err)
