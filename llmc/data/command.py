"""What the commands of `llmc-data` have in common: the types of their options, and the report of what was written."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from llmc.data.writer import SHARD_TOKENS, WrittenFile
from llmc.errors import UsageError
from llmc.machine import cpu_count

if TYPE_CHECKING:
    from llmc.cli import Parser

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--out", metavar="DIR", default=default, help="output directory")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        default=cpu_count(),
        metavar="N",
        help="processes that encode; the files are the same for any number",
    )


def add_shard_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-tokens", type=positive, default=SHARD_TOKENS, metavar="N", help="largest number of tokens of a file"
    )


def fraction(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number between 0 and 1, such as 0.1")
    return number


def positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number, such as 64")
    return int(value)


def check_name(name: str) -> None:
    """UsageError unless files can be called so: brackets and stars would not match themselves in -i and -j."""
    if name in ("", ".", "..") or not name.isprintable() or any(character in "/*?[" for character in name):
        raise UsageError(f"--name {name!r} cannot begin file names: give a word such as novels")


def report(written: Iterable[WrittenFile]) -> None:
    for file in written:
        print(f"{file.path}: {file.contents}{' (replaced)' if file.replaced else ''}")
