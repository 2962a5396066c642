"""The state of a run, to and from the files of a checkpoint. All ranks of the run take part."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmc.checkpoint import Checkpoint, mark_done
from llmc.config import TrainConfig
from llmc.data.loader import DataLoader
from llmc.errors import RunError
from llmc.model_file import FileDtype, ModelShape, load_model, read_model_step, save_units
from llmc.outliers import OutlierDetector
from llmc.ranks import Ranks
from llmc.resharding import (
    Parts,
    array_size,
    model_units,
    moves,
    own_parts,
    parameter_parts,
    placement_of,
    whole_tensors,
)
from llmc.state_file import TrainState, map_arrays, read_state, write_state

if TYPE_CHECKING:
    import torch

    from llmc import _C

BACK = "put the right file back"


def save(
    checkpoint: Checkpoint,
    shape: ModelShape,
    precision: FileDtype,
    model: "_C.GPT2",
    loader: DataLoader,
    loss_outliers: OutlierDetector,
    norm_outliers: OutlierDetector,
    ranks: Ranks,
) -> None:
    """Write all files of a checkpoint and, when they are on the disk, its marker."""
    what = f"the checkpoint of step {checkpoint.step}"
    if ranks.rank == 0:
        checkpoint.make_way(ranks.size)
        print(f"Writing checkpoint at step {checkpoint.step}\nWriting model to {checkpoint.model}", flush=True)
    ranks.barrier(f"the place for {what}")
    model.start_optimizer()  # there may have been no update yet
    units = (model.gather_parameters(unit) for unit in range(shape.num_layers + 2))
    if ranks.rank == 0:
        save_units(checkpoint.model, shape, precision, units, checkpoint.step)
        for rank in range(ranks.size):
            print(f"Writing state to {checkpoint.state(rank)}", flush=True)
    else:
        for _ in units:  # rank 0 needs this rank's part
            pass
    # fp32 parameters are their own master copy, and stand in the file as such.
    has_master = precision == "fp32" or model.options.master_weights
    sources = {"m": "m", "v": "v"}
    if has_master:
        sources["master"] = "parameters" if precision == "fp32" else "master"
    stage = model.options.zero_stage
    state = TrainState(
        version=1 if stage == 0 else 2,
        step=checkpoint.step,
        world_size=ranks.size,
        rank=ranks.rank,
        zero_stage=stage,
        has_master=has_master,
        num_parameters=shape.num_parameters,
        array_size=shape.num_parameters if stage == 0 else array_size(model_units(shape, ranks.size), ranks.size),
        rng_state=model.rng_state,
        last_update_rng_state=model.last_update_rng_state,
        loader=loader.state(),
        loss_window=tuple(loss_outliers.window),
        norm_window=tuple(norm_outliers.window),
    )
    arrays = {name: list(pieces(model, shape, source)) for name, source in sources.items()}
    write_state(checkpoint.state(ranks.rank), state, arrays)
    ranks.barrier(what)
    if ranks.rank == 0:
        mark_done(checkpoint)
    ranks.barrier(f"the end of {what}")  # only now it is there for all of them


def pieces(model: "_C.GPT2", shape: ModelShape, name: str) -> "Iterator[torch.Tensor]":
    """m, v, master or the parameters as the state file of this rank has them: all in file order, or its slices."""
    stage = model.options.zero_stage
    if stage == 0:
        tensors = model.parameters() if name == "parameters" else model.optimizer_state(name)
        yield from (tensors[tensor] for tensor, _ in shape.parameters())
        return
    buffer, P = model.buffer(name), model.world_size
    for offset, size, _ in model_units(shape, P):
        whole = name == "parameters" and stage < 3
        begin = offset + model.rank * (size // P) if whole else offset // P
        yield buffer[begin : begin + size // P]


def read(checkpoint: Checkpoint, shape: ModelShape, config: TrainConfig, precision: FileDtype) -> list[TrainState]:
    """All but the large arrays, of each rank that wrote it. RunError unless this run can go on from it."""
    paths = [checkpoint.state(rank) for rank in range(checkpoint.world_size)]
    states = [read_state(path, shape.num_parameters) for path in paths]
    for file, step in (
        (checkpoint.model, read_model_step(checkpoint.model)),
        *zip(paths, (state.step for state in states), strict=True),
    ):
        if step not in (None, checkpoint.step):
            raise RunError(f"{file} is of step {step}, not of {checkpoint.step} as its name says: {BACK}")
    first = states[0]
    for rank, (path, state) in enumerate(zip(paths, states, strict=True)):
        if (state.rank, state.world_size) != (rank, len(paths)):
            raise RunError(
                f"{path} is of rank {state.rank} of {state.world_size}, not of {rank} of {len(paths)}: {BACK}"
            )
        for name in ("version", "zero_stage", "has_master", "array_size"):
            value, expected = getattr(state, name), getattr(first, name)
            if value != expected:
                raise RunError(f"{path} and {paths[0]} are of different runs: {name} is {value} and {expected}: {BACK}")
    if first.version == 2:
        size = array_size(model_units(shape, len(paths)), len(paths))
        if first.array_size != size:
            raise RunError(
                f"{paths[0]} is damaged: its arrays have {first.array_size} values, this model's have {size}"
            )
    if not first.has_master and (precision == "fp32" or config.master_weights):
        raise RunError(
            f"{paths[0]} has no master weights: go on with --precision bf16 -w 0, "
            f"or begin a new run from its weights with -e {checkpoint.model} and another -o"
        )
    return states


def restore(checkpoint: Checkpoint, states: list[TrainState], shape: ModelShape, model: "_C.GPT2") -> None:
    """Make `model` the one that was saved, parameters rounded as they were.

    It may have another number of ranks, ZeRO stage and precision: each rank reads what it owns.
    """
    import torch

    model.start_optimizer()
    stage, precision = model.options.zero_stage, model.options.precision
    whole = whole_tensors(shape)
    own = own_parts(model_units(shape, model.world_size), model.rank, model.world_size) if stage > 0 else whole
    targets: dict[str, tuple[dict[str, torch.Tensor], Parts]] = {
        name: (model.optimizer_state(name), own) for name in ("m", "v")
    }
    if precision == "fp32":
        targets["master"] = (model.parameters(), own if stage == 3 else whole)
    elif model.options.master_weights:
        targets["master"] = (model.optimizer_state("master"), own)
    else:
        load_model(checkpoint.model, model.parameters(), parameter_parts(model))
    placement = placement_of(states[0], shape)
    for name, (tensors, parts) in targets.items():  # -w 0 leaves the file's master weights aside
        for rank, found in moves(placement, parts).items():
            array = map_arrays(checkpoint.state(rank), states[rank])[name]
            for move in found:
                tensors[move.tensor].view(-1)[move.target].copy_(torch.from_numpy(array[move.source]))
    # Of rank 0: all ranks of this run must round alike, those of llm.c did not.
    model.rng_state, model.last_update_rng_state = states[0].rng_state, states[0].last_update_rng_state
    if precision == "bf16" and model.options.master_weights:
        model.restore_parameters()
