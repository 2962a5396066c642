"""The debug state of the PyTorch reference: one batch with its logits, loss and gradients, to compare with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmc.binfile import HEADER_BYTES, MAGIC_DEBUG_STATE, atomic_write, check_size, read_header, write_header
from llmc.errors import RunError
from llmc.model_file import ModelShape, PathLike, file_order, write_array

if TYPE_CHECKING:
    import torch

VERSION = 2


@dataclass(frozen=True)
class DebugState:
    """One fp32 forward and backward pass of the PyTorch reference. Arrays are views of the file."""

    x: np.ndarray  # (B, T) int32
    y: np.ndarray  # (B, T) int32
    logits: np.ndarray  # (B, T, V) fp32
    loss: float  # mean over B and T
    gradients: dict[str, np.ndarray]  # fp32, of the mean loss, unclipped; "wte" is (Vp, C)


def write_debug_state(
    path: PathLike,
    x: "torch.Tensor",
    y: "torch.Tensor",
    logits: "torch.Tensor",
    loss: float,
    gradients: Mapping[str, "torch.Tensor"],
) -> None:
    """Write the debug state `path` in one piece.

    x, y: tokens and targets (B, T); logits: (B, T, V) without padding; loss: the mean;
    gradients: names and shapes of `ModelShape.parameters`, with "wte" padded to (Vp, C).
    """
    import torch

    B, T = x.shape
    num_layers = sum(name.endswith(".ln1w") for name in gradients)
    with atomic_write(path) as file:
        write_header(file, {0: MAGIC_DEBUG_STATE, 1: VERSION, 2: B, 3: T})
        write_array(file, x, torch.int32)
        write_array(file, y, torch.int32)
        write_array(file, logits, torch.float32)
        file.write(np.float32(loss).tobytes())
        for name in file_order(num_layers):
            write_array(file, gradients[name], torch.float32)


def read_debug_state(path: PathLike, shape: ModelShape) -> DebugState:
    """Map the debug state `path` of a model of `shape`. Raises RunError for a bad file or one of another model."""
    header = read_header(path, MAGIC_DEBUG_STATE, (VERSION,))
    B, T = int(header[2]), int(header[3])
    if B <= 0 or not 0 < T <= shape.max_seq_len:
        raise RunError(
            f"{path} does not fit the model: its header says B = {B}, T = {T}; "
            f"B must be positive and T from 1 to {shape.max_seq_len}"
        )
    sizes = {"x": (B, T), "y": (B, T), "logits": (B, T, shape.vocab_size), "loss": (1,), **dict(shape.parameters())}
    values = sum(math.prod(size) for size in sizes.values())
    contents = f"B = {B}, T = {T}, for a model of V = {shape.vocab_size} and {shape.num_parameters} parameters"
    check_size(path, HEADER_BYTES + 4 * values, contents)
    data: np.ndarray = np.memmap(path, "<f4", "c", HEADER_BYTES)
    arrays = {}
    for name, size in sizes.items():
        arrays[name], data = data[: math.prod(size)].reshape(size), data[math.prod(size) :]
    x, y, logits, loss = (arrays.pop(name) for name in ("x", "y", "logits", "loss"))
    return DebugState(x.view("<i4"), y.view("<i4"), logits, float(loss[0]), arrays)
