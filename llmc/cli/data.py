"""`llmc-data`: make data sets of token shards, and look into any file."""

import argparse
from pathlib import Path

from llmc.cli import Parser, run
from llmc.data import choices, fineweb, hellaswag, lichess, mmlu, shakespeare, text, tinyshakespeare, tinystories
from llmc.data.command import Commands, positive
from llmc.errors import RunError
from llmc.inspect_file import PROBLEM, Options, inspect_file

DATA_SETS = (text, shakespeare, tinyshakespeare, tinystories, fineweb, lichess, hellaswag, mmlu, choices)


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
    for module in DATA_SETS:
        module.add_command(commands)
    _add_inspect(commands)
    return parser


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
        type=positive,
        default=Options.max_tokens,
        metavar="N",
        help="show the first N tokens (default: %(default)s)",
    )
    inspect.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    problems = 0
    for line in inspect_file(arguments.file, Options(arguments.model, arguments.tokenizer, arguments.tokens)):
        print(line)
        problems += line.startswith(PROBLEM)
    if problems:
        raise RunError(f"{arguments.file}: {problems} problem{'s' if problems > 1 else ''} found")
