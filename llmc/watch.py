"""How the ranks of a run end: together, with the first cause on stderr.

Each rank keeps one connection to rank 0. A rank that fails says so there; one that dies cannot, but the connection
breaks. Rank 0 prints the cause and tells all the status to leave with. No rank is asked for signs of life: one that is
busy for an hour is as good as any.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import TYPE_CHECKING, NoReturn

from llmc.errors import RunError
from llmc.failure import describe
from llmc.meeting import Deadline, Member
from llmc.ranks import TIMEOUT
from llmc.stop import INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed import Store

# Rank 0 says READY when all are connected, and GOODBYE when all have said DONE. Anything else is JSON: a failure,
# [status, line], to rank 0, and the status to leave with from rank 0.
READY, DONE, GOODBYE = b"ready", b"done", b"goodbye"
OTHER_REPORTS = 1.0  # seconds that a failure waits for those of the other ranks: is it the same everywhere?
LEAVING = 2.0  # seconds that rank 0 lets the others leave before it
GRACE = 2.0  # seconds after Ctrl-C in which the main thread should have noticed it
LAST_RESORT = 60.0  # seconds that a failed rank waits for rank 0, which may be busy


class Watch:
    """This rank's connection to rank 0, from the constructor to finish() or fail(). For the main thread.

    In between this process may leave with os._exit at any time, because another rank has failed or died: the main
    thread may sit in a collective operation or in a kernel, and nothing else could end that.
    """

    def __init__(self, program: str, store: "Store", host: str, me: Member, members: list[Member], deadline: Deadline):
        """`program` begins the line on stderr; `host` is rank 0's address. RunError if not all connect in time."""
        self._program, self._me, self._rank_0 = program, me, members[0]
        self._ready, self._goodbye = threading.Event(), threading.Event()
        self._reporting, self._has_reported = threading.Lock(), False
        # Python tells of Ctrl-C through a pipe too, which also works while the main thread is in a long operation.
        self._interrupts, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self._old_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        if me.rank == 0:
            listens_to = "127.0.0.1" if all(member.host == me.host for member in members) else ""
            key = secrets.token_bytes(32)
            listener = Listener((listens_to, 0), backlog=len(members), authkey=key)
            port = listener.address[1]
            judge = Judge(program, members, listener)
            threading.Thread(target=judge.run, daemon=True).start()
            store.set("watch", json.dumps([port, key.hex()]))
        port, key = json.loads(store.get("watch"))
        threading.Thread(target=self._obey, args=(host, port, bytes.fromhex(key)), daemon=True).start()
        if not deadline.wait(self._ready.is_set):
            absent = judge.absent() if me.rank == 0 else str(members[0])
            raise RunError(f"no connection with {absent} within {deadline.seconds:g} s: is a firewall in between?")

    def finish(self) -> None:
        """Return when all ranks have come here: rank 0 serves the store, so it must not leave before the others."""
        self._connection.send_bytes(DONE)
        if not self._goodbye.wait(TIMEOUT.total_seconds()):
            raise RunError(f"the other ranks are not at the end {TIMEOUT} after this one")
        signal.set_wakeup_fd(self._old_wakeup)

    def fail(self, error: BaseException) -> NoReturn:
        """Report `error` to rank 0 and leave as that says, which may know a better reason."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # already leaving
        failure = describe(error)
        if failure is None:
            traceback.print_exception(type(error), error, error.__traceback__)
            failure = 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
        self._report(*failure)
        time.sleep(LAST_RESORT)
        say(self._program, failure[1])
        leave(failure[0])

    def _report(self, status: int, line: str) -> None:
        with self._reporting:
            if not self._has_reported:
                self._has_reported = True
                with contextlib.suppress(OSError):  # rank 0 is dead: _obey sees it too
                    self._connection.send_bytes(json.dumps([status, line]).encode())

    def _obey(self, host: str, port: int, key: bytes) -> None:
        """The thread that does what rank 0 says."""
        try:
            self._connection = Client((host, port), authkey=key)
        except (OSError, EOFError, AuthenticationError):
            return  # the main thread waits for self._ready in vain
        keep_alive(self._connection)
        self._connection.send_bytes(str(self._me.rank).encode())
        timeout, interrupts = None, 0
        while True:
            ready = wait([self._connection, self._interrupts], timeout)
            if not ready:
                self._report(INTERRUPTED, "interrupted")
                timeout = None
            if self._interrupts in ready and (more := os.read(self._interrupts, 64).count(signal.SIGINT)):
                interrupts += more
                # A run that listens (stop.py) takes the first one as a request, and the second one ends it at once.
                if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                    timeout = GRACE
                elif interrupts >= 2:
                    timeout = 0.0
            if self._connection in ready:
                try:
                    message = self._connection.recv_bytes()
                except (EOFError, OSError):
                    say(self._program, death(self._rank_0))
                    leave(1)
                if message == GOODBYE:
                    self._goodbye.set()
                    return
                if message == READY:
                    self._ready.set()
                else:
                    leave(json.loads(message))


class Judge:
    """What rank 0 does for all: find the cause of an end that is none, and tell everybody."""

    def __init__(self, program: str, members: list[Member], listener: Listener):
        self._program, self._members, self._listener = program, members, listener
        self._connections: dict[Connection, int] = {}  # to all ranks, this one too
        self._done: set[int] = set()
        self._reports: dict[int, tuple[int, str]] = {}  # status and line, the oldest first
        self._death = ""  # the line about the first rank that died, if one did

    def absent(self) -> str:
        """The members without a connection."""
        return ", ".join(str(member) for member in self._members if member.rank not in self._connections.values())

    def run(self) -> None:
        """The thread of rank 0: until all have said DONE, or until the run has failed."""
        while len(self._connections) < len(self._members):
            self._accept()
        self._listener.close()
        self._tell(READY)
        reports_end = float("inf")  # when to wait no longer for what others say of a failure
        while len(self._done) < len(self._members):
            for connection in wait(list(self._connections), seconds_until(reports_end)):
                assert isinstance(connection, Connection)
                self._read(connection)
            if self._reports:
                reports_end = min(reports_end, time.monotonic() + OTHER_REPORTS)
            if self._death or time.monotonic() >= reports_end or len(self._reports) == len(self._members):
                self._end()
                return
        self._tell(GOODBYE)

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()
            keep_alive(connection)
            self._connections[connection] = int(connection.recv_bytes())
        except (OSError, EOFError, AuthenticationError):  # no rank of ours, such as a port scanner
            time.sleep(0.1)

    def _read(self, connection: Connection) -> None:
        rank = self._connections[connection]
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            del self._connections[connection]
            # One that had nothing more to say may go; and after Ctrl-C, mpirun and others kill what is left.
            interrupted = any(status == INTERRUPTED for status, _ in self._reports.values())
            if rank not in self._done and rank not in self._reports and not interrupted:
                self._death = self._death or death(self._members[rank])
            return
        if message == DONE:
            self._done.add(rank)
        else:
            status, line = json.loads(message)
            self._reports[rank] = status, line

    def _end(self) -> None:
        """Say why, then tell all ranks to leave, this one last."""
        # A death comes before all reports: those of ranks that still wait for others cannot make an operation fail.
        status, line = 1, self._death
        if not line:
            rank, (status, line) = next(iter(self._reports.items()))
            if len(self._reports) < len(self._members) or len(set(self._reports.values())) > 1:
                line = line and f"rank {rank}: {line}"
        say(self._program, line)
        self._tell(json.dumps(status).encode(), but=0)
        # Were this process the first to leave, a report that it has not read would break the connection too early.
        end = time.monotonic() + LEAVING
        while set(self._connections.values()) - {0} and time.monotonic() < end:
            for connection in wait(list(self._connections), seconds_until(end)):
                assert isinstance(connection, Connection)
                self._read(connection)
        self._tell(json.dumps(status).encode())

    def _tell(self, message: bytes, but: int = -1) -> None:
        # This process last: after GOODBYE it may leave at once.
        for connection, rank in sorted(self._connections.items(), key=lambda item: -item[1]):
            if rank != but:
                with contextlib.suppress(OSError):  # a death, which will be seen
                    connection.send_bytes(message)


def seconds_until(end: float) -> float | None:
    """None for an end that never comes."""
    return None if end == float("inf") else max(0.0, end - time.monotonic())


def keep_alive(connection: Connection) -> None:
    """Let the kernel notice within a minute that the machine at the other end is gone, which sends nothing."""
    with socket.socket(fileno=os.dup(connection.fileno())) as other_end:
        other_end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                other_end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def death(member: Member) -> str:
    return f"{member} has died: killed, perhaps for lack of memory, or crashed"


def say(program: str, line: str) -> None:
    """One line on stderr at once, whatever the main thread is printing; nothing for ''."""
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"{program}: error: {line}\n".encode())


def leave(status: int) -> NoReturn:
    """End this process now, whatever its main thread is doing."""
    flush = threading.Thread(target=flush_stdout, daemon=True)
    flush.start()
    flush.join(1)  # the main thread may hold the lock
    os._exit(status)


def flush_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
