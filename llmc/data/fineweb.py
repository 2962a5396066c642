"""FineWeb and FineWeb-Edu: text of the web, filtered, in GPT-2's tokens; the first shard's worth is for validation."""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from llmc.data.command import Commands, add_shard_tokens, add_workers, report
from llmc.data.source import Piece, Source, find_sources, fingerprint_of
from llmc.data.text import (
    EncodeText,
    JsonLines,
    Text,
    document_pieces,
    is_json_lines,
    item_size,
    json_items,
    text_items,
    vocabulary_of,
)
from llmc.data.writer import WrittenFile, write_dataset
from llmc.errors import RunError
from llmc.tokenizer import gpt2

REPOSITORIES = {"classic": "HuggingFaceFW/fineweb", "edu": "HuggingFaceFW/fineweb-edu"}
NAMES = {"classic": "fineweb", "edu": "edu_fineweb"}
SIZES = ("10B", "100B")
KEY = "text"
BATCH_DOCUMENTS = 256  # read from a parquet file at a time


def prepare_fineweb(
    out: str | os.PathLike[str],
    type: str,
    size: str,
    source: str | os.PathLike[str] | None,
    shard_tokens: int,
    workers: int,
) -> list[WrittenFile]:
    """Make the data set of the files in `source`, .parquet and .jsonl; None: of the stream from Hugging Face.

    Its order is that of the files, and the first `shard_tokens` tokens are for validation.
    """
    total: int | None = None
    items: Iterator[Text | JsonLines]
    if source is None:
        items = text_items(stream(REPOSITORIES[type], f"sample-{size}T"))
        fingerprint: dict[str, object] = {"repository": REPOSITORIES[type], "size": size}
    else:
        sources = _known(find_sources([source]), source)
        items = file_items(sources)
        total = sum(file.size for file in sources)
        fingerprint = {"files": fingerprint_of(file.path for file in sources)}
    encoder = gpt2()
    written, _ = write_dataset(
        out,
        NAMES[type],
        vocabulary_of(encoder),
        items,
        EncodeText(encoder),
        val=shard_tokens,
        fingerprint=fingerprint,
        workers=workers,
        shard_tokens=shard_tokens,
        total=total,
        unit="char" if source is None else "B",
        size=item_size,
    )
    return written


def stream(repository: str, name: str) -> Iterator[Piece]:
    """Yield the documents of a subset of a data set at Hugging Face, as they come."""
    try:
        import datasets
    except ImportError:
        raise RunError(
            "FineWeb comes through the package datasets: python -m pip install datasets; or give --input DIR with its "
            ".parquet files"
        ) from None
    try:
        rows = datasets.load_dataset(repository, name=name, split="train", streaming=True)
        for row in rows:
            yield from document_pieces([row[KEY]])
    except Exception as error:  # of the network, by any of several libraries
        reason = " ".join(str(error).split()) or error.__class__.__name__
        raise RunError(f"{repository} broke off ({reason}): run the same command again, it goes on") from error


def file_items(sources: Sequence[Source]) -> Iterator[Text | JsonLines]:
    for source in sources:
        if is_json_lines(source.path):
            yield from json_items(source.path, KEY)
        else:
            yield from text_items(read_parquet(source))


def read_parquet(source: Source) -> Iterator[Piece]:
    """Yield the documents of a file, its column "text"; their sizes add up to that of the file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RunError(f"{source.path} needs the package pyarrow: python -m pip install pyarrow") from None
    try:
        file: Any = parquet.ParquetFile(source.path)
        if KEY not in file.schema_arrow.names:
            raise RunError(f"{source.path} has no column {KEY!r}, it has {', '.join(file.schema_arrow.names)}")
        size = source.size // max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(BATCH_DOCUMENTS, columns=[KEY]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    kind = file.schema_arrow.field(KEY).type
                    raise RunError(f"{source.path}: its column {KEY!r} holds {kind}, expected text (string)")
                if text is not None:
                    yield Piece(True, text, size)
    except (OSError, ArrowException) as error:
        raise RunError(f"cannot read {source.path}: {' '.join(str(error).split())}") from error


def _known(sources: Sequence[Source], source: str | os.PathLike[str]) -> list[Source]:
    files = [file for file in sources if file.path.suffix == ".parquet" or is_json_lines(file.path)]
    if not files:
        raise RunError(f"{source} holds no .parquet and no .jsonl files")
    return files


def add_command(commands: Commands) -> None:
    fineweb = commands.add_parser(
        "fineweb",
        help="data set: FineWeb or FineWeb-Edu, 10 or 100 billion tokens of the web",
        description="Make a data set of FineWeb in GPT-2's tokens, streamed from Hugging Face by the package datasets, "
        "or from files. The first shard's worth of tokens is for validation. An interrupted run goes on where it "
        "stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fineweb.add_argument("--type", choices=tuple(NAMES), default="classic", help="all, or the educational part")
    fineweb.add_argument("--size", choices=SIZES, default="10B", help="tokens of the sample")
    fineweb.add_argument(
        "--input",
        metavar="DIR",
        help='a directory with its .parquet files, or .jsonl with a "text" (default: stream)',
        default=argparse.SUPPRESS,
    )
    fineweb.add_argument(
        "--out",
        metavar="DIR",
        help="output directory (default: dev/data/fineweb10B and so on, by type and size)",
        default=argparse.SUPPRESS,
    )
    add_shard_tokens(fineweb)
    add_workers(fineweb)
    fineweb.set_defaults(command=_fineweb)


def _fineweb(arguments: argparse.Namespace) -> None:
    out = getattr(arguments, "out", f"dev/data/{NAMES[arguments.type]}{arguments.size}")
    source = getattr(arguments, "input", None)
    report(prepare_fineweb(out, arguments.type, arguments.size, source, arguments.shard_tokens, arguments.workers))
