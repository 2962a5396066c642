"""What the trainer's tests share: files to train on, laid out by hand, and what a refusal looks like."""

import struct
from pathlib import Path

import numpy as np
import pytest

from llmc import cli
from llmc.checksum import seal, verify
from llmc.cli.train import _main as command

V = 65  # vocabulary


def header(*slots: int) -> bytes:
    return struct.pack("<256i", *slots, *[0] * (256 - len(slots)))


def write_shard(path: Path, tokens: list[int]) -> None:
    path.write_bytes(header(20240520, 1, len(tokens)) + struct.pack(f"<{len(tokens)}H", *tokens))


def without_checksum(path: str | Path) -> bytes:
    """The bytes of a file of ours, the slots of its checksum 0; tests/test_checksum.py is about these."""
    assert verify(path)
    raw = Path(path).read_bytes()
    return raw[:160] + bytes(8) + raw[168:]


def rewrite(path: str | Path, raw: bytes) -> None:
    """Other bytes in the place of a file of ours, with a checksum of their own."""
    with open(path, "w+b") as file:
        file.write(raw)
        seal(file)


def write_tokenizer(path: Path, vocab_size: int, end_of_text: int = 0) -> None:
    """One byte per token, from '!' on."""
    path.write_bytes(
        header(20240328, 2, vocab_size, end_of_text) + b"".join(bytes([1, 33 + id]) for id in range(vocab_size))
    )


def text(seed: int, n: int) -> list[int]:
    """A noisy walk over the vocabulary: there is something to learn."""
    steps = np.random.default_rng(seed).integers(1, 4, n)
    return [int(token) for token in np.cumsum(steps) % V]


def write_data(directory: Path, train: tuple[int, ...] = (900,), val: int = 300) -> Path:
    """A data set in `directory`/data: training shards of so many tokens, a validation shard, and the tokenizer."""
    (directory / "data").mkdir()
    for i, tokens in enumerate(train):
        write_shard(directory / "data" / f"t_train_{i}.bin", text(i, tokens))
    write_shard(directory / "data" / "t_val_0.bin", text(9, val))
    write_tokenizer(directory / "data" / "tokenizer.bin", V)
    return directory


def expect_refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str) -> None:
    """llmc-train ends with this status, one line that holds `message`, and nothing else printed."""
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-train", command, arguments)
    captured = capsys.readouterr()
    assert caught.value.code == status
    assert captured.err.startswith("llmc-train: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
