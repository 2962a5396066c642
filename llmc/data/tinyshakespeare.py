"""Tiny Shakespeare: 40,000 lines of the plays, 1,115,394 characters, in GPT-2's tokens and with llm.c's split."""

import argparse
import hashlib
import os
from pathlib import Path

from llmc.data.command import Commands, add_out, report
from llmc.data.download import download
from llmc.data.source import find_sources, read_pieces
from llmc.data.text import EncodeText, document_pieces, item_size, text_items, vocabulary_of
from llmc.data.writer import WrittenFile, write_dataset
from llmc.errors import RunError
from llmc.tokenizer import gpt2

NAME = "tiny_shakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CHARACTERS = 1_115_394
VAL_TOKENS = 32_768
BLANK_LINE = "\n\n"


def prepare_tinyshakespeare(out: str | os.PathLike[str], source: str | os.PathLike[str]) -> list[WrittenFile]:
    """Make the data set of a text file: end-of-text before each speech, the first 32,768 tokens for validation."""
    file, *others = find_sources([source])
    if others:
        raise RunError(f"--input {source} is a directory of {1 + len(others)} files: give the one with the text")
    text = next(read_pieces(file, divide=False)).text
    *speeches, last = text.split(BLANK_LINE)
    documents = [*(speech + BLANK_LINE for speech in speeches), last]
    encoder = gpt2()
    written, _ = write_dataset(
        out,
        NAME,
        vocabulary_of(encoder),
        text_items(document_pieces(documents)),
        EncodeText(encoder),
        val=VAL_TOKENS,
        fingerprint={"text": hashlib.sha256(text.encode()).hexdigest()},
        workers=1,
        total=len(text),
        size=item_size,
    )
    return written


def add_command(commands: Commands) -> None:
    tinyshakespeare = commands.add_parser(
        "tinyshakespeare",
        help="data set: Tiny Shakespeare, 1 MB, as llm.c makes it",
        description="Make a data set of Tiny Shakespeare in GPT-2's tokens, with llm.c's split: end-of-text before "
        "each speech, the first 32,768 tokens for validation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tinyshakespeare.add_argument(
        "--input",
        metavar="FILE",
        help="the text, often called input.txt or tiny_shakespeare.txt (default: download)",
        default=argparse.SUPPRESS,
    )
    add_out(tinyshakespeare, "dev/data/tinyshakespeare")
    tinyshakespeare.set_defaults(command=_tinyshakespeare)


def _tinyshakespeare(arguments: argparse.Namespace) -> None:
    source = getattr(arguments, "input", None)
    if source is None:
        source = Path(arguments.out, "tiny_shakespeare.txt")
        download(URL, source, "llmc-data tinyshakespeare --input FILE")
        if source.stat().st_size != CHARACTERS:  # it is plain ASCII
            raise RunError(
                f"{source} has {source.stat().st_size} bytes, the text has {CHARACTERS}: delete it, try again"
            )
    report(prepare_tinyshakespeare(arguments.out, source))
