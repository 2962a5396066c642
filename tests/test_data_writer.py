"""The writer of data sets: its files, interrupted runs that go on, and any number of processes."""

import contextlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmc.cli.data import _main
from llmc.data import source, text, writer
from llmc.data.writer import Encoded, Vocabulary, WrittenFile, write_dataset
from llmc.errors import RunError

LETTERS = Vocabulary([b"<|end|>", *(bytes([letter]) for letter in b"abcdefghij")], 0)
LARGE = Vocabulary([b"<|end|>"] + [b"x"] * 65_536, 0)


def encode(item: str) -> Encoded:
    """End-of-text, then 1 for a, 2 for b ..."""
    if "!" in item:
        raise RunError("there is a ! in it")
    if "#" in item:
        os.kill(os.getpid(), signal.SIGKILL)
    tokens = [0, *(ord(letter) - ord("a") + 1 for letter in item)]
    return Encoded(np.array(tokens, np.uint16), Counter(kept=1, vowels=item.count("a")))


def write(
    out: Path,
    items: Iterable[str],
    val: float | int | Iterable[str],
    vocabulary: Vocabulary = LETTERS,
    workers: int = 1,
    shard_tokens: int = 100,
    fingerprint: object = 0,
) -> tuple[list[WrittenFile], Counter[str]]:
    return write_dataset(
        out,
        "x",
        vocabulary,
        items,
        encode,
        val=val,
        fingerprint={"test": fingerprint},
        workers=workers,
        shard_tokens=shard_tokens,
        size=len,
    )


def shard(path: Path) -> list[int]:
    """Tokens read by the format's description, not by our reader."""
    raw = path.read_bytes()
    magic, version, n = struct.unpack("<3i", raw[:12])
    assert (magic, version, len(raw)) == (20240520, 1, 1024 + 2 * n)
    return list(struct.unpack(f"<{n}H", raw[1024:]))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def words(n: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefghij", k=generator.randrange(1, 20))) for _ in range(n)]


def test_shards_of_equal_size(tmp_path: Path) -> None:
    """250 tokens in shards of at most 100: three of 83 or 84, not one of 50 that a batch might not fit in."""
    items = ["abcdefghi"] * 25
    written, counts = write(tmp_path, items, ["abc", "jih"])
    shards = [shard(tmp_path / f"x_train_{i:06d}.bin") for i in range(3)]
    assert sorted(map(len, shards)) == [83, 83, 84]
    assert [token for tokens in shards for token in tokens] == [*range(10)] * 25
    assert shard(tmp_path / "x_val_000000.bin") == [0, 1, 2, 3, 0, 10, 9, 8]
    body = b"\x07<|end|>" + b"".join(bytes([1, letter]) for letter in b"abcdefghij")
    assert (tmp_path / "tokenizer.bin").read_bytes() == struct.pack("<4I", 20240328, 2, 11, 0) + bytes(1008) + body
    assert counts == Counter(kept=27, vowels=26)
    assert [(file.path.name, file.contents, file.replaced) for file in written] == [
        ("x_train_000000.bin", f"{len(shards[0])} tokens", False),
        ("x_train_000001.bin", f"{len(shards[1])} tokens", False),
        ("x_train_000002.bin", f"{len(shards[2])} tokens", False),
        ("x_val_000000.bin", "8 tokens", False),
        ("tokenizer.bin", "vocabulary of 11 tokens", False),
    ]
    assert sorted(contents(tmp_path)) == sorted(file.path.name for file in written)  # nothing else is left


@pytest.mark.parametrize(
    ("val", "train_tokens", "val_tokens"),
    [
        (0.25, [0, 1, 2, 3, 0, 4], [5, 6]),
        (3, [3, 0, 4, 5, 6], [0, 1, 2]),
        (["gh"], [0, 1, 2, 3, 0, 4, 5, 6], [0, 7, 8]),
    ],
)
def test_what_is_held_out(
    tmp_path: Path, val: float | int | list[str], train_tokens: list[int], val_tokens: list[int]
) -> None:
    write(tmp_path, ["abc", "def"], val)
    assert shard(tmp_path / "x_train_000000.bin") == train_tokens
    assert shard(tmp_path / "x_val_000000.bin") == val_tokens


def test_large_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, ["abc"], ["d"], LARGE)
    raw = (tmp_path / "x_train_000000.bin").read_bytes()
    assert raw == struct.pack("<3i", 20240801, 7, 4) + bytes(1012) + struct.pack("<4I", 0, 1, 2, 3)
    write(tmp_path / "65536", ["abc"], ["d"], Vocabulary(LARGE.token_bytes[:65_536], 0))
    assert shard(tmp_path / "65536" / "x_train_000000.bin") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("items", "val", "message"),
    [
        ([], ["a"], r"the train split of x is empty \(2 tokens in all\): give more text$"),
        (["a"], [], r"the val split of x is empty \(2 tokens in all\): give more text$"),
        (["a"], 0.1, "the val split of x is empty .* give more text or another --val-fraction$"),
        (["a"], 2, "the train split of x is empty .* give more text$"),
        (["a"], 100, "the train split of x is empty .* give more text or fewer --shard-tokens$"),
    ],
)
def test_empty_split(tmp_path: Path, items: list[str], val: float | int | list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        write(tmp_path, items, val)
    assert not list(tmp_path.iterdir())


def test_any_number_of_processes(tmp_path: Path) -> None:
    items = words(200)
    one, two = (write(tmp_path / str(workers), items, 0.1, workers=workers) for workers in (1, 2))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and one[1] == two[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_failure_of_an_item(tmp_path: Path, workers: int) -> None:
    with pytest.raises(RunError, match=r"^there is a ! in it$"):
        write(tmp_path, [*words(10), "!", *words(10)], 0.1, workers=workers)
    assert not list(tmp_path.iterdir())


def test_killed_worker(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^a worker process was killed, perhaps for memory: use fewer --workers$"):
        write(tmp_path, [*words(10), "#", *words(10)], 0.1, workers=2)
    assert not list(tmp_path.iterdir())


def test_few_items_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = done = most = 0

    def items() -> Iterator[str]:
        nonlocal taken, most
        for word in words(50):
            taken += 1
            most = max(most, taken - done)
            yield word

    append = writer._Unfinished.append

    def count(self: writer._Unfinished, split: str, encoded: Encoded) -> None:
        nonlocal done
        done += 1
        append(self, split, encoded)

    monkeypatch.setattr(writer._Unfinished, "append", count)
    write(tmp_path, items(), 0.1, workers=2)
    assert done == 50 and most <= 5


# ---- interrupted runs


def stop_after(items: list[str], n: int, error: BaseException) -> Iterator[str]:
    yield from items[:n]
    raise error


def test_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items, val = words(100), words(30)
    expected = write(tmp_path / "once", items, val)
    out = tmp_path / "out"
    for train, held_out in (
        (stop_after(items, 40, KeyboardInterrupt()), val),
        (stop_after(items, 70, KeyboardInterrupt()), val),
        (items, stop_after(val, 10, KeyboardInterrupt())),
    ):
        with pytest.raises(KeyboardInterrupt):
            write(out, train, held_out)
        assert list(contents_of_visible(out)) == []
    capsys.readouterr()
    _, counts = write(out, ["?"] * 100, ["?"] * 10 + val[10:])  # "?" would be an error of encoding
    tokens = sum(len(word) + 1 for word in [*items, *val[:10]])
    assert capsys.readouterr().err == f"going on in {out}/.x.unfinished: {tokens:,} tokens are there\n"
    assert contents(out) == contents(tmp_path / "once") and counts == expected[1]


def contents_of_visible(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if not path.name.startswith(".")]


DAMAGED_JOURNALS = [  # instead of the intact one's values
    "{",
    "[" * 100_000,
    {"tokens": None},
    {"tokens": {"train": 20}},
    {"tokens": {"train": -1, "val": 0}},
    {"tokens": {"train": 1.5, "val": 0}},
    {"items": {"train": "5", "val": 0}},
    {"items": {"train": True, "val": 0}},
    {"counts": {"train": 5, "val": {}}},
    {"counts": {"train": {"kept": "x"}, "val": {}}},
]


@pytest.mark.parametrize("damage", DAMAGED_JOURNALS, ids=range(len(DAMAGED_JOURNALS)))
def test_damaged_journal(tmp_path: Path, damage: str | dict[str, object]) -> None:
    items = words(100)
    expected = write(tmp_path / "once", items, 0.1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop_after(items, 50, KeyboardInterrupt()), 0.1)
    journal = out / ".x.unfinished" / "journal.json"
    intact = json.loads(journal.read_text())
    journal.write_text(damage if isinstance(damage, str) else json.dumps({**intact, **damage}))
    _, counts = write(out, items, 0.1)
    assert contents(out) == contents(tmp_path / "once") and counts == expected[1]


@pytest.mark.parametrize("what", ["fingerprint", "tokenizer", "lost tokens"])
def test_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    items = words(100)
    vocabulary = Vocabulary([*LETTERS.token_bytes, b"k"], 0) if what == "tokenizer" else LETTERS
    write(tmp_path / "once", items, 0.1, vocabulary)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop_after(["jjj"] * 50, 50, KeyboardInterrupt()), 0.1)
    if what == "lost tokens":
        os.truncate(out / ".x.unfinished" / "train.tokens", 10)
    capsys.readouterr()
    write(out, items, 0.1, vocabulary, fingerprint=int(what == "fingerprint"))
    error = capsys.readouterr().err
    assert contents(out) == contents(tmp_path / "once")
    assert error.startswith("starting over: ") and error.count("\n") == 1


class Interrupting(np.ndarray):  # type: ignore[type-arg]
    """Tokens whose number is asked for just when Ctrl-C is pressed."""

    def __len__(self) -> int:
        signal.raise_signal(signal.SIGINT)
        return super().__len__()


def test_ctrl_c_between_two_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that is counted has its tokens counted, too."""
    items = words(20)
    write(tmp_path / "once", items, 0.1)
    append = writer._Unfinished.append

    def interrupted(self: writer._Unfinished, split: str, encoded: Encoded) -> None:
        append(self, split, Encoded(encoded.tokens.view(Interrupting), encoded.counts))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer._Unfinished, "append", interrupted)
        write(tmp_path / "out", items, 0.1)
    write(tmp_path / "out", items, 0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "once")


def test_tokens_that_the_tokenizer_file_cannot_hold(tmp_path: Path) -> None:
    """Are noticed before anything is encoded or written."""
    for token in (b"", bytes(256)):
        with pytest.raises(RunError, match=f"token 1 has {len(token)} bytes, the format takes 1 to 255"):
            write(tmp_path / "out", stop_after([], 0, AssertionError()), 0.1, Vocabulary([b"<|end|>", token], 0))
    assert not list(tmp_path.iterdir())


def test_tokens_after_the_journal_are_cut_off(tmp_path: Path) -> None:
    items = words(100)
    write(tmp_path / "once", items, 0.1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, stop_after(items, 40, KeyboardInterrupt()), 0.1)
    with open(out / ".x.unfinished" / "train.tokens", "ab") as file:
        file.write(b"half a tok")
    write(out, items, 0.1)
    assert contents(out) == contents(tmp_path / "once")


def test_failures_keep_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that breaks off, such as a network, after more than the seconds that may be lost."""
    items = words(100)
    write(tmp_path / "once", items, 0.1)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.0)
    with pytest.raises(RunError, match="broke off"):
        write(tmp_path / "out", stop_after(items, 40, RunError("the connection broke off")), 0.1)
    journal = json.loads((tmp_path / "out" / ".x.unfinished" / "journal.json").read_text())
    assert journal["items"] == {"train": 40, "val": 0}
    write(tmp_path / "out", ["?"] * 40 + items[40:], 0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "once")


def test_two_runs_at_once(tmp_path: Path) -> None:
    def items() -> Iterator[str]:
        yield "abc"
        with pytest.raises(RunError, match=r"\.x\.unfinished is in use: another run is making x there, wait for it$"):
            write(tmp_path, words(10), 0.1)
        yield "def"

    write(tmp_path, items(), 0.5)
    assert shard(tmp_path / "x_train_000000.bin") == [0, 1, 2, 3]


# The command in a process of its own, made slow: many small items, some milliseconds each.
SLOW = """
import sys, time
from llmc.data import source, text, writer
source.CHUNK_BYTES = text.ITEM_CHARACTERS = 1000
writer.SAVE_SECONDS = float(sys.argv.pop(1))
append = writer._Unfinished.append
def slow(*arguments):
    time.sleep(0.005)
    append(*arguments)
writer._Unfinished.append = slow
from llmc.cli.data import main
main()
"""


@contextlib.contextmanager
def slow_run(save_seconds: float, workers: int) -> Iterator[subprocess.Popen[str]]:
    """A run that has got some way."""
    command = [sys.executable, "-c", SLOW, str(save_seconds), "text", "t.txt", "--encoding", "chars", "--out", "o"]
    command += ["--workers", str(workers)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    tokens, journal = Path("o/.t.unfinished/train.tokens"), Path("o/.t.unfinished/journal.json")
    with process:
        wait_until(lambda: tokens.exists() and tokens.stat().st_size > 20_000)
        if save_seconds < 60:
            wait_until(lambda: journal.exists() and json.loads(journal.read_text())["items"]["train"])
        yield process


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    workers: int,
    stop: signal.Signals,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("\n".join(words(40_000)))
    save_seconds = 0.1 if stop == signal.SIGKILL else 3600  # Ctrl-C saves on its own
    with slow_run(save_seconds, workers) as process:
        workers_of_it = children(process.pid)
        if stop == signal.SIGKILL:
            process.kill()
            process.communicate(timeout=30)
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
            _, error = process.communicate(timeout=30)
            assert (process.returncode, error) == (130, "llmc-data: error: interrupted\n")
    assert len(workers_of_it) >= workers if workers > 1 else workers_of_it == []
    wait_until(lambda: not any(map(alive, workers_of_it)))
    assert contents_of_visible(Path("o")) == []
    monkeypatch.setattr(source, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(text, "ITEM_CHARACTERS", 1000)
    capsys.readouterr()
    for out in ("o", "once"):
        _main(["text", "t.txt", "--encoding", "chars", "--workers", "1", "--out", out])
    message = re.fullmatch(r"going on in o/\.t\.unfinished: ([0-9,]+) tokens are there\n", capsys.readouterr().err)
    assert message is not None and message[1] != "0"
    assert contents(Path("o")) == contents(Path("once"))
