"""llmc-eval against PyTorch in fp64, row by row without padding; on one rank and on three."""

import json
import math
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from model_testing import build, reference_model
from ranks_testing import run_ranks
from test_hellaswag import random_examples, write_eval
from training_data import V, rewrite, text, write_shard, write_tokenizer

from llmc import cli
from llmc.cli.eval import _main as command
from llmc.evaluate import Settings, Shards, evaluate
from llmc.inference import open_model
from llmc.model_file import ModelShape, save_model
from llmc.ranks import Ranks

T = 24
CASE = (T, V, 2, 2, 32, 8, T)
MODEL = "-e model.bin -b 8"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("model.bin", CASE)
    write_eval("eval.bin", random_examples(23))
    write_shard(tmp_path / "a_0.bin", text(0, 700))
    write_shard(tmp_path / "a_1.bin", text(2, 400))
    return tmp_path


def save(path, case):
    model = build(case)
    max_seq_len, vocab_size, num_layers, num_heads, channels, *_ = case
    shape = ModelShape(max_seq_len, vocab_size, model.config.padded_vocab_size, num_layers, num_heads, channels)
    save_model(path, shape, "fp32", model.parameters())


def call(flags):
    """The result in the JSON file."""
    command([*MODEL.split(), *flags.split(), "--json", "result.json"])
    return json.loads(Path("result.json").read_text())


@pytest.fixture
def twin(reference):
    """The model in PyTorch, fp64: the losses of each token but the first of rows of one length, one after the other."""
    model = reference_model(reference, build(CASE), torch.float64)

    def losses(*rows):
        tokens = torch.tensor(rows)
        with torch.no_grad():
            logits, _ = model(tokens[:, :-1], tokens[:, 1:])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")

    return losses


# ----------------------------------------------------------------------------------------------------------------------
# Multiple choice


def choices_of(twin, examples):
    """By sum and by mean; no choice is so narrow that fp32 could make another."""
    by_sum, by_mean = [], []
    for _, context, completions in examples:
        losses = [twin(context + completion)[-len(completion) :] for completion in completions]
        for values, choices in (
            ([float(loss.sum()) for loss in losses], by_sum),
            ([float(loss.mean()) for loss in losses], by_mean),
        ):
            best, second = sorted(values)[:2]
            assert second - best > 1e-5
            choices.append(values.index(best))
    return by_sum, by_mean


def test_accuracies(twin, capsys):
    """Labels by which the sums are right in 12 of 23 and the means in more or fewer."""
    examples = random_examples(23)
    by_sum, by_mean = choices_of(twin, examples)
    assert by_sum != by_mean
    labels = [choice if i % 2 == 0 else (choice + 1) % 4 for i, choice in enumerate(by_sum)]
    write_eval("eval.bin", [(label, *rest) for label, (_, *rest) in zip(labels, examples, strict=True)])
    right = sum(label == choice for label, choice in zip(labels, by_mean, strict=True))
    assert right != 12
    names = {"hellaswag": "HellaSwag", "mmlu": "MMLU", "choices": "choices"}
    numbers = {"file": "eval.bin", "questions": 23, "acc": 12 / 23, "acc_norm": right / 23}
    for flag, name in names.items():
        assert call(f"--{flag} eval.bin") == {"model": "model.bin", flag: numbers}
        line = f"{name}: acc 12/23 = {12 / 23:f} | acc_norm {right}/23 = {right / 23:f}\n"
        assert capsys.readouterr().out == line
    together = call("--mmlu eval.bin --hellaswag eval.bin")
    assert together == {"model": "model.bin", "hellaswag": numbers, "mmlu": numbers}


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def losses_of(twin, tokens, length):
    """Of the rows of a shard, the last of which may be shorter."""
    rows = [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
    whole = len(rows) - (len(rows[-1]) <= length)
    return torch.cat([twin(*rows[:whole]), *(twin(row) for row in rows[whole:])])


@pytest.mark.parametrize(("flags", "length"), [("", T), ("-t 7", 7), ("-b 3 -t 10", 10), ("-b 64", T)])
def test_loss_of_all_tokens(twin, capsys, flags, length):
    """Every token of each shard but its first, once."""
    losses = torch.cat([losses_of(twin, text(seed, n), length) for seed, n in ((0, 700), (2, 400))])
    assert len(losses) == 699 + 399
    found = call(f"--shards a_?.bin {flags}")["shards"]
    assert found["tokens"] == 699 + 399 and found["pattern"] == "a_?.bin"
    assert abs(found["loss"] - float(losses.mean())) < 1e-5  # fp32 losses of about 4
    assert abs(found["perplexity"] / math.exp(float(losses.mean())) - 1) < 1e-5
    assert capsys.readouterr().out == f"loss {found['loss']:f} | perplexity {found['perplexity']:.4f} | 1,098 tokens\n"


def test_max_batches(twin):
    losses = losses_of(twin, text(0, 700), 10)[:90]
    found = call("--shards a_*.bin -t 10 -b 3 --max-batches 3")["shards"]
    assert found["tokens"] == 90 and abs(found["loss"] - float(losses.mean())) < 1e-5
    assert call("--shards a_*.bin --max-batches 1000") == call("--shards a_*.bin")


def test_max_batches_of_a_long_shard(directory):
    """Only the rows that are asked for are listed: all of a large data set would not fit into the memory."""
    write_shard(directory / "long.bin", [0] * 1_000_000)
    tracemalloc.start()
    shards = Shards("long.bin", 1, open_model("model.bin"), 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(shards.rows) == 2 and peak < 1_000_000  # a list of all takes more than 50 bytes a row


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def evaluate_rank(ranks, directory, settings):
    os.chdir(directory)
    return evaluate(Settings(**settings), ranks)


@pytest.mark.parametrize(
    "flags",
    [
        {"hellaswag": "eval.bin", "batch_size": 8},  # 6 batches of shards for 3 ranks
        {"hellaswag": "eval.bin", "batch_size": 8, "max_batches": 2},  # one has none
        {"batch_size": 1, "seq_len": 3},
    ],
)
def test_any_number_of_ranks_measures_the_same(directory, flags):
    """The same bits, and rank 0's file."""
    settings = {"model": "model.bin", "shards": "a_*.bin", "json": "ranks.json", **flags}
    expected = evaluate(Settings(**settings), Ranks())
    file = Path("ranks.json").read_bytes()
    Path("ranks.json").unlink()
    assert run_ranks(3, evaluate_rank, directory, settings) == [expected] * 3
    assert Path("ranks.json").read_bytes() == file


class Uneven:
    """A model whose losses are so different in size that another order of adding them would show."""

    def evaluate(self, tokens, targets):
        return 10.0 ** (targets / 4 - 10)


def loss_of_rank(ranks, directory):
    os.chdir(directory)
    return Shards("a_*.bin", 3, open_model("model.bin"), None).evaluate(Uneven(), 1, ranks)


def test_sums_do_not_depend_on_the_ranks(directory):
    expected = loss_of_rank(Ranks(), directory)
    sums = [(10.0 ** (torch.tensor(text(seed, n)[1:]) / 4 - 10)).tolist() for seed, n in ((0, 700), (2, 400))]
    assert abs(expected["loss"] / (math.fsum(map(math.fsum, sums)) / 1098) - 1) < 1e-6  # fp32
    assert run_ranks(3, loss_of_rank, directory) == [expected] * 3


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


REFUSED = [  # flags, exit status, message
    ("", 2, "nothing to measure: give one or more of --hellaswag, --mmlu, --choices, --shards, --chess-shards, "),
    (
        "--hellaswag no.bin",
        1,
        "no.bin: No such file or directory; llmc-data hellaswag makes it: name it with --hellaswag",
    ),
    (
        "--mmlu a_0.bin",
        1,
        "a_0.bin is not a multiple-choice evaluation file: it is a token shard; llmc-data mmlu makes ",
    ),
    (
        "--choices big.bin",
        1,
        f"token {V} of example 1 is outside the model's vocabulary of {V}: name a file made with ",
    ),
    (
        "--choices eval.bin -e short.bin",
        1,
        "eval.bin: example 22 has a row of 24 tokens, the model a context of 23: leave that example out",
    ),
    ("--choices eval.bin -t 23", 2, "-t 23 is too short for --choices: example 22 of eval.bin has a row of 24 tokens"),
    ("--mmlu eval.bin -b 3", 2, "-b 3 is too small for --mmlu, where a question takes 4 rows: use -b 4 or more"),
    ("--shards a_*.bin -t 25", 2, "-t 25 is longer than the context of model.bin: use -t 24 or less"),
    (
        "--shards a_*.bin -b 0",
        2,
        "argument -b/--batch-size: '0' is not a whole number from 1 to 2147483647, such as 16",
    ),
    ("--shards no_*.bin", 1, "no token shards match no_*.bin"),
    ("--shards other/x.bin", 1, "has 66 tokens, the model model.bin 65: give shards made with the model's tokenizer"),
    (
        "--shards high.bin",
        1,
        f"high.bin: token {V} at offset 30 is outside the model's vocabulary of {V}: give shards ",
    ),
    ("--shards one.bin", 1, "the shards of --shards one.bin have one token each, a loss takes two: give longer ones"),
    ("--max-batches 2 --mmlu eval.bin", 2, "--max-batches 2 has no effect here: drop it"),
    ("--chess-positions p.txt -b 4", 2, "-b 4 has no effect here: drop it"),
    ("--chess-positions p.txt", 2, "--chess-positions p.txt: model.bin has a vocabulary of 65 tokens, chess has 72: "),
    ("--games 3 --shards a_*.bin", 2, "--games 3 has no effect here: drop it"),
    ("--shards a_*.bin --json no/r.json", 1, "--json no/r.json cannot be written: give a file name in a directory "),
    (
        "--shards a_*.bin -e d12",
        2,
        "-e d12: only trained weights are worth asking: give a model file, whose name ends ",
    ),
    ("--shards a_*.bin -e no.bin", 1, "no.bin: No such file or directory"),
    ("--shards a_*.bin --device x", 2, "argument --device: invalid choice: 'x'"),
    ("--shards a_*.bin -e nan.bin", 1, "the loss of the shards is nan: the model's weights are of no use"),
    ("--mmlu eval.bin -e nan.bin", 1, "MMLU: the model's loss of example "),
]


@pytest.mark.parametrize(("flags", "status", "message"), REFUSED, ids=[flags for flags, *_ in REFUSED])
def test_refused(directory, capsys, flags, status, message):
    save("short.bin", (T - 1, *CASE[1:-1], T - 1))
    three = random_examples(3)
    three[1][2][2][-1] = V
    write_eval("big.bin", three)
    Path("other").mkdir()
    write_tokenizer(directory / "other" / "tokenizer.bin", V + 1)
    write_shard(directory / "other" / "x.bin", text(0, 100))
    write_shard(directory / "high.bin", [*text(0, 30), V, *text(0, 30)])
    write_shard(directory / "one.bin", [1])
    content = bytearray(Path("model.bin").read_bytes())
    content[-4:] = np.float32(math.nan).tobytes()
    rewrite("nan.bin", content)
    before = sorted(directory.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-eval", command, ["-e", "model.bin", *flags.split()])
    out, err = capsys.readouterr()
    assert caught.value.code == status and message in err
    assert err.startswith("llmc-eval: error: ") and err.count("\n") == 1 and out == ""
    assert sorted(directory.rglob("*")) == before


def test_help(capsys):
    for argument in ("-h", "--help"):
        with pytest.raises(SystemExit) as caught:
            cli.run("llmc-eval", command, [argument])
        assert caught.value.code == 0 and "usage: llmc-eval" in capsys.readouterr().out


def test_progress_on_a_terminal_only(monkeypatch, capsys):
    call("--shards a_*.bin -b 2")
    assert "\r" not in capsys.readouterr().out
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    call("--shards a_*.bin -b 2")
    assert capsys.readouterr().out.startswith("evaluating shards: 0/24\revaluating shards: 10/24\r")
