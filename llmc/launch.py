"""Who am I among how many? And all of us begin and end together.

Processes are started by mpirun, torchrun or Slurm's srun, which is seen in the environment, or one by one with
`-pm tcp` or `-pm fs`. All must have started within LLMC_START_TIMEOUT seconds (environment variable, 120 by default).
"""

import os

# torch reads it when it is imported: it would tell the story of each broken connection, with its C++ stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from llmc import machine, stores
from llmc.config import TrainConfig, show
from llmc.errors import RunError, UsageError
from llmc.meeting import Deadline, Member, meet, myself, start_deadline
from llmc.mpi import MPICH, OPEN_MPI
from llmc.ranks import Ranks, join_gloo_group
from llmc.watch import Watch

TORCHRUN, SRUN, TCP, FS = "torchrun", "srun", "-pm tcp", "-pm fs"
# Flags that may differ from rank to rank: they only serve to find each other.
OWN_FLAGS = {"process_rank", "server_ip", "shared_path"}


@contextmanager
def launch(config: TrainConfig, program: str = "llmc-train") -> Iterator[Ranks]:
    """The ranks of this run, of which this process is one; only rank 0 prints on stdout.

    Raises UsageError or RunError where the ranks cannot begin together. From then on a failure of the context ends all
    ranks, with one line on stderr and the same status.
    """
    place = find_place(config, os.environ)
    if place.size == 1:
        yield Ranks()
        return
    deadline = start_deadline()
    with reach_store(place, config, deadline) as (store, host):
        me = myself(place.rank, place.size)
        members = meet(store, me, deadline)
    watch = Watch(program, store, host, me, members, deadline)
    try:
        with silent(place.rank > 0):
            share_cores(me, members)
            on_this_machine = [member.rank for member in members if member.host == me.host]
            one_machine = len(on_this_machine) == place.size
            by_flags = place.launcher in (TCP, FS)
            yield agreed(
                config,
                Ranks(
                    rank=place.rank,
                    size=place.size,
                    local_rank=place.rank % config.gpus_per_node if by_flags else on_this_machine.index(place.rank),
                    local_size=len(on_this_machine),
                    store=store,
                    group_name=join_gloo_group(store, place.rank, place.size, one_machine, deadline.left()),
                ),
            )
        watch.finish()
    except BaseException as error:
        watch.fail(error)


@dataclass(frozen=True)
class Place:
    """What a process is told by what has started it."""

    launcher: str
    rank: int = 0
    size: int = 1


def find_place(config: TrainConfig, environ: Mapping[str, str]) -> Place:
    """From the flags with -pm tcp or fs, otherwise from the environment. UsageError if they contradict each other."""
    started, by_flag = detect(environ), config.num_processes
    if config.start_method == "mpi":
        if by_flag > 1 and started.size == 1:
            raise UsageError(f"-pn {by_flag} has no effect with -pm mpi, where mpirun -np says it: drop it")
        if by_flag > 1 and by_flag != started.size:
            raise UsageError(f"-pn {by_flag}, but {started.launcher} has started {started.size} processes: drop -pn")
        return started
    method = f"-pm {config.start_method}"
    if by_flag == 1 and started.size > 1:
        raise UsageError(
            f"{started.launcher} has started {started.size} processes, but with {method} and without -pn each would be "
            f"a run of its own: drop {method}, or give -pn and -pr too"
        )
    if by_flag > 1 and method == TCP and config.server_ip == "-1":
        raise UsageError("-pm tcp needs the address of rank 0: give it with -ps")
    return Place(method, config.process_rank, by_flag)


def detect(environ: Mapping[str, str]) -> Place:
    """What the environment says. The innermost launcher counts, as of `srun torchrun` or of mpirun in a Slurm job."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return place_of(TORCHRUN, environ, "RANK", "WORLD_SIZE")
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return place_of(OPEN_MPI, environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if {"PMI_RANK", "MPI_LOCALRANKID"} <= environ.keys():  # the latter is not set by srun --mpi=pmi2
        return place_of(MPICH, environ, "PMI_RANK", "PMI_SIZE")
    # Not SLURM_NTASKS, which the script of a job sees too: what runs there without srun is one process.
    if {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= environ.keys():
        return place_of(SRUN, environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return Place("")


def place_of(launcher: str, environ: Mapping[str, str], rank_name: str, size_name: str) -> Place:
    rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise RunError(f"{rank_name}={rank} and {size_name}={size} in the environment are no rank and number of ranks")
    return Place(launcher, int(rank), int(size))


@contextmanager
def reach_store(place: Place, config: TrainConfig, deadline: Deadline) -> Iterator[stores.Found]:
    """The store that all ranks of the run reach, and rank 0's address. RunError if it is not there in time."""
    rank, size = place.rank, place.size
    if place.launcher == FS:
        with stores.by_file(rank, Path(config.shared_path), deadline) as found:
            yield found
    elif place.launcher == TCP:
        yield stores.by_tcp(rank, config.server_ip, stores.PORT, deadline)
    elif place.launcher == SRUN:
        yield stores.by_tcp(rank, *stores.slurm_address(os.environ), deadline)
    elif place.launcher == TORCHRUN:
        yield stores.by_environment(rank, deadline)
    else:
        yield stores.by_mpi(place.launcher, rank, size, deadline)


@contextmanager
def silent(is_silent: bool) -> Iterator[None]:
    """Nothing goes to stdout if `is_silent`."""
    if is_silent:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    else:
        yield


def share_cores(me: Member, members: list[Member]) -> None:
    """Give each rank of a machine its own part of the cores that they share, unless there are more ranks than cores.

    A rank is bound to its part, so that its memory stays near and Gloo's threads do not disturb the others, and it
    computes with as many threads. A launcher may have bound the ranks before; with OMP_NUM_THREADS both is the user's.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    sharing = [member for member in members if member.host == me.host and set(member.cores) & set(me.cores)]
    threads = max(1, len(me.cores) // len(sharing))
    divisible = 1 < len(sharing) <= len(me.cores) and all(member.cores == me.cores for member in sharing)
    if divisible and hasattr(os, "sched_setaffinity"):
        first = sharing.index(me) * threads
        os.sched_setaffinity(0, machine.side_by_side(me.cores)[first : first + threads])
    torch.set_num_threads(threads)


def agreed(config: TrainConfig, ranks: Ranks) -> Ranks:
    """`ranks`, if they all have the same flags. RunError on all of them that names the first that differs."""
    flags = {name: value for name, value in asdict(config).items() if name not in OWN_FLAGS}
    all_flags = ranks.gather(flags, "the flags")
    for rank, other in enumerate(all_flags):
        for name, value in all_flags[0].items():
            if other[name] != value:
                flag = "--" + name.replace("_", "-")
                raise RunError(
                    f"{flag} is {show(value)} on rank 0 and {show(other[name])} on rank {rank}: "
                    "start all processes with the same flags"
                )
    return ranks
