"""Optimizer and data state (state_STEP_RANK.bin): with the model file, all that a run needs to go on to the bit.

After the header come m, v and, with slot 4 set, master weights, fp32: in version 1 all N values each in the order of
the model file, in version 2 the rank's slice of every unit, padding included. Then, where the loader shuffles, its
block; then a trailer that llm.c neither writes nor reads: magic number, byte length and a JSON object.

llm.c's ZeRO stage 1 writes version 1 with N / world_size values each, which only the size of the file tells.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llmc import json_text
from llmc.binfile import HEADER_BYTES, MAGIC_STATE, atomic_write, read_header, write_header
from llmc.checksum import seal
from llmc.data.consumed import Consumed
from llmc.data.loader import LoaderState
from llmc.data.shards import MAX_TOKENS
from llmc.errors import RunError
from llmc.model_file import PathLike, write_array

if TYPE_CHECKING:
    import torch

VERSIONS = (1, 2)
TRAILER_MAGIC = 20261124
# Where llm.c keeps the Mersenne Twister: unused seed, numbers left, next number, state, and two constants.
TWISTER = struct.Struct("<QiI624I2I")
TWISTER_SIZE = 624
TWISTER_CONSTANTS = (0, 0x9908B0DF)
MAX_TRAILER = 2**31  # bytes: some fifty million batches that an interrupted run of other ranks has consumed


@dataclass(frozen=True)
class TrainState:
    """Everything in a state file but the large arrays."""

    version: int  # 1: arrays of the whole model, or llm.c's parts at stage 1; 2: of this rank's slices
    step: int  # optimizer steps done, so the 0-based number of the next one
    world_size: int
    rank: int
    zero_stage: int
    has_master: bool
    num_parameters: int  # N, of the whole model
    array_size: int  # values in each array
    rng_state: int  # of the model
    last_update_rng_state: int  # as it was just before the last update
    loader: LoaderState
    loss_window: tuple[float, ...]  # of the outlier detectors, oldest first
    norm_window: tuple[float, ...]
    fp8_history: tuple[float, ...] = ()  # of this rank; empty without --fp8

    @property
    def arrays(self) -> list[str]:
        return ["m", "v", "master"] if self.has_master else ["m", "v"]


def write_state(path: PathLike, state: TrainState, arrays: Mapping[str, list["torch.Tensor"]]) -> None:
    """Write a state file in one piece. arrays: "m", "v" and, if it has them, "master", in pieces, array_size in all."""
    import torch

    loader = state.loader
    slots = {
        0: MAGIC_STATE,
        1: state.version,
        2: state.world_size,
        3: state.rank,
        4: int(state.has_master),
        5: int(loader.shuffle),
        6: state.zero_stage,
        10: state.step,
        **words(12, state.num_parameters),
        **(words(14, state.array_size) if state.version == 2 else {}),
        **words(20, state.rng_state),
        **words(22, state.last_update_rng_state),
        **words(30, loader.shard_index),
        **words(32, loader.next_sample),
    }
    trailer = json.dumps(
        {
            "loss_window": state.loss_window,
            "norm_window": state.norm_window,
            **({"fp8_history": state.fp8_history} if state.fp8_history else {}),
            "B": loader.B,
            "T": loader.T,
            "epoch": loader.epoch,
            "consumed": {
                epoch: {shard: intervals.tolist() for shard, intervals in shards.items()}
                for epoch, shards in loader.consumed.items()
            },
        }
    ).encode()
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
        seal(file)


def read_state(path: PathLike, num_parameters: int | None = None) -> TrainState:
    """Read all but the arrays. RunError unless the file is whole and of a model of `num_parameters` values.

    Without `num_parameters` the header must tell: llm.c's files do not.
    """
    header = read_header(path, MAGIC_STATE, VERSIONS)
    stated = word(header, 12)
    if num_parameters is None and stated == 0:
        raise RunError(f"{path} does not say how many parameters it is for: it is llm.c's, name its model file too")
    N = num_parameters or stated
    if stated not in (0, N):
        raise RunError(f"{path} is of another model: it has the state of {stated} parameters, the model has {N}")
    version, world_size, zero_stage = int(header[1]), int(header[2]), int(header[6])
    if zero_stage not in ((0,) if version == 1 else (1, 2, 3)):
        raise RunError(f"{path} is damaged: version {version} at ZeRO stage {zero_stage}")
    if version == 2:
        return read_rest(path, header, N, word(header, 14), zero_stage)
    try:
        return read_rest(path, header, N, N, zero_stage)
    except RunError:
        if stated != 0 or world_size < 2 or N % world_size != 0:
            raise
        try:
            return read_rest(path, header, N, N // world_size, zero_stage=1)
        except RunError:
            pass  # what is wrong with it as a file of the whole model says more
        raise


def read_rest(path: PathLike, header: np.ndarray, N: int, array_size: int, zero_stage: int) -> TrainState:
    """What the header says and what follows the arrays of that size. RunError unless the file ends there."""
    has_master, shuffle = flag(path, header, 4), flag(path, header, 5)
    with open(path, "rb") as file:
        reader = Reader(Path(path), file, HEADER_BYTES + 4 * array_size * (3 if has_master else 2))
        loader = reader.loader(word(header, 30), word(header, 32)) if shuffle else unshuffled(header)
        trailer = reader.trailer(required=word(header, 12) != 0)
    return TrainState(
        version=int(header[1]),
        step=int(header[10]),
        world_size=int(header[2]),
        rank=int(header[3]),
        zero_stage=zero_stage,
        has_master=has_master,
        num_parameters=N,
        array_size=array_size,
        rng_state=word(header, 20),
        last_update_rng_state=word(header, 22),
        loader=replace(loader, B=trailer.B, T=trailer.T, epoch=trailer.epoch, consumed=trailer.consumed),
        loss_window=trailer.loss_window,
        norm_window=trailer.norm_window,
        fp8_history=trailer.fp8_history,
    )


def read_world_size(path: PathLike) -> int:
    """How many ranks have written files like this one. RunError if it is none."""
    return int(read_header(path, MAGIC_STATE, VERSIONS)[2])


def map_arrays(path: PathLike, state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of the file that `state` was read from: fp32 (array_size,) each, read when they are touched."""
    n = state.array_size
    # Copy-on-write: torch refuses to share read-only memory without a warning. Nothing is ever written.
    with open(path, "rb") as file:
        return {
            name: np.memmap(file, "<f4", "c", HEADER_BYTES + 4 * n * i, (n,)) for i, name in enumerate(state.arrays)
        }


@dataclass(frozen=True)
class Trailer:
    """What llm.c does not keep; the defaults are for its files."""

    loss_window: tuple[float, ...] = ()
    norm_window: tuple[float, ...] = ()
    fp8_history: tuple[float, ...] = ()
    B: int | None = None
    T: int | None = None
    epoch: int = 0
    consumed: Consumed = field(default_factory=dict)


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

    def trailer(self, required: bool) -> Trailer:
        """llm.c's files, which do not state N either, end before it."""
        if self.left == 0 and not required:
            return Trailer()
        magic, length = struct.unpack("<iQ", self._read(12, "the trailer"))
        if magic != TRAILER_MAGIC:
            raise RunError(f"{self.path} is too long: {self.left + 12} bytes do not belong to it")
        self._require(length, "the trailer")
        if length > MAX_TRAILER:
            raise RunError(f"{self.path} is damaged: its trailer has {length} bytes, {MAX_TRAILER} are the most")
        raw = self._read(length, "the trailer")
        if self.left > 0:
            raise RunError(f"{self.path} is too long: {self.left} bytes follow the trailer")
        try:
            fields = json_text.parse(raw)
            B, T = fields.get("B"), fields.get("T")
            return Trailer(
                numbers_of(fields["loss_window"]),
                numbers_of(fields["norm_window"]),
                numbers_of(fields.get("fp8_history", [])),
                B if B is None else whole_number(B, 1),
                T if T is None else whole_number(T, 1),
                whole_number(fields.get("epoch", 0)),
                consumed_of(fields.get("consumed", {})),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise RunError(f"{self.path} is damaged: its trailer cannot be read ({error})") from None

    def _order(self, what: str) -> np.ndarray:
        (length,) = struct.unpack("<Q", self._read(8, what))
        self._require(4 * length, what)
        if length > MAX_TOKENS:
            raise RunError(f"{self.path} is damaged: {what} has {length} entries, a shard at most {MAX_TOKENS} tokens")
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


def whole_number(value: Any, smallest: int = 0) -> int:
    """An integer of 64 bits, or ValueError."""
    if not isinstance(value, int) or not smallest <= value < 2**63:
        raise ValueError(f"{value!r:.50} is not a whole number from {smallest} on")
    return value


def consumed_of(epochs: Any) -> Consumed:
    """Intervals by epoch and shard, or ValueError."""
    return {
        int(epoch): {int(shard): intervals_of(intervals) for shard, intervals in shards.items()}
        for epoch, shards in epochs.items()
    }


def intervals_of(values: Any) -> np.ndarray:
    intervals = np.array(values)
    if intervals.ndim != 2 or intervals.shape[1] != 2 or intervals.dtype != np.int64:
        raise ValueError("consumed tokens are not pairs of whole numbers")
    if not (np.diff(intervals.reshape(-1), prepend=-1) > 0).all():
        raise ValueError("consumed tokens are not in order")
    return intervals


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
