"""`llmc-init`: a model file with random weights, to start training from."""

import argparse
from pathlib import Path

from llmc.cli import Parser, run
from llmc.config import INT32_MAX
from llmc.models import DESCRIPTORS


def main() -> None:
    run("llmc-init", _main)


def _main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    from llmc.init_model import init_model  # waits for torch, which --help need not

    lines = init_model(arguments.descriptor, arguments.out, arguments.precision, arguments.seed, arguments.tokenizer)
    print(*lines, sep="\n")


def _parser() -> Parser:
    parser = Parser(
        prog="llmc-init",
        description="Write a model file (.bin) with seeded random weights, GPT-2's initialisation, and its tokenizer "
        "beside it. llmc-init chess:d8 makes the file that llmc-train starts from without flags.",
        epilog="Model descriptors: " + "; ".join(DESCRIPTORS) + ".",
    )
    parser.add_argument("descriptor", metavar="DESCRIPTOR", help="the model, as for llmc-train -e")
    parser.add_argument(
        "--out", type=_model_file, metavar="FILE.bin", help="model file (default: llm.c's name, as gpt2_d12_bf16.bin)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the file (default: bf16)")
    parser.add_argument("--seed", type=_seed, default=42, metavar="N", help="of the weights (default: 42)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer of a custom vocabulary: gives its size, and is copied"
    )
    return parser


def _model_file(value: str) -> Path:
    if not value.endswith(".bin"):
        raise argparse.ArgumentTypeError(f"{value!r} is no name for a model file: it must end in .bin")
    return Path(value)


def _seed(value: str) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) > INT32_MAX:
        raise argparse.ArgumentTypeError(f"{value!r} is no seed: it must be a whole number from 0 to {INT32_MAX}")
    return int(value)
