"""Runs `llmc-data` in this process and reads what it makes."""

import struct
from pathlib import Path

import pytest

from llmc.cli import run
from llmc.cli.data import _main


def call(*arguments: object) -> None:
    run("llmc-data", _main, [str(argument) for argument in arguments])


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Expect failure with this status and one line; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == status
    assert out == "" and err.startswith("llmc-data: error: ") and err.count("\n") == 1
    return err.removeprefix("llmc-data: error: ").strip()


def shard(path: str | Path) -> list[int]:
    """Tokens read by the format's description, not by our reader."""
    raw = Path(path).read_bytes()
    magic, version, n = struct.unpack("<3i", raw[:12])
    assert (magic, version, len(raw)) == (20240520, 1, 1024 + 2 * n)
    return list(struct.unpack(f"<{n}H", raw[1024:]))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
