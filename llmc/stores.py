"""Where the ranks of a run meet: torch's TCPStore, which rank 0 serves (or torchrun), and the ways to find it."""

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import mpi
from llmc.errors import RunError, UsageError
from llmc.meeting import Deadline
from llmc.ranks import TIMEOUT

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

LOCALHOST = "127.0.0.1"
NONCE = "nonce"  # key of what a file must say too, to be of the run that answers
PORT = 12345  # of -pm tcp, as in llm.c
ATTEMPT = timedelta(seconds=2)  # for one connection: Ctrl-C is seen after it, and a new address
Found = tuple["Store", str]  # and the address of rank 0


def serve(port: int) -> "TCPStore":
    """The store of rank 0, on all its addresses; on a free port for 0."""
    from torch.distributed import TCPStore

    try:
        return TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    except RuntimeError as error:
        reason = "it is in use, perhaps by another rank 0" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise RunError(f"rank 0 cannot serve port {port}: {reason}") from error


def try_to_connect(host: str, port: int) -> "TCPStore | None":
    """One attempt."""
    from torch.distributed import TCPStore

    try:
        store = TCPStore(host, port, is_master=False, timeout=ATTEMPT)
    except RuntimeError:
        return None
    store.set_timeout(TIMEOUT)
    return store


def connect(host: str, port: int, deadline: Deadline) -> "TCPStore":
    found: list[TCPStore] = []

    def is_connected() -> bool:
        found.extend(filter(None, [try_to_connect(host, port)]))
        return bool(found)

    if not deadline.wait(is_connected):
        raise RunError(f"rank 0 does not answer at {host}:{port} within {deadline.seconds:g} s: has it started there?")
    return found[0]


def reachable(host: str) -> str:
    """The address to reach `host` at: a machine need not be able to resolve its own name."""
    return LOCALHOST if host in (socket.gethostname(), socket.gethostname().split(".")[0], "localhost") else host


def by_tcp(rank: int, host: str, port: int, deadline: Deadline) -> Found:
    """Rank 0 is on `host` and serves `port`."""
    host = reachable(host)
    return (serve(port), LOCALHOST) if rank == 0 else (connect(host, port, deadline), host)


def by_mpi(launcher: str, rank: int, size: int, deadline: Deadline) -> Found:
    store = serve(0) if rank == 0 else None
    address = json.dumps([socket.gethostname(), store.port]) if store else ""
    host, port = json.loads(mpi.broadcast(launcher, size, address))
    return (store, LOCALHOST) if store else (connect(reachable(host), port, deadline), reachable(host))


@contextmanager
def by_file(rank: int, folder: Path, deadline: Deadline) -> Iterator[Found]:
    """Rank 0 writes its address to a file in `folder`, which it removes at the end of the context."""
    if not folder.is_dir():
        raise UsageError(f"-pp {folder}: there is no such directory; give one that all processes see")
    job = os.environ.get("SLURM_JOB_ID")
    path = folder / (f"llmc_meeting_{job}" if job else "llmc_meeting")
    if rank > 0:
        yield look_for_file(path, deadline)
        return
    if read_address(path).store:
        raise RunError(
            f"another run is starting with {path}, or a process of this one that is rank 0 too: "
            "give each process its rank with -pr, and runs that start at one time different directories with -pp"
        )
    store, nonce = serve(0), secrets.token_hex(16)
    store.set(NONCE, nonce)
    text = json.dumps([socket.gethostname(), store.port, nonce])
    new = path.with_name(f"{path.name}.{nonce}")
    new.write_text(text)
    new.replace(path)  # nobody ever reads half of it
    try:
        yield store, LOCALHOST
    finally:
        with suppress(OSError):
            if path.read_text() == text:
                path.unlink()


@dataclass(frozen=True)
class Address:
    """What such a file leads to."""

    host: str
    store: "TCPStore | None"  # None if the run that has written the file does not answer
    problem: str


def read_address(path: Path) -> Address:
    """One attempt: rank 0 may write the file, or replace the one of an earlier run, at any time."""
    try:
        host, port, nonce = json.loads(path.read_text())
    except FileNotFoundError:
        return Address("", None, f"there is no {path}; do all processes see that directory (-pp)?")
    except (ValueError, TypeError):
        return Address("", None, f"{path} is no file of llmc; delete it")
    host = reachable(host)
    store = try_to_connect(host, port)
    if store and store.check([NONCE]) and store.get(NONCE).decode() == nonce:
        return Address(host, store, "")
    who = "another run" if store else "nobody"
    return Address(host, None, f"{path} is of an earlier run, {who} answers at {host}:{port}; delete it")


def look_for_file(path: Path, deadline: Deadline) -> Found:
    address = read_address(path)
    while not address.store:
        if deadline.left() == 0:
            raise RunError(f"rank 0 has not started within {deadline.seconds:g} s: {address.problem}")
        time.sleep(0.1)
        address = read_address(path)
    return address.store, address.host


def by_environment(rank: int, deadline: Deadline) -> Found:
    """As torch's env:// does it: torchrun serves a store, rank 0 only where others have set torchrun's variables."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not re.fullmatch("[0-9]{1,5}", port):
        raise RunError(f"MASTER_PORT={port} in the environment is no port")
    from torch.distributed import PrefixStore

    store: Store
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, address = connect(reachable(host), int(port), deadline), reachable(host)
    else:
        store, address = by_tcp(rank, host, int(port), deadline)
    # torchrun keeps its store when it starts the processes again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"llmc {attempt}", store), address


def slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 is in a step of Slurm: on its first node (n3 of n[3-4,7],gpu1), at a port that other steps avoid."""
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    assert first is not None  # it matches everything
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return host, 16384 + (61 * job + step) % 16384  # below the ports that the kernel gives away
