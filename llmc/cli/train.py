"""llmc-train: train a model."""

from llmc.cli import run
from llmc.config import parse_args


def main() -> None:
    run("llmc-train", _main)


def _main(argv: list[str]) -> None:
    config = parse_args(argv)
    # Only now: --help and a wrong flag are answered without waiting for torch.
    from llmc.train import train

    train(config)
