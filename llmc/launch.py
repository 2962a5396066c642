"""Who am I among how many? So far: alone."""

import os

from llmc.config import TrainConfig
from llmc.errors import RunError, UsageError

# Where Open MPI, MPICH and Intel MPI, torchrun, and Slurm's srun say how many processes they have started.
WORLD_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_single_process(config: TrainConfig) -> None:
    """Raise UsageError or RunError when this process is to be one of several, which would overwrite each other."""
    if config.num_processes > 1 and config.start_method == "mpi":
        raise UsageError(
            f"-pn {config.num_processes} has no effect with -pm mpi, where mpirun -np says it; and this version "
            "trains in one process: drop it"
        )
    if config.num_processes > 1:
        raise UsageError(f"-pn {config.num_processes}: this version trains in one process; use -pn 1 (or --dry-run)")
    for name in WORLD_SIZE_VARIABLES:
        value = os.environ.get(name, "1")
        if value != "1":
            raise RunError(
                f"started as one of several processes ({name}={value}): this version trains in one; start it alone"
            )
