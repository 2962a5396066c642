"""What -e and the flags on memory and numerics mean for the core: sizes, options and the memory plan."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import models
from llmc.config import TrainConfig
from llmc.device import Device
from llmc.errors import RunError, UsageError
from llmc.model_file import FileDtype, ModelShape, read_model_header

if TYPE_CHECKING:
    from llmc import _C

WELL_KNOWN_FILES = {"gpt2_124M_bf16.bin": "gpt2:d12", "gpt2_124M.bin": "gpt2:d12", "chessGPT_d8_bf16.bin": "chess:d8"}

HOST = "host"  # the lifetime of what is in the host's memory
ALIGNMENT = 256  # bytes; the core pads every buffer to a multiple, kAlignment in csrc/gpt2/plan.cpp


@dataclass(frozen=True)
class Buffer:
    """A row of the memory plan."""

    name: str
    lifetime: str  # parameters, gradients, optimizer, activations, checkpoint or host, the host's memory
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the allocation; buffers may share memory
    bytes: int


def is_file(model: str) -> bool:
    """True if -e names a file, False if it is a descriptor."""
    return model.endswith(".bin")


def model_shape(config: TrainConfig, vocab_size_of_data: int | None) -> tuple[ModelShape, FileDtype | None]:
    """The sizes of -e, and the dtype of its parameters if it names a file.

    `vocab_size_of_data` is the default of the free form. UsageError or RunError without one.
    """
    if not is_file(config.model):
        return models.resolve(config.model, vocab_size_of_data), None
    path = Path(config.model)
    if path.exists() or path.name not in WELL_KNOWN_FILES:
        return read_model_header(path)
    descriptor = WELL_KNOWN_FILES[path.name]
    out = "" if path.name == str(path) else f" --out {path}"
    if path.name == "chessGPT_d8_bf16.bin":
        raise RunError(f"-e {path}: there is no such file; make it, with random weights: llmc-init {descriptor}{out}")
    raise RunError(
        f"-e {path}: there is no such file; make it of OpenAI's weights: llmc-convert gpt2 {path}; or train this model "
        f"from scratch: -e {descriptor}"
    )


def precision_of(config: TrainConfig, on_cuda: bool, stored: FileDtype | None) -> FileDtype:
    """Of parameters and activations; `stored` is the model file's, None without one.

    bf16 is the habit of GPUs, and what a file holds is kept there: `auto` means that. UsageError for settings that
    contradict it.
    """
    auto: FileDtype = (stored or "bf16") if on_cuda else "fp32"
    precision: FileDtype = {"auto": auto, "fp32": "fp32", "bf16": "bf16"}[config.precision]
    if not config.tf32 and not (on_cuda and precision == "fp32"):
        raise UsageError("-f 0 has no effect but in fp32 on a GPU: drop it")
    if precision == "fp32" and not config.master_weights:
        raise UsageError("-w 0 has no effect in fp32, where parameters are their own master copy: drop it")
    if precision == "fp32" and config.grad_dtype == "bf16":
        raise UsageError("--grad-dtype bf16 needs --precision bf16: fp32 parameters have fp32 gradients")
    return precision


def core_config(model: str, shape: ModelShape) -> "_C.GPT2Config":
    """The sizes as the core takes them. RunError, which names `model`, if it cannot."""
    from llmc import _C

    try:
        return _C.GPT2Config(**asdict(shape))
    except _C.Error as error:
        raise RunError(f"{model}: {error}") from error


def check_fp8(config: TrainConfig, shape: ModelShape, precision: FileDtype, device: Device) -> None:
    """UsageError for --fp8 where it cannot be."""
    if not config.fp8:
        return
    flag = f"--fp8 {config.fp8}"
    if not device.is_cuda:
        raise UsageError(f"{flag} needs a GPU, this run is on a CPU: drop it")
    if not device.has_fp8:
        raise UsageError(f"{flag} needs a GPU of compute capability 8.9 or newer, which {device.name} is not: drop it")
    if precision != "bf16":
        raise UsageError(f"{flag} needs --precision bf16, this run is in {precision}: drop it")
    if config.gelu_fusion > 0:
        raise UsageError(
            f"-ge {config.gelu_fusion} cannot be with {flag}, which computes the GELU with the conversion: drop -ge"
        )
    if config.batch_size * config.seq_len % 16 != 0:
        raise UsageError(
            f"{flag} needs batches of a multiple of 16 tokens, -b {config.batch_size} times -t {config.seq_len} is "
            f"{config.batch_size * config.seq_len}: change one of them"
        )
    if shape.channels % 16 != 0:
        raise UsageError(
            f"{flag} needs channels that are a multiple of 16, -e {config.model} has {shape.channels}: drop it"
        )
    if config.fp8 == 2 and shape.padded_vocab_size % 16 != 0:
        raise UsageError(
            f"--fp8 2 needs a padded vocabulary of a multiple of 16, -e {config.model} has {shape.padded_vocab_size}: "
            "use --fp8 1"
        )


def core_options(
    config: TrainConfig,
    precision: FileDtype,
    device: Device,
    *,
    batch_size: int | None = None,
    recompute: int | None = None,
    zero_stage: int | None = None,
) -> "_C.Options":
    """The flags as the core takes them; the keywords replace single ones."""
    from llmc import _C

    if config.offload_optimizer and not device.is_cuda:
        raise UsageError("--offload-optimizer 1 has no effect on a CPU, whose memory is the host's: drop it")
    if not config.autotune and not device.is_cuda:
        raise UsageError("--autotune 0 has no effect on a CPU, where nothing is chosen by time: drop it")
    fuses_gelu = device.fuses_gelu and not config.fp8
    cudnn = config.attention == "cudnn"
    if cudnn and not device.is_cuda:
        raise UsageError("--attention cudnn needs a GPU, this run is on a CPU: drop it")
    if cudnn and precision != "bf16":
        raise UsageError(f"--attention cudnn needs --precision bf16, this run is in {precision}: use --attention flash")
    if cudnn and config.seq_len == 1:
        raise UsageError("--attention cudnn needs -t 2 or more, -t is 1: use --attention flash")
    if config.cuda_graphs and not device.is_cuda:
        raise UsageError("--cuda-graphs 1 has no effect on a CPU, which launches no kernels: drop it")
    return _C.Options(
        batch_size=config.batch_size if batch_size is None else batch_size,
        seq_len=config.seq_len,
        precision=precision,
        grad_dtype="fp32" if config.grad_dtype == "fp32" else precision,
        recompute=config.recompute if recompute is None else recompute,
        bias_fusion=config.autotune and device.is_cuda and not config.fp8,  # where it is slower, timing finds out
        gelu_fusion=2 * fuses_gelu if config.gelu_fusion == -1 else config.gelu_fusion,
        master_weights=config.master_weights,
        zero_stage=config.zero_stage if zero_stage is None else zero_stage,
        device=device.core_name,
        tf32=config.tf32,
        offload_optimizer=config.offload_optimizer,
        cudnn_attention=cudnn,
        cuda_graphs=config.cuda_graphs,
        fp8=config.fp8,
    )


def memory_plan(config: "_C.GPT2Config", options: "_C.Options", world_size: int = 1) -> list[Buffer]:
    """All buffers of one rank."""
    from llmc import _C

    return [Buffer(*row) for row in _C.plan(config, options, world_size)]


def total_bytes(buffers: list[Buffer]) -> int:
    """Of the device's memory."""
    return sum(size for lifetime, size in bytes_by_lifetime(buffers).items() if lifetime != HOST)


def host_bytes(buffers: list[Buffer]) -> int:
    """Of the host's memory, where that is not the device's."""
    return bytes_by_lifetime(buffers).get(HOST, 0)


def bytes_by_lifetime(buffers: list[Buffer]) -> dict[str, int]:
    """Bytes of each allocation. Buffers may share memory, so it is the last end that counts."""
    ends: dict[str, int] = {}
    for buffer in buffers:
        end = buffer.offset + -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        ends[buffer.lifetime] = max(ends.get(buffer.lifetime, 0), end)
    return ends
