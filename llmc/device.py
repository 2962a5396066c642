"""Where a run happens: the CPU, or a CUDA device."""

from dataclasses import dataclass, replace

from llmc.config import TrainConfig
from llmc.errors import RunError, UsageError
from llmc.machine import cpu_name, memory_bytes
from llmc.model_file import FileDtype
from llmc.peak import peak_flops


@dataclass(frozen=True)
class Device:
    """A device as the trainer sees it."""

    core_name: str  # "cpu" or "cuda:0": what the core calls it
    name: str  # of the processor
    memory: int  # bytes that the run may use
    fuses_gelu: bool  # whether a GELU inside the matrix products costs nothing
    pci_bus_id: str = ""  # of a GPU

    def free_memory(self) -> int:
        """Bytes that nobody has now: of a GPU; a CPU's memory is never quite free and still there for the run."""
        from llmc import _C

        return _C.cuda_free_memory() if self.is_cuda else self.memory

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


def choose_device(config: TrainConfig) -> Device:
    """What --device says; auto is a GPU where there is one. RunError if it is not there."""
    from llmc import _C

    if config.device == "cpu":
        return cpu()
    if why_not := _C.why_no_cuda_device():
        if config.device == "auto":
            return cpu()
        raise RunError(f"--device cuda: {why_not}; use --device cpu")
    gpu = _C.cuda_devices()[0]
    fuses_gelu = gpu["compute_capability"] >= (9, 0)
    return Device("cuda:0", gpu["name"], gpu["memory"], fuses_gelu, gpu["pci_bus_id"])


def cpu() -> Device:
    # Fusion costs nothing here: the same bits, fewer passes over memory.
    return Device("cpu", cpu_name(), memory_bytes(), fuses_gelu=True)


def device_on_paper(config: TrainConfig, memory: int | None) -> Device:
    """The device of a dry run, with `memory` bytes if that is given: a GPU need not be there then."""
    if config.device == "cuda" and memory is not None:
        device = Device("cuda:0", "GPU", memory, fuses_gelu=True)
    else:
        try:
            device = choose_device(config)
        except RunError as error:
            raise UsageError(f"{error}, or give a GPU's memory with --memory") from error
    return device if memory is None else replace(device, memory=memory)
