"""From a command line, and a configuration file it may name, to the configuration of a run."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmc.config import TABLE, TrainConfig, flag_fields, flag_of, names, read_float, read_value, show
from llmc.config_file import read_config_file
from llmc.errors import UsageError
from llmc.models import DESCRIPTORS
from llmc.roofline import GPUS

METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X", bool: "0|1"}


@dataclass(frozen=True)
class Command:
    """What llmc-train is asked to do."""

    config: TrainConfig
    dry_run: bool = False
    memory_gib: float | None = None  # of the device that a dry run is for; None: of this machine
    roofline: str | None = None  # the GPU whose time of a step a dry run predicts


def parse_args(argv: list[str]) -> Command:
    """Read llm.c's `-b 4` as well as `--batch-size 4` and `--batch-size=4`; of a repeated flag the last one counts.

    Raises UsageError for an unknown flag, a missing value, a value of the wrong type or one that no run can use;
    RunError for a configuration file that cannot be read.
    """
    given = vars(build_parser().parse_args(list(join_values(argv))))
    dry_run, memory_gib, roofline, file = (
        given.pop(name, None) for name in ("dry_run", "memory", "roofline", "config")
    )
    if memory_gib is not None and not dry_run:
        raise UsageError(f"--memory {memory_gib:g} only has an effect with --dry-run; otherwise drop it")
    if roofline is not None and not dry_run:
        raise UsageError(f"--roofline {roofline} only has an effect with --dry-run; otherwise drop it")
    values = {**(read_config_file(file) if file is not None else {}), **given}
    return Command(TrainConfig(**values), bool(dry_run), memory_gib, roofline)


def join_values(argv: list[str]) -> Iterator[str]:
    """Turn `-x -1` into `-x=-1`: on its own argparse takes `-1e-4` for a flag, and `-bq` for `-b q`."""
    known = {name: show(entry.default) for name, entry in TABLE.items()}
    known |= {"--config": "FILE", "--memory": "80", "--roofline": "H100"}
    switches = ("--help", "--dry-run")
    arguments = iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if argument in switches or (equals and name in known):
            yield argument
        elif name in known:
            value = next(arguments, None)
            if value is None or value in known or value in switches:
                if name == "-h":
                    yield "--help"  # whatever follows: the help ends the program
                    return
                found = "the command line ends there" if value is None else f"the flag {value} follows"
                raise UsageError(f"{name} needs a value, but {found}; try {name} {known[name]}")
            yield f"{name}={value}"
        elif argument.startswith("-"):
            raise UsageError(f"unknown flag {show(argument)}; --help lists the flags")
        else:
            raise UsageError(
                f"stray argument {show(argument)}: a value needs its flag before it; --help lists the flags"
            )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmc-train",
        usage="llmc-train [flag value]...",
        description="Train a GPT-2 or GPT-3 class model.",
        epilog="Model descriptors: " + "; ".join(DESCRIPTORS) + ".",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=120),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for entry in flag_fields():
        spec = flag_of(entry)
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group)
        groups[spec.group].add_argument(
            *names(entry),
            dest=entry.name,
            type=lambda text, entry=entry: read_value(entry, text),
            metavar="|".join(str(choice) for choice in spec.rule.choices) or METAVARS[type(entry.default)],
            help=f"{spec.help} (default: {show(entry.default)})".replace("%", "%%"),
        )
    command = parser.add_argument_group("this command")
    command.add_argument(
        "--config", metavar="FILE", help="take values from a .toml or .yaml file; keys are the long names, flags win"
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print steps, tokens, all buffers of a process and what would fit; allocate nothing",
    )
    command.add_argument("--memory", type=read_memory, metavar="GIB", help="a dry run for a device of that memory")
    command.add_argument(
        "--roofline",
        type=read_roofline,
        metavar="GPU",
        help=f"a dry run that predicts the time of a step, its MFU and the largest losses on one of {', '.join(GPUS)}",
    )
    command.add_argument("--help", action="help", help="show this text and exit")
    return parser


def read_memory(text: str) -> float:
    value = read_float(text)
    if value is None or value <= 0:
        raise UsageError(f"--memory {show(text)}: it must be a positive number of GiB, such as 80")
    return value


def read_roofline(text: str) -> str:
    if text not in GPUS:
        raise UsageError(f"--roofline {show(text)}: it must be one of {', '.join(GPUS)}")
    return text
