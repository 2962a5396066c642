"""`llmc-convert`: models from and to Hugging Face, and into another precision or vocabulary size."""

import argparse
from pathlib import Path

from llmc.cli import Parser, run
from llmc.cli.numbers import whole
from llmc.models import MAX_SIZE

EXAMPLES = """\
SOURCE                               TARGET
  gpt2, gpt2-xl, owner/name, ...       model.bin     a model of the Hugging Face hub
  a directory of save_pretrained       model.bin     its safetensors, and its tokenizer beside the target
  model.bin                            a directory   for from_pretrained, with GPT-2's tokenizer if the model has it
  model.bin                            other.bin     in another precision or with another number of tokens

Any GPT2LMHeadModel that llmc's GPT-2 can compute is taken, others are refused. TARGET must not exist.

  llmc-convert gpt2 gpt2_124M_bf16.bin
  llmc-convert log124M/model_00018865.bin my_gpt2
"""


def main() -> None:
    run("llmc-convert", _main)


def _main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    from llmc.convert import convert  # needs torch, which takes a while: not for --help

    for line in convert(arguments.source, arguments.target, arguments.precision, arguments.vocab_size):
        print(line, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="llmc-convert",
        description="Convert a model between llmc's files (.bin) and Hugging Face's directories.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert, see below")
    parser.add_argument("target", metavar="TARGET", type=Path, help="what to make of it")
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the values in TARGET; bf16 is rounded to nearest (default: bf16 if TARGET is named *_bf16.bin, else "
        "what keeps the values of SOURCE)",
    )
    parser.add_argument(
        "--vocab-size",
        type=whole(1, 50257, MAX_SIZE),
        metavar="N",
        help="from .bin to .bin: keep the first N tokens, or add tokens, whose embedding is the mean of the others",
    )
    return parser
