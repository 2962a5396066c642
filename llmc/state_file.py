"""Optimizer and data state (state_STEP_RANK.bin): with the model file, all that a run needs to go on to the bit.

After the header come m, v and, with slot 4 set, master weights, each fp32 (N,) in the order of the model file; then,
where the loader shuffles, its block; then a trailer that llm.c neither writes nor reads: magic number, byte length and
a JSON object with the outlier detectors' windows.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llmc.binfile import HEADER_BYTES, MAGIC_STATE, atomic_write, read_header, write_header
from llmc.data.loader import LoaderState
from llmc.errors import RunError
from llmc.model_file import PathLike, write_array

if TYPE_CHECKING:
    import torch

VERSION = 1
TRAILER_MAGIC = 20261124
# Where llm.c keeps the Mersenne Twister: unused seed, numbers left, next number, state, and two constants.
TWISTER = struct.Struct("<QiI624I2I")
TWISTER_SIZE = 624
TWISTER_CONSTANTS = (0, 0x9908B0DF)


@dataclass(frozen=True)
class TrainState:
    """Everything in a state file but the large arrays."""

    step: int  # optimizer steps done, so the 0-based number of the next one
    world_size: int
    rank: int
    zero_stage: int
    has_master: bool
    num_parameters: int  # N, values in each array
    rng_state: int  # of the model
    last_update_rng_state: int  # as it was just before the last update
    loader: LoaderState
    loss_window: tuple[float, ...]  # of the outlier detectors, oldest first
    norm_window: tuple[float, ...]

    @property
    def arrays(self) -> list[str]:
        return ["m", "v", "master"] if self.has_master else ["m", "v"]


def write_state(path: PathLike, state: TrainState, arrays: Mapping[str, list["torch.Tensor"]]) -> None:
    """Write a state file in one piece. arrays: "m", "v" and, if it has them, "master", in pieces of N values in all."""
    import torch

    loader = state.loader
    slots = {
        0: MAGIC_STATE,
        1: VERSION,
        2: state.world_size,
        3: state.rank,
        4: int(state.has_master),
        5: int(loader.shuffle),
        6: state.zero_stage,
        10: state.step,
        **words(12, state.num_parameters),
        **words(20, state.rng_state),
        **words(22, state.last_update_rng_state),
        **words(30, loader.shard_index),
        **words(32, loader.next_sample),
    }
    trailer = json.dumps({"loss_window": state.loss_window, "norm_window": state.norm_window}).encode()
    with atomic_write(path) as file:
        write_header(file, slots)
        for name in state.arrays:
            for piece in arrays[name]:
                write_array(file, piece, torch.float32)
        if loader.shuffle:
            for order in (loader.shard_order, loader.sample_order):
                file.write(struct.pack("<Q", len(order)) + order.astype("<i4").tobytes())
            left = TWISTER_SIZE + 1 - loader.position
            file.write(TWISTER.pack(0, left, loader.position, *loader.generator.tolist(), *TWISTER_CONSTANTS))
        file.write(struct.pack("<iQ", TRAILER_MAGIC, len(trailer)) + trailer)


def read_state(path: PathLike, num_parameters: int | None = None) -> TrainState:
    """Read all but the arrays. RunError unless the file is whole and its arrays have `num_parameters` values each.

    Without `num_parameters` the header must tell: llm.c's files do not.
    """
    header = read_header(path, MAGIC_STATE, (VERSION,))
    stated = word(header, 12)
    if num_parameters is None and stated == 0:
        raise RunError(f"{path} does not say how many parameters it is for: it is llm.c's, name its model file too")
    N = num_parameters or stated
    if stated not in (0, N):
        raise RunError(f"{path} is of another model: it has the state of {stated} parameters, the model has {N}")
    has_master, shuffle = flag(path, header, 4), flag(path, header, 5)
    with open(path, "rb") as file:
        reader = Reader(Path(path), file, HEADER_BYTES + 4 * N * (3 if has_master else 2))
        loader = reader.loader(word(header, 30), word(header, 32)) if shuffle else unshuffled(header)
        windows = reader.windows(required=stated != 0)
    return TrainState(
        step=int(header[10]),
        world_size=int(header[2]),
        rank=int(header[3]),
        zero_stage=int(header[6]),
        has_master=has_master,
        num_parameters=N,
        rng_state=word(header, 20),
        last_update_rng_state=word(header, 22),
        loader=loader,
        loss_window=windows[0],
        norm_window=windows[1],
    )


def map_arrays(path: PathLike, state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of the file that `state` was read from: fp32 (N,) each, read when they are touched."""
    N = state.num_parameters
    # Copy-on-write: torch refuses to share read-only memory without a warning. Nothing is ever written.
    return {name: np.memmap(path, "<f4", "c", HEADER_BYTES + 4 * N * i, (N,)) for i, name in enumerate(state.arrays)}


class Reader:
    """Reads what follows the arrays, which end at `offset`, never more than the file has."""

    def __init__(self, path: Path, file: BinaryIO, offset: int) -> None:
        self.path, self.file = path, file
        self.left = os.fstat(file.fileno()).st_size - offset
        self._require(0, "the optimizer state")
        file.seek(offset)

    def loader(self, shard_index: int, next_sample: int) -> LoaderState:
        shard_order = self._order("the order of the shards")
        sample_order = self._order("the order of the samples")
        _, left, position, *numbers = TWISTER.unpack(self._read(TWISTER.size, "the shuffle's generator"))
        # A generator that has just been seeded, or is used up, computes a new state first: numpy counts that as 624.
        position = TWISTER_SIZE if left == 1 else position
        if not 1 <= left <= TWISTER_SIZE or left + position != TWISTER_SIZE + 1:
            raise RunError(f"{self.path} is damaged: the shuffle's generator has {left} numbers left at {position}")
        generator = np.array(numbers[:TWISTER_SIZE], dtype=np.uint32)
        return LoaderState(True, shard_index, next_sample, shard_order, sample_order, generator, position)

    def windows(self, required: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of losses and norms; llm.c's files, which do not state N either, end before them."""
        if self.left == 0 and not required:
            return (), ()
        magic, length = struct.unpack("<iQ", self._read(12, "the trailer"))
        if magic != TRAILER_MAGIC:
            raise RunError(f"{self.path} is too long: {self.left + 12} bytes do not belong to it")
        raw = self._read(length, "the trailer")
        if self.left > 0:
            raise RunError(f"{self.path} is too long: {self.left} bytes follow the trailer")
        try:
            fields = json.loads(raw)
            return numbers_of(fields["loss_window"]), numbers_of(fields["norm_window"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise RunError(f"{self.path} is damaged: its trailer cannot be read ({error})") from None

    def _order(self, what: str) -> np.ndarray:
        (length,) = struct.unpack("<Q", self._read(8, what))
        return np.frombuffer(self._read(4 * length, what), dtype="<i4").astype(np.int32)

    def _read(self, size: int, what: str) -> bytes:
        self._require(size, what)
        self.left -= size
        return self.file.read(size)

    def _require(self, size: int, what: str) -> None:
        if size > self.left:
            raise RunError(
                f"{self.path} is truncated or of another model: {what} needs {size - self.left} more bytes than it has"
            )


def numbers_of(values: Any) -> tuple[float, ...]:
    """A list of finite numbers, or ValueError."""
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError("a window is not a list of numbers")
    return tuple(float(value) for value in values)


def unshuffled(header: np.ndarray) -> LoaderState:
    empty = np.zeros(0, np.int32)
    return LoaderState(False, word(header, 30), word(header, 32), empty, empty, np.zeros(0, np.uint32), TWISTER_SIZE)


def words(slot: int, value: int) -> dict[int, int]:
    """An unsigned 64-bit number in two slots, as signed 32-bit halves."""
    low, high = struct.unpack("<ii", struct.pack("<Q", value))
    return {slot: low, slot + 1: high}


def word(header: np.ndarray, slot: int) -> int:
    return int(header[slot : slot + 2].copy().view("<u8")[0])


def flag(path: PathLike, header: np.ndarray, slot: int) -> bool:
    value = int(header[slot])
    if value not in (0, 1):
        raise RunError(f"{path} is damaged: header slot {slot} is {value}, expected 0 or 1")
    return value == 1
