"""llmc-train: train a model."""

import io
import sys

from llmc.cli import run
from llmc.config import parse_args


def main() -> None:
    run("llmc-train", train)


def train(argv: list[str]) -> None:
    config = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sample with a character that the terminal does not know must not end a long run.
        sys.stdout.reconfigure(errors="replace")
    # Only now: --help and a wrong flag are answered without waiting for torch.
    from llmc.train import train

    train(config)
