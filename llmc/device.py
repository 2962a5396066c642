"""Where a run happens: the CPU, or a CUDA device."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmc.config import TrainConfig
from llmc.errors import RunError, UsageError
from llmc.machine import cpu_name, memory_bytes
from llmc.model_file import FileDtype
from llmc.peak import peak_flops
from llmc.ranks import TIMEOUT, Ranks
from llmc.roofline import GPUS

if TYPE_CHECKING:
    from llmc import _C


@dataclass(frozen=True)
class Device:
    """A device as the trainer sees it."""

    core_name: str  # "cpu", "cuda:0", ...: what the core calls it
    name: str  # of the processor
    memory: int  # bytes that the run may use
    fuses_gelu: bool  # whether a GELU inside the matrix products costs nothing
    has_fp8: bool = False
    index: int = 0  # of a GPU
    pci_bus_id: str = ""

    def free_memory(self) -> int:
        """Bytes that nobody has now: of a GPU; a CPU's memory is never quite free and still there for the run."""
        from llmc import _C

        return _C.cuda_free_memory(self.index) if self.is_cuda else self.memory

    @property
    def is_cuda(self) -> bool:
        return self.core_name != "cpu"

    def peak_flops(self, precision: FileDtype, tf32: bool) -> float | None:
        """The most it can do per second: measured now on a CPU (50 ms), of a GPU by the table, None if it has none."""
        if not self.is_cuda:
            from llmc import _C

            return _C.peak_flops()
        # Plain fp32 does not use the tensor cores that the table is about.
        return peak_flops(self.name, precision) if precision == "bf16" or tf32 else None


def choose_device(config: TrainConfig, local_rank: int = 0, local_size: int = 1) -> Device:
    """What --device says, for one of `local_size` processes on this machine; auto is a GPU where there is one.

    RunError if it is not there.
    """
    from llmc import _C

    if config.device == "cpu":
        return cpu(local_size)
    if why_not := _C.why_no_cuda_device():
        if config.device == "auto":
            return cpu(local_size)
        raise RunError(f"--device cuda: {why_not}; use --device cpu")
    gpus = _C.cuda_devices()
    # A process that sees one GPU only was given its own, as Slurm does with --gpus-per-task.
    index = local_rank if len(gpus) > 1 else 0
    if index >= len(gpus):
        raise RunError(f"{local_size} processes on this machine, which has {len(gpus)} GPUs: start one process per GPU")
    gpu = gpus[index]
    capability = gpu["compute_capability"]
    fuses_gelu, has_fp8 = capability >= (9, 0), capability >= (8, 9)
    return Device(f"cuda:{index}", gpu["name"], gpu["memory"], fuses_gelu, has_fp8, index, gpu["pci_bus_id"])


def cpu(local_size: int = 1) -> Device:
    # Fusion costs nothing here: the same bits, fewer passes over memory. They share the machine's memory.
    return Device("cpu", cpu_name(), memory_bytes() // local_size, fuses_gelu=True)


def communicator(ranks: Ranks, device: Device) -> "_C.Communicator | None":
    """What the ranks' devices talk through: NCCL between GPUs, Gloo between CPUs; None for a single process."""
    from llmc import _C

    if ranks.size == 1:
        return None
    if not device.is_cuda:
        return _C.gloo_communicator(ranks.group_name)
    identity = ranks.broadcast(_C.nccl_unique_id().hex() if ranks.rank == 0 else "", "NCCL's identity")
    timeout = TIMEOUT.total_seconds()
    return _C.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, device.index, timeout)


def device_on_paper(config: TrainConfig, memory: int | None, roofline: str | None = None) -> Device:
    """The device of a dry run, with `memory` bytes if that is given: a GPU need not be there then, nor the one that
    `roofline` names."""
    if roofline is not None:
        if config.device == "cpu":
            raise UsageError(f"--roofline {roofline} is a GPU: drop --device cpu")
        gpu = GPUS[roofline]
        device = Device("cuda:0", gpu.device, gpu.memory_mib * 2**20, gpu.fuses_gelu, gpu.has_fp8)
    elif config.device == "cuda" and memory is not None:
        device = Device("cuda:0", "GPU", memory, fuses_gelu=True, has_fp8=True)
    else:
        try:
            device = choose_device(config)
        except RunError as error:
            raise UsageError(f"{error}, or give a GPU's memory with --memory") from error
    return device if memory is None else replace(device, memory=memory)
