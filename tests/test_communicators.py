"""What ranks do together: Gloo, and NCCL in the simulator. Results against torch in fp64, order, and every failure.

The functions that take `ranks` run on the ranks.
"""

import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta
from multiprocessing.connection import wait

import devices
import pytest
import torch
from ranks_testing import run_ranks, start
from torch import distributed

from llmc import _C

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # the relative error of one rounding
SECONDS = 1.0  # the time-out of collectives that are to fail


def gloo(ranks, seconds=30.0):
    """A group of these ranks that has a time-out of its own."""
    if not distributed.is_initialized():  # run_ranks makes none for a single process
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return _C.gloo_communicator(distributed.new_group(timeout=timedelta(seconds=seconds)).group_name)


def nccl(ranks, seconds=30.0):
    core = devices.simulator().core
    unique_id = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else None, "unique id")
    return core.nccl_communicator(bytes.fromhex(unique_id), ranks.rank, ranks.size, 0, seconds)


class CPU:
    def to_device(self, tensor):
        return tensor.clone()

    def to_host(self, tensor):
        return tensor


# --- results --------------------------------------------------------------------------------------------------------


def values(rank, n, dtype):
    return torch.randn(n, generator=torch.Generator().manual_seed(100 * n + rank)).to(dtype)


def all_collectives(comm, device, sizes):
    """Every collective, with so many elements in a rank's slice: (dtype, n, results), each a CPU tensor."""
    results = []
    for dtype in DTYPES:
        for n in sizes:
            mine = values(comm.rank, n, dtype)
            whole = values(comm.rank, n * comm.size, dtype)
            place = slice(comm.rank * n, (comm.rank + 1) * n)
            average, total, scattered = (device.to_device(x) for x in (mine, mine, whole))
            in_place = torch.zeros(n * comm.size, dtype=dtype)
            in_place[place] = mine
            in_place = device.to_device(in_place)
            apart, own = device.to_device(torch.zeros(n * comm.size, dtype=dtype)), device.to_device(mine)
            # All under way before the first is waited for.
            tickets = [
                comm.all_reduce_average(average, "average"),
                comm.all_reduce_sum(total, "sum"),
                comm.reduce_scatter_average(scattered, "scattered"),
                comm.all_gather(in_place, in_place[place], "in place"),
                comm.all_gather(apart, own, "apart"),
            ]
            assert tickets == list(range(tickets[0], tickets[0] + 5))
            comm.wait(tickets[3])
            comm.wait(tickets[1])  # a ticket stands for those before it
            comm.finish(tickets[4])
            comm.finish(tickets[0])
            outputs = average, total, scattered[place], in_place, apart
            results.append((dtype, n, [device.to_host(x).clone() for x in outputs]))
    return results


def results_with_gloo(ranks):
    return all_collectives(gloo(ranks), CPU(), [1, 61, 3001])


def check_results(by_rank):
    """Bounds: a sum of P numbers is rounded P - 1 times, an average once more, each time by at most u·Σ|x|."""
    size = len(by_rank)
    for cases in zip(*by_rank, strict=True):
        dtype, n, _ = cases[0]
        u = ROUNDING[dtype] * (1.05 if dtype == torch.bfloat16 else 1.0001)  # (1 + u)^P, no more than 4 ranks
        average, total, _, in_place, apart = cases[0][2]
        mine = torch.stack([values(rank, n, dtype) for rank in range(size)]).double()
        whole = torch.stack([values(rank, n * size, dtype) for rank in range(size)]).double()
        assert ((average - mine.mean(0)).abs() <= u * mine.abs().sum(0)).all()
        assert ((total - mine.sum(0)).abs() <= (size - 1) * u * mine.abs().sum(0)).all()
        scattered = torch.cat([outputs[2] for _, _, outputs in cases])
        assert ((scattered - whole.mean(0)).abs() <= u * whole.abs().sum(0)).all()
        gathered = torch.cat([values(rank, n, dtype) for rank in range(size)])
        assert torch.equal(in_place, gathered) and torch.equal(apart, gathered)
        for _, _, (other_average, other_total, _, *_) in cases[1:]:
            assert torch.equal(other_average, average) and torch.equal(other_total, total)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gloo(size):
    check_results(run_ranks(size, results_with_gloo))


def chained(ranks):
    """Collectives on shared memory, none waited for; long ones, so that they would meet."""
    comm, n = gloo(ranks), 1 << 20
    place = slice(ranks.rank * n, (ranks.rank + 1) * n)
    x = torch.full((ranks.size * n,), float(ranks.rank))
    comm.all_reduce_sum(x)  # 1 everywhere
    comm.all_gather(x, x[place])
    comm.all_reduce_sum(x[place])  # 2 in the own slice
    comm.wait(comm.all_gather(x, x[place]))
    return x.unique().tolist()


def test_gloo_keeps_the_order_of_collectives_that_share_memory():
    assert run_ranks(2, chained) == [[2.0], [2.0]]


def bf16_ties(ranks):
    x = torch.full((8,), [1.0, 2.0**-8][min(ranks.rank, 1)], dtype=torch.bfloat16)
    comm = gloo(ranks)
    comm.wait(comm.all_reduce_sum(x))
    return x.tolist()


def test_gloo_rounds_bf16_after_every_addition():
    """1 + 2^-8 is a tie, which goes to the even 1: two ranks lose what three, 2^-8 + 2^-8 first, would keep."""
    assert run_ranks(2, bf16_ties) == [[1.0] * 8] * 2
    assert {value for rank in run_ranks(3, bf16_ties) for value in rank} <= {1.0, 1 + 2.0**-7}


# --- the simulated NCCL ---------------------------------------------------------------------------------------------


def gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def results_with_nccl(ranks, lazy):
    """all_collectives, and the order of operations and collectives, with no report of the checker.

    For 0 and 100 collectives between call and waiting (more than a communicator remembers): gelu of the average of
    gelu(x), and the sum of x.
    """
    device, comm = devices.simulator(), nccl(ranks)
    with device.settings(lazy=lazy):
        results, ordered = all_collectives(comm, device, [8, 3000]), []  # CUDA tensors start at multiples of 16 bytes
        for others in (0, 100):
            # All tensors live to the end: to free one would wait for the device.
            x = device.to_device(values(ranks.rank, 64, torch.float32))
            before, after, other = (device.to_device(torch.zeros(64)) for _ in range(3))
            device.core.ops.gelu_forward(before, x)
            ticket = comm.all_reduce_average(before, "activations")
            for _ in range(others):
                comm.all_reduce_average(other)
            comm.wait(ticket)
            device.core.ops.gelu_forward(after, before)
            ordered.append(device.to_host(after).clone())
            ticket = comm.all_reduce_sum(x, "x")
            for _ in range(others):
                comm.all_reduce_average(other)
            comm.finish(ticket)
            ordered.append(device.to_host(x).clone())
        device.check()
    return results, ordered


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("size", [2, 4])
def test_nccl(size, lazy):
    devices.require_simulator()
    by_rank = run_ranks(size, results_with_nccl, lazy)
    check_results([results for results, _ in by_rank])
    x = torch.stack([values(rank, 64, torch.float32) for rank in range(size)]).double()
    for _, ordered in by_rank:
        for i, expected in enumerate([gelu(gelu(x).mean(0)), x.sum(0)] * 2):
            torch.testing.assert_close(ordered[i].double(), expected, rtol=1e-5, atol=1e-6)


def one_rank_with_nccl(ranks):
    results, _ = results_with_nccl(ranks, False)
    return results


def test_nccl_alone():
    devices.require_simulator()
    check_results(run_ranks(1, one_rank_with_nccl))


def leaving(ranks, make, to_device):
    """Rank 0 has no more use for its communicator while its last collective is still under way."""
    comm = make(ranks)
    x = to_device(torch.ones(8))
    comm.finish(comm.all_reduce_sum(x))
    if ranks.rank == 1:
        time.sleep(0.2)
    ticket = comm.all_reduce_sum(x)
    if ranks.rank == 1:
        comm.finish(ticket)
    del comm
    return x.tolist()


def with_gloo(ranks, function, *args):
    return function(ranks, gloo, lambda x: x, *args)


def with_nccl(ranks, function, lazy, *args):
    device = devices.simulator()
    with device.settings(lazy=lazy):
        return function(ranks, nccl, device.to_device, *args)


def test_the_end_of_a_communicator_waits_for_its_collectives():
    assert run_ranks(2, with_gloo, leaving) == [[4.0] * 8] * 2
    devices.require_simulator()
    assert run_ranks(2, with_nccl, leaving, True) == [[4.0] * 8] * 2


# --- failures -------------------------------------------------------------------------------------------------------


def failure(call):
    """The error of a call, and after how many seconds it came."""
    began = time.monotonic()
    try:
        call()
    except RuntimeError as error:  # Error of one build of the core or the other
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def later_calls(comm, x):
    """Errors of what is called after a failure."""
    calls = [lambda: comm.all_reduce_sum(x), lambda: comm.all_gather(x, x[8 * comm.rank :][:8]), lambda: comm.wait(1)]
    return [failure(call)[0] for call in [*calls, lambda: comm.finish(1)]]


def reduce_gradients(comm, x):
    comm.finish(comm.all_reduce_average(x, "gradients of block 3"))


def other_operation(ranks, make, to_device):
    """Rank 1 gathers where the others reduce."""
    comm = make(ranks, SECONDS)
    x = to_device(torch.ones(16))
    if ranks.rank == 1:
        error = failure(lambda: comm.finish(comm.all_gather(x, x[8:], "parameters of block 1")))
    else:
        error = failure(lambda: reduce_gradients(comm, x))
    return *error, later_calls(comm, x)


def missing(ranks, make, to_device, collectives_before):
    """Rank 1 stays away, from the first collective or from a later one."""
    comm = make(ranks, SECONDS)
    x = to_device(torch.ones(16))
    for _ in range(collectives_before):
        comm.finish(comm.all_reduce_sum(x, "losses"))
    outcome = "", 0, []
    if ranks.rank != 1:
        outcome = *failure(lambda: reduce_gradients(comm, x)), later_calls(comm, x)
    ranks.barrier("end")
    return outcome


def without_place(text):
    return re.sub(r" \(\w+\.cpp:\d+\)$", "", text)


def check_failure(outcome, pattern):
    error, seconds, later = outcome
    assert re.search(pattern, error), error
    assert seconds < 3 * SECONDS
    assert {without_place(text) for text in later} == {without_place(error)}


def test_gloo_names_the_operations_that_differ():
    first, second = run_ranks(2, with_gloo, other_operation)
    why = r"another rank is gone, or did not take part in time \(Gloo: [^/]+\)"
    check_failure(first, r"^all_reduce of gradients of block 3 \(16 x fp32\) failed on rank 0 of 2: " + why)
    check_failure(second, r"^all_gather of parameters of block 1 \(16 x fp32\) failed on rank 1 of 2: " + why)


@pytest.mark.parametrize("collectives_before", [0, 2])
def test_gloo_names_what_a_rank_is_missing_from(collectives_before):
    outcome, _ = run_ranks(2, with_gloo, missing, collectives_before)
    check_failure(outcome, r"^all_reduce of gradients of block 3 .*Gloo: Timed out waiting 1000ms")


def doomed(pipe, rank, port, how):
    """A rank that may die; not with run_ranks, which would not have it."""
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=30))
    comm = _C.gloo_communicator(distributed.group.WORLD.group_name)
    x = torch.ones(1200 if how == "other size" and rank == 1 else 1000)
    comm.finish(comm.all_reduce_sum(torch.ones(3), "losses"))
    if how == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.send(failure(lambda: reduce_gradients(comm, x)))


@pytest.mark.parametrize("how", ["killed", "other size"])
def test_gloo_and_a_rank_that_dies(how):
    """All others fail long before the time-out. On another size Gloo itself ends the first process that sees it."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [multiprocessing.get_context("forkserver").Pipe(duplex=False) for _ in range(3)]
    processes = [start(doomed, pipes[rank][1], rank, server.port, how) for rank in range(3)]
    try:
        for _, theirs in pipes:
            theirs.close()
        deadline, outcomes = time.monotonic() + 20, {}
        for rank, (ours, _) in enumerate(pipes):
            assert wait([ours], deadline - time.monotonic()), f"rank {rank} hangs"
            try:
                outcomes[rank] = ours.recv()
            except EOFError:
                processes[rank].join(5)
                assert processes[rank].exitcode in (-signal.SIGKILL, -signal.SIGABRT)
        assert outcomes and len(outcomes) < 3
        assert how != "killed" or set(outcomes) == {0, 2}
        for error, seconds in outcomes.values():
            assert re.match(r"all_reduce of gradients of block 3 \(1[02]00 x fp32\) failed on rank \d of 3: ", error)
            assert seconds < 10
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("lazy", [False, True], ids=["fails in the call", "fails later"])
def test_nccl_names_the_operations_that_differ(lazy):
    devices.require_simulator()
    first, second = run_ranks(2, with_nccl, other_operation, lazy)
    why = r"NCCL: .*rank 0 AllReduce\(count 16, float32, avg\), rank 1 AllGather\(count 8"
    check_failure(first, r"^all_reduce of gradients of block 3 \(16 x fp32\) failed on rank 0 of 2: " + why)
    check_failure(second, r"^all_gather of parameters of block 1 \(16 x fp32\) failed on rank 1 of 2: " + why)


def missing_with_nccl(ranks, collectives_before):
    os.environ["CUDASIM_NCCL_TIMEOUT"] = str(SECONDS / 2)  # of a simulated collective that has begun
    return with_nccl(ranks, missing, False, collectives_before)


@pytest.mark.parametrize(
    ("collectives_before", "why"),
    [(0, "after 1 s another rank is still missing, or it does something else"), (2, "NCCL: .*waits for rank 1")],
)
def test_nccl_names_what_a_rank_is_missing_from(collectives_before, why):
    devices.require_simulator()
    outcome, _ = run_ranks(2, missing_with_nccl, collectives_before)
    check_failure(outcome, r"^all_reduce of gradients of block 3 \(16 x fp32\) failed on rank 0 of 2: " + why)


def impatient(ranks):
    """Rank 2 is missing, and rank 0 gives up early."""
    comm = nccl(ranks, SECONDS if ranks.rank == 0 else 60)
    x = devices.simulator().to_device(torch.ones(8))
    outcome = failure(lambda: reduce_gradients(comm, x)) if ranks.rank < 2 else None
    ranks.barrier("end")
    return outcome


def test_nccl_ends_on_all_ranks_when_one_gives_up():
    devices.require_simulator()
    _, (error, seconds), _ = run_ranks(3, impatient)
    assert re.search(r"on rank 1 of 3: NCCL: .*rank 0 gave up", error), error
    assert seconds < 3 * SECONDS


def lonely(ranks):
    core = devices.simulator().core
    return failure(lambda: core.nccl_communicator(core.nccl_unique_id(), 0, 2, 0, SECONDS))


def test_nccl_does_not_wait_for_ever_at_the_start():
    devices.require_simulator()
    ((error, seconds),) = run_ranks(1, lonely)
    assert error.startswith("rank 0 of 2 cannot join the others: after 1 s another rank is still missing")
    assert SECONDS <= seconds < 2 * SECONDS


# --- arguments ------------------------------------------------------------------------------------------------------


def refusals(ranks):
    comm, x = gloo(ranks), torch.ones(8)
    calls = {
        "dtype": lambda: comm.all_reduce_sum(torch.ones(8, dtype=torch.float64)),
        "contiguous": lambda: comm.all_reduce_average(torch.ones(4, 4).t()),
        "grad": lambda: comm.all_reduce_average(torch.ones(4, requires_grad=True)),
        "slices": lambda: comm.reduce_scatter_average(torch.ones(7)),
        "gathered slices": lambda: comm.all_gather(torch.ones(7), torch.ones(3)),
        "own's size": lambda: comm.all_gather(x, torch.ones(3)),
        "own's dtype": lambda: comm.all_gather(x, torch.ones(4, dtype=torch.bfloat16)),
        "own's place": lambda: comm.all_gather(x, x[1:5]),
        "group": lambda: _C.gloo_communicator("nobody"),
    }
    errors = {name: failure(call)[0] for name, call in calls.items()}
    comm.finish(comm.all_reduce_sum(x))  # a refused call leaves the communicator as it was
    return comm.rank, comm.size, x.tolist(), errors


REFUSALS = {
    "dtype": "all_reduce_sum: x is Double, it must be fp32 or bf16",
    "contiguous": "all_reduce_average: x is not contiguous",
    "grad": "all_reduce_average: x is written and must not require grad",
    "slices": "reduce_scatter_average: x has 7 elements, it must have a multiple of the number of ranks, 2",
    "gathered slices": "all_gather: x has 7 elements, it must have a multiple of the number of ranks, 2",
    "own's size": "all_gather: own has 3 elements, fp32, on cpu; it must be one of the 2 slices of x: 4 elements, fp32",
    "own's dtype": "all_gather: own has 4 elements, bf16, on cpu; it must be one of the 2 slices of x: 4 elements",
    "own's place": "all_gather: own overlaps x, but is not rank [01]'s slice of it",
    "group": "there is no process group 'nobody' for CPU tensors",
}


def test_refusals():
    for rank, (own_rank, size, reduced, errors) in enumerate(run_ranks(2, refusals)):
        assert (own_rank, size, reduced) == (rank, 2, [2.0] * 8)
        assert errors.keys() == REFUSALS.keys()
        for name, pattern in REFUSALS.items():
            assert re.match(pattern, errors[name]), errors[name]


def wrong_device(ranks):
    device, comm = devices.simulator(), nccl(ranks)
    return failure(lambda: comm.all_reduce_sum(torch.ones(8)))[0], len(device.core.nccl_unique_id())


def test_nccl_refuses_host_memory():
    devices.require_simulator()
    ((error, bytes_of_id),) = run_ranks(1, wrong_device)
    assert error.startswith("all_reduce_sum: x is on cpu, it must be on the communicator's device, cuda:0")
    assert bytes_of_id == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"short", 0, 2, 0, 1.0), "the unique id has 5 bytes, it must be what nccl_unique_id"),
        ((bytes(128), 2, 2, 0, 1.0), "there is no rank 2 of 2"),
        ((bytes(128), 0, 2, 0, 0.0), "the time-out is 0 s, it must be more than 0"),
    ],
)
def test_arguments_of_nccl_communicator(arguments, message):
    core = devices.simulator().core
    with pytest.raises(core.Error, match=message):
        core.nccl_communicator(*arguments)


@pytest.mark.skipif(_C.build_info()["cuda"], reason="this build has CUDA")
def test_a_build_without_cuda_says_so():
    for call in (_C.nccl_unique_id, lambda: _C.nccl_communicator(bytes(128), 0, 2, 0, 1.0)):
        with pytest.raises(_C.Error, match="this build of llmc has no CUDA backend"):
            call()
