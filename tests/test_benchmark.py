"""scripts/benchmark.py: a whole run of a tiny model, what it works out, its errors, the turns of llm.c's program."""

import csv
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.errors import RunError, UsageError

ROOT = Path(__file__).parent.parent
TINY_MODEL = "custom:l=1,c=16,h=2,t=16,v=65"
TINY = f"{TINY_MODEL}:2x8"
TEXTS = f"{TINY_MODEL}:sample12"
# wte of 128 padded rows, wpe, a layer (12 C² in matrices, 13 C in vectors), the last layernorm
TINY_PARAMETERS = 128 * 16 + 16 * 16 + (12 * 16 * 16 + 13 * 16) + 2 * 16


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import benchmark

        yield benchmark


@pytest.fixture(scope="module")
def cases(benchmark):
    import benchmark_cases

    return benchmark_cases


@pytest.fixture(scope="module")
def contenders(benchmark):
    import benchmark_contenders

    return benchmark_contenders


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


STEPS = """#!/bin/sh
echo "[GPT-2]"
step=0
while [ $step -lt %d ]; do
  echo "step $step: train loss 5.3 (took 1.500 ms)"
  step=$((step + 1))
  sleep 0.002
done
"""


def test_a_run(tmp_path):
    fake = program(tmp_path / "train_gpt2", STEPS % 1000)
    command = [sys.executable, ROOT / "scripts/benchmark.py", "--rounds", "1", "--steps", "1", "--threads", "1"]
    command += ["--cases", TINY, TEXTS, "--peers", "eager", "--llm-c", f"{TINY}={fake}"]
    command += ["--csv", "b.csv", "--chart", "b.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")

    flops = 16 * (6 * TINY_PARAMETERS + 6 * 1 * 16 * 8)
    assert f"{TINY}: {TINY_PARAMETERS} parameters, 16 tokens" in result.stdout
    for name in ("llmc", "eager", "llm.c"):
        assert re.search(
            rf"^{name} +[\d.]+ +\d+ +[\d.]+x +[\d.]+ +[\d.]+% +\d+ +-?\d+ +-?[\d.]+x$", result.stdout, re.M
        )
    for name in ("llmc", "eager"):
        assert re.search(rf"^{name} +[\d.]+ +\d+ +[\d.]+x +\d+$", result.stdout, re.M)
    assert f"{TEXTS}: {TINY_PARAMETERS} parameters, 11 tokens a text" in result.stdout
    assert re.search(r"^matmul_forward 16x48x16 +1 +[\d.]+ +[\d.]+% +[\d.]+ +[\d.]+% +[\d.]+$", result.stdout, re.M)
    assert re.search(r"^matmul_forward 1x48x16 +11 ", result.stdout, re.M)
    assert len(re.findall(r"^between them +[\d.]+ +[\d.]+%$", result.stdout, re.M)) == 2

    with open(tmp_path / "b.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(TINY, name, str(flops)) for name in ("llmc", "eager", "llm.c")]
    expected += [(TEXTS, name, "0") for name in ("llmc", "eager")]
    assert [(row["case"], row["contender"], row["flops_per_step"]) for row in rows] == expected
    for row in rows:
        assert row["threads"] == "1"
        assert 0.1 < float(row["peak_gflops"]) < 10_000
        assert 0.1 < float(row["copy_gbs"]) < 10_000
        assert 0 < float(row["median_ms"]) < 10_000
    assert float(rows[2]["median_ms"]) == 1.5
    # Python with torch takes more than 100 MiB, a shell less than 20, whatever their parent, this test, has held.
    assert float(rows[0]["peak_mib"]) > 100 and float(rows[2]["peak_mib"]) < 20
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["llmc", "eager", "huggingface"])
def test_texts(cases, monkeypatch, name):
    if name == "huggingface":
        pytest.importorskip("transformers")
    monkeypatch.setattr(cases.Case, "timed", lambda case, work: work())
    text = getattr(cases.parse_case(TEXTS), name)()
    assert len(text) == 11
    assert all(0 <= token < 65 for token in text)


def test_hugging_face_is_left_out_where_it_is_missing(benchmark, cases, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peers = ["eager", "huggingface"]
    assert benchmark.available(peers, [cases.parse_case(TINY)]) == peers
    assert capsys.readouterr().out == ""
    assert benchmark.available(peers, [cases.parse_case(TEXTS)]) == ["eager"]
    assert capsys.readouterr().out == "huggingface is left out: pip install transformers\n"


def test_flops_and_shares(benchmark, cases):
    case = cases.parse_case("d12:4x64")
    assert case.tokens == 256
    assert case.flops == 256 * (6 * 124475904 + 6 * 12 * 768 * 64)
    rows = [benchmark.Row("llmc", 0.5, 2500 * 2**20), benchmark.Row("eager", 0.75, 3000 * 2**20)]
    measurement = benchmark.Measurement(case, peak=1e12, bandwidth=1e10, rows=rows, operations={}, timed_seconds=0.5)
    assert measurement.relative_seconds(rows[1]) == 1.5
    assert measurement.share_of_peak(rows[0]) == pytest.approx(case.flops / 0.5 / 1e12)
    assert measurement.excess_memory(rows[1]) == 3000 * 2**20 - 16 * 124475904


def test_small_operations_share_a_line(benchmark, cases, capsys):
    case = cases.parse_case(TINY)
    operations = {
        "small": (1, 0.001, 0, 1e6),
        "matmul_forward 1x2x3": (2, 0.5, 1e9, 1e9),
        "smaller": (3, 0.002, 1e6, 1e6),
        "adamw": (1, 0.3, 0, 3e9),
    }
    benchmark.report_operations(benchmark.Measurement(case, 1e10, 1e10, [], operations, timed_seconds=1.0))
    assert [line.split() for line in capsys.readouterr().out.strip().splitlines()[1:]] == [
        ["matmul_forward", "1x2x3", "2", "500.000", "50.0%", "2.0", "20.0%", "2.0"],
        ["adamw", "1", "300.000", "30.0%", "10.0"],
        ["others", "4", "3.000", "0.3%", "0.3", "3.3%", "0.7"],
        ["between", "them", "197.000", "19.7%"],
    ]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cases", "d12"], "--cases d12: give MODEL:BxT or MODEL:sampleN, such as d12:4x64 or d12:sample256"),
        (["--cases", "d12:0x64"], "--cases d12:0x64: give MODEL:BxT"),
        (["--cases", "d12:sample"], "--cases d12:sample: give MODEL:BxT or MODEL:sampleN"),
        (["--cases", "d12:1x1025"], "a row has from 1 to 1024 tokens, the model's context"),
        (["--cases", "d12:sample1025"], "a row has from 2 to 1024 tokens, the model's context"),
        (["--cases", "d12:sample0"], "a row has from 2 to 1024 tokens"),
        (["--cases", "d13:4x64"], "d13 is no model"),
        (["--cases", "custom:l=1,c=16,h=2,t=16:1x8"], "add ,v=SIZE"),
        (["--rounds", "0"], "--rounds and --steps must be 1 or more"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--steps", "few"], "argument --steps: invalid int value: 'few'"),
        (["--peers", "jax"], "invalid choice: 'jax'"),
        (["--llm-c", "d24:1x64=train_gpt2"], "give CASE=PATH with CASE one of those that train: d12:4x64"),
        (["--cases", "d12:sample2", "--llm-c", "d12:sample2=train_gpt2"], "CASE one of those that train: none"),
        (["--llm-c", "d12:4x64=nothing"], "'nothing' is no program"),
        (["--chart", "nowhere/b.png"], "there is no directory nowhere"),
    ],
)
def test_usage_errors(benchmark, arguments, error):
    with pytest.raises(UsageError, match=re.escape(error)):
        benchmark.main(arguments)


def test_a_csv_file_with_other_columns_is_left_alone(benchmark, tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("date,machine\n")
    with pytest.raises(UsageError, match=r"old\.csv: the file has other columns"):
        benchmark.main(["--csv", str(path)])
    assert path.read_text() == "date,machine\n"


def test_an_error_in_a_process_is_one_line(cases, contenders, capfd):
    case = replace(cases.parse_case(TINY), T=17)
    worker = contenders.Worker("llmc", cases.Case.llmc, case, threads=1)
    with closing(worker), pytest.raises(RunError, match=rf"^llmc of {TINY}: .*17"):
        worker.warm_up()
    assert capfd.readouterr().err == ""


def test_a_process_that_was_killed(cases, contenders):
    worker = contenders.Worker("llmc", cases.Case.llmc, cases.parse_case(TINY), threads=1)
    with closing(worker), pytest.raises(RunError, match=rf"^llmc of {TINY}: its process ended with status -9$"):
        worker.process.kill()
        worker.process.join()
        worker.ask(1)


# Steps of 20 ms, timed as llm.c does.
TIMED_STEPS = f"""#!{sys.executable} -S
import time
for step in range(1000):
    started = time.monotonic()
    while time.monotonic() - started < 0.02:
        time.sleep(0.001)
    print(f"step {{step}}: train loss 5.3 (took {{1e3 * (time.monotonic() - started):f}} ms)")
"""


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_program_rests_between_its_turns(contenders, tmp_path):
    with closing(contenders.Program(program(tmp_path / "train_gpt2", TIMED_STEPS))) as fake:
        fake.warm_up()
        for _ in range(3):
            time.sleep(0.5)  # by which the step that was interrupted took longer
            assert state(fake.process.pid) == "T"
            seconds = fake.ask(2)
            assert len(seconds) == 2
            assert all(0.02 <= second < 0.4 for second in seconds)
        assert 1 < fake.peak_memory() / 2**20 < 50
    assert fake.process.returncode == -9


@pytest.mark.parametrize(
    ("text", "last_line"),
    [
        (STEPS % 5, "step 4: train loss 5.3 (took 1.500 ms)"),
        ("#!/bin/sh\necho started\necho 'Error: no file gpt2_124M.bin' >&2\nexit 1\n", "Error: no file gpt2_124M.bin"),
        ("#!/bin/sh\n", ""),
    ],
)
def test_a_program_that_ends_early(contenders, tmp_path, text, last_line):
    error = f"ended before it had printed enough lines like llm.c's .*its last line: '{re.escape(last_line)}'"
    with (
        closing(contenders.Program(program(tmp_path / "train_gpt2", text))) as fake,
        pytest.raises(RunError, match=error),
    ):
        fake.warm_up()
        fake.ask(4)


def test_a_program_that_is_none(contenders, tmp_path):
    with pytest.raises(RunError, match="train_gpt2 cannot be started: Exec format error"):
        contenders.Program(program(tmp_path / "train_gpt2", "\0"))


def test_a_silent_program(contenders, tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "LONGEST_STEP", 0.1)
    fake = contenders.Program(program(tmp_path / "train_gpt2", "#!/bin/sh\nexec sleep 100\n"))
    with closing(fake), pytest.raises(RunError, match=r"has not printed the line of a step for 0\.1 s"):
        fake.warm_up()
    with pytest.raises(ProcessLookupError):
        os.kill(fake.process.pid, 0)
