"""From the flags to a model and its data: every check is made here, before anything on the disk changes."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import models
from llmc.config import TrainConfig
from llmc.data.loader import DataLoader
from llmc.data.shards import find_shards
from llmc.errors import RunError, UsageError
from llmc.machine import memory_bytes
from llmc.model_file import FileDtype, ModelShape, load_model, read_model_header
from llmc.schedule import Schedule
from llmc.tokenizer import Tokenizer, dataset_tokenizer, working_directory_tokenizer

if TYPE_CHECKING:
    from llmc import _C

Buffer = tuple[str, str, str, tuple[int, ...], int, int]  # name, lifetime, dtype, shape, offset, bytes

INIT_SEED = 42  # of the weights of a descriptor
WELL_KNOWN_FILES = {"gpt2_124M_bf16.bin": "gpt2:d12", "chessGPT_d8_bf16.bin": "chess:d8"}


@dataclass(frozen=True)
class Run:
    """All that is settled before the first step."""

    config: TrainConfig
    shape: ModelShape
    model: "_C.GPT2"
    buffers: list[Buffer]  # of the memory plan
    precision: FileDtype
    train_pattern: str
    train_loader: DataLoader
    val_loader: DataLoader
    tokenizer: Tokenizer | None
    accumulation_steps: int
    num_steps: int
    val_batches: int
    schedule: Schedule

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, on this process."""
        return self.config.batch_size * self.config.seq_len * self.accumulation_steps

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward: 6 per parameter, and the attention scores."""
        return 6 * self.shape.num_parameters + 6 * self.shape.num_layers * self.shape.channels * self.config.seq_len

    @property
    def start_token(self) -> int:
        """What a sample starts with: end-of-text, as far as it is known."""
        if self.tokenizer:
            return self.tokenizer.end_of_text
        return models.END_OF_TEXT_IDS.get(self.shape.vocab_size, 0)


def prepare(config: TrainConfig) -> Run:
    """Check everything that can be checked before the first step, and build what the steps need."""
    B, T = config.batch_size, config.seq_len
    accumulation_steps = config.accumulation_steps(world_size=1)
    precision: FileDtype = "bf16" if config.precision == "bf16" else "fp32"
    if precision == "fp32" and not config.master_weights:
        raise UsageError("-w 0 has no effect in fp32, where parameters are their own master copy: drop it")

    train_pattern = config.val_data if config.overfit_one_batch else config.train_data
    stored_shape = stored_model_shape(config) if is_file(config.model) else None
    tokenizers = [dataset_tokenizer(find_shards(pattern)[0]) for pattern in (train_pattern, config.val_data)]
    tokenizer = tokenizers[0] or tokenizers[1]
    shape = stored_shape or models.resolve(config.model, tokenizer.vocab_size if tokenizer else None)
    if shape.max_seq_len < T:
        raise UsageError(
            f"-t {T} is longer than the context of the model {config.model}: use -t {shape.max_seq_len} or less"
        )
    for known in filter(None, tokenizers):
        check_vocabulary(config.model, shape, known)
    check_same_tokens(*tokenizers)

    shuffle = not config.overfit_one_batch
    train_loader = DataLoader(train_pattern, B, T, shuffle=shuffle, vocab_size=shape.vocab_size)
    val_loader = DataLoader(config.val_data, B, T, vocab_size=shape.vocab_size)
    num_steps = config.max_steps
    if num_steps == -1:
        num_steps = train_loader.num_tokens // (B * T * accumulation_steps)
        if num_steps == 0:
            raise UsageError(
                f"-d {config.total_batch_size} is more than the {train_loader.num_tokens} tokens of {train_pattern}, "
                "so an epoch has no step: lower -d or give the number of steps with -x"
            )
    val_batches = val_loader.num_tokens // (B * T) if config.val_max_batches == -1 else config.val_max_batches
    schedule = Schedule(
        config.scheduler, config.learning_rate, config.warmup_steps, num_steps, config.final_lr_fraction
    )
    check_output_dir(config.output_dir)
    model, buffers = build_model(config, shape, precision)
    return Run(
        config=config,
        shape=shape,
        model=model,
        buffers=buffers,
        precision=precision,
        train_pattern=train_pattern,
        train_loader=train_loader,
        val_loader=val_loader,
        tokenizer=tokenizer or working_directory_tokenizer(shape.vocab_size),
        accumulation_steps=accumulation_steps,
        num_steps=num_steps,
        val_batches=val_batches,
        schedule=schedule,
    )


def check_output_dir(directory: str) -> None:
    """Find out before a large model is built, not after it, that nothing can be written; '' stands for no directory."""
    path = Path(directory)
    if not directory:
        return
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise RunError(f"-o {path}: {existing} is not a directory; choose another output directory")
    if not os.access(existing, os.W_OK | os.X_OK) or (path / "main.log").is_dir():
        raise RunError(f"-o {path}: {path / 'main.log'} cannot be written; choose another output directory")


def is_file(model: str) -> bool:
    """True if -e names a file, False if it is a descriptor."""
    return model.endswith(".bin")


def stored_model_shape(config: TrainConfig) -> ModelShape:
    path = Path(config.model)
    if path.exists() or path.name not in WELL_KNOWN_FILES:
        return read_model_header(path)[0]
    message = f"-e {path}: there is no such file; to train this model from scratch use -e {WELL_KNOWN_FILES[path.name]}"
    if path.name == "gpt2_124M_bf16.bin":
        message += (
            "; to make the file from OpenAI's weights run python scripts/train_gpt2.py --model gpt2 "
            f"--num_iterations 0 --input_bin '{config.train_data}' (needs the transformers package and the network)"
        )
    raise RunError(message)


def check_vocabulary(model: str, shape: ModelShape, tokenizer: Tokenizer) -> None:
    """A GPT-2 must not silently train on chess."""
    V = shape.vocab_size
    if tokenizer.vocab_size != V:
        how = " (llmc-data text --encoding gpt2 makes it)" if V == models.GPT2_VOCAB_SIZE else ""
        raise RunError(
            f"the model {model} has a vocabulary of {V} tokens, the data's tokenizer {tokenizer.path} one of "
            f"{tokenizer.vocab_size}: give -i and -j data of {V} tokens{how} or another model with -e, "
            "such as custom:l=4,c=128,h=4,t=64, which takes the vocabulary of the data"
        )


def check_same_tokens(train: Tokenizer | None, val: Tokenizer | None) -> None:
    """Numbers must mean the same text in both data sets."""
    if train and val and train.tokens != val.tokens:
        raise RunError(
            f"the data of -i and -j have different tokens ({train.path} and {val.path}): "
            "give training and validation data of one data set"
        )


def build_model(config: TrainConfig, shape: ModelShape, precision: FileDtype) -> tuple["_C.GPT2", list[Buffer]]:
    """The model with its weights, and its memory plan."""
    from llmc import _C

    try:
        core_config = _C.GPT2Config(**asdict(shape))
    except _C.Error as error:
        raise RunError(f"-e {config.model}: {error}") from error
    options = _C.Options(
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        precision=precision,
        recompute=config.recompute,
        gelu_fusion=2,  # costs nothing on the CPU: the same bits, fewer passes over memory
        master_weights=config.master_weights,
    )
    buffers = _C.plan(core_config, options)
    needed, available = sum(bytes_by_lifetime(buffers).values()), memory_bytes()
    if needed > available:
        raise RunError(
            f"the run needs {needed // 2**20} MiB of memory, this machine has {available // 2**20} MiB: "
            "lower -b or -t, raise -r, or use a smaller model"
        )
    model = _C.GPT2(core_config, options)
    if is_file(config.model):
        load_model(config.model, model.parameters())
    else:
        model.init_random(INIT_SEED)
    return model, buffers


def bytes_by_lifetime(buffers: list[Buffer]) -> dict[str, int]:
    """Bytes of each allocation. Buffers may share memory, so it is the last end that counts."""
    ends: dict[str, int] = {}
    for _, lifetime, _, _, offset, size in buffers:
        ends[lifetime] = max(ends.get(lifetime, 0), offset + size)
    return ends
