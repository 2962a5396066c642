"""The README's journeys, command by command, with smaller inputs in the place of downloads and of hours of training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. "
GAMES = ["1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6 5. O-O Be7 6. Re1 b5 7. Bb3 d6 1-0",
         "1. d4 d5 2. c4 e6 3. Nc3 Nf6 4. Bg5 Be7 5. e3 O-O 6. Nf3 h6 7. Bh4 b6 1/2-1/2"]  # fmt: skip


def fine_tune(directory: Path) -> list[tuple[str, str]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    from llmc.hf_tokenizer import write_gpt2

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, n_positions=64))
    model.save_pretrained(directory / "copy_of_gpt2")
    write_gpt2(directory / "copy_of_gpt2", max_seq_len=64)
    (directory / "my_book.txt").write_text(SENTENCE * 100)
    return [
        ("llmc-convert gpt2 ", "llmc-convert copy_of_gpt2 "),
        ("-b 4 -t 256 -x 200", "-b 4 -t 16 -x 2"),
        ("-v 50 -s 100 -g 100 -n 200", "-v 1 -s 1 -g 8 -n 2"),
        ("model_00000200", "model_00000002"),
        ("--top-k 40", "--top-k 40 --max-tokens 8"),
    ]


def reproduce(directory: Path) -> list[tuple[str, str]]:
    (directory / "fineweb").mkdir()
    documents = "".join(json.dumps({"text": SENTENCE * 20}) + "\n" for _ in range(20))
    (directory / "fineweb/part.jsonl").write_text(documents)
    question = {"ind": 0, "ctx": "It was a", "label": 1, "endings": ["red day", "cold day", "day", "clock"]}
    (directory / "hellaswag_val.jsonl").write_text(json.dumps(question) + "\n")
    small = "-e custom:l=1,c=16,h=1,t=64 -b 4 -t 64 -d 256 -x 2 -u 1 -g 8"
    return [
        ("llmc-data fineweb", "llmc-data fineweb --input fineweb --shard-tokens 2000"),
        ("llmc-data hellaswag", "llmc-data hellaswag --input hellaswag_val.jsonl"),
        ("scripts/run_gpt2_124M.sh", f"NPROC=1 {ROOT}/scripts/run_gpt2_124M.sh {small}"),
        ("model_00018865", "model_00000002"),
    ]


def play_chess(directory: Path) -> list[tuple[str, str]]:
    (directory / "games.pgn").write_text("".join(f'[Event "?"]\n\n{game}\n\n' for game in GAMES * 60))
    return [
        ("llmc-data lichess 2013-01", "llmc-data lichess --pgn games.pgn --name 201301 --val-fraction 0.3"),
        ("l=6,c=128,h=4,t=256", "l=1,c=16,h=1,t=64"),
        ("-b 8 -t 128 -x 6600", "-b 4 -t 32 -x 2"),
        ("-b 8 -t 256 -x 1950", "-b 4 -t 64 -x 2"),
        ("-u 200", "-u 1"),
        ("-u 50", "-u 1"),
        ("-n 6600", "-n 2"),
        ("-n 1950", "-n 2"),
        ("model_00006600", "model_00000002"),
        ("model_00001950", "model_00000002"),
        ("--chess-shards", "--games 4 --chess-shards"),
    ]


def blocks(heading: str, language: str) -> list[str]:
    """The code of a section of the README."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


def journeys() -> list[str]:
    return blocks("Journeys", "bash")


@pytest.mark.parametrize(
    ("number", "prepare", "made"),
    [
        (0, fine_tune, {"plot.png", "my_gpt2/model.safetensors"}),
        (1, reproduce, {"plot.png", "log_gpt2_124M/main.log", "dev/data/hellaswag/hellaswag_val.bin"}),
        (2, play_chess, {"log_chess_128/model_00000002.bin", "log_chess_256/model_00000002.bin"}),
    ],
)
def test_journey(tmp_path: Path, number: int, prepare, made: set[str]) -> None:
    commands = journeys()[number]
    for written, run in prepare(tmp_path):
        assert written in commands
        commands = commands.replace(written, run)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert made <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}


def test_every_journey_is_tested() -> None:
    assert len(journeys()) == 3


def test_playing_with_the_core() -> None:
    code = "\n".join(blocks("Playing with the core", "python"))
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    steps = [line.split() for line in result.stdout.splitlines()]
    assert len(steps) == 10 and float(steps[-1][1]) < float(steps[0][1])  # the loss falls
