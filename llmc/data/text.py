"""Text to tokens: the items that all data sets of text are written from, and the data set of the user's own files."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmc import json_text
from llmc.data.command import (
    Commands,
    add_shard_tokens,
    add_workers,
    check_name,
    fraction,
    report,
)
from llmc.data.source import MAX_DOCUMENT, Piece, Source, find_sources, fingerprint_of, open_source, read_pieces
from llmc.data.writer import Encoded, Vocabulary, WrittenFile, write_dataset
from llmc.errors import RunError
from llmc.tokenizer import ENCODINGS, Encoder, make_encoder

ITEM_CHARACTERS = 1_000_000  # a tenth of a second's work, and more than a process's overhead
COMPRESSED = (".gz", ".zst")


class Text(NamedTuple):
    """An item: pieces of documents."""

    pieces: list[Piece]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class JsonLines(NamedTuple):
    """An item: lines of a file, each a JSON object with a document under `key`."""

    path: Path
    number: int  # of the first line, from 1
    lines: bytes
    key: str
    size: int

    def documents(self) -> Iterator[str]:
        """RunError, naming file and line, for what is no such line."""
        for number, line in enumerate(self.lines.split(b"\n"), self.number):
            if not line.strip():
                continue
            try:
                document = json_text.parse(line)
            except ValueError as error:
                raise RunError(f"{self.path} line {number} is not JSON: {error}") from error
            text = document.get(self.key) if isinstance(document, dict) else None
            if not isinstance(text, str):
                keys = f"has {', '.join(map(repr, document))}" if isinstance(document, dict) else "is no object"
                raise RunError(f"{self.path} line {number} has no text under {self.key!r} (it {keys}): use --key")
            yield without_surrogates(text)


def item_size(item: Text | JsonLines) -> int:
    return item.size


class EncodeText:
    """Tokens of an item, end-of-text before each document; empty documents are left out and counted."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._separator = np.array([encoder.end_of_text], dtype=np.uint32).astype(encoder.encode("").dtype)

    def __call__(self, item: Text | JsonLines) -> Encoded:
        pieces = item.pieces if isinstance(item, Text) else document_pieces(item.documents())
        parts, counts = [self._separator[:0]], Counter[str]()
        for begins, text, _ in pieces:
            if begins and text:
                parts.append(self._separator)
            if begins:
                counts["documents" if text else "empty"] += 1
            parts.append(self._encoder.encode(text))
        return Encoded(np.concatenate(parts), counts)


def vocabulary_of(encoder: Encoder) -> Vocabulary:
    return Vocabulary(encoder.token_bytes(), encoder.end_of_text)


def document_pieces(documents: Iterable[str]) -> Iterator[Piece]:
    """Documents that are in memory; their sizes are in characters."""
    return (Piece(True, document, len(document)) for document in documents)


def text_items(pieces: Iterable[Piece]) -> Iterator[Text]:
    """Gather pieces to items that are worth sending to a process."""
    gathered: list[Piece] = []
    characters = 0
    for piece in pieces:
        gathered.append(piece)
        characters += len(piece.text)
        if characters >= ITEM_CHARACTERS:
            yield Text(gathered)
            gathered, characters = [], 0
    if gathered:
        yield Text(gathered)


def file_items(sources: Sequence[Source], key: str, divide: bool) -> Iterator[Text | JsonLines]:
    """Items of files: .jsonl with a document in each line, all others one document each."""
    texts: list[Source] = []
    for source in sources:
        if not is_json_lines(source.path):
            texts.append(source)
            continue
        yield from _texts(texts, divide)
        texts = []
        yield from json_items(source.path, key)
    yield from _texts(texts, divide)


def _texts(sources: Sequence[Source], divide: bool) -> Iterator[Text]:
    return text_items(piece for source in sources for piece in read_pieces(source, divide))


def json_items(path: Path, key: str) -> Iterator[JsonLines]:
    position, number, gathered = 0, 1, list[bytes]()
    with open_source(path) as (file, content):
        size = 0
        while line := content.readline(MAX_DOCUMENT + 1):
            if len(line) > MAX_DOCUMENT:
                raise RunError(f"{path} line {number + len(gathered)} has more than {MAX_DOCUMENT:,} bytes")
            gathered.append(line)
            size += len(line)
            if size >= ITEM_CHARACTERS:
                yield JsonLines(path, number, b"".join(gathered), key, file.tell() - position)
                position, number, size = file.tell(), number + len(gathered), 0
                gathered = []
        if gathered:
            yield JsonLines(path, number, b"".join(gathered), key, file.tell() - position)


def is_json_lines(path: Path) -> bool:
    return plain_name(path).endswith(".jsonl")


def plain_name(path: Path) -> str:
    """The name of a file without the ending of a compression."""
    return path.stem if path.suffix in COMPRESSED else path.name


def without_surrogates(text: str) -> str:
    """Halves of a character, which JSON's escapes can hold but UTF-8 cannot, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ---- llmc-data text


def prepare_text(
    paths: Sequence[str | os.PathLike[str]],
    encoding: str,
    out: str | os.PathLike[str],
    name: str,
    val_fraction: float,
    key: str,
    shard_tokens: int,
    workers: int,
) -> tuple[list[WrittenFile], Counter[str]]:
    """Make a data set of files and directories, the last `val_fraction` of all tokens for validation."""
    sources = find_sources(paths)
    total = sum(source.size for source in sources)
    encoder = make_encoder(encoding, lambda: _all_text(sources, key))
    return write_dataset(
        out,
        name,
        vocabulary_of(encoder),
        file_items(sources, key, encoder.divides),
        EncodeText(encoder),
        val=val_fraction,
        fingerprint={
            "files": fingerprint_of(source.path for source in sources),
            "key": key,
            "encoding": fingerprint_of([encoding]) if os.path.isfile(encoding) else encoding,
        },
        workers=min(workers, 1 + total // ITEM_CHARACTERS),
        shard_tokens=shard_tokens,
        total=total,
        unit="B",
        size=item_size,
    )


def _all_text(sources: Sequence[Source], key: str) -> Iterator[str]:
    for item in file_items(sources, key, divide=True):
        yield from (piece.text for piece in item.pieces) if isinstance(item, Text) else item.documents()


def add_command(commands: Commands) -> None:
    text = commands.add_parser(
        "text",
        help="data set: your own text files",
        description="Make a data set of UTF-8 text files and directories of them, sorted by path. Each file is one "
        "document, each line of a .jsonl file is one; both may be compressed (.gz, .zst). An end-of-text token comes "
        "before each document. The last part of all tokens together is for validation, so put the files in the order "
        "you want. An interrupted run goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text.add_argument("files", nargs="+", metavar="FILE", help="text files, .jsonl files, directories")
    text.add_argument("--encoding", default="gpt2", help=ENCODINGS)
    text.add_argument(
        "--out", metavar="DIR", help="output directory (default: dev/data/NAME)", default=argparse.SUPPRESS
    )
    text.add_argument(
        "--name",
        help="files are called NAME_train_000000.bin and so on (default: the first FILE's name without its ending)",
        default=argparse.SUPPRESS,
    )
    text.add_argument("--val-fraction", type=fraction, default=0.1, metavar="F", help="share of the tokens held out")
    text.add_argument("--key", default="text", help="where a line of a .jsonl file has its document")
    add_shard_tokens(text)
    add_workers(text)
    text.set_defaults(command=_text)


def _text(arguments: argparse.Namespace) -> None:
    name = getattr(arguments, "name", _default_name(Path(arguments.files[0])))
    check_name(name)
    written, counts = prepare_text(
        arguments.files,
        arguments.encoding,
        getattr(arguments, "out", f"dev/data/{name}"),
        name,
        arguments.val_fraction,
        arguments.key,
        arguments.shard_tokens,
        arguments.workers,
    )
    report(written)
    if counts["empty"]:
        print(f"{counts['empty']:,} of {sum(counts.values()):,} documents were empty and left out")


def _default_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else Path(plain_name(path)).stem
