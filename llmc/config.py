"""The one table of the trainer's flags: parser, `--help`, configuration files and the validated configuration."""

import math
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn

import numpy as np

from llmc.data.eval_file import NUM_COMPLETIONS
from llmc.errors import UsageError
from llmc.outliers import MAX_Z
from llmc.schedule import SCHEDULERS
from llmc.wall_time import FORMATS, read_wall_time

INT32_MAX = 2**31 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
RECOMPUTE = (0, 1, 2, 3, 4)  # levels
HELLASWAG_DATA = "dev/data/hellaswag/hellaswag_val.bin"


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
MAX_TIME = Rule(f"a time in {FORMATS}, or ''", lambda value: value == "" or bool(read_wall_time(value)))
JSON_LOG = Rule("a file name, 1 for main.jsonl in -o, or '' for none", lambda value: value != "0")
# The newest of n values has a z-score of the root of n - 1 at most, so a higher threshold would never act.
Z_SCORE = Rule(f"between 0 and {MAX_Z:.2f}, the largest possible z-score", lambda value: 0 <= value <= MAX_Z)


@dataclass(frozen=True)
class Flag:
    """What the table knows of a flag beyond its dataclass field, which gives long name, type and default."""

    short: str  # llm.c's name; '' for none, two where llm.c's help and llm.c disagree
    group: str
    rule: Rule
    help: str


def flag(short: str, default: Any, group: str, rule: Rule, help: str) -> Any:
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
    tokenizer: str = flag(
        "", "", "files", ANY, "tokenizer file to decode samples with; '': the one beside the data, or llm.c's"
    )
    output_dir: str = flag("-o", "log_chess_gpt", "files", ANY, "directory for log and checkpoints, '' for none")
    checkpoint_every: int = flag(
        "-n", 0, "checkpoints", at_least(0), "write a checkpoint every so many steps and at the end; 0: never"
    )
    keep_checkpoints: int = flag(
        "-nk", 0, "checkpoints", at_least(0), "keep so many of the newest checkpoints, and the major ones; 0: all"
    )
    major_every: int = flag(
        "-nm", 0, "checkpoints", at_least(0), "checkpoints of every so many steps are major: never deleted; 0: none"
    )
    async_checkpoint: bool = flag(
        "", False, "checkpoints", ANY, "1: write checkpoints while training goes on, from a copy in the host's memory"
    )
    resume: bool = flag(
        "-y", False, "checkpoints", ANY, "1: go on from the newest checkpoint in -o; 0: move its checkpoints aside"
    )
    batch_size: int = flag("-b", 4, "batch", at_least(1), "micro-batch size B in rows, per process")
    seq_len: int = flag("-t", 1024, "batch", at_least(1), "sequence length T, at most the model's context")
    total_batch_size: int = flag(
        "-d", -1, "batch", minus_one_or(1), "tokens per step, a multiple of B*T*processes; -1: B*T*processes"
    )
    max_steps: int = flag("-x", -1, "workload", minus_one_or(0), "optimizer steps; 0: evaluate only, -1: one epoch")
    max_time: str = flag(
        "",
        "",
        "workload",
        MAX_TIME,
        "end with a checkpoint (-n) before so much time has passed, such as 3:55:00; '': no limit",
    )
    scheduler: str = flag("-k", "cosine", "optimization", one_of(*SCHEDULERS), "learning rate scheduler")
    learning_rate: float = flag("-l", 3e-4, "optimization", at_least(0), "peak learning rate")
    warmup_steps: int = flag("-u", 0, "optimization", at_least(0), "steps of linear warm-up")
    final_lr_fraction: float = flag("-q", 1.0, "optimization", FRACTION, "final learning rate as a part of the peak")
    weight_decay: float = flag("-c", 0.0, "optimization", at_least(0), "weight decay of matrices and embeddings")
    skip_loss_z: float = flag(
        "-sl", 0.0, "optimization", Z_SCORE, "skip the update when the loss has a z-score above this; 0: never"
    )
    skip_norm_z: float = flag(
        "-sg", 0.0, "optimization", Z_SCORE, "skip the update when the gradient norm has a z-score above this; 0: never"
    )
    on_nan: str = flag(
        "",
        "stop",
        "optimization",
        one_of("stop", "skip", "rollback"),
        "when a number is not finite: stop, skip the update, or go back to the last checkpoint and on with later data",
    )
    seed: int = flag("", 42, "optimization", at_least(0), "of random weights and of the order of the data")
    val_every: int = flag(
        "-v", 20, "evaluation", ANY, "validate every so many steps and at the end; below 1: only at the end"
    )
    val_max_batches: int = flag("-m", 20, "evaluation", minus_one_or(1), "batches per validation; -1: the whole split")
    sample_every: int = flag(
        "-s", 20, "evaluation", ANY, "sample text every so many steps and at the end; below 1: never"
    )
    sample_length: int = flag("-g", 64, "evaluation", at_least(1), "tokens per sample, at most the sequence length")
    hellaswag: bool = flag(
        "-h", False, "evaluation", ANY, "1: HellaSwag with every validation after step 0; -h alone is --help"
    )
    hellaswag_data: str = flag("", HELLASWAG_DATA, "evaluation", NOT_EMPTY, "evaluation file for -h 1")
    overfit_one_batch: bool = flag(
        "-a", False, "debugging", ANY, "1: every step sees the same first batch, taken from the validation data"
    )
    log_gpu_every: int = flag("-lg", -1, "debugging", ANY, "log the GPU's state every so many steps; below 1: never")
    json_log: str = flag(
        "", "", "logging", JSON_LOG, "file for a JSON object per step and evaluation; 1: main.jsonl in -o, '': none"
    )
    tensorboard: str = flag("", "", "logging", ANY, "directory for TensorBoard, '' for none")
    wandb: str = flag("", "", "logging", ANY, "project of Weights & Biases, '' for none")
    device: str = flag("", "auto", "numerics", one_of("auto", "cpu", "cuda"), "where to run")
    precision: str = flag(
        "", "auto", "numerics", one_of("auto", "fp32", "bf16"), "of parameters and activations; auto: fp32 on a CPU"
    )
    grad_dtype: str = flag(
        "", "auto", "numerics", one_of("auto", "fp32", "bf16"), "of parameter gradients; auto: as --precision"
    )
    master_weights: bool = flag("-w", True, "numerics", ANY, "fp32 master copy of bf16 parameters")
    tf32: bool = flag("-f", True, "numerics", ANY, "1: fp32 matrix products may use a GPU's TF32")
    autotune: bool = flag(
        "",
        True,
        "numerics",
        ANY,
        "1: time cuBLASLt's algorithms on the GPU before the first step, and take the fastest; 0: its first choice",
    )
    gelu_fusion: int = flag(
        "-ge", -1, "numerics", one_of(-1, 0, 1, 2), "GELU inside the products: 0 no, 1 forward, 2 both ways; -1: best"
    )
    attention: str = flag(
        "",
        "flash",
        "numerics",
        one_of("flash", "cudnn"),
        "attention by our own flash kernels, or in bf16 on a GPU by cuDNN: a build with LLMC_CUDNN=ON",
    )
    cuda_graphs: bool = flag(
        "", False, "numerics", ANY, "1: the CPU launches a pass on a GPU, and the update, as one; the same bits"
    )
    fp8: int = flag(
        "",
        0,
        "numerics",
        one_of(0, 1, 2),
        "matrix products in FP8 with delayed scaling: 1 those of the blocks, 2 also the loss head's; on a GPU of "
        "compute capability 8.9 or newer",
    )
    recompute: int = flag(
        "-r",
        1,
        "memory",
        one_of(*RECOMPUTE),
        "less memory, more work: 0 keep all, 1 recompute GELU, 2 layernorm too, 3 attention's projections too, "
        "4 the whole block",
    )
    offload_optimizer: bool = flag(
        "", False, "memory", ANY, "1: AdamW's m, v and master weights stay in host memory and pass through the GPU"
    )
    zero_stage: int = flag(
        "-z", 0, "memory", one_of(0, 1, 2, 3), "ZeRO: 1 optimizer state, 2 gradients, 3 parameters cut over processes"
    )
    gpus_per_node: int = flag("-pg", 8, "processes", at_least(1), "GPUs per node, with -pm tcp or fs")
    start_method: str = flag(
        "-pm -pi",
        "mpi",
        "processes",
        one_of("mpi", "tcp", "fs"),
        "how processes find each other; mpi: by mpirun, torchrun or srun",
    )
    num_processes: int = flag("-pn", 1, "processes", at_least(1), "number of processes, with -pm tcp or fs")
    shared_path: str = flag("-pp -pf", "/tmp", "processes", NOT_EMPTY, "directory that all processes see, with -pm fs")
    process_rank: int = flag("-pr", 0, "processes", at_least(0), "rank of this process, with -pm tcp or fs")
    server_ip: str = flag("-ps", "-1", "processes", NOT_EMPTY, "address of rank 0, with -pm tcp")

    def __post_init__(self) -> None:
        for entry in flag_fields():
            check_value(entry, getattr(self, entry.name))
        if self.batch_size * self.seq_len > INT32_MAX:
            raise UsageError(
                f"-b {self.batch_size} times -t {self.seq_len} is over {INT32_MAX} tokens: lower one of them"
            )
        if self.sample_every > 0 and self.sample_length > self.seq_len:
            raise UsageError(f"-g {self.sample_length} is longer than -t {self.seq_len}: use -g {self.seq_len} or less")
        if self.hellaswag and self.batch_size < NUM_COMPLETIONS:
            raise UsageError(
                f"-b {self.batch_size} is too small for -h 1, where an example takes {NUM_COMPLETIONS} rows: "
                f"use -b {NUM_COMPLETIONS} or more, or -h 0"
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        """A flag that could have no effect is a mistake: better an answer now than a surprise after hours."""
        constant, checkpoints = self.scheduler == "constant", self.checkpoint_every > 0
        needs = [  # flag, True if it was given, True if it has an effect, when it has one
            ("-u", self.warmup_steps > 0, not constant, "with another scheduler than -k constant"),
            ("-q", self.final_lr_fraction != 1, not constant, "with another scheduler than -k constant"),
            ("-n", checkpoints, self.output_dir != "", "with an output directory -o"),
            ("-y", self.resume, self.output_dir != "", "with an output directory -o"),
            ("--json-log", self.json_log == "1", self.output_dir != "", "with an output directory -o"),
            ("--on-nan", self.on_nan == "rollback", checkpoints, "with checkpoints: add -n"),
            ("-nk", self.keep_checkpoints > 0, checkpoints, "with checkpoints: add -n"),
            ("--async-checkpoint", self.async_checkpoint, checkpoints, "with checkpoints: add -n"),
            ("-nm", self.major_every > 0, self.keep_checkpoints > 0, "where checkpoints are deleted: add -nk"),
            ("--hellaswag-data", self.hellaswag_data != HELLASWAG_DATA, self.hellaswag, "with -h 1"),
            ("-f", not self.tf32, self.precision != "bf16", "with --precision fp32"),
            ("-pg", self.gpus_per_node != 8, self.start_method != "mpi", "with -pm tcp or -pm fs"),
            ("-pr", self.process_rank != 0, self.start_method != "mpi", "with -pm tcp or -pm fs"),
            ("-pp", self.shared_path != "/tmp", self.start_method == "fs", "with -pm fs"),
            ("-ps", self.server_ip != "-1", self.start_method == "tcp", "with -pm tcp"),
        ]
        for name, given, effective, when in needs:
            if given and not effective:
                value = show(getattr(self, TABLE[name].name))
                raise UsageError(f"{name} {value} only has an effect {when}; otherwise drop it")
        if self.process_rank >= self.num_processes:
            raise UsageError(
                f"-pr {self.process_rank} is no rank of -pn {self.num_processes} processes: they count from 0"
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
    """Short names, if there are any, and long name."""
    return [*flag_of(entry).short.split(), "--" + entry.name.replace("_", "-")]


TABLE: dict[str, Field[Any]] = {name: entry for entry in flag_fields() for name in names(entry)}


def check_value(entry: Field[Any], value: Any) -> None:
    rule = flag_of(entry).rule
    if isinstance(value, str) and not value.isprintable():
        refuse(entry, value, "it must be printable text")
    if not rule.allows(value):
        refuse(entry, value, f"it must be {rule.text}")


def refuse(entry: Field[Any], value: Any, reason: str) -> NoReturn:
    raise UsageError(f"{'/'.join(names(entry))} {show(value)}: {reason}")


def show(value: Any) -> str:
    """A value as it is written on the command line; empty or unprintable text as Python writes it."""
    text = str(int(value) if isinstance(value, bool) else value)
    return text if text and text.isprintable() else repr(text)


def read_value(entry: Field[Any], text: str) -> Any:
    """From the text of a value to the type of the flag's default. UsageError for one that no run can use."""
    kind = type(entry.default)
    value = READERS[kind](text)
    if value is None:
        refuse(entry, text, f"it must be {KINDS[kind]}, such as {show(entry.default)}")
    check_value(entry, value)
    return value


def read_bool(text: str) -> bool | None:
    return {"0": False, "1": True}.get(text)


def read_int(text: str) -> int | None:
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,10}", text) else None
    return value if value is not None and abs(value) <= INT32_MAX else None


def read_float(text: str) -> float | None:
    value = float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) else math.nan
    return value if abs(value) <= FLOAT32_MAX else None


READERS: dict[type, Callable[[str], Any]] = {str: str, bool: read_bool, int: read_int, float: read_float}
KINDS: dict[type, str] = {bool: "0 or 1", int: f"a whole number up to {INT32_MAX}", float: "a finite number"}
