"""Readers under damaged files: a short run of tests/fuzz/run.py, and that it finds what there is to find."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("zstandard")

import mutator  # noqa: E402
from targets import TARGETS, accepted  # noqa: E402

DEFECT = 77  # exit status of the fuzzer


@pytest.mark.parametrize("name", TARGETS)
def test_intact_files_are_accepted(tmp_path: Path, name: str) -> None:
    """Otherwise no mutation of them gets far."""
    target = TARGETS[name]
    (seeds := tmp_path / "seeds").mkdir()
    target.seeds(seeds)
    (work := tmp_path / "work").mkdir()
    target.beside(work)
    for seed in sorted(seeds.iterdir()):
        path = work / target.file
        path.unlink(missing_ok=True)
        path.write_bytes(seed.read_bytes())
        # A rank file would need one of four numbers of ranks.
        assert accepted(target.read, path) == (name != "rank_file"), seed.name


def test_mutated_json_is_json() -> None:
    text = json.dumps({"a": [1, {"b": None}], "c": "d"}).encode()
    kinds = set()
    for seed in range(3000):
        lines = mutator.mutate(text + b"\n" + text, seed).split(b"\n")
        assert text in lines and len(lines) == 2
        kinds.update(type(json.loads(line)).__name__ for line in lines)
    assert kinds == {"dict", "list", "str", "int", "float", "bool", "NoneType"}
    assert mutator.mutate(b"{", 0) is None


def fuzz(arguments: list[str], keep: Path, planted: str = "") -> subprocess.CompletedProcess[str]:
    """planted: statements before the run, which may change the readers."""
    pytest.importorskip("atheris")
    program = keep / "run_it.py"  # a file: it may begin itself anew
    program.write_text(f"import sys\nsys.path.insert(0, {str(FUZZ)!r})\nimport run\n{planted}\nrun.main()\n")
    command = [sys.executable, str(program), *arguments, "--keep", str(keep)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)


@pytest.mark.parametrize(("group", "inputs", "seconds"), [("files", 60_000, 15), ("games", 40_000, 8)])
def test_a_short_run(tmp_path: Path, group: str, inputs: int, seconds: int) -> None:
    result = fuzz(["--reader", group, "--inputs", str(inputs), "--seconds", str(seconds)], tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(list((tmp_path / group).iterdir())) > 50  # inputs that led on
    assert list((tmp_path / "found").iterdir()) == []


def test_the_long_form_counts_over_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris")
    import long

    def feed(reader: str, inputs: int, seconds: int, seed: int) -> tuple[int, bool]:
        asked.append((reader, inputs, seed))
        return min(inputs, 600), reader == "shard"

    monkeypatch.setattr(long, "TABLE", tmp_path / "fuzz.csv")
    monkeypatch.setattr(long, "feed", feed)
    monkeypatch.setattr(sys, "argv", ["long.py", "eval", "shard", "--inputs", "1000"])
    for again in (False, True):
        asked: list[tuple[str, int, int]] = []
        long.main()
        # What failed is not fed on until somebody has mended it and removed its line.
        assert asked == ([] if again else [("eval", 1000, 1), ("eval", 400, 601), ("shard", 1000, 1)])
    today = date.today()
    header, *lines = (tmp_path / "fuzz.csv").read_text().splitlines()
    assert header == "reader,inputs,failures,date" and len(lines) == len(TARGETS) + 4
    assert {f"eval,1000,0,{today}", f"shard,600,1,{today}", "model,0,0,", "pgn,0,0,"} <= {*lines}


PLANTED = """
import atheris

@atheris.instrument_func
def read(path):
    content = path.read_bytes()
    if content[3:4] == b"x" and content[7:8] == b"y":
        {failure}

run.TARGETS["eval"] = run.Target("x", read, run.TARGETS["eval"].seeds)
"""


@pytest.mark.parametrize("failure", ["raise KeyError(5)", "bytearray(2**30)"])
def test_a_planted_defect_is_found(tmp_path: Path, failure: str) -> None:
    """Two bytes at two places: mutations alone would take some billions, but each gets a step further by itself."""
    result = fuzz(["--reader", "eval", "--inputs", "200000"], tmp_path, PLANTED.format(failure=failure))
    assert result.returncode == DEFECT, result.stderr[-4000:]
    (found,) = (tmp_path / "found").iterdir()
    assert found.read_bytes()[3::4][:2] == b"xy"
