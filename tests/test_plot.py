"""llmc-plot: the lines of the figure are the numbers of the logs; what is refused."""

import math
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc import cli
from llmc.cli.plot import _main as command
from llmc.config import TrainConfig
from llmc.config_file import write_config_file
from llmc.errors import RunError
from llmc.plot import (
    draw,
    plot,
    read_run,
    references_of,
    running_mean,
)
from llmc.references import OF_SIZE, REFERENCES

pytest.importorskip("matplotlib")

LOG = "".join(f"s:{step} trl:{10 - step / 50:.4f} lr:0.000300 norm:{1 + step % 3}.00\n" for step in range(200))
LOG += "s:0 tel:10.5000\ns:100 tel:8.5000\ns:200 tel:6.5000\ns:100 eval:0.2500\ns:200 eval:0.3000\n"


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "main.log").write_text(LOG)
    return tmp_path


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def figure_of(paths, x_scales, references=(), x="steps"):
    return draw([read_run(path) for path in paths], x_scales, "", x, dict.fromkeys(references, True))


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return axes


def data(line):
    return [list(values) for values in line.get_data()]


def test_a_picture(directory, capsys):
    command(["one", "--title", "A run"])
    assert capsys.readouterr().out == "wrote plot.png\n"
    # Loss, HellaSwag, norm and learning rate: two by two panels of 7 by 4.5 inches.
    assert png_size(directory / "plot.png") == (1400, 900)
    (directory / "two" / "main.log").write_text("s:0 tel:3.0\ns:10 tel:2.0\n")
    command(["two", "--out", "two.png"])
    assert png_size(directory / "two.png") == (700, 450)


@pytest.mark.parametrize(("suffix", "begin"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_other_formats(directory, suffix, begin):
    command(["one", "--out", f"a.{suffix}"])
    assert (directory / f"a.{suffix}").read_bytes().startswith(begin)


def test_lines_are_the_log(directory):
    figure = figure_of([directory / "one"], [1.0])
    assert [axes.get_title() for axes in figure.axes] == [
        "loss", "HellaSwag accuracy", "gradient norm", "learning rate",
    ]  # fmt: skip
    losses = [round(10 - step / 50, 4) for step in range(200)]
    raw, mean, validation = panel(figure, "loss").get_lines()
    assert data(raw) == [list(range(200)), losses]
    # 2 values on each side, fewer at the ends; of a straight line the mean is the middle.
    xs, ys = data(mean)
    assert xs == list(range(200))
    expected = [float(np.mean(losses[max(0, i - 2) : i + 3])) for i in range(200)]
    assert ys == pytest.approx(expected, abs=1e-9)
    assert data(validation) == [[0, 100, 200], [10.5, 8.5, 6.5]]
    assert mean.get_linewidth() > raw.get_linewidth()
    assert raw.get_color() == mean.get_color() == validation.get_color()
    (hellaswag,) = panel(figure, "HellaSwag accuracy").get_lines()
    assert data(hellaswag) == [[100, 200], [0.25, 0.3]]
    norm, mean = panel(figure, "gradient norm").get_lines()
    assert data(norm) == [list(range(200)), [1.0 + step % 3 for step in range(200)]]
    assert data(mean)[1][1:3] == [1.75, 1.8]  # of 1 2 3 1 and of 1 2 3 1 2
    (rate,) = panel(figure, "learning rate").get_lines()
    assert data(rate) == [list(range(200)), [3e-4] * 200]
    labels = [text.get_text() for text in panel(figure, "loss").get_legend().get_texts()]
    assert labels == ["one, training", "one, validation"]


def test_the_first_losses_of_a_long_run_leave_the_panel(directory):
    """The last 95% of 200 steps begin at step 10; the highest loss there is 9.8, the lowest, of validation, 6.02."""
    low, high = panel(figure_of([directory / "one"], [1.0]), "loss").get_ylim()
    assert (low, high) == pytest.approx((6.02 - 0.05 * (9.8 - 6.02), 9.8), abs=0.03)
    (directory / "two" / "main.log").write_text(LOG[: LOG.index("s:50 ")])
    figure = figure_of([directory / "one", directory / "two"], [1.0, 1.0])
    assert panel(figure, "loss").get_ylim()[1] > 10.5  # not where one of them is short


def test_several_runs(directory):
    figure = figure_of([directory / "one", directory / "two" / "main.log"], [1.0, 1.0])
    one, two = panel(figure, "learning rate").get_lines()
    assert (one.get_label(), two.get_label()) == ("one", "two")
    assert one.get_color() != two.get_color()
    assert data(one) == data(two)


def test_runs_of_the_same_name(directory, capsys):
    deep = directory / "two" / "one"
    deep.mkdir()
    (deep / "main.log").write_text(LOG)
    command(["one", "two/one", "--out", "a.svg"])
    text = (directory / "a.svg").read_text()
    assert "<!-- one/main.log -->" in text and "<!-- two/one/main.log -->" in text


def test_tokens(directory, capsys):
    write_config_file("one/config.toml", TrainConfig(batch_size=4, seq_len=64, total_batch_size=512))
    run = read_run(directory / "one")
    assert run.tokens_per_step == (512, "")
    figure = figure_of([directory / "one"], [512], x="tokens")
    *_, validation = panel(figure, "loss").get_lines()
    assert data(validation) == [[0, 51200, 102400], [10.5, 8.5, 6.5]]
    assert panel(figure, "loss").get_xlabel() == "tokens"
    command(["one", "--x", "tokens"])
    assert capsys.readouterr().out == "wrote plot.png\n"
    # Without -d it depends on the number of processes.
    write_config_file("one/config.toml", TrainConfig(batch_size=4, seq_len=64, sample_length=8))
    command(["one", "--x", "tokens"])
    note = "note: one: 256 tokens a step, if it had 1 process(es): its log does not say it\n"
    assert capsys.readouterr().out == f"{note}wrote plot.png\n"


JSON = '{"step": 0, "tokens": 0, "tokens_per_s": 100.0}\n{"step": 4, "tokens": 128, "tokens_per_s": 200.5}\n'


def test_json_log(directory):
    """Beside main.log it adds the speed and the tokens of a step; alone it is a log as well."""
    (directory / "one" / "main.jsonl").write_text(JSON)
    run = read_run(directory / "one")
    assert run.tokens_per_step == (32, "")
    (speed,) = panel(figure_of([directory / "one"], [32]), "tokens/s").get_lines()
    assert data(speed) == [[0, 128], [100.0, 200.5]]
    alone = read_run(directory / "one" / "main.jsonl")
    assert (alone.name, list(alone.log.series)) == ("one", ["tokens_per_s"])
    (directory / "fast.jsonl").write_text(JSON)
    assert read_run(directory / "fast.jsonl").name == "fast"


def test_running_mean():
    values = np.random.default_rng(0).normal(size=1000) + 5
    values[[0, 1, 500]] = math.nan
    values[501] = math.inf
    finite = np.where(np.isfinite(values), values, math.nan)
    expected = [np.nanmean(finite[max(0, i - 10) : i + 11]) for i in range(1000)]
    assert running_mean(values) == pytest.approx(expected)
    np.testing.assert_array_equal(running_mean(np.array([math.nan, 2.0])), [math.nan, 2.0])


def test_reference_lines(directory):
    figure = figure_of([directory / "one"], [1.0], ["gpt2_124M", "gpt3_125M", "gpt2_1558M"])
    lines = {line.get_label(): line.get_ydata()[0] for line in panel(figure, "loss").get_lines()[3:]}
    assert lines == {"GPT-2 124M on FineWeb": 3.424958, "GPT-2 1558M on FineWeb-Edu": 2.831273}
    assert panel(figure, "loss").get_ylim()[0] < 2.83  # also where the run itself is far above
    lines = {line.get_label(): line.get_ydata()[0] for line in panel(figure, "HellaSwag accuracy").get_lines()[1:]}
    assert lines == {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337, "GPT-2 1558M": 0.488946}
    assert len(panel(figure, "learning rate").get_lines()) == 1
    figure = draw([read_run(directory / "one")], [1.0], "", "steps", {"gpt2_124M": False})  # its loss does not compare
    assert len(panel(figure, "loss").get_lines()) == 3 and len(panel(figure, "HellaSwag accuracy").get_lines()) == 2


def test_reference_values():
    assert [reference.val_loss for reference in REFERENCES.values()] == [
        3.424958, 3.083089, 3.000580, 2.831273, None, None, None, None,
    ]  # fmt: skip
    assert [reference.hellaswag for reference in REFERENCES.values()] == [
        0.294463, 0.375224, 0.431986, 0.488946, 0.337, 0.436, 0.510, 0.547,
    ]  # fmt: skip
    assert {name for names in OF_SIZE.values() for name in names} == set(REFERENCES)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("d12", ["gpt2_124M", "gpt3_125M"]),
        ("gpt2:d24", ["gpt2_350M", "gpt3_350M"]),
        ("gpt3:c1536", ["gpt2_774M", "gpt3_760M"]),
        ("gpt3:c2048", ["gpt2_1558M", "gpt3_1300M"]),
        ("d48", ["gpt2_1558M", "gpt3_1300M"]),
        ("d6", []),
        ("chess:d12", []),  # another vocabulary
        ("custom:l=12,c=768,h=12,t=64", []),  # of whatever data
        ("no.bin", []),
        ("damaged", []),
    ],
)
def test_references_by_size(directory, model, names):
    write_config_file("one/config.toml", TrainConfig(model=model, val_data="data/FineWeb_val_*.bin"))
    write_config_file("two/config.toml", TrainConfig(model=model, val_data="data/book_val_*.bin"))
    one, two = read_run(directory / "one"), read_run(directory / "two")
    compares = {name: REFERENCES[name].dataset == "FineWeb" for name in names}
    assert references_of([one]) == compares
    assert references_of([two]) == dict.fromkeys(names, False)  # the loss of other text does not compare
    assert references_of([two, one]) == compares


@pytest.mark.parametrize(
    ("val_data", "dataset"),
    [
        ("dev/data/fineweb10B/fineweb_val_*.bin", "FineWeb"),
        ("dev/data/edu_fineweb100B/edu_fineweb_val_*.bin", "FineWeb-Edu"),
        ("FineWeb-Edu/val_*.bin", "FineWeb-Edu"),
        ("/home/education/fineweb_val_*.bin", "FineWeb"),
        ("dev/data/book/book_val_*.bin", None),
    ],
)
def test_losses_compare_on_the_same_text(directory, val_data, dataset):
    """OpenAI's 124M was measured on FineWeb, its 1558M on FineWeb-Edu, which is easier."""
    for model, name, measured_on in (("d12", "gpt2_124M", "FineWeb"), ("d48", "gpt2_1558M", "FineWeb-Edu")):
        write_config_file("one/config.toml", TrainConfig(model=model, val_data=val_data))
        assert references_of([read_run(directory / "one")])[name] == (dataset == measured_on)


def test_references_by_the_checkpoint(directory):
    """llm.c's runs have no config.toml."""
    N = 50304 * 768 + 1024 * 768 + 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768
    model = directory / "one" / "model_00000100.bin"
    model.write_bytes(struct.pack("<256i", 20240326, 5, 1024, 50257, 12, 12, 768, 50304, *[0] * 248))
    os.truncate(model, 1024 + 2 * N)  # a hole, no bytes on the disk
    assert references_of([read_run(directory / "one")]) == {"gpt2_124M": False, "gpt3_125M": False}


def test_reference_flags(directory, capsys):
    write_config_file("one/config.toml", TrainConfig(model="d12", val_data="data/fineweb_val_*.bin"))
    for flags, labels in [
        ([], ["GPT-2 124M", "GPT-3 125M"]),
        (["--reference", "none"], []),
        (["--reference", "gpt3_760M", "--reference", "gpt2_350M"], ["GPT-2 350M", "GPT-3 760M"]),
    ]:
        command(["one", "--out", "a.svg", *flags])
        found = set(re.findall(r"<!-- (GPT-\S+ \S+)(?: on FineWeb)? -->", (directory / "a.svg").read_text()))
        assert found == set(labels)


def test_what_is_passed_over_is_said(directory, capsys):
    with open("one/main.log", "a") as file:
        file.write("s:200 trl:")
    (directory / "two" / "config.toml").write_text("batch-size = 0\n")
    command(["one", "two"])
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "note: one/main.log line 206 was cut off in the middle and is passed over",
        "note: two/config.toml is passed over: --config two/config.toml: -b/--batch-size 0: it must be 1 or more",
        "wrote plot.png",
    ]


REFUSED = [
    ("no", 1, "no does not exist: give the output directory of a run (-o), a main.log or a JSON log"),
    ("empty", 1, "empty/main.log does not exist: give the output directory"),
    ("empty.log", 1, "empty.log has no line yet: wait until the run has logged something"),
    ("other.jsonl", 1, "other.jsonl has nothing to draw: none of hellaswag, loss, lr, norm, tokens_per_s, val_loss"),
    ("damaged.log", 1, "damaged.log line 1 is damaged: 'hello' is no line of a main.log, such as s:20 tel:3.5000"),
    ("damaged.jsonl", 1, "damaged.jsonl line 1 is damaged: 'hello' is no line of a JSON log"),
    ("one --out plot.gif", 2, "--out plot.gif: the name must end in .png, .pdf, .svg"),
    ("one --out one/main.log", 2, "--out one/main.log: the name must end in"),
    ("one --out no/plot.png", 1, "cannot write no/plot.png: No such file or directory"),
    ("one --x tokens", 2, "nothing says how many tokens a step of one/main.log has: there is no config.toml"),
    ("one --x time", 2, "invalid choice: 'time'"),
    ("one --reference gpt2_125M", 2, "invalid choice: 'gpt2_125M'"),
    ("one --reference none --reference gpt2_124M", 2, "--reference none contradicts the others: drop it, or them"),
    ("", 2, "the following arguments are required: RUN"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), REFUSED, ids=[arguments for arguments, *_ in REFUSED])
def test_refusals(directory, capsys, arguments, status, message):
    (directory / "empty").mkdir()
    (directory / "empty.log").write_text("")
    (directory / "other.jsonl").write_text('{"step": 1, "accuracy": 0.5, "ms": 3}\n')
    for name in ("damaged.log", "damaged.jsonl"):
        (directory / name).write_text("hello\n")
    before = sorted(directory.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-plot", command, arguments.split())
    captured = capsys.readouterr()
    assert caught.value.code == status
    assert captured.err.startswith("llmc-plot: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert sorted(directory.rglob("*")) == before
    assert (directory / "one" / "main.log").read_text() == LOG


def test_without_matplotlib(directory, monkeypatch):
    monkeypatch.setattr("llmc.plot.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match="llmc-plot needs a package that is not installed: pip install matplotlib"):
        plot([directory / "one"], Path("plot.png"), "", "steps", [])


def test_help_does_not_wait_for_matplotlib_or_torch():
    code = "import sys; from llmc.cli.plot import main; sys.argv = ['llmc-plot', '--help']\n"
    code += "try: main()\nfinally: print({'torch', 'matplotlib'} & {*sys.modules}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "set()\n")
    assert all(name in result.stdout for name in REFERENCES)
