"""Multiple-choice evaluation files, from words laid out by hand."""

import struct
from pathlib import Path

import pytest

from llmc.data.eval_file import read_eval
from llmc.errors import RunError

FIRST = [65535, 40, 0, 2, 4, 3, 10, 11, 12, 1, 20, 2, 21, 22, 1, 23, 3, 24, 25, 26]
SECOND = [65535, 32, 1, 0, 4, 1, 65534, 1, 0, 1, 1, 2, 2, 3, 1, 4]


def eval_bytes(*examples: list[int], n: int | None = None, longest: int = 40, version: int = 1) -> bytes:
    words = [word for example in examples for word in example]
    header = struct.pack("<4i", 20240522, version, len(examples) if n is None else n, longest)
    return header + bytes(1024 - 16) + struct.pack(f"<{len(words)}H", *words)


def changed(example: list[int], **words: int) -> list[int]:
    """The example with some words replaced: w3=7 puts 7 at position 3."""
    return [words.get(f"w{i}", word) for i, word in enumerate(example)]


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(eval_bytes(FIRST, SECOND))
    examples = read_eval(path)
    assert [(e.index, e.label, e.context.tolist(), [c.tolist() for c in e.completions]) for e in examples] == [
        (0, 2, [10, 11, 12], [[20], [21, 22], [23], [24, 25, 26]]),
        (1, 0, [65534], [[0], [1], [2, 3], [4]]),
    ]


GOOD = eval_bytes(FIRST, SECOND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read multiple-choice evaluation file PATH: No such file or directory"),
        (GOOD[:1000], "PATH is not a multiple-choice evaluation file: it has 1000 bytes, the header alone takes 1024"),
        (
            struct.pack("<i", 20240520) + GOOD[4:],
            "PATH is not a multiple-choice evaluation file: it is a token shard",
        ),
        (
            eval_bytes(FIRST, version=2),
            "PATH: multiple-choice evaluation file of version 2, this program reads version 1",
        ),
        (eval_bytes(n=0), "PATH: its header gives 0 examples, expected at least 1"),
        (eval_bytes(FIRST, n=-1), "PATH: its header gives -1 examples, expected at least 1"),
        (eval_bytes(n=2), "PATH is truncated: it ends after 0 of 2 examples"),
        (eval_bytes(FIRST, SECOND, n=3), "PATH is truncated: it ends after 2 of 3 examples"),
        (eval_bytes(FIRST, [65535, 32], n=2), "PATH: example 1 of 2 is truncated: the file ends in its first words"),
        (
            GOOD[:-1],
            "PATH: example 1 of 2 is truncated: it says it has 32 bytes, the file ends after 30",
        ),
        (
            eval_bytes(FIRST, SECOND[:4]),
            "PATH: example 1 of 2 is truncated: it says it has 32 bytes, the file ends after 8",
        ),
        (eval_bytes(FIRST, SECOND, n=1), "PATH is too long: 32 bytes follow the last of 1 examples"),
        (GOOD + b"\0", "PATH is too long: 1 bytes follow the last of 2 examples"),
        (
            eval_bytes(FIRST, SECOND, longest=42),
            "PATH is damaged: its header gives the longest example 42 bytes, it is example 0 with 40",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w0=65534)),
            "PATH: example 1 of 2 is damaged: it begins with 65534, expected 65535",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w1=33)),
            "PATH: example 1 of 2 is damaged: it says it has 33 bytes, an example takes an even number from 6",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w1=4)),
            "PATH: example 1 of 2 is damaged: it says it has 4 bytes, an example takes an even number from 6",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w1=6)),
            "PATH: example 1 of 2 is damaged: it says it has 6 bytes, too few for the label",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w1=14)),
            "PATH: example 1 of 2 is damaged: it says it has 14 bytes, too few for the length of completion 0",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w1=30)),
            "PATH: example 1 of 2 is damaged: it says it has 30 bytes, too few for completion 3",
        ),
        (
            eval_bytes(changed(FIRST, w1=42), SECOND),
            "PATH: example 0 of 2 is damaged: it says it has 42 bytes, its fields take 40",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w2=2)),
            "PATH: example 1 of 2 is damaged: it says it is example 2",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w3=4)),
            "PATH: example 1 of 2 is damaged: its label is 4, expected 0 to 3",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w4=5)),
            "PATH: example 1 of 2 is damaged: it has 5 completions, expected 4",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w5=0)),
            "PATH: example 1 of 2 is damaged: the context is empty",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w11=0)),
            "PATH: example 1 of 2 is damaged: completion 2 is empty",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w5=65535)),
            "PATH: example 1 of 2 is damaged: it says it has 32 bytes, too few for the context",
        ),
        (
            eval_bytes(FIRST, changed(SECOND, w13=65535)),
            "PATH: example 1 of 2 is damaged: completion 2 contains 65535, which is no token but begins an example",
        ),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_eval(path)
    assert str(caught.value) == message.replace("PATH", str(path))
