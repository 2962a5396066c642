"""The state of a run, to and from the files of a checkpoint. All ranks of the run take part."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.checkpoint import Checkpoint, find, mark_done
from llmc.checksum import verify
from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.model_file import FileDtype, ModelShape, load_model, read_model_header, read_model_step, save_units
from llmc.ranks import Ranks
from llmc.resharding import (
    Parts,
    array_size,
    model_units,
    moves,
    own_parts,
    parameter_parts,
    placement_of,
    state_array_size,
    whole_tensors,
)
from llmc.state_file import TrainState, map_arrays, read_state, write_state

if TYPE_CHECKING:
    import torch

    from llmc import _C
    from llmc.checkpoint_copies import Copies
    from llmc.prepare import Run

BACK = "put the right file back"


# What a rank can do without the model and the other ranks, maybe in another thread: '', or what there is to say of it.
Work = Callable[[], str]
# Yields work whose result it wants to be sent. All ranks send it together: what is in between is done by all of them.
Saving = Generator[Work, str, str]


@dataclass(frozen=True)
class Contents:
    """What the files of a checkpoint hold of this rank, in the model's memory or in copies of it."""

    units: Iterable[Mapping[str, "torch.Tensor"]]  # the parameters; all ranks must go through them, rank 0 writes them
    state: TrainState
    arrays: Mapping[str, list["torch.Tensor"]]


def save(run: "Run", checkpoint: Checkpoint, copies: "Copies | None" = None) -> Saving:
    """Write all files of a checkpoint and, when they are on the disk, its marker.

    copies: the run may go on while the work is done. With -nk the checkpoint is only good when what is on the disk has
    been compared with its checksum. Returns '', or on all ranks the reason why there is no such checkpoint now, not
    even half of one.
    """
    ranks, step = run.ranks, checkpoint.step
    what = f"the checkpoint of step {step}"
    if ranks.rank == 0:
        print(f"Writing checkpoint at step {step}\nWriting model to {checkpoint.model}")
        print(*(f"Writing state to {checkpoint.state(rank)}" for rank in range(ranks.size)), sep="\n", flush=True)
    if problem := ranks.problem_of_rank_0(f"the place for {what}", checkpoint.make_way, ranks.size):
        return problem
    contents = contents_of(run, step)
    if copies:
        contents = copied(contents, copies, run.shape)
    problem = yield lambda: write(run, checkpoint, contents)
    problem = ranks.first_problem(problem, what)
    problem = yield lambda: complete(checkpoint, problem) if ranks.rank == 0 else ""
    return ranks.first_problem(problem, f"the end of {what}")


def contents_of(run: "Run", step: int) -> Contents:
    model, shape, ranks, precision = run.model, run.shape, run.ranks, run.precision
    model.start_optimizer()  # there may have been no update yet
    # fp32 parameters are their own master copy, and stand in the file as such.
    has_master = precision == "fp32" or model.options.master_weights
    sources = {"m": "m", "v": "v"}
    if has_master:
        sources["master"] = "parameters" if precision == "fp32" else "master"
    stage = model.options.zero_stage
    state = TrainState(
        version=1 if stage == 0 else 2,
        step=step,
        world_size=ranks.size,
        rank=ranks.rank,
        zero_stage=stage,
        has_master=has_master,
        num_parameters=shape.num_parameters,
        array_size=state_array_size(shape, stage, ranks.size),
        rng_state=model.rng_state,
        last_update_rng_state=model.last_update_rng_state,
        loader=run.train_loader.state(),
        loss_window=tuple(run.loss_outliers.window),
        norm_window=tuple(run.norm_outliers.window),
        fp8_history=tuple(model.fp8_history),
    )
    units = (model.gather_parameters(unit) for unit in range(shape.num_layers + 2))
    return Contents(units, state, {name: list(pieces(model, shape, source)) for name, source in sources.items()})


def copied(contents: Contents, copies: "Copies", shape: ModelShape) -> Contents:
    arrays = {name: list(map(copies.copier(name), tensors)) for name, tensors in contents.arrays.items()}
    units: list[Mapping[str, torch.Tensor]] = []
    if "parameters" in copies:
        copy = copies.copier("parameters")
        units = [{name: copy(tensor) for name, tensor in unit.items()} for unit in contents.units]
    elif contents.state.rank == 0:
        units = [dict(zip((name for name, _ in shape.parameters()), arrays["master"], strict=True))]
    for _ in contents.units:
        pass
    return Contents(units, contents.state, arrays)


def write(run: "Run", checkpoint: Checkpoint, contents: Contents) -> str:
    """The files of this rank; '', or why they are not there."""
    rank = contents.state.rank
    try:
        try:
            if rank == 0:
                save_units(checkpoint.model, run.shape, run.precision, contents.units, checkpoint.step)
        finally:
            # Rank 0 needs this rank's part, and, if it cannot write, the others need it to go on.
            for _ in contents.units:
                pass
        write_state(checkpoint.state(rank), contents.state, contents.arrays)
        if run.config.keep_checkpoints > 0:  # older ones go: this one must be good
            for path in [checkpoint.state(rank), *([checkpoint.model] if rank == 0 else [])]:
                verify(path, past_cache=True)
    except RunError as error:
        return str(error)
    return ""


def complete(checkpoint: Checkpoint, problem: str) -> str:
    """Mark the checkpoint as done or, with a problem, delete what is there of it; the problem there is then."""
    try:
        if not problem:
            mark_done(checkpoint)
    except RunError as error:
        problem = str(error)
    if problem:
        with contextlib.suppress(OSError):
            checkpoint.delete()
    return problem


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


@dataclass(frozen=True)
class Stored:
    """A checkpoint and all that its files say but the large arrays."""

    checkpoint: Checkpoint
    shape: ModelShape
    precision: FileDtype  # of the model file
    states: list[TrainState]  # of each rank that wrote it

    @property
    def step(self) -> int:
        return self.checkpoint.step

    @property
    def paths(self) -> list[str]:
        """Of the states."""
        return [str(self.checkpoint.state(state.rank)) for state in self.states]


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that cannot be gone on from."""

    checkpoint: Checkpoint
    problem: str


def newest_good(directory: Path, ranks: Ranks) -> tuple[Stored | None, list[PassedOver]]:
    """The newest checkpoint whose files are all there and as they were written, and the newer ones, newest first.

    The same on all ranks. RunError if there are some and none is good: their owner should know.
    """
    steps = ranks.broadcast([found.step for found in find(directory) if found.done.exists()], "the checkpoints in -o")
    passed_over: list[PassedOver] = []
    for step in reversed(steps):
        checkpoint = Checkpoint(directory, step)
        stored, problem = None, ""
        try:
            stored = read(checkpoint)
            paths = [checkpoint.model, *(checkpoint.state(rank) for rank in range(len(stored.states)))]
            for path in paths[ranks.rank :: ranks.size]:  # the ranks share this work
                verify(path)
        except (RunError, OSError) as error:
            problem = str(error)
        problem = ranks.first_problem(problem, f"the state of the checkpoint of step {step}")
        if not problem:
            return stored, passed_over
        passed_over.append(PassedOver(checkpoint, problem))
    if passed_over:
        first = passed_over[0]
        raise RunError(
            f"{first.checkpoint.done} is there, but {first.problem}, and no older checkpoint is good: "
            f"{BACK}, or begin anew with -y 0"
        )
    return None, []


def read(checkpoint: Checkpoint) -> Stored:
    """What the files say, without the checksums. RunError unless they are there and belong together."""
    missing = next(checkpoint.missing(), None)
    if missing:
        raise RunError(f"{missing} is not there")
    shape, precision = read_model_header(checkpoint.model)
    paths = [checkpoint.state(rank) for rank in range(checkpoint.world_size)]
    states = [read_state(path, shape.num_parameters) for path in paths]
    for file, step in (
        (checkpoint.model, read_model_step(checkpoint.model)),
        *zip(paths, (state.step for state in states), strict=True),
    ):
        if step not in (None, checkpoint.step):
            raise RunError(f"{file} is of step {step}, not of {checkpoint.step} as its name says")
    first = states[0]
    for rank, (path, state) in enumerate(zip(paths, states, strict=True)):
        if (state.rank, state.world_size) != (rank, len(paths)):
            raise RunError(f"{path} is of rank {state.rank} of {state.world_size}, not of {rank} of {len(paths)}")
        for name in ("version", "zero_stage", "has_master", "array_size"):
            value, expected = getattr(state, name), getattr(first, name)
            if value != expected:
                raise RunError(f"{path} and {paths[0]} are of different runs: {name} is {value} and {expected}")
    if first.version == 2:
        size = array_size(model_units(shape, len(paths)), len(paths))
        if first.array_size != size:
            raise RunError(
                f"{paths[0]} is damaged: its arrays have {first.array_size} values, this model's have {size}"
            )
    return Stored(checkpoint, shape, precision, states)


def check_master(stored: Stored, config: TrainConfig, precision: FileDtype) -> None:
    """RunError if a run in that precision needs master weights that are not there."""
    if not stored.states[0].has_master and (precision == "fp32" or config.master_weights):
        raise RunError(
            f"{stored.paths[0]} has no master weights: go on with --precision bf16 -w 0, "
            f"or begin a new run from its weights with -e {stored.checkpoint.model} and another -o"
        )


def roll_back(run: "Run", directory: Path) -> int:
    """Make a run in progress what it was at its newest good checkpoint, but for its data; the step to go on with.

    Model, optimizer, random numbers and outlier windows. RunError on all ranks if there is none.
    """
    stored, _ = newest_good(directory, run.ranks)
    if stored is None:
        raise RunError(f"there is no checkpoint in {directory} to go back to")
    restore(stored, run.model)
    state = stored.states[0]
    run.loss_outliers.restore(state.loss_window)
    run.norm_outliers.restore(state.norm_window)
    return stored.step


def restore(stored: Stored, model: "_C.GPT2") -> None:
    """Make `model` the one that was saved, parameters rounded as they were.

    It may have another number of ranks, ZeRO stage and precision: each rank reads what it owns.
    """
    import torch

    checkpoint, states, shape = stored.checkpoint, stored.states, stored.shape
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
    if model.options.fp8:  # each rank has its own, from its own batches
        history = list(states[model.rank].fp8_history) if len(states) == model.world_size else []
        model.fp8_history = history if len(history) == model.buffer("fp8_history").numel() else []
