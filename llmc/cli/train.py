"""llmc-train: train a model."""

from llmc.cli import run
from llmc.command_line import parse_args


def main() -> None:
    run("llmc-train", _main)


def _main(argv: list[str]) -> None:
    command = parse_args(argv)
    # Only now: --help and a wrong flag are answered without waiting for torch.
    if command.dry_run:
        from llmc.dry_run import dry_run

        dry_run(command.config, command.memory_gib, command.roofline)
    else:
        from llmc.launch import launch
        from llmc.train import train

        with launch(command.config) as ranks:
            train(command.config, ranks)
