"""Host memory for what a rank writes of a checkpoint, so that training goes on meanwhile (--async-checkpoint 1)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmc.build import HOST, Buffer, bytes_by_lifetime
from llmc.model_file import ITEM_BYTES, FileDtype, ModelShape
from llmc.resharding import state_array_size

if TYPE_CHECKING:
    import torch

    from llmc import _C

PREFIX = "copy_of_"  # of the buffers' names; what follows is "m", "v", "master" or "parameters"


def copy_buffers(
    shape: ModelShape, options: "_C.Options", world_size: int, rank: int, others: list[Buffer]
) -> list[Buffer]:
    """The rows of the memory plan that follow the `others`: in the memory of a CPU's run, or beside that of a GPU's."""
    precision: FileDtype = "fp32" if options.precision == "fp32" else "bf16"
    stage = options.zero_stage if world_size > 1 else 0
    size = state_array_size(shape, stage, world_size)
    arrays: dict[str, tuple[FileDtype, int]] = {"m": ("fp32", size), "v": ("fp32", size)}
    if precision == "fp32" or options.master_weights:
        arrays["master"] = ("fp32", size)
    # In fp32 and uncut the master weights of the state are the parameters of the model file.
    if rank == 0 and not (precision == "fp32" and stage == 0):
        arrays["parameters"] = (precision, shape.num_parameters)
    lifetime = "checkpoint" if options.device == "cpu" else HOST
    buffers: list[Buffer] = []
    for name, (dtype, n) in arrays.items():
        offset = bytes_by_lifetime(others + buffers).get(lifetime, 0)
        buffers.append(Buffer(PREFIX + name, lifetime, dtype, (n,), offset, n * ITEM_BYTES[dtype]))
    return buffers


class Copies:
    """The memory itself; for one checkpoint at a time."""

    def __init__(self, model: "_C.GPT2", plan: list[Buffer]) -> None:
        self._memory = {
            buffer.name.removeprefix(PREFIX): model.host_memory(buffer.shape[0], buffer.dtype)
            for buffer in plan
            if buffer.name.startswith(PREFIX)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._memory

    def copier(self, name: str) -> "Callable[[torch.Tensor], torch.Tensor]":
        """A function that copies tensors into that memory, one behind the other."""
        memory, end = self._memory[name], 0

        def copy(tensor: "torch.Tensor") -> "torch.Tensor":
            nonlocal end
            begin, end = end, end + tensor.numel()
            place = memory[begin:end].view(tensor.shape)
            place.copy_(tensor)
            return place

        return copy
