"""Model files (.bin, version 3 in fp32 and 5 in bf16).

Files hold each kind of tensor for all layers together (tensor-major). The program holds all tensors of a layer together
and names them "wte", "wpe", "h0.ln1w", ..., "h0.fcprojb", "h1.ln1w", ..., "lnfw", "lnfb". Only this module knows both.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np

from llmc.binfile import (
    HEADER_BYTES,
    MAGIC_MODEL,
    atomic_write,
    check_size,
    read_header,
    write_header,
)
from llmc.checksum import seal
from llmc.errors import RunError

if TYPE_CHECKING:
    import torch

PathLike = str | os.PathLike[str]
FileDtype = Literal["fp32", "bf16"]

VERSIONS: dict[FileDtype, int] = {"fp32": 3, "bf16": 5}
STEP_SLOT = 10  # of checkpoints: step + 1. 0 in all other files, and llm.c does not look at it
MAX_LAYERS = 2**12  # that the core takes; of tiny layers a file could hold more than there is memory for their names
ITEM_BYTES: dict[FileDtype, int] = {"fp32": 4, "bf16": 2}

BLOCK_TENSORS = (
    *("ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb"),
    *("ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb"),
)


def file_order(num_layers: int) -> list[str]:
    """The program's tensor names in the order of the file."""
    blocks = [f"h{layer}.{name}" for name in BLOCK_TENSORS for layer in range(num_layers)]
    return ["wte", "wpe", *blocks, "lnfw", "lnfb"]


@dataclass(frozen=True)
class ModelShape:
    """The six sizes in the header of a model file."""

    max_seq_len: int
    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    num_heads: int
    channels: int

    @property
    def num_parameters(self) -> int:
        """Number of values in the file, padding rows of wte included."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def flops_per_token(self, T: int) -> int:
        """Of a training step on rows of T tokens: 6 per parameter, and the attention scores."""
        return 6 * self.num_parameters + 6 * self.num_layers * self.channels * T

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """The 16 tensors of the file as (name, shape), in its order."""
        L, C = self.num_layers, self.channels
        return [
            ("wte", (self.padded_vocab_size, C)),
            ("wpe", (self.max_seq_len, C)),
            ("ln1w", (L, C)),
            ("ln1b", (L, C)),
            ("qkvw", (L, 3 * C, C)),
            ("qkvb", (L, 3 * C)),
            ("attprojw", (L, C, C)),
            ("attprojb", (L, C)),
            ("ln2w", (L, C)),
            ("ln2b", (L, C)),
            ("fcw", (L, 4 * C, C)),
            ("fcb", (L, 4 * C)),
            ("fcprojw", (L, C, 4 * C)),
            ("fcprojb", (L, C)),
            ("lnfw", (C,)),
            ("lnfb", (C,)),
        ]

    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """The same values as the program names them, (name, shape), in the order of the file."""
        shapes = dict(self.tensors())
        return [
            (name, shapes[name] if name in shapes else shapes[name.split(".")[1]][1:])
            for name in file_order(self.num_layers)
        ]


def read_model_header(path: PathLike) -> tuple[ModelShape, FileDtype]:
    """Return sizes and dtype of the model file `path`. Raises RunError unless header and file size are right."""
    header = read_header(path, MAGIC_MODEL, tuple(VERSIONS.values()))
    max_seq_len, vocab_size, num_layers, num_heads, channels, padded_vocab_size = (int(slot) for slot in header[2:8])
    shape = ModelShape(max_seq_len, vocab_size, padded_vocab_size, num_layers, num_heads, channels)
    check_shape(path, shape)
    dtype: FileDtype = "fp32" if int(header[1]) == VERSIONS["fp32"] else "bf16"
    expected = HEADER_BYTES + shape.num_parameters * ITEM_BYTES[dtype]
    check_size(path, expected, f"{shape.num_parameters} {dtype} parameters")
    return shape, dtype


def check_shape(path: PathLike, shape: ModelShape) -> None:
    """Raise RunError when no model can have the sizes that the header of `path` states."""
    for name, value in asdict(shape).items():
        if value <= 0:
            raise RunError(f"{path} is damaged: its header says {name} = {value}, which must be positive")
    if shape.num_layers > MAX_LAYERS:
        raise RunError(f"{path} is damaged: its header says num_layers = {shape.num_layers}, the most are {MAX_LAYERS}")
    if shape.padded_vocab_size < shape.vocab_size:
        raise RunError(
            f"{path} is damaged: its header says padded_vocab_size = {shape.padded_vocab_size}, "
            f"less than vocab_size = {shape.vocab_size}"
        )
    if shape.channels % shape.num_heads != 0:
        raise RunError(
            f"{path} is damaged: its header says channels = {shape.channels}, "
            f"which num_heads = {shape.num_heads} does not divide"
        )
    if shape.num_parameters * ITEM_BYTES["fp32"] >= 2**63:
        raise RunError(f"{path} is damaged: its header promises {shape.num_parameters} parameters")


def load_model(
    path: PathLike,
    parameters: Mapping[str, "torch.Tensor"],
    parts: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Copy the model file `path` into `parameters` (names and shapes of `ModelShape.parameters`, any dtype and device).

    parts: where `parameters` has only values begin to end of each tensor, flattened, in that order.
    fp32 values are rounded to nearest when the parameters are bf16. Raises RunError for a bad file or another model's.
    """
    import torch

    def fits(name: str, size: tuple[int, ...]) -> bool:
        if parts is None:
            return tuple(parameters[name].shape) == size
        begin, end = parts[name]
        return parameters[name].numel() == end - begin

    shape, dtype = read_model_header(path)
    expected = shape.parameters()
    wrong = [name for name, size in expected if name not in parameters or not fits(name, size)]
    if wrong or len(expected) != len(parameters):
        where = f", which differs in {wrong[0]}" if wrong else ""
        raise RunError(f"{path} holds another model than the one to load it into{where}: it has {asdict(shape)}")
    offset = HEADER_BYTES
    with open(path, "rb") as file, torch.no_grad():
        for name, size in expected:
            begin = 0 if parts is None else parts[name][0]
            target = parameters[name]
            if target.numel() > 0:
                target.copy_(mapped(file, dtype, offset + begin * ITEM_BYTES[dtype], tuple(target.shape)))
            offset += math.prod(size) * ITEM_BYTES[dtype]


def mapped_parameters(path: PathLike, shape: ModelShape, dtype: FileDtype) -> dict[str, "torch.Tensor"]:
    """The parameters in a model file, by the program's names; their memory is the file's, not to be written to."""
    parameters, offset = {}, HEADER_BYTES
    with open(path, "rb") as file:
        for name, size in shape.parameters():
            parameters[name] = mapped(file, dtype, offset, size)
            offset += math.prod(size) * ITEM_BYTES[dtype]
    return parameters


def mapped(file: BinaryIO, dtype: FileDtype, offset: int, size: tuple[int, ...]) -> "torch.Tensor":
    """The values of a model file from byte `offset` on; their memory is the file's, not to be written to."""
    import torch

    # Copy-on-write: torch refuses to share read-only memory without a warning.
    values = torch.from_numpy(np.memmap(file, "<f4" if dtype == "fp32" else "<i2", "c", offset, size))
    return values if dtype == "fp32" else values.view(torch.bfloat16)


def described(shape: ModelShape) -> str:
    """The sizes in words, the number of parameters last."""
    return (
        f"{shape.num_layers} layers, {shape.channels} channels, {shape.num_heads} heads, "
        f"context {shape.max_seq_len}, vocabulary {shape.vocab_size}, {shape.num_parameters:,}"
    )


def read_model_step(path: PathLike) -> int | None:
    """The step of the checkpoint that the model file belongs to; None: it does not say."""
    header = read_header(path, MAGIC_MODEL, tuple(VERSIONS.values()))
    return int(header[STEP_SLOT]) - 1 if header[STEP_SLOT] > 0 else None


def save_model(
    path: PathLike,
    shape: ModelShape,
    dtype: FileDtype,
    parameters: Mapping[str, "torch.Tensor"],
    step: int | None = None,
) -> None:
    """Write the model file `path` in one piece: it appears complete or not at all.

    `parameters` has the names and shapes of `ModelShape.parameters`; fp32 is rounded to nearest in a bf16 file.
    step: of the checkpoint that the file belongs to.
    """
    save_units(path, shape, dtype, [parameters], step)


def save_units(
    path: PathLike,
    shape: ModelShape,
    dtype: FileDtype,
    units: Iterable[Mapping[str, "torch.Tensor"]],
    step: int | None = None,
) -> None:
    """The same with parameters that come a few at a time, in any order, each once."""
    import torch

    slots = {
        0: MAGIC_MODEL,
        1: VERSIONS[dtype],
        2: shape.max_seq_len,
        3: shape.vocab_size,
        4: shape.num_layers,
        5: shape.num_heads,
        6: shape.channels,
        7: shape.padded_vocab_size,
        STEP_SLOT: 0 if step is None else step + 1,
    }
    places, offset = {}, HEADER_BYTES
    for name, size in shape.parameters():
        places[name] = (offset, size)
        offset += math.prod(size) * ITEM_BYTES[dtype]
    with atomic_write(path) as file:
        write_header(file, slots)
        for unit in units:
            for name, parameter in unit.items():
                offset, size = places.pop(name)
                if tuple(parameter.shape) != size:
                    raise ValueError(f"{name} has shape {tuple(parameter.shape)}, a model file of {shape} needs {size}")
                file.seek(offset)
                if dtype == "fp32":
                    write_array(file, parameter, torch.float32)
                else:
                    write_array(file, parameter.detach().to(torch.bfloat16).view(torch.int16), torch.int16)
        if places:
            raise ValueError(f"{', '.join(places)} of a model file of {shape} did not come")
        seal(file)


def write_array(file: BinaryIO, tensor: "torch.Tensor", dtype: "torch.dtype") -> None:
    """Append the values of `tensor`, cast to `dtype`, row by row."""
    file.write(tensor.detach().to("cpu", dtype).contiguous().numpy().data)
