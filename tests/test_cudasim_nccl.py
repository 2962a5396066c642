"""The simulated NCCL: results against formulas, ranks that disagree or do not come, wrong arguments."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cudasim_testing import LIBRARY, SCRIPTS, SUCCESS, DeviceTensor, kinds, load_library, take_reports

INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR = 4, 5, 6  # ncclResult_t
UINT8, FLOAT32, FLOAT64 = 1, 7, 8  # ncclDataType_t
SUM, PROD = 0, 1  # ncclRedOp_t

nccl: Any = None


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Every test must take the reports that it provokes."""
    global nccl
    nccl = load_library()
    take_reports()
    yield
    assert take_reports() == []


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


def make_id() -> UniqueId:
    unique_id = UniqueId()
    assert load_library().ncclGetUniqueId(ctypes.byref(unique_id)) == SUCCESS
    return unique_id


# --- one process per rank ------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """What a rank printed about a scenario; result None if the process was killed."""

    result: int | None
    reports: list[str]
    seconds: float


def run_ranks(scenarios: list[str], size: int, timeout: float = 20) -> dict[str, list[Ended]]:
    """Processes run scenarios of cudasim/library_tests/nccl_rank.py one after another; this process makes the ids."""
    arguments = [argument for scenario in scenarios for argument in (scenario, bytes(make_id()).hex())]
    command = [sys.executable, str(SCRIPTS / "nccl_rank.py"), str(LIBRARY)]
    environment = os.environ | {"CUDASIM_NCCL_TIMEOUT": str(timeout)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ended: dict[str, list[Ended]] = {scenario: [] for scenario in scenarios}
    for process in ranks:
        out, errors = process.communicate(timeout=60)
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0, errors
        for index, scenario in enumerate(scenarios):
            ended[scenario].append(Ended(None, [], 0) if killed else Ended(**json.loads(out)[index]))
    return ended


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks(size: int) -> None:
    scenarios = ["operations", "messages", "groups and streams"] + ["rounding"] * (size == 3)
    for scenario, ranks in run_ranks(scenarios, size).items():
        for rank in ranks:
            assert (rank.result, rank.reports) == (SUCCESS, []), scenario


def test_an_id_serves_once() -> None:
    for rank in run_ranks(["id used twice"], 2)["id used twice"]:
        assert rank.result in (INVALID_ARGUMENT, INVALID_USAGE) and kinds(rank.reports) == ["nccl"]
    unique_id, comm = make_id(), ctypes.c_void_p()
    assert nccl.ncclCommInitRank(ctypes.byref(comm), 1, unique_id, 0) == SUCCESS
    assert nccl.ncclCommInitRank(ctypes.byref(comm), 1, unique_id, 0) == INVALID_ARGUMENT  # its maker has closed it
    assert kinds(take_reports()) == ["nccl"]


# scenario: what one of the reports contains, or all where all ranks see it; the results of the ranks
DISAGREEMENTS: dict[str, tuple[str, list[int]]] = {
    "count": (
        "rank 0 AllReduce(count 100, float32, sum), rank 1 AllReduce(count 99, float32, sum), rank 2 AllReduce(",
        [INVALID_USAGE] * 3,
    ),
    "type": ("rank 1 AllReduce(count 100, int32, sum)", [INVALID_USAGE] * 3),
    "reduction": ("rank 1 AllReduce(count 100, float32, max)", [INVALID_USAGE] * 3),
    "operation": ("rank 1 ReduceScatter(count 100, float32, sum)", [INVALID_USAGE] * 3),
    "root": ("rank 1 Broadcast(count 100, float32, root 1)", [INVALID_USAGE] * 3),
    "queued": ("rank 1 AllReduce(count 99, float32, sum)", [INVALID_USAGE] * 3),
    "message count": ("Recv(count 99, float32, from 0), rank 0 Send(count 100", [SUCCESS, INVALID_USAGE, REMOTE_ERROR]),
    "message type": ("Recv(count 100, int32, from 0), rank 0 Send(", [SUCCESS, INVALID_USAGE, REMOTE_ERROR]),
    "abort": ("rank 1 gave up", [REMOTE_ERROR, SUCCESS, REMOTE_ERROR]),
}


@pytest.fixture(scope="module")
def disagreements() -> dict[str, list[Ended]]:
    return run_ranks(list(DISAGREEMENTS), 3)


@pytest.mark.parametrize("scenario", DISAGREEMENTS)
def test_ranks_that_disagree(scenario: str, disagreements: dict[str, list[Ended]]) -> None:
    text, results = DISAGREEMENTS[scenario]
    ranks = disagreements[scenario]
    assert [rank.result for rank in ranks] == results
    reports = [report for rank in ranks for report in rank.reports]
    assert kinds(reports) == ["nccl"]
    if results == [INVALID_USAGE] * 3:
        assert len(reports) == 3 and all(text in report for report in reports)
    else:
        assert any(text in report for report in reports)


# One scenario per process: the ranks end at different times.
@pytest.mark.parametrize("scenario", ["missing at the start", "missing call", "crash"])
def test_a_rank_does_not_come(scenario: str) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks = run_ranks([scenario], 3, timeout=1)[scenario]
    for rank in (ranks[0], ranks[2]):
        assert rank.result == REMOTE_ERROR and rank.seconds < 10
    assert any("waits for rank 1: not within 1 s" in report for report in ranks[0].reports + ranks[2].reports)
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.parametrize(
    "scenario, result, reason",
    [
        ("rank twice", INVALID_USAGE, "two processes join as rank 0"),
        ("sizes", INVALID_ARGUMENT, "ranks, another rank"),
    ],
)
def test_ranks_join_wrongly(scenario: str, result: int, reason: str) -> None:
    ranks = run_ranks([scenario], 2, timeout=1)[scenario]
    assert sorted(rank.result or 0 for rank in ranks) == [result, REMOTE_ERROR]
    assert any(reason in report for rank in ranks for report in rank.reports)


# --- arguments -----------------------------------------------------------------------------------------------------


class Communicator:
    """Of this process alone, with two arrays of 100 fp32 numbers in device memory."""

    def __init__(self) -> None:
        self.comm = ctypes.c_void_p()
        assert nccl.ncclCommInitRank(ctypes.byref(self.comm), 1, make_id(), 0) == SUCCESS
        self.x, self.y = DeviceTensor(torch.arange(100.0)), DeviceTensor(torch.zeros(100))

    def all_reduce(
        self,
        send: int | None = 0,
        recv: int | None = 0,
        count: int = 100,
        kind: int = FLOAT32,
        reduction: int = SUM,
        in_place: bool = False,
        comm: ctypes.c_void_p | None = None,
    ) -> int:
        """From x to y (in place: to x); send and recv are bytes from the start of the arrays, None for null."""
        to = self.x if in_place else self.y
        sendbuff = None if send is None else self.x.pointer + send
        recvbuff = None if recv is None else to.pointer + recv
        pointers = ctypes.c_void_p(sendbuff), ctypes.c_void_p(recvbuff)
        return nccl.ncclAllReduce(*pointers, ctypes.c_size_t(count), kind, reduction, comm or self.comm, None)


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "sendbuff is null": ({"send": None}, "sendbuff is null"),
    "recvbuff is null": ({"recv": None}, "recvbuff is null"),
    "alignment": ({"send": 2, "count": 99}, "not aligned"),
    "bounds of sendbuff": ({"count": 101}, "sendbuff (404 bytes"),
    "bounds of recvbuff": ({"recv": 4}, "recvbuff (400 bytes"),
    "overlap": ({"in_place": True, "recv": 4, "count": 99}, "not as an in-place operation"),
    "type": ({"kind": 12}, "data type 12"),
    "type of a reduction": ({"kind": FLOAT64, "count": 50}, "data type 8"),
    "reduction": ({"reduction": PROD}, "reduction 1"),
    "communicator": ({"comm": ctypes.c_void_p(4096)}, "not a communicator"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    wrong, reason = RULES[rule]
    c = Communicator()
    assert c.all_reduce() == c.all_reduce(in_place=True) == SUCCESS
    assert c.y.download().tolist() == list(range(100))
    assert c.all_reduce(**wrong) == INVALID_ARGUMENT
    assert reason in nccl.ncclGetLastError(None).decode()
    assert kinds(take_reports()) == ["nccl"]
    assert c.all_reduce() == SUCCESS  # a refused call leaves the communicator as it was


def test_in_place_gather_and_scatter_have_their_own_rule() -> None:
    """With one rank both are in place at the start of the other array, and nowhere else."""
    c = Communicator()
    x, shifted, count = ctypes.c_void_p(c.x.pointer), ctypes.c_void_p(c.x.pointer + 4), ctypes.c_size_t(99)
    assert nccl.ncclAllGather(x, x, count, FLOAT32, c.comm, None) == SUCCESS
    assert nccl.ncclReduceScatter(x, x, count, FLOAT32, SUM, c.comm, None) == SUCCESS
    assert take_reports() == []
    assert nccl.ncclAllGather(shifted, x, count, FLOAT32, c.comm, None) == INVALID_ARGUMENT
    assert nccl.ncclReduceScatter(x, shifted, count, FLOAT32, SUM, c.comm, None) == INVALID_ARGUMENT
    assert len(take_reports()) == 2


def test_roots_peers_groups_and_handles() -> None:
    c = Communicator()
    x, count = ctypes.c_void_p(c.x.pointer), ctypes.c_size_t(100)
    wrong = [
        nccl.ncclBroadcast(x, x, count, UINT8, 1, c.comm, None),
        nccl.ncclReduce(x, x, count, FLOAT32, SUM, -1, c.comm, None),
        nccl.ncclSend(x, count, FLOAT32, 1, c.comm, None),
        nccl.ncclRecv(x, count, FLOAT32, 2, c.comm, None),
    ]
    assert wrong == [INVALID_ARGUMENT] * 4
    assert nccl.ncclBroadcast(x, x, count, UINT8, 0, c.comm, None) == SUCCESS
    assert nccl.ncclGroupEnd() == INVALID_USAGE
    assert nccl.ncclCommDestroy(c.comm) == SUCCESS
    assert nccl.ncclCommDestroy(c.comm) == INVALID_ARGUMENT
    assert len(take_reports()) == 6


def test_what_a_communicator_says_of_itself() -> None:
    c, value = Communicator(), ctypes.c_int(-1)
    for function, wanted in (("Count", 1), ("UserRank", 0), ("GetAsyncError", SUCCESS)):
        assert getattr(nccl, f"ncclComm{function}")(c.comm, ctypes.byref(value)) == SUCCESS
        assert value.value == wanted
    assert nccl.ncclGetVersion(ctypes.byref(value)) == SUCCESS and value.value // 10000 == 2
    assert nccl.ncclGetErrorString(INVALID_USAGE).startswith(b"invalid usage")


@pytest.mark.parametrize("size, rank", [(0, 0), (2, 2), (2, -1), (17, 0)])
def test_joining_an_impossible_rank(size: int, rank: int) -> None:
    comm = ctypes.c_void_p()
    assert nccl.ncclCommInitRank(ctypes.byref(comm), size, make_id(), rank) == INVALID_ARGUMENT
    assert nccl.ncclCommInitRank(ctypes.byref(comm), 1, UniqueId(), 0) == INVALID_ARGUMENT
    assert len(take_reports()) == 2


def test_uninitialised_data() -> None:
    c = Communicator()
    c.x = DeviceTensor(c.x.tensor, upload=False)
    c.all_reduce()
    assert kinds(take_reports()) == ["uninitialised"]
