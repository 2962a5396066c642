"""`llmc-init`: a model file with random weights, to start training from."""

import argparse
from pathlib import Path

from llmc.cli import Parser, run
from llmc.models import DESCRIPTORS


def main() -> None:
    run("llmc-init", _main)


def _main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    from llmc.init_model import init_model  # needs torch, which takes a while: not for --help

    lines = init_model(arguments.descriptor, arguments.out, arguments.precision, arguments.seed, arguments.tokenizer)
    print(*lines, sep="\n")


def _parser() -> Parser:
    parser = Parser(
        prog="llmc-init",
        description="Write a model file with seeded random weights (GPT-2's initialisation) and its tokenizer beside\n"
        "it. `llmc-init chess:d8` makes the file that llmc-train starts from without -e.",
        epilog="Descriptors:\n  " + "\n  ".join(DESCRIPTORS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("descriptor", metavar="DESCRIPTOR", help="the model, see below")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the model file (default: llm.c's name for it)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the file (default: bf16)")
    parser.add_argument("--seed", type=_seed, default=42, metavar="N", help="of the random weights (default: 42)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="gives the vocabulary size of a custom model, and is copied"
    )
    return parser


def _seed(value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) >= 2**32:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from 0 to {2**32 - 1}, such as 42")
    return int(value)
