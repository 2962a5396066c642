"""TinyStories: 5 million short stories in the words of a small child, written by GPT-3.5 and GPT-4.

They are published as an archive of 50 JSON files, each a list of objects with a "story". As in llm.c, the first file is
for validation and the stories of each file are shuffled; the files stay in order.
"""

import argparse
import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from llmc import json_text
from llmc.binfile import atomic_write
from llmc.data.command import Commands, add_out, add_shard_tokens, add_workers, report
from llmc.data.download import download
from llmc.data.source import ARCHIVE_ERRORS, Piece, fingerprint_of, open_archive, regular_members
from llmc.data.text import EncodeText, item_size, text_items, vocabulary_of, without_surrogates
from llmc.data.writer import WrittenFile, write_dataset
from llmc.errors import RunError
from llmc.tokenizer import gpt2

NAME = "TinyStories"
ARCHIVE = "TinyStories_all_data.tar.gz"
URL = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/{ARCHIVE}"
SEED = 1337


def prepare_tinystories(
    out: str | os.PathLike[str], source: Path, shard_tokens: int, workers: int
) -> list[WrittenFile]:
    """Make the data set of the archive, or of a directory with its JSON files."""
    of_source = hashlib.sha256(repr(fingerprint_of([source])).encode()).hexdigest()[:12]
    unpacked = Path(out, f".{NAME}.{of_source}.json")  # never the files of another archive
    directory = source if source.is_dir() else unpack(source, unpacked)
    files = sorted(directory.glob("*.json"))
    if len(files) < 2:
        raise RunError(f"{source} holds {len(files)} .json files, expected 2 or more: the first is for validation")
    encoder = gpt2()
    written, _ = write_dataset(
        out,
        NAME,
        vocabulary_of(encoder),
        text_items(read_stories(files[1:])),
        EncodeText(encoder),
        val=text_items(read_stories(files[:1])),
        fingerprint={"files": fingerprint_of(files if source.is_dir() else [source])},
        workers=workers,
        shard_tokens=shard_tokens,
        total=sum(file.stat().st_size for file in files),
        unit="B",
        size=item_size,
    )
    shutil.rmtree(unpacked, ignore_errors=True)
    return written


def read_stories(files: Sequence[Path]) -> Iterator[Piece]:
    """Yield the stories of a split, those of each file shuffled by its place in the split."""
    for place, file in enumerate(files):
        try:
            stories = [without_surrogates(entry["story"]).strip() for entry in json_text.parse(file.read_bytes())]
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(f'{file} is not a JSON list of objects with a "story"') from error
        random.Random(SEED + place).shuffle(stories)
        size = file.stat().st_size // max(len(stories), 1)
        yield from (Piece(True, story, size) for story in stories)


def unpack(archive: Path, directory: Path) -> Path:
    """Write the .json files of the archive into `directory`, except those that are there already."""
    try:
        with (
            open(archive, "rb") as raw,
            tqdm.wrapattr(
                raw, "read", total=archive.stat().st_size, desc=f"unpacking {archive.name}", disable=None
            ) as f,
            open_archive(archive, f) as members,
        ):
            directory.mkdir(parents=True, exist_ok=True)
            for member, size, content in regular_members(members):
                path = directory / member.name
                if path.suffix != ".json" or path.name.startswith("."):
                    continue
                if path.exists() and path.stat().st_size == size:
                    continue
                with atomic_write(path) as file:
                    shutil.copyfileobj(content, file)
    except ARCHIVE_ERRORS as error:
        raise RunError(f"cannot read {archive}, expected {ARCHIVE}: {error}") from error
    return directory


def add_command(commands: Commands) -> None:
    tinystories = commands.add_parser(
        "tinystories",
        help="data set: TinyStories, 0.9 billion tokens of simple stories",
        description="Make a data set of TinyStories in GPT-2's tokens. The stories of the first of its JSON files are "
        "for validation. An interrupted run goes on where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tinystories.add_argument(
        "--input",
        metavar="FILE",
        help=f"a copy of {ARCHIVE}, or a directory with its .json files (default: download)",
        default=argparse.SUPPRESS,
    )
    add_out(tinystories, "dev/data/tinystories")
    add_shard_tokens(tinystories)
    add_workers(tinystories)
    tinystories.set_defaults(command=_tinystories)


def _tinystories(arguments: argparse.Namespace) -> None:
    source = getattr(arguments, "input", None)
    if source is None:
        source = download(URL, Path(arguments.out, ARCHIVE), "llmc-data tinystories --input FILE")
    report(prepare_tinystories(arguments.out, Path(source), arguments.shard_tokens, arguments.workers))
