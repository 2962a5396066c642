"""One rank of the NCCL tests; no torch here, so that it starts quickly.

python nccl_rank.py LIBRARY RANK SIZE [SCENARIO ID]... prints JSON, one object per scenario. tests/test_cudasim_nccl.py
starts the ranks.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SUM, MAX, MIN, AVG = 0, 2, 3, 4
INT32, FLOAT32, BFLOAT16, UINT8 = 2, 7, 9, 1
NUMPY = {INT32: np.int32, FLOAT32: np.float32, BFLOAT16: np.uint16, UINT8: np.uint8}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """The nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def encode(x: np.ndarray, kind: int) -> np.ndarray:
    return bf16_bits(x) if kind == BFLOAT16 else x.astype(NUMPY[kind])


class Rank:
    def __init__(self, library: str, rank: int, size: int, unique_id: str) -> None:
        self.lib: Any = ctypes.CDLL(library)
        self.lib.cudasim_report.restype = ctypes.c_char_p
        self.rank, self.size = rank, size
        self.id = UniqueId()
        ctypes.memmove(ctypes.byref(self.id), bytes.fromhex(unique_id), 128)
        self.comm = ctypes.c_void_p()

    def join(self, rank: int | None = None, size: int | None = None) -> int:
        rank, size = self.rank if rank is None else rank, self.size if size is None else size
        return self.lib.ncclCommInitRank(ctypes.byref(self.comm), size, self.id, rank)

    def upload(self, array: np.ndarray) -> int:
        pointer, size = ctypes.c_void_p(), ctypes.c_size_t(max(array.nbytes, 1))
        assert self.lib.cudaMalloc(ctypes.byref(pointer), size) == 0
        self.copy(pointer.value, array.ctypes.data, array.nbytes, HOST_TO_DEVICE)
        return pointer.value or 0

    def download(self, pointer: int, count: int, kind: int) -> np.ndarray:
        array = np.empty(count, NUMPY[kind])
        self.copy(array.ctypes.data, pointer, array.nbytes, DEVICE_TO_HOST)
        return array

    def copy(self, to: int | None, source: int | None, size: int, direction: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
        assert self.lib.cudaMemcpy(*pointers, ctypes.c_size_t(size), direction) == 0

    def call(self, name: str, *arguments: Any) -> int:
        """nccl{name}(arguments..., communicator, default stream)."""
        return getattr(self.lib, "nccl" + name)(*arguments, self.comm, None)

    def synchronize(self) -> None:
        assert self.lib.cudaDeviceSynchronize() == 0


pointer, count = ctypes.c_void_p, ctypes.c_size_t


def value(rank: int, n: int) -> np.ndarray:
    """Small integers, which every type and every partial sum holds exactly."""
    return (np.arange(n) * 7 + rank * 13) % 101 - 50


def reduced(size: int, n: int, reduction: int, kind: int) -> np.ndarray:
    """The reduction over the ranks by its formula."""
    all_ranks = np.stack([value(rank, n) for rank in range(size)])
    if reduction == AVG:
        total = all_ranks.sum(0)
        return encode(np.trunc(total / size) if kind == INT32 else total.astype(np.float32) / np.float32(size), kind)
    return encode({SUM: all_ranks.sum, MAX: all_ranks.max, MIN: all_ranks.min}[reduction](0), kind)


def check_equal(got: np.ndarray, wanted: np.ndarray, what: Any) -> None:
    assert np.array_equal(got, wanted), (what, np.flatnonzero(got != wanted)[:5])


def operations(r: Rank) -> None:
    """Every operation, type and reduction, out of place and in place, across chunk borders."""
    assert r.join() == 0
    for n in (1, 17, 300_001):  # a chunk is 262144 floats
        for kind in (FLOAT32, BFLOAT16, INT32) if n < 100 else (FLOAT32,):
            item = NUMPY[kind]().itemsize
            for reduction in (SUM, MAX, MIN, AVG) if n < 100 else (SUM,):
                own, whole = encode(value(r.rank, n), kind), encode(value(r.rank, n * r.size), kind)
                wanted, wanted_whole = reduced(r.size, n, reduction, kind), reduced(r.size, n * r.size, reduction, kind)
                portion = wanted_whole[r.rank * n : (r.rank + 1) * n]
                for in_place in (False, True):
                    what = (n, kind, reduction, in_place)
                    send = r.upload(own)
                    recv = send if in_place else r.upload(np.zeros_like(own))
                    assert r.call("AllReduce", pointer(send), pointer(recv), count(n), kind, reduction) == 0
                    check_equal(r.download(recv, n, kind), wanted, ("AllReduce", *what))
                    send = r.upload(whole)
                    recv = send + r.rank * n * item if in_place else r.upload(np.zeros_like(own))
                    assert r.call("ReduceScatter", pointer(send), pointer(recv), count(n), kind, reduction) == 0
                    check_equal(r.download(recv, n, kind), portion, ("ReduceScatter", *what))
                    for root in range(r.size):
                        send = r.upload(own)
                        recv = send if in_place else r.upload(np.zeros_like(own))
                        assert r.call("Reduce", pointer(send), pointer(recv), count(n), kind, reduction, root) == 0
                        untouched = own if in_place else np.zeros_like(own)
                        check_equal(
                            r.download(recv, n, kind), wanted if r.rank == root else untouched, ("Reduce", *what)
                        )
            own = encode(value(r.rank, n), kind)
            gathered = np.concatenate([encode(value(rank, n), kind) for rank in range(r.size)])
            for in_place in (False, True):
                start = np.zeros(n * r.size, NUMPY[kind])
                start[r.rank * n : (r.rank + 1) * n] = own
                recv = r.upload(start)
                send = recv + r.rank * n * item if in_place else r.upload(own)
                assert r.call("AllGather", pointer(send), pointer(recv), count(n), kind) == 0
                check_equal(r.download(recv, n * r.size, kind), gathered, ("AllGather", n, kind, in_place))
                for root in range(r.size):
                    send = r.upload(own)
                    recv = send if in_place else r.upload(np.zeros_like(own))
                    assert r.call("Broadcast", pointer(send), pointer(recv), count(n), kind, root) == 0
                    check_equal(r.download(recv, n, kind), encode(value(root, n), kind), ("Broadcast", n, kind, root))
    assert r.lib.ncclCommDestroy(r.comm) == 0


def messages(r: Rank) -> None:
    """A ring in a group; two messages to the same peer keep their order; an unequal exchange without a group."""
    assert r.join() == 0
    following, preceding = (r.rank + 1) % r.size, (r.rank - 1) % r.size
    for n in (0, 1, 200_003):  # a part is 65536 floats
        first, second = (r.upload(encode(value(r.rank, n) + add, FLOAT32)) for add in (0, 1000))
        got_first, got_second = (r.upload(np.zeros(n, np.float32)) for _ in range(2))
        r.lib.ncclGroupStart()
        assert r.call("Recv", pointer(got_first), count(n), FLOAT32, preceding) == 0
        assert r.call("Send", pointer(first), count(n), FLOAT32, following) == 0
        assert r.call("Send", pointer(second), count(n), FLOAT32, following) == 0
        assert r.call("Recv", pointer(got_second), count(n), FLOAT32, preceding) == 0
        assert r.lib.ncclGroupEnd() == 0
        for got, add in ((got_first, 0), (got_second, 1000)):
            check_equal(r.download(got, n, FLOAT32), encode(value(preceding, n) + add, FLOAT32), ("ring", n, add))
    data = r.upload(encode(value(r.rank, 100), UINT8))
    if r.size > 1 and r.rank < 2:
        assert r.call("Send" if r.rank == 0 else "Recv", pointer(data), count(100), UINT8, 1 - r.rank) == 0
        check_equal(r.download(data, 100, UINT8), encode(value(0, 100), UINT8), "one way")


def groups_and_streams(r: Rank) -> None:
    """A group starts at its end; lazy streams run it when something waits; a nested group belongs to the outer one."""
    assert r.join() == 0
    r.lib.cudasim_set_lazy(1)
    x, y = r.upload(np.ones(8, np.float32)), r.upload(np.full(8, r.rank, np.float32))
    r.lib.ncclGroupStart()
    r.lib.ncclGroupStart()
    assert r.call("AllReduce", pointer(x), pointer(x), count(8), FLOAT32, SUM) == 0
    assert r.call("AllReduce", pointer(y), pointer(y), count(8), FLOAT32, MAX) == 0
    assert r.lib.ncclGroupEnd() == 0
    assert r.download(x, 1, FLOAT32)[0] == 1
    assert r.lib.ncclGroupEnd() == 0
    r.synchronize()
    assert r.download(x, 8, FLOAT32).tolist() == [r.size] * 8
    assert r.download(y, 8, FLOAT32).tolist() == [r.size - 1] * 8
    r.lib.cudasim_set_lazy(0)


def rounding(r: Rank) -> None:
    """bf16 sums are rounded after every rank: 1 + 2^-8 + 2^-8 stays 1, because each tie goes to the even 1."""
    assert r.join() == 0
    x = r.upload(bf16_bits(np.full(4, 1.0 if r.rank == 0 else 2.0**-8)))
    assert r.call("AllReduce", pointer(x), pointer(x), count(4), BFLOAT16, SUM) == 0
    check_equal(r.download(x, 4, BFLOAT16), bf16_bits(np.ones(4)), "rounding")


def two_communicators(r: Rank) -> int:
    """An id serves once."""
    assert r.join() == 0
    return r.join()


# --- ranks that disagree: the result is that of the rank's own call ------------------------------------------------


def differ(usual: Callable[[Rank, int], int], other: Callable[[Rank, int], int]) -> Callable[[Rank], int]:
    """Rank 1 makes another call than the others."""

    def scenario(r: Rank) -> int:
        assert r.join() == 0
        data = r.upload(np.zeros(400, np.float32))
        result = (other if r.rank == 1 else usual)(r, data)
        error = ctypes.c_int()
        assert r.lib.ncclCommGetAsyncError(r.comm, ctypes.byref(error)) == 0
        assert error.value == result
        if result:  # and stays so
            assert all_reduce()(r, data) == result
        return result

    return scenario


def queued(r: Rank) -> int:
    """The first of two queued calls fails; the second is dropped."""
    assert r.join() == 0
    r.lib.cudasim_set_lazy(1)
    data = r.upload(np.zeros(400, np.float32))
    assert all_reduce(99 if r.rank == 1 else 100)(r, data) == 0
    assert all_reduce()(r, data) == 0
    r.synchronize()
    r.lib.cudasim_set_lazy(0)
    error = ctypes.c_int()
    assert r.lib.ncclCommGetAsyncError(r.comm, ctypes.byref(error)) == 0
    return error.value


def all_reduce(n: int = 100, kind: int = FLOAT32, reduction: int = SUM) -> Callable[[Rank, int], int]:
    return lambda r, data: r.call("AllReduce", pointer(data), pointer(data), count(n), kind, reduction)


def broadcast(root: int) -> Callable[[Rank, int], int]:
    return lambda r, data: r.call("Broadcast", pointer(data), pointer(data), count(100), FLOAT32, root)


def reduce_scatter(r: Rank, data: int) -> int:
    return r.call("ReduceScatter", pointer(data), pointer(data + r.rank * 400), count(100), FLOAT32, SUM)


def message(n: int, kind: int) -> Callable[[Rank, int], int]:
    """From rank 0 to rank 1; others have a part in it only when it fails."""

    def run(r: Rank, data: int) -> int:
        if r.rank > 1:
            return all_reduce()(r, data)
        return r.call("Send" if r.rank == 0 else "Recv", pointer(data), count(n), kind, 1 - r.rank)

    return run


def without_rank_1(instead: Callable[[Rank], Any]) -> Callable[[Rank], int]:
    """Rank 1 does something else than to take part."""

    def scenario(r: Rank) -> int:
        assert r.join() == 0
        data = r.upload(np.zeros(400, np.float32))
        return instead(r) if r.rank == 1 else all_reduce()(r, data)

    return scenario


SCENARIOS: dict[str, Callable[[Rank], Any]] = {
    "operations": operations,
    "messages": messages,
    "groups and streams": groups_and_streams,
    "rounding": rounding,
    "id used twice": two_communicators,
    "missing at the start": lambda r: 0 if r.rank == 1 else r.join(),
    "rank twice": lambda r: r.join(rank=0),
    "sizes": lambda r: r.join(size=2 + (r.rank == 1)),
    "count": differ(all_reduce(), all_reduce(99)),
    "type": differ(all_reduce(), all_reduce(kind=INT32)),
    "reduction": differ(all_reduce(), all_reduce(reduction=MAX)),
    "operation": differ(all_reduce(), reduce_scatter),
    "root": differ(broadcast(0), broadcast(1)),
    "message count": differ(message(100, FLOAT32), message(99, FLOAT32)),
    "message type": differ(message(100, FLOAT32), message(100, INT32)),
    "queued": queued,
    "abort": without_rank_1(lambda r: r.lib.ncclCommAbort(r.comm)),
    "missing call": without_rank_1(lambda r: 0),
    "crash": without_rank_1(lambda r: os.kill(os.getpid(), signal.SIGKILL)),
}


def main() -> None:
    library, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    results = []
    for name, unique_id in zip(sys.argv[4::2], sys.argv[5::2], strict=True):
        r = Rank(library, rank, size, unique_id)
        r.lib.cudasim_clear()
        started = time.monotonic()
        result = SCENARIOS[name](r) or 0
        seconds = time.monotonic() - started
        reports = r.lib.cudasim_report().decode().splitlines()
        results.append({"result": result, "reports": reports, "seconds": seconds})
    print(json.dumps(results))


main()
