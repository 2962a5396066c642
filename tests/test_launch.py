"""How the processes of a run find each other, what they refuse, and how they end: together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_testing import Processes

from llmc import cli, machine
from llmc.command_line import parse_args
from llmc.config import TrainConfig
from llmc.errors import RunError, UsageError
from llmc.launch import Place, detect, find_place, launch, share_cores
from llmc.meeting import Member
from llmc.stores import slurm_address

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
HYDRA = {"PMI_SIZE": "8", "PMI_RANK": "3", "MPI_LOCALRANKID": "3"}
TORCHRUN = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "3"}
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
# What the daemons of mpirun get from Slurm, and hand on: they are one task each.
DAEMON = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place("")),
        (IN_A_JOB, Place("")),  # the script of a job
        (OPEN_MPI, Place("Open MPI's mpirun", 3, 8)),
        (HYDRA, Place("mpirun", 3, 8)),
        (TORCHRUN, Place("torchrun", 3, 8)),
        (SRUN, Place("srun", 3, 8)),
        ({**SRUN, "PMI_SIZE": "8", "PMI_RANK": "3"}, Place("srun", 3, 8)),  # --mpi=pmi2
        ({**SRUN, "PMIX_RANK": "3"}, Place("srun", 3, 8)),
        ({**DAEMON, **OPEN_MPI}, Place("Open MPI's mpirun", 3, 8)),
        ({**DAEMON, **HYDRA}, Place("mpirun", 3, 8)),
        ({**SRUN, **TORCHRUN}, Place("torchrun", 3, 8)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, Place("torchrun", 0, 1)),
    ],
)
def test_environments(environ, place):
    assert detect(environ) == place


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("x", "8"), ("0", "")])
def test_an_impossible_environment(rank, size):
    with pytest.raises(RunError, match=f"RANK={rank} and WORLD_SIZE={size} in the environment are no rank"):
        detect({**TORCHRUN, "RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("flags", "environ", "place"),
    [
        ({}, {}, Place("")),
        ({}, HYDRA, Place("mpirun", 3, 8)),
        ({"num_processes": 8}, HYDRA, Place("mpirun", 3, 8)),
        ({"start_method": "fs", "num_processes": 4, "process_rank": 2}, {}, Place("-pm fs", 2, 4)),
        # The flags are made from Slurm's variables there.
        (
            {"start_method": "tcp", "num_processes": 8, "process_rank": 3, "server_ip": "n1"},
            SRUN,
            Place("-pm tcp", 3, 8),
        ),
        ({"num_processes": 8}, {}, "-pn 8 has no effect with -pm mpi, where mpirun -np says it: drop it"),
        ({"num_processes": 4}, HYDRA, "-pn 4, but mpirun has started 8 processes: drop -pn"),
        ({"start_method": "fs"}, HYDRA, "mpirun has started 8 processes, but with -pm fs and without -pn each"),
        ({"start_method": "tcp", "num_processes": 2}, {}, "-pm tcp needs the address of rank 0: give it with -ps"),
    ],
)  # fmt: skip
def test_flags_and_environment(flags, environ, place):
    config = TrainConfig(**flags)
    if isinstance(place, Place):
        assert find_place(config, environ) == place
    else:
        with pytest.raises(UsageError) as caught:
            find_place(config, environ)
        assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3-4,7],gpu1", "n3"), ("n[07]", "n07"), ("r[1-2]n[05-08].lan", "r1n05.lan")],
)
def test_the_first_node_of_slurm(nodes, host):
    environ = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    found, port = slurm_address(environ)
    assert found == host and 1024 <= port < 32768
    assert slurm_address({**environ, "SLURM_STEP_ID": "3"})[1] != port


# --- real processes -------------------------------------------------------------------------------------------------


def rank(flags, action):
    def main(_):
        with launch(parse_args(flags.split()).config) as ranks:
            action(ranks)

    cli.run("llmc-train", main, [])


def run(folder, action, flags, **environ):
    """A process for each of `flags`."""
    return Processes(folder, rank, [(text, action) for text in flags], environ)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags_of(folder, size, **changes):
    return [f"-pm fs -pp {folder} -pn {size} -pr {changes.get(str(rank), rank)}" for rank in range(size)]


def say_who(ranks):
    ranks.barrier("hello")
    print(f"rank {ranks.rank} of {ranks.size}, {ranks.local_rank} of {ranks.local_size} here")
    time.sleep(0.3 * ranks.rank)  # the last one is slower than the others


def test_fs(tmp_path):
    started = run(tmp_path, say_who, flags_of(tmp_path, 3))
    assert started.wait() == ([0, 0, 0], "")
    assert started.read("out") == "rank 0 of 3, 0 of 3 here\n"  # only rank 0 prints
    assert not list(tmp_path.glob("llmc_meeting*"))


def test_fs_after_a_crash(tmp_path):
    """Rank 0 replaces the file of a run that is gone, whoever looks at it first."""
    (tmp_path / "llmc_meeting").write_text(f'["{socket.gethostname()}", {free_port()}, "0123"]')
    started = run(tmp_path, say_who, list(reversed(flags_of(tmp_path, 2))))
    assert started.wait() == ([0, 0], "")


def test_a_stale_file(tmp_path):
    port = free_port()
    (tmp_path / "llmc_meeting").write_text(f'["{socket.gethostname()}", {port}, "0123"]')
    started = run(tmp_path, say_who, [flags_of(tmp_path, 2)[1]], LLMC_START_TIMEOUT="1")
    statuses, errors = started.wait()
    assert statuses == [1]
    assert "rank 0 has not started within 1 s" in errors and f"nobody answers at 127.0.0.1:{port}; delete it" in errors
    assert errors.count("\n") == 1


def test_tcp_and_torchrun(tmp_path):
    """Both by environment variables or flags alone, one run after the other on one machine."""
    port = free_port()
    flags = [f"-pm tcp -ps 127.0.0.1 -pg 2 -pn 2 -pr {rank}" for rank in range(2)]
    started = run(tmp_path, say_who, flags)
    assert started.wait() == ([0, 0], "")
    environ = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = run(tmp_path, say_who, ["-b 1"], **environ)
    assert started.wait() == ([0], "")
    assert started.read("out").endswith("rank 0 of 1, 0 of 1 here\n")


def test_a_missing_rank(tmp_path):
    statuses, errors = run(tmp_path, say_who, flags_of(tmp_path, 3)[:2], LLMC_START_TIMEOUT="2").wait()
    assert statuses == [1, 1]
    assert errors.count("1 of 3 ranks did not start within 2 s (LLMC_START_TIMEOUT): rank 2\n") == 2


def test_wrong_sizes_and_ranks(tmp_path):
    other_size = [flags_of(tmp_path, 3)[0], flags_of(tmp_path, 2)[1]]
    statuses, errors = run(tmp_path, say_who, other_size, LLMC_START_TIMEOUT="5").wait()
    assert statuses == [1, 1]
    assert errors.count("was started as one of 2 processes, rank 0") == 2 and errors.count("as one of 3\n") == 2
    twice = flags_of(tmp_path, 3, **{"2": 1})
    statuses, errors = run(tmp_path, say_who, twice, LLMC_START_TIMEOUT="5").wait()
    assert statuses == [1, 1, 1]
    assert errors.count("give each process another rank\n") == 3


def test_other_flags(tmp_path):
    flags = flags_of(tmp_path, 2)
    statuses, errors = run(tmp_path, say_who, [flags[0] + " -l 1e-3", flags[1]]).wait()
    assert statuses == [1, 1]
    same = "start all processes with the same flags"
    assert errors == f"llmc-train: error: --learning-rate is 0.001 on rank 0 and 0.0003 on rank 1: {same}\n"


def fail_alone(ranks):
    if ranks.rank == 1:
        raise RunError("the disk is full")
    time.sleep(60)


def fail_together(ranks):
    raise UsageError("no such thing")


def die_in_a_barrier(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier("a checkpoint")


def die_while_others_work(ranks):
    if ranks.rank == 0:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        sum(range(10**6))


@pytest.mark.parametrize(
    ("action", "statuses", "cause"),
    [
        (fail_alone, [1, 1, 1], "llmc-train: error: rank 1: the disk is full\n"),
        (fail_together, [2, 2, 2], "llmc-train: error: no such thing\n"),
        (die_in_a_barrier, [1, -9, 1], "llmc-train: error: rank 1 (process {1} on {host}) has died: killed, perhaps"),
    ],
)
def test_one_cause_and_a_quick_end(tmp_path, action, statuses, cause):
    started = run(tmp_path, action, flags_of(tmp_path, 3))
    pids = [process.pid for process in started.processes]
    assert started.wait(20)[0] == statuses
    errors = started.read("err")
    assert errors.startswith(cause.format(*pids, host=socket.gethostname())) and errors.count("\n") == 1


def test_rank_0_dies(tmp_path):
    """There is nobody to speak for all then: each says it."""
    started = run(tmp_path, die_while_others_work, flags_of(tmp_path, 3))
    statuses, errors = started.wait(20)
    assert statuses == [-9, 1, 1]
    assert errors.count("llmc-train: error: rank 0 (process") == errors.count(" has died: ") == errors.count("\n") == 2


def test_ctrl_c(tmp_path):
    started = run(tmp_path, fail_alone_never, flags_of(tmp_path, 2))
    while "ready" not in started.read("out"):
        time.sleep(0.1)
    for process in started.processes:
        os.kill(process.pid, signal.SIGINT)
    assert started.wait(20) == ([130, 130], "llmc-train: error: interrupted\n")


def fail_alone_never(ranks):
    ranks.barrier("ready")
    print("ready", flush=True)
    time.sleep(60)


PROGRAM = """
import sys
import torch
from llmc import cli
from llmc.config import TrainConfig
from llmc.launch import launch
def main(_):
    with launch(TrainConfig()) as ranks:
        print("sum", sum(ranks.gather(ranks.rank, "ranks")), "of", ranks.size)
        if "die" in sys.argv and ranks.rank == 1:
            raise OSError("boom")
        ranks.barrier("end")
cli.run("llmc-train", main, [])
"""


FOLDERS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
MPIRUNS = {
    "MPICH": ["mpirun"],  # verbatim: the one that was installed with the package
    "Open MPI": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"],
}


def mpirun(name, *arguments, **environ):
    program, *options = MPIRUNS[name]
    if not (path := shutil.which(program, path=FOLDERS)):
        pytest.skip(f"there is no {program}")
    command = [path, *options, "-np", "3", sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "PATH": FOLDERS, **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("arguments", [[], ["die"]])
@pytest.mark.parametrize("name", MPIRUNS)
def test_mpirun(name, arguments):
    """Also as root, and with more ranks than cores."""
    result = mpirun(name, *arguments)
    assert result.stdout.splitlines()[0] == "sum 3 of 3"
    assert (result.returncode == 0) == (not arguments)
    assert ("llmc-train: error: rank 1: boom" in result.stderr) == bool(arguments)


def test_the_library_of_another_mpirun():
    """MPICH's mpirun over Open MPI's library: each process is a rank 0 of its own."""
    libraries = list(Path("/usr/lib").glob("*/libmpi.so.40"))
    if not libraries:
        pytest.skip("there is no Open MPI")
    result = mpirun("MPICH", MPI4PY_LIBMPI=str(libraries[0]))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "mpirun has started 3 processes, but the MPI library that mpi4py loads, Open MPI" in result.stderr
    assert result.stderr.count("sees 1: it belongs to another mpirun") == 3


EIGHT = tuple(range(8))


@pytest.mark.parametrize(
    ("cores", "rank", "own", "threads"),  # cores: of ranks 0, 1, ... of this machine
    [
        ([EIGHT], 0, None, 8),
        ([EIGHT, EIGHT], 0, [0, 4, 1, 5], 4),
        ([EIGHT, EIGHT], 1, [2, 6, 3, 7], 4),
        ([EIGHT, EIGHT, EIGHT], 2, [2, 6], 2),
        ([(0, 1), (0, 1), (0, 1)], 1, None, 1),  # more ranks than cores
        ([(0, 1, 2, 3), (4, 5, 6, 7)], 1, None, 4),  # the launcher has bound them
        ([(0, 1, 2, 3), (2, 3, 4, 5)], 1, None, 2),  # nobody knows what was meant
    ],
)
def test_ranks_share_cores(
    monkeypatch: pytest.MonkeyPatch,
    cores: list[tuple[int, ...]],
    rank: int,
    own: list[int] | None,
    threads: int,
) -> None:
    """Four cores with two threads each, numbered as Linux does: all first threads, then all second ones."""
    members = [Member(i, len(cores), "here", 100 + i, allowed) for i, allowed in enumerate(cores)]
    members.append(Member(len(cores), len(cores) + 1, "there", 7, EIGHT))
    bound, counts = [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "side_by_side", lambda cores: sorted(cores, key=lambda core: (core % 4, core)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    share_cores(members[rank], members)
    assert bound == ([] if own is None else [own])
    assert counts == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share_cores(members[rank], members)
    assert len(bound) + len(counts) == (1 if own is None else 2)  # that of before: now both is the user's
