"""How the processes of a run make sure that all of them are there, before anything else."""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llmc.errors import RunError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

START_TIMEOUT = "LLMC_START_TIMEOUT"  # environment variable: seconds in which all ranks must have started
DEFAULT_START_TIMEOUT = "120"
LATE = 10.0  # seconds more that the others wait for what rank 0 says, which may have started after them


class Deadline:
    """The end of the time for starting, `seconds` from now."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def wait(self, is_done: Callable[[], bool], late: float = 0) -> bool:
        """False if the time passes before `is_done()`. Ctrl-C ends it, which a wait in torch would not see."""
        pause = 0.01
        while not is_done():
            if time.monotonic() > self._end + late:
                return False
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)
        return True


def start_deadline() -> Deadline:
    """From now, by LLMC_START_TIMEOUT. UsageError if that is no number of seconds."""
    text = os.environ.get(START_TIMEOUT, DEFAULT_START_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= timedelta(days=1).total_seconds():
        raise UsageError(f"{START_TIMEOUT}={text} in the environment: it must be a number of seconds, up to a day")
    return Deadline(seconds)


@dataclass(frozen=True)
class Member:
    """What a process says of itself."""

    rank: int
    size: int  # of the run, as far as it knows
    host: str
    pid: int
    cores: tuple[int, ...]  # numbers of those that it may use

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def myself(rank: int, size: int) -> Member:
    all_cores = range(os.cpu_count() or 1)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else all_cores  # macOS does not bind processes
    return Member(rank, size, socket.gethostname(), os.getpid(), tuple(sorted(cores)))


def meet(store: "Store", me: Member, deadline: Deadline) -> list[Member]:
    """All members of the run, in the order of their ranks. RunError on each that is there if they cannot be one run.

    Rank 0 looks at all and decides; nobody else can know whether everybody knows.
    """
    number = store.add("joined", 1)
    store.set(f"member {number}", json.dumps(asdict(me)))
    if me.rank == 0:
        members = gather_members(store, me, deadline)
        problem = mistake(members, me) or missing(members, me, deadline)
        outcome = {"problem": problem, "members": [asdict(member) for member in members]}
        store.set("outcome", json.dumps(outcome))
        if problem:  # the store ends with this process: the others read this first
            Deadline(2).wait(lambda: store.add("left", 0) >= store.add("joined", 0) - 1)
    elif deadline.wait(lambda: store.check(["outcome"]), LATE):
        outcome = json.loads(store.get("outcome"))
        members = [read_member(member) for member in outcome["members"]]
        problem = outcome["problem"]
        if not problem and me not in members:
            twin = next(member for member in members if member.rank == me.rank)
            problem = f"{me} is too much: {twin} has joined before it; give each process another rank"
        store.add("left", 1)
    else:
        members = [read_member(json.loads(store.get(f"member {i + 1}"))) for i in range(store.add("joined", 0))]
        problem = missing(members, me, deadline) or "rank 0 has not said whether all are there"
    if problem:
        raise RunError(problem)
    return sorted(members, key=lambda member: member.rank)


def gather_members(store: "Store", me: Member, deadline: Deadline) -> list[Member]:
    """Those that have joined, when they are enough, when one of them cannot be right, or when the time has passed."""
    members: list[Member] = []
    while len(members) < me.size and not mistake(members, me):
        key = f"member {len(members) + 1}"
        if not deadline.wait(lambda key=key: store.check([key])):  # type: ignore[misc]
            break
        members.append(read_member(json.loads(store.get(key))))
    return members


def read_member(values: dict[str, Any]) -> Member:
    return Member(**{**values, "cores": tuple(values["cores"])})


def mistake(members: list[Member], me: Member) -> str:
    """What is wrong with those that are there, '' for nothing; `me` is right by definition."""
    for i, member in enumerate(members):
        if member.size != me.size:
            return f"{member} was started as one of {member.size} processes, {me} as one of {me.size}"
        for other in members[:i]:
            if other.rank == member.rank:
                return f"there are two of one rank, {other} and {member}: give each process another rank"
    return ""


def missing(members: list[Member], me: Member, deadline: Deadline) -> str:
    """The ranks that are not there, '' for none."""
    absent = sorted(set(range(me.size)) - {member.rank for member in members})
    if not absent:
        return ""
    names = ", ".join(str(rank) for rank in absent[:8]) + (", ..." if len(absent) > 8 else "")
    return (
        f"{len(absent)} of {me.size} ranks did not start within {deadline.seconds:g} s ({START_TIMEOUT}): "
        f"rank{'s' if len(absent) > 1 else ''} {names}"
    )
