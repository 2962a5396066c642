"""HellaSwag against PyTorch in fp64, row by row without padding; files are written by hand."""

import contextlib
import io
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_testing import build, reference_model
from ranks_testing import run_ranks
from training_data import V, expect_refusal, write_data

import llmc.train
from llmc import _C
from llmc.cli.train import _main as command
from llmc.command_line import parse_args
from llmc.data.eval_file import Example
from llmc.errors import RunError
from llmc.hellaswag import count_correct, load_examples
from llmc.ranks import Ranks
from llmc.train import train as run_training

T = 24
BASE = (
    f"-e custom:l=2,c=32,h=2,t=32 -i data/t_train_*.bin -j data/t_val_*.bin -b 8 -t {T} -d 576 -g 8 -x 5 -v 2 -s 0 "
    "-m 2 -l 1e-2 --hellaswag-data eval.bin"
)
CASE = (32, V, 2, 2, 32, 10, T)


def random_examples(count, seed=0, longest=T):
    """(label, context, completions), all lengths mixed; the rows of the last example have `longest` tokens."""
    generator = np.random.default_rng(seed)

    def tokens(length):
        return generator.integers(0, V, length).tolist()

    examples = [
        (
            int(generator.integers(4)),
            tokens(generator.integers(1, 12)),
            [tokens(n) for n in generator.integers(1, 11, 4)],
        )
        for _ in range(count - 1)
    ]
    return [*examples, (3, tokens(longest - 2), [tokens(3), tokens(1), tokens(3), tokens(2)])]


def write_eval(path, examples):
    records = []
    for index, (label, context, completions) in enumerate(examples):
        runs = [word for run in (context, *completions) for word in (len(run), *run)]
        records.append([65535, 2 * (5 + len(runs)), index, label, 4, *runs])
    words = [word for record in records for word in record]
    longest = max(record[1] for record in records)
    content = struct.pack("<4i1008x", 20240522, 1, len(examples), longest)
    Path(path).write_bytes(content + struct.pack(f"<{len(words)}H", *words))


def choices_of_pytorch(reference, model, examples):
    """What the model chooses in each example, by fp64; no choice is so narrow that fp32 could make another."""
    twin = reference_model(reference, model, torch.float64)
    choices = []
    for _, context, completions in examples:
        means = []
        for completion in completions:
            row = torch.tensor(context + completion)
            with torch.no_grad():
                logits, _ = twin(row[None, :-1], row[None, 1:])
            losses = torch.nn.functional.cross_entropy(logits[0], row[1:], reduction="none")
            means.append(float(losses[-len(completion) :].mean()))
        best, second = sorted(means)[:2]
        assert second - best > 1e-4
        choices.append(means.index(best))
    return choices


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_eval("eval.bin", random_examples(23))
    return write_data(tmp_path, train=(2000,), val=1500)


@pytest.fixture
def train(capsys, monkeypatch):
    """Run llmc-train with BASE and further flags; what it printed, main.log, and the run."""
    runs = []
    prepare = llmc.train.prepare
    monkeypatch.setattr(llmc.train, "prepare", lambda *arguments: runs.append(prepare(*arguments)) or runs[-1])

    def run(flags):
        capsys.readouterr()
        command([*BASE.split(), *flags.split(), "-o", "out"])
        return capsys.readouterr().out, Path("out/main.log").read_text(), runs[-1]

    return run


# ----------------------------------------------------------------------------------------------------------------------
# The count


@pytest.mark.parametrize("batch_size", [4, 7, 8, 10])  # 1, 1, 2 and 2 examples a batch
def test_choices_are_those_of_pytorch(reference, batch_size):
    """Each example alone shows the choice, all of them the count."""
    examples = random_examples(23)
    model = build((*CASE[:5], batch_size, T))
    choices = choices_of_pytorch(reference, model, examples)
    assert set(choices) == {0, 1, 2, 3}
    labels = [label for label, *_ in examples]
    expected = [choice == label for choice, label in zip(choices, labels, strict=True)]
    loaded = load_examples("eval.bin", T, T, V)
    found = {example.index: count_correct(model, [example], batch_size, Ranks()) for example in loaded}
    assert [found[i] for i in range(23)] == expected
    assert count_correct(model, loaded, batch_size, Ranks()) == sum(expected)
    write_eval("eval.bin", [(choice, *rest) for choice, (_, *rest) in zip(choices, examples, strict=True)])
    assert count_correct(model, load_examples("eval.bin", T, T, V), batch_size, Ranks()) == 23


class Recorder:
    """A model that gives every token the loss of its number, and keeps what it was called with."""

    def __init__(self):
        self.shapes = []

    def evaluate(self, tokens, targets):
        assert tokens.shape == targets.shape and tokens.dtype == targets.dtype == torch.int32
        self.shapes.append(tuple(tokens.shape))
        return targets.float()


def example(label, context, *completions):
    return Example(0, label, np.array(context, np.uint16), [np.array(tokens, np.uint16) for tokens in completions])


@pytest.mark.parametrize(
    ("completions", "choice"),
    [
        (([9], [3], [4], [5]), 1),
        (([2, 8], [3, 3, 3], [4], [5]), 1),  # means, not sums
        (([1, 9], [9, 1], [6], [4, 5]), 3),  # all tokens count, the context does not
        (([7], [5], [5, 5], [5]), 1),  # of equal ones the first
        (([5, 5], [4, 6], [5], [6]), 0),
    ],
)
def test_the_rule(completions, choice):
    for label in range(4):
        assert count_correct(Recorder(), [example(label, [60], *completions)], 4, Ranks()) == (label == choice)


@pytest.mark.parametrize(("batch_size", "rows"), [(4, [4] * 23), (9, [8] * 11 + [4]), (64, [64, 28])])
def test_batches(batch_size, rows):
    """Whole examples, no longer than they need to be: sorted by length, so each begins where the one before ended."""
    model = Recorder()
    count_correct(model, load_examples("eval.bin", T, T, V), batch_size, Ranks())
    lengths = sorted(len(context) + max(map(len, completions)) - 1 for _, context, completions in random_examples(23))
    step = batch_size // 4
    longest = [max(lengths[first : first + step]) for first in range(0, 23, step)]
    assert model.shapes == list(zip(rows, longest, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks


def count_on_rank(ranks, path, stages):
    """Of each stage: the count, and how often the model was called."""
    comm = _C.gloo_communicator(ranks.group_name) if ranks.size > 1 else None
    results = []
    for stage in stages:
        model = build(CASE, comm=comm, zero_stage=stage)
        calls = []

        class Counted:
            def evaluate(self, tokens, targets, model=model, calls=calls):
                calls.append(tokens.shape)
                return model.evaluate(tokens, targets)

        results.append((count_correct(Counted(), load_examples(path, T, T, V), CASE[5], ranks), len(calls)))
    return results


@pytest.mark.parametrize("count", [23, 3])  # 12 batches for 3 ranks; 2, so that one has none
def test_any_number_of_ranks_counts_the_same(reference, directory, count):
    examples = random_examples(count)
    model = build(CASE)
    choices = choices_of_pytorch(reference, model, examples)
    # Every other one is right, the last among them: counted twice or not at all it would show.
    labels = [(choice + i % 2) % 4 for i, choice in enumerate(choices)]
    write_eval("eval.bin", [(label, *rest) for label, (_, *rest) in zip(labels, examples, strict=True)])
    for size in (1, 3):
        results = run_ranks(size, count_on_rank, str(directory / "eval.bin"), [0, 3] if size > 1 else [0])
        batches = -(-count // 2)
        assert all(result == ((count + 1) // 2, -(-batches // size)) for rank in results for result in rank)


def train_rank(ranks, directory, flags):
    """What a rank prints, or the refusal."""
    os.chdir(directory)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            run_training(parse_args(f"{BASE} {flags.format(rank=ranks.rank)}".split()).config, ranks)
        except RunError as error:
            out.write(str(error))
    return out.getvalue()


def test_the_trainer_on_three_ranks(directory):
    """-a 1: all train on the same tokens, so that step by step they count the same."""
    lines = []
    for size, stage in ((1, 0), (3, 0), (3, 3)):
        printed, *_ = run_ranks(
            size, train_rank, directory, f"-a 1 -m 1 -h 1 -b {24 // size} -z {stage} -o {size}{stage}"
        )
        lines.append(re.findall("^HellaSwag: .*$", printed, re.M))
        assert Path(f"{size}{stage}/main.log").read_text().count(" eval:") == 3
    assert len(lines[0]) == 3 and lines[0] == lines[1] == lines[2]


def test_ranks_that_see_different_files(directory):
    """One with fewer batches would make the others wait."""
    for rank in range(2):
        write_eval(f"eval{rank}.bin", random_examples(5 - rank))
    refusals = run_ranks(2, train_rank, directory, "-h 1 -b 6 --hellaswag-data eval{rank}.bin -o out")
    assert refusals == ["the ranks do not agree on the number of examples for -h: 5 on rank 0, 4 on rank 1"] * 2


# ----------------------------------------------------------------------------------------------------------------------
# The trainer


def kinds(printed):
    return [line.split()[0] for line in printed.splitlines() if re.match("val loss|HellaSwag|step |generating", line)]


def test_console_and_log(reference, train):
    """After validation, but not at step 0; the model at the end is the one that is counted last."""
    printed, log, run = train("-h 1 -s 4")
    expected = "val step step val HellaSwag: step step val HellaSwag: generating: step val HellaSwag: generating:"
    assert kinds(printed) == expected.split()
    assert re.search(r"^\| run hellaswag +\| yes +\|$", printed, re.M)
    counts = re.findall(r"^HellaSwag: (\d+)/23 = (0\.\d{6})$", printed, re.M)
    assert [f"{int(correct) / 23:.6f}" for correct, _ in counts] == [accuracy for _, accuracy in counts]
    logged = re.findall(r"^s:(\d+) eval:(.*)$", log, re.M)
    assert logged == [(step, f"{int(n) / 23:.4f}") for step, (n, _) in zip("245", counts, strict=True)]
    choices = choices_of_pytorch(reference, run.model, random_examples(23))
    labels = [label for label, *_ in random_examples(23)]
    assert int(counts[-1][0]) == sum(choice == label for choice, label in zip(choices, labels, strict=True))


def test_it_changes_nothing_else(train):
    """The same bits with and without, but for its own lines; without, not a word about it but `no` in the table."""
    _, with_it, run = train("-h 1")
    parameters = {name: tensor.clone() for name, tensor in run.model.parameters().items()}
    printed, without, run = train("-h 0 --hellaswag-data dev/data/hellaswag/hellaswag_val.bin")
    assert re.findall("^.*hellaswag.*$", printed, re.M | re.I) == [f"| {'run hellaswag':<21} | {'no':<50} |"]
    assert re.sub(r"s:\d+ eval:.*\n", "", with_it) == without
    for name, tensor in run.model.parameters().items():
        assert torch.equal(tensor, parameters[name]), name


@pytest.mark.parametrize(("flags", "steps"), [("-x 0", [0]), ("-v 0", [5]), ("-v 5", [5]), ("-v 7 -x 3", [3])])
def test_when(train, flags, steps):
    _, log, _ = train(f"-h 1 {flags}")
    assert [int(step) for step in re.findall(r"^s:(\d+) eval:", log, re.M)] == steps


def test_resume_and_config_file(train):
    """What comes after the resume is what the unbroken run has."""
    _, unbroken, _ = train("-h 1 -n 3")
    train("-h 1 -n 3 -x 3")
    command(["--config", "out/config.toml", "-y", "1", "-x", "5"])
    resumed = Path("out/main.log").read_text()
    assert re.findall(r"^s:[45] eval.*$", resumed, re.M) == re.findall(r"^s:[45] eval.*$", unbroken, re.M) != []
    config = Path("out/config.toml").read_text()
    assert "\nhellaswag = true\n" in config and '\nhellaswag-data = "eval.bin"\n' in config


def test_dry_run_needs_no_file(capsys):
    command([*BASE.split(), "-h", "1", "--hellaswag-data", "no.bin", "--dry-run"])
    assert "steps: 5 of 576 tokens" in capsys.readouterr().out


def test_progress_on_a_terminal_only(monkeypatch):
    """Every ten batches, over one another; the result must not keep the end of a longer line."""
    examples = load_examples("eval.bin", T, T, V)
    for on_terminal, expected in (
        (True, "".join(f"evaluating HellaSwag: {i}/23\r" for i in (0, 10, 20)) + "\x1b[K"),
        (False, ""),
    ):
        out = io.StringIO()
        out.isatty = lambda on_terminal=on_terminal: on_terminal
        monkeypatch.setattr(sys, "stdout", out)
        count_correct(Recorder(), examples, 4, Ranks())
        assert out.getvalue() == expected


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

MAKES = "llmc-data hellaswag makes it: name it with --hellaswag-data, or use -h 0"
REFUSED = [  # flags, exit status, what the message must contain
    ("-b 3", 2, "-b 3 is too small for -h 1, where an example takes 4 rows: use -b 4 or more, or -h 0"),
    ("--hellaswag-data no.bin", 1, f"multiple-choice evaluation file no.bin: No such file or directory; {MAKES}"),
    ("--hellaswag-data cut.bin", 1, "cut.bin: example 22 of 23 is truncated: it says it has "),
    (
        "--hellaswag-data data/t_val_0.bin",
        1,
        "data/t_val_0.bin is not a multiple-choice evaluation file: it is a token ",
    ),
    (
        *("--hellaswag-data gpt2.bin", 1),
        f"gpt2.bin: token 65 of example 1 is outside the model's vocabulary of {V}: name a file made with the model's "
        "tokenizer with --hellaswag-data, or use -h 0",
    ),
    (
        "-t 23",
        2,
        "-t 23 is too short for -h 1: example 22 of eval.bin has a row of 24 tokens: use -t 24 or more, or use -h 0",
    ),
]


@pytest.mark.parametrize(("flags", "status", "message"), REFUSED, ids=[flags for flags, *_ in REFUSED])
def test_refused_before_anything_is_touched(directory, capsys, flags, status, message):
    (directory / "cut.bin").write_bytes((directory / "eval.bin").read_bytes()[:-2])
    three = random_examples(3)
    three[1][2][2][-1] = V
    write_eval("gpt2.bin", three)
    before = sorted(directory.rglob("*"))
    expect_refusal(capsys, [*BASE.split(), "-d", "-1", "-h", "1", *flags.split(), "-o", "out"], status, message)
    assert sorted(directory.rglob("*")) == before
