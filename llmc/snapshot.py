"""The state of a run, to and from the files of a checkpoint."""

from typing import TYPE_CHECKING

from llmc.checkpoint import RANK, Checkpoint, mark_done
from llmc.config import TrainConfig
from llmc.data.loader import DataLoader
from llmc.errors import RunError
from llmc.model_file import FileDtype, ModelShape, load_model, read_model_step, save_model
from llmc.outliers import OutlierDetector
from llmc.state_file import TrainState, map_arrays, read_state, write_state

if TYPE_CHECKING:
    import torch

    from llmc import _C


def save(
    checkpoint: Checkpoint,
    shape: ModelShape,
    precision: FileDtype,
    model: "_C.GPT2",
    loader: DataLoader,
    loss_outliers: OutlierDetector,
    norm_outliers: OutlierDetector,
) -> None:
    """Write all files of a checkpoint and, when they are on the disk, its marker."""
    checkpoint.done.unlink(missing_ok=True)  # of an incomplete one, whose files must not pass for these
    model.start_optimizer()  # there may have been no update yet
    parameters = model.parameters()
    arrays = {name: model.optimizer_state(name) for name in ("m", "v")}
    # fp32 parameters are their own master copy, and stand in the file as such.
    has_master = precision == "fp32" or model.options.master_weights
    if has_master:
        arrays["master"] = parameters if precision == "fp32" else model.optimizer_state("master")
    state = TrainState(
        step=checkpoint.step,
        world_size=1,
        rank=RANK,
        zero_stage=0,
        has_master=has_master,
        num_parameters=shape.num_parameters,
        rng_state=model.rng_state,
        last_update_rng_state=model.last_update_rng_state,
        loader=loader.state(),
        loss_window=tuple(loss_outliers.window),
        norm_window=tuple(norm_outliers.window),
    )
    print(f"Writing checkpoint at step {checkpoint.step}\nWriting model to {checkpoint.model}", flush=True)
    save_model(checkpoint.model, shape, precision, parameters, checkpoint.step)
    print(f"Writing state to {checkpoint.state}", flush=True)
    order = [name for name, _ in shape.parameters()]
    write_state(checkpoint.state, state, {name: [array[p] for p in order] for name, array in arrays.items()})
    mark_done(checkpoint)


def read(checkpoint: Checkpoint, shape: ModelShape, config: TrainConfig, precision: FileDtype) -> TrainState:
    """All but the large arrays. RunError unless this run can go on from it."""
    path = checkpoint.state
    state = read_state(path, shape.num_parameters)
    for file, step in ((checkpoint.model, read_model_step(checkpoint.model)), (path, state.step)):
        if step not in (None, checkpoint.step):
            raise RunError(
                f"{file} is of step {step}, not of {checkpoint.step} as its name says: put the right file back"
            )
    if (state.world_size, state.rank, state.zero_stage) != (1, RANK, 0):
        raise RunError(
            f"{path} was written by rank {state.rank} of {state.world_size} at ZeRO stage {state.zero_stage}: "
            "this version resumes runs of one process"
        )
    if not state.has_master and (precision == "fp32" or config.master_weights):
        raise RunError(
            f"{path} has no master weights: go on with --precision bf16 -w 0, "
            f"or begin a new run from its weights with -e {checkpoint.model} and another -o"
        )
    return state


def restore(
    checkpoint: Checkpoint, state: TrainState, shape: ModelShape, precision: FileDtype, model: "_C.GPT2"
) -> None:
    """Make `model` the one that was saved, parameters rounded as they were."""
    import torch

    parameters = model.parameters()
    model.start_optimizer()
    targets = {name: model.optimizer_state(name) for name in ("m", "v")}
    if precision == "fp32":
        targets["master"] = parameters
    elif model.options.master_weights:
        targets["master"] = model.optimizer_state("master")
    else:
        load_model(checkpoint.model, parameters)
    for name, array in map_arrays(checkpoint.state, state).items():
        if name in targets:  # -w 0 leaves the file's master weights aside
            copy(torch.from_numpy(array), shape, targets[name])
    model.rng_state, model.last_update_rng_state = state.rng_state, state.last_update_rng_state
    if precision == "bf16" and model.options.master_weights:
        model.restore_parameters()


def copy(values: "torch.Tensor", shape: ModelShape, targets: "dict[str, torch.Tensor]") -> None:
    """Values (N,) in the order of the file into tensors by name."""
    for name, size in shape.parameters():
        target = targets[name]
        target.copy_(values[: target.numel()].view(size))
        values = values[target.numel() :]
