"""Runs a function on several ranks, each a process of its own; or processes that are to become the ranks of a run."""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from llmc.ranks import Ranks, join_gloo_group

LIMIT = timedelta(seconds=60)  # for all that the ranks of one test do


def start(target: Callable[..., None], *args: Any) -> multiprocessing.Process:
    """A process that has everything imported already: torch takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "pytest", "llmc.train", "llmc._C"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(ranks, *args)` on `size` ranks of one thread each, with a Gloo group; the results in order of ranks.

    `function` must be one of a module, and all it takes and returns picklable. The test fails with the text of the
    first exception, and after 60 seconds; no process outlives the call.
    """
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
    context = multiprocessing.get_context("forkserver")
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [start(run_rank, pipes[rank][1], server.port, rank, size, function, args) for rank in range(size)]
    for _, theirs in pipes:
        theirs.close()
    waiting = {ours: rank for rank, (ours, _) in enumerate(pipes)}
    results: list[Any] = [None] * size
    failures: list[str] = []
    deadline = time.monotonic() + LIMIT.total_seconds()
    try:
        while waiting and (ready := wait(list(waiting), max(0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank], failure = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ranks[rank].join(5)
                    failure = f"died with status {ranks[rank].exitcode}"
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    deadline = min(deadline, time.monotonic() + 2)  # the others may have something to say
        if waiting and not failures:
            failures.append(f"no result from ranks {sorted(waiting.values())} within {LIMIT}")
    finally:
        for process in ranks:
            process.kill() if failures or waiting else process.join(5)
        for process in ranks:
            process.join(5)
            assert process.exitcode is not None
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return results


def run_rank(pipe: Connection, port: int, rank: int, size: int, function: Callable[..., Any], args: Any) -> None:
    result, failure = None, ""
    try:
        torch.set_num_threads(1)
        store = PrefixStore("test", TCPStore("127.0.0.1", port, is_master=False, timeout=LIMIT))
        name = join_gloo_group(store, rank, size, one_machine=True, seconds=60) if size > 1 else ""
        ranks = Ranks(rank, size, rank, size, store if size > 1 else None, name)
        ranks.barrier("the start")  # one that ends early must not break connections that others are still making
        result = function(ranks, *args)
    except BaseException:
        failure = traceback.format_exc()
    pipe.send_bytes(pickle.dumps((result, failure)))


def run_process(output: str, environ: dict[str, str], function: Callable[..., Any], args: Any) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.environ.update(environ)
    function(*args)


class Processes:
    """Processes of one thread each that are started and waited for, and what they wrote."""

    def __init__(
        self, folder: Path, function: Callable[..., Any], arguments: list[tuple[Any, ...]], environ: dict[str, str]
    ) -> None:
        """function(*arguments[i]) is what process i does."""
        self.outputs = [folder / f"rank{i}" for i in range(len(arguments))]
        for output in self.outputs:
            for name in ("out", "err"):  # of earlier processes
                Path(f"{output}.{name}").unlink(missing_ok=True)
        environ = {"OMP_NUM_THREADS": "1", "LLMC_START_TIMEOUT": "20", **environ}
        self.processes = [
            start(run_process, str(output), environ, function, args)
            for output, args in zip(self.outputs, arguments, strict=True)
        ]

    def wait(self, seconds: float = 40) -> tuple[list[int | None], str]:
        """Statuses, and all of stderr. The test fails if one is still there after that time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        hang = [number for number, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not hang, f"ranks {hang} are still there; stderr: {self.read('err')}"
        return [process.exitcode for process in self.processes], self.read("err")

    def read(self, name: str) -> str:
        """What all have written to "out" or "err" so far."""
        paths = [Path(f"{output}.{name}") for output in self.outputs]
        return "".join(path.read_text() for path in paths if path.exists())
