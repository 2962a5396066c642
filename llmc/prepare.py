"""From the flags to a model and its data: every check is made here, before anything on the disk changes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import models
from llmc.build import (
    Buffer,
    check_fp8,
    core_config,
    core_options,
    host_bytes,
    is_file,
    memory_plan,
    model_shape,
    precision_of,
    total_bytes,
)
from llmc.checkpoint import Checkpoint, files
from llmc.checkpoint_copies import copy_buffers
from llmc.checksum import verify
from llmc.config import TrainConfig
from llmc.data.eval_file import Example
from llmc.data.loader import DataLoader
from llmc.data.shards import find_shards
from llmc.device import Device, choose_device, communicator
from llmc.errors import RunError, UsageError
from llmc.hellaswag import load_examples
from llmc.machine import memory_bytes
from llmc.model_file import FileDtype, ModelShape, load_model
from llmc.outliers import OutlierDetector
from llmc.output_dir import check_output_dir
from llmc.ranks import Ranks
from llmc.resharding import parameter_parts
from llmc.schedule import Schedule
from llmc.snapshot import PassedOver, check_master, newest_good, restore
from llmc.state_file import TrainState
from llmc.telemetry import Telemetry
from llmc.tokenizer import Tokenizer, dataset_tokenizer, working_directory_tokenizer

if TYPE_CHECKING:
    from llmc import _C


@dataclass(frozen=True)
class Run:
    """All that is settled before the first step."""

    config: TrainConfig
    ranks: Ranks
    shape: ModelShape
    model: "_C.GPT2"
    buffers: list[Buffer]  # of the memory plan
    precision: FileDtype  # of parameters and activations
    train_pattern: str
    train_loader: DataLoader
    val_loader: DataLoader
    hellaswag_examples: list[Example]  # none without -h 1
    tokenizer: Tokenizer | None
    accumulation_steps: int
    num_steps: int
    val_batches: int
    schedule: Schedule
    loss_outliers: OutlierDetector
    norm_outliers: OutlierDetector
    resumed: TrainState | None  # what the run goes on from
    passed_over: list[PassedOver]  # checkpoints newer than that, missing files or damaged
    device: Device
    telemetry: Telemetry | None  # the device's sensors, if they are to be logged
    peak_flops: float | None  # of the device, per second; None if that is not known

    @property
    def start_step(self) -> int:
        return self.resumed.step if self.resumed else 0

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, over all ranks."""
        return self.config.batch_size * self.config.seq_len * self.accumulation_steps * self.ranks.size

    @property
    def flops_per_token(self) -> int:
        return self.shape.flops_per_token(self.config.seq_len)

    @property
    def start_token(self) -> int:
        """What a sample starts with: end-of-text, as far as it is known."""
        if self.tokenizer:
            return self.tokenizer.end_of_text
        return models.END_OF_TEXT_IDS.get(self.shape.vocab_size, 0)


def prepare(config: TrainConfig, ranks: Ranks) -> Run:
    """Check everything that can be checked before the first step, and build what the steps need."""
    from llmc import _C

    B, T, P = config.batch_size, config.seq_len, ranks.size
    accumulation_steps = config.accumulation_steps(P)
    device = choose_device(config, ranks.local_rank, ranks.local_size)
    telemetry = telemetry_of(config, device)

    train_pattern = config.val_data if config.overfit_one_batch else config.train_data
    tokenizers = [dataset_tokenizer(find_shards(pattern)[0]) for pattern in (train_pattern, config.val_data)]
    tokenizer = Tokenizer(config.tokenizer) if config.tokenizer else tokenizers[0] or tokenizers[1]
    vocab_size = tokenizer.vocab_size if tokenizer else None
    check_not_in_output_dir(config)
    stored, passed_over = newest_good(Path(config.output_dir), ranks) if config.resume else (None, [])
    stored_as: FileDtype | None
    if stored:
        shape, stored_as = stored.shape, stored.precision
        check_same_model(config, stored.checkpoint, shape, vocab_size)
    else:
        shape, stored_as = model_shape(config, vocab_size)
    precision = precision_of(config, device.is_cuda, stored_as)
    if shape.max_seq_len < T:
        raise UsageError(
            f"-t {T} is longer than the context of the model {config.model}: use -t {shape.max_seq_len} or less"
        )
    for known in filter(None, [*tokenizers, tokenizer]):
        check_vocabulary(config.model, shape, known)
    check_same_tokens(*tokenizers)

    shuffle = not config.overfit_one_batch
    train_loader = DataLoader(
        train_pattern, B, T, ranks.rank, P, shuffle=shuffle, seed=config.seed, vocab_size=shape.vocab_size
    )
    val_loader = DataLoader(config.val_data, B, T, ranks.rank, P, vocab_size=shape.vocab_size)
    hellaswag_examples = (
        load_examples(config.hellaswag_data, T, shape.max_seq_len, shape.vocab_size) if config.hellaswag else []
    )
    num_steps = config.max_steps
    if num_steps == -1:
        num_steps = train_loader.num_tokens // (B * T * P * accumulation_steps)
        if num_steps == 0:
            raise UsageError(
                f"-d {config.total_batch_size} is more than the {train_loader.num_tokens} tokens of {train_pattern}, "
                "so an epoch has no step: lower -d or give the number of steps with -x"
            )
    val_batches = val_loader.num_tokens // (B * T * P) if config.val_max_batches == -1 else config.val_max_batches
    schedule = Schedule(
        config.scheduler, config.learning_rate, config.warmup_steps, num_steps, config.final_lr_fraction
    )
    state = stored.states[0] if stored else None
    if stored:
        check_master(stored, config, precision)
        if stored.step > num_steps:
            raise UsageError(
                f"-x: the newest checkpoint in -o {config.output_dir} is at step {stored.step}, the run would end at "
                f"step {num_steps}: raise -x, or begin a new run with another -o"
            )
        train_loader.load_states([state.loader for state in stored.states], stored.paths)
    check_output_dir(config.output_dir)

    check_attention(config)
    check_fp8(config, shape, precision, device)
    sizes, options = core_config(f"-e {config.model}", shape), core_options(config, precision, device)
    buffers = memory_plan(sizes, options, P)
    if config.async_checkpoint:
        buffers += copy_buffers(shape, options, P, ranks.rank, buffers)
    check_memory(buffers, device, ranks)
    # The ranks may see different files.
    ranks.agree("tokens in the training data", train_loader.num_tokens)
    ranks.agree("the number of examples for -h", len(hellaswag_examples))
    if not stored and is_file(config.model):
        problem = ranks.problem_of_rank_0("the file of -e", verify, config.model)
        if problem:
            raise RunError(f"-e {problem}")
    model = _C.GPT2(sizes, options, communicator(ranks, device))
    if stored:
        restore(stored, model)
    elif is_file(config.model):
        load_model(config.model, model.parameters(), parameter_parts(model))
    else:
        model.init_random(config.seed)
    return Run(
        config=config,
        ranks=ranks,
        shape=shape,
        model=model,
        buffers=buffers,
        precision=precision,
        train_pattern=train_pattern,
        train_loader=train_loader,
        val_loader=val_loader,
        hellaswag_examples=hellaswag_examples,
        tokenizer=tokenizer or working_directory_tokenizer(shape.vocab_size),
        accumulation_steps=accumulation_steps,
        num_steps=num_steps,
        val_batches=val_batches,
        schedule=schedule,
        loss_outliers=OutlierDetector(state.loss_window if state else ()),
        norm_outliers=OutlierDetector(state.norm_window if state else ()),
        resumed=state,
        passed_over=passed_over,
        device=device,
        telemetry=telemetry,
        peak_flops=device.peak_flops(precision, config.tf32),
    )


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


def telemetry_of(config: TrainConfig, device: Device) -> Telemetry | None:
    """The sensors for -lg, None without it."""
    if config.log_gpu_every < 1:
        return None
    if not device.is_cuda:
        raise UsageError(f"-lg {config.log_gpu_every} needs a GPU, this run is on the CPU: drop it")
    return Telemetry(device.pci_bus_id)


def check_not_in_output_dir(config: TrainConfig) -> None:
    """A new run moves the checkpoints in -o aside, and must not pull the ground from under itself."""
    model, directory = Path(config.model), Path(config.output_dir)
    if (
        config.output_dir
        and not config.resume
        and is_file(config.model)
        and model.resolve() in map(Path.resolve, files(directory))
    ):
        raise UsageError(
            f"-e {model} is a checkpoint in -o {directory}, which a new run moves aside: choose another -o, "
            "or go on from the newest one with -y 1"
        )


def check_same_model(config: TrainConfig, checkpoint: Checkpoint, shape: ModelShape, vocab_size: int | None) -> None:
    """-e is not needed to resume; but where it says something it must be true."""
    if is_file(config.model) and not Path(config.model).exists():
        return
    wanted, _ = model_shape(config, vocab_size)
    if wanted != shape:
        fields = [name for name, size in asdict(shape).items() if size != asdict(wanted)[name]]
        raise RunError(
            f"{checkpoint.model} is not the model -e {config.model}: its {fields[0]} is {asdict(shape)[fields[0]]}, "
            f"not {asdict(wanted)[fields[0]]}; give the -e of that run, or begin a new one with another -o"
        )


def check_attention(config: TrainConfig) -> None:
    from llmc import _C

    if config.attention == "cudnn" and not _C.build_info()["cudnn"]:
        raise UsageError(
            "--attention cudnn: this build of llmc has no cuDNN: reinstall with LLMC_CUDNN=ON, which says what is "
            "missing, or use --attention flash"
        )


def check_memory(buffers: list[Buffer], device: Device, ranks: Ranks) -> None:
    needed, available = total_bytes(buffers), device.free_memory()
    if needed > available:
        where = f"{device.name} has {available // 2**20} MiB free"
        if not device.is_cuda:
            each = " for each process" if ranks.size > 1 else ""
            where = f"this machine has {available // 2**20} MiB{each}"
        raise RunError(
            f"the run needs {needed // 2**20} MiB of memory, {where}: "
            "lower -b or -t, raise -r, or use a smaller model (--dry-run shows what would fit)"
        )
    needed, available = host_bytes(buffers), memory_bytes() // ranks.local_size
    if needed > available:
        each = " for each process" if ranks.local_size > 1 else ""
        raise RunError(
            f"the run needs {needed // 2**20} MiB of host memory, this machine has {available // 2**20} MiB{each}: "
            "use more machines with -z 1, or drop --offload-optimizer 1 and --async-checkpoint 1"
        )
