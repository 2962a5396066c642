"""The one table of the trainer's flags: parser, `--help` and the validated configuration are made from it."""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn

import numpy as np

from llmc.errors import UsageError
from llmc.models import DESCRIPTORS
from llmc.schedule import SCHEDULERS

INT32_MAX = 2**31 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Rule:
    """The values that a flag accepts: `allows` decides, `text` completes the sentence "it must be …"."""

    text: str
    allows: Callable[[Any], bool]
    choices: tuple[Any, ...] = ()


def at_least(minimum: int) -> Rule:
    return Rule(f"{minimum} or more", lambda value: value >= minimum)


def minus_one_or(minimum: int) -> Rule:
    return Rule(f"{minimum} or more, or -1", lambda value: value == -1 or value >= minimum)


def one_of(*choices: Any) -> Rule:
    return Rule("one of " + ", ".join(str(choice) for choice in choices), lambda value: value in choices, choices)


ANY = Rule("", lambda value: True)
NOT_EMPTY = Rule("a name or pattern", lambda value: value != "")
FRACTION = Rule("between 0 and 1", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Flag:
    """What the table knows of a flag beyond its dataclass field, which gives long name, type and default."""

    short: str | None
    group: str
    rule: Rule
    help: str


def flag(short: str | None, default: Any, group: str, rule: Rule, help: str) -> Any:
    return field(default=default, metadata={"flag": Flag(short, group, rule, help)})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run. Raises UsageError for a value that no run can use."""

    model: str = flag(
        "-e",
        "chessGPT_d8_bf16.bin",
        "model",
        NOT_EMPTY,
        "a .bin file to start from, or a descriptor for random weights",
    )
    train_data: str = flag(
        "-i", "dev/data/201506/201506_train_*.bin", "files", NOT_EMPTY, "training shards, a glob pattern"
    )
    val_data: str = flag(
        "-j", "dev/data/201506/201506_val_*.bin", "files", NOT_EMPTY, "validation shards, a glob pattern"
    )
    output_dir: str = flag("-o", "log_chess_gpt", "files", ANY, "directory for the log, '' for none")
    batch_size: int = flag("-b", 4, "batch", at_least(1), "micro-batch size B in rows, per process")
    seq_len: int = flag("-t", 1024, "batch", at_least(1), "sequence length T, at most the model's context")
    total_batch_size: int = flag(
        "-d", -1, "batch", minus_one_or(1), "tokens per step, a multiple of B*T*processes; -1: B*T*processes"
    )
    max_steps: int = flag("-x", -1, "workload", minus_one_or(0), "optimizer steps; 0: evaluate only, -1: one epoch")
    scheduler: str = flag("-k", "cosine", "optimization", one_of(*SCHEDULERS), "learning rate scheduler")
    learning_rate: float = flag("-l", 3e-4, "optimization", at_least(0), "peak learning rate")
    warmup_steps: int = flag("-u", 0, "optimization", at_least(0), "steps of linear warm-up")
    final_lr_fraction: float = flag("-q", 1.0, "optimization", FRACTION, "final learning rate as a part of the peak")
    weight_decay: float = flag("-c", 0.0, "optimization", at_least(0), "weight decay of matrices and embeddings")
    val_every: int = flag(
        "-v", 20, "evaluation", ANY, "validate every so many steps and at the end; below 1: only at the end"
    )
    val_max_batches: int = flag("-m", 20, "evaluation", minus_one_or(1), "batches per validation; -1: the whole split")
    sample_every: int = flag(
        "-s", 20, "evaluation", ANY, "sample text every so many steps and at the end; below 1: never"
    )
    sample_length: int = flag("-g", 64, "evaluation", at_least(1), "tokens per sample, at most the sequence length")
    overfit_one_batch: bool = flag(
        "-a", False, "debugging", ANY, "1: every step sees the same first batch, taken from the validation data"
    )
    recompute: int = flag(
        "-r", 1, "memory", one_of(0, 1, 2), "less memory, more work: 0 keep all, 1 recompute GELU, 2 layernorm too"
    )
    master_weights: bool = flag("-w", True, "memory", ANY, "fp32 master copy of bf16 parameters")
    precision: str = flag(
        None, "auto", "memory", one_of("auto", "fp32", "bf16"), "of parameters and activations; auto: fp32 on a CPU"
    )

    def __post_init__(self) -> None:
        for entry in flag_fields():
            value = getattr(self, entry.name)
            if not flag_of(entry).rule.allows(value):
                refuse(entry, value, f"it must be {flag_of(entry).rule.text}")
        if self.batch_size * self.seq_len > INT32_MAX:
            raise UsageError(
                f"-b {self.batch_size} times -t {self.seq_len} is over {INT32_MAX} tokens: lower one of them"
            )
        if self.sample_length > self.seq_len:
            raise UsageError(f"-g {self.sample_length} is longer than -t {self.seq_len}: use -g {self.seq_len} or less")
        if self.scheduler == "constant" and self.warmup_steps > 0:
            raise UsageError(f"-u {self.warmup_steps} has no effect with -k constant: drop it or use another scheduler")
        if self.scheduler == "constant" and self.final_lr_fraction != 1:
            raise UsageError(
                f"-q {self.final_lr_fraction} has no effect with -k constant: drop it or use another scheduler"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-steps per optimizer step, on each of `world_size` processes."""
        tokens_per_pass = self.batch_size * self.seq_len * world_size
        if self.total_batch_size == -1:
            return 1
        if self.total_batch_size % tokens_per_pass != 0:
            below = self.total_batch_size // tokens_per_pass * tokens_per_pass
            fixes = [f"-d {multiple}" for multiple in (below, below + tokens_per_pass) if multiple > 0]
            raise UsageError(
                f"-d {self.total_batch_size} is not a multiple of {tokens_per_pass}, the tokens of one pass "
                f"(B={self.batch_size} * T={self.seq_len} * processes={world_size}): use {' or '.join(fixes)}"
            )
        return self.total_batch_size // tokens_per_pass


def flag_fields() -> tuple[Field[Any], ...]:
    """The rows of the table."""
    return fields(TrainConfig)


def flag_of(entry: Field[Any]) -> Flag:
    flag: Flag = entry.metadata["flag"]
    return flag


def names(entry: Field[Any]) -> list[str]:
    """Short name, if there is one, and long name."""
    short = flag_of(entry).short
    return [*([short] if short else []), "--" + entry.name.replace("_", "-")]


def refuse(entry: Field[Any], value: Any, reason: str) -> NoReturn:
    raise UsageError(f"{'/'.join(names(entry))} {show(value)}: {reason}")


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if value != "" else "''"


def parse_args(argv: list[str]) -> TrainConfig:
    """Read llm.c's `-b 4` as well as `--batch-size 4` and `--batch-size=4`; of a repeated flag the last one counts.

    Raises UsageError for an unknown flag, a missing value, a value of the wrong type or one that no run can use.
    """
    parser = build_parser()
    known = {name: entry for entry in flag_fields() for name in names(entry)}
    return TrainConfig(**vars(parser.parse_args(list(join_values(argv, known)))))


def join_values(argv: list[str], known: dict[str, Field[Any]]) -> Iterator[str]:
    """Turn `-x -1` into `-x=-1`: on its own argparse takes `-1e-4` for a flag, and `-bq` for `-b q`."""
    arguments = iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if argument in ("-h", "--help") or (equals and name in known):
            yield argument
        elif name in known:
            value = next(arguments, None)
            if value is None or value in known:
                found = "the command line ends there" if value is None else f"the flag {value} follows"
                raise UsageError(f"{name} needs a value, but {found}; try {name} {show(known[name].default)}")
            yield f"{name}={value}"
        elif argument.startswith("-"):
            raise UsageError(f"unknown flag {argument}; --help lists the flags")
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
            default=entry.default,
            type=value_reader(entry),
            metavar="|".join(str(choice) for choice in spec.rule.choices) or METAVARS[type(entry.default)],
            help=f"{spec.help} (default: {show(entry.default)})".replace("%", "%%"),
        )
    parser.add_argument_group("help").add_argument("-h", "--help", action="help", help="show this text and exit")
    return parser


METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X", bool: "0|1"}


def value_reader(entry: Field[Any]) -> Callable[[str], Any]:
    """A function from the text of a value to the type of the flag's default."""

    def read(text: str) -> Any:
        kind = type(entry.default)
        if kind is str:
            return text
        value = READERS[kind](text)
        if value is None:
            refuse(entry, text, f"it must be {KINDS[kind]}, such as {show(entry.default)}")
        return value

    return read


def read_bool(text: str) -> bool | None:
    return {"0": False, "1": True}.get(text)


def read_int(text: str) -> int | None:
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,10}", text) else None
    return value if value is not None and abs(value) <= INT32_MAX else None


def read_float(text: str) -> float | None:
    value = float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) else math.nan
    return value if abs(value) <= FLOAT32_MAX else None


READERS: dict[type, Callable[[str], Any]] = {bool: read_bool, int: read_int, float: read_float}
KINDS: dict[type, str] = {bool: "0 or 1", int: f"a whole number up to {INT32_MAX}", float: "a finite number"}
