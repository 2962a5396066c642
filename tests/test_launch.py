"""One process only: what says that there are to be several is refused, with one line."""

import pytest

from llmc.config import TrainConfig
from llmc.errors import RunError, UsageError
from llmc.launch import WORLD_SIZE_VARIABLES, check_single_process

# Of Open MPI, of MPICH and Intel MPI, of torchrun, of srun.
VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """These tests may themselves run in a job."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_variables():
    assert set(WORLD_SIZE_VARIABLES) == set(VARIABLES)


@pytest.mark.parametrize("method", ["mpi", "tcp", "fs"])
def test_a_single_process(method):
    check_single_process(TrainConfig(start_method=method))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mpi", "-pn 8 has no effect with -pm mpi, where mpirun -np says it"),
        ("tcp", "-pn 8: this version trains in one process; use -pn 1"),
        ("fs", "-pn 8: this version trains in one process; use -pn 1"),
    ],
)
def test_several_processes_by_flag(method, message):
    with pytest.raises(UsageError) as caught:
        check_single_process(TrainConfig(start_method=method, num_processes=8))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_several_processes_by_environment(monkeypatch, name):
    monkeypatch.setenv(name, "8")
    with pytest.raises(RunError) as caught:
        check_single_process(TrainConfig())
    assert f"({name}=8)" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_one_process_started_by_a_launcher(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    check_single_process(TrainConfig())
