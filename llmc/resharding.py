"""Which state file of a checkpoint holds which values of a tensor, and which of them a rank of this run wants.

Values are counted within their tensor, flattened. Our ZeRO stages cut units (csrc/gpt2/layout.h), llm.c's cuts tensors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmc.build import core_config
from llmc.model_file import ModelShape
from llmc.state_file import TrainState

if TYPE_CHECKING:
    from llmc import _C

# (offset, size, [(tensor, offset, numel), ...]) in values from the start of the layout. Rank r of P has slice
# [r*size/P, (r+1)*size/P) of every unit, from offset/P on in its arrays.
Unit = tuple[int, int, Sequence[tuple[str, int, int]]]


class Segment(NamedTuple):
    """Values begin to end of a tensor, in the arrays of one rank from offset on."""

    begin: int
    end: int
    rank: int
    offset: int


class Move(NamedTuple):
    """Values of one rank's arrays, and where they belong in what another rank wants of a tensor."""

    tensor: str
    source: slice
    target: slice


Placement = Mapping[str, Sequence[Segment]]  # of each tensor, ascending, from its first value to its last
Parts = Mapping[str, tuple[int, int]]  # of each tensor: begin, end; both 0 for nothing


def model_units(shape: ModelShape, world_size: int) -> Sequence[Unit]:
    from llmc import _C

    return _C.parameter_units(core_config("the model", shape), world_size)


def array_size(units: Sequence[Unit], world_size: int) -> int:
    """Values in each array of a rank that keeps its slices only, padding included."""
    return sum(size for _, size, _ in units) // world_size


def state_array_size(shape: ModelShape, stage: int, world_size: int) -> int:
    """Values in each array of a rank's state file."""
    return shape.num_parameters if stage == 0 else array_size(model_units(shape, world_size), world_size)


def placement_of(state: TrainState, shape: ModelShape) -> Placement:
    """Where the state files of the checkpoint that `state` belongs to have what."""
    if state.version == 1:
        return tensor_slices(shape, state.world_size if state.zero_stage == 1 else 1)
    return unit_slices(model_units(shape, state.world_size), state.world_size)


def unit_slices(units: Sequence[Unit], world_size: int) -> Placement:
    """Every unit cut into slices of one size."""
    placement: dict[str, list[Segment]] = {}
    for unit, size, tensors in units:
        step = size // world_size
        for name, start, numel in tensors:
            segments = placement[name] = []
            for rank in range((start - unit) // step, (start + numel - 1 - unit) // step + 1):
                first = unit + rank * step  # of the slice
                begin, end = max(start, first), min(start + numel, first + step)
                segments.append(Segment(begin - start, end - start, rank, unit // world_size + begin - first))
    return placement


def tensor_slices(shape: ModelShape, world_size: int) -> Placement:
    """Every tensor of every layer cut into slices of one size, in the order of the model file: llm.c's ZeRO stage 1."""
    placement, position = {}, 0
    for name, size in shape.parameters():
        step = math.prod(size) // world_size
        placement[name] = [Segment(r * step, (r + 1) * step, r, position) for r in range(world_size)]
        position += step
    return placement


def whole_tensors(shape: ModelShape) -> Parts:
    return {name: (0, math.prod(size)) for name, size in shape.parameters()}


def own_parts(units: Sequence[Unit], rank: int, world_size: int) -> Parts:
    """What a rank has of each tensor where units are cut."""
    placement = unit_slices(units, world_size)
    return {
        name: next(((s.begin, s.end) for s in segments if s.rank == rank), (0, 0))
        for name, segments in placement.items()
    }


def parameter_parts(model: "_C.GPT2") -> Parts | None:
    """What `model.parameters()` has of each tensor; None: all of it."""
    from llmc import _C

    if model.options.zero_stage < 3:
        return None
    return own_parts(_C.parameter_units(model.config, model.world_size), model.rank, model.world_size)


def moves(placement: Placement, parts: Parts) -> dict[int, list[Move]]:
    """How to fill the parts, by the rank whose arrays have the values."""
    result: dict[int, list[Move]] = {}
    for name, (first, last) in parts.items():
        for segment in placement[name]:
            begin, end = max(first, segment.begin), min(last, segment.end)
            if begin < end:
                offset = segment.offset + begin - segment.begin
                move = Move(name, slice(offset, offset + end - begin), slice(begin - first, end - first))
                result.setdefault(segment.rank, []).append(move)
    return result
