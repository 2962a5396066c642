"""The CUDA simulator itself: every report with a kernel that deserves it, schedules, streams, the rules of CUDA.

The kernels are in cudasim/core_tests. errors.cu marks the places that must be reported with comments.
"""

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import devices
import numpy as np
import pytest

ERRORS_SOURCE = Path(__file__).parent / "cudasim" / "core_tests" / "errors.cu"
SCHEDULES = ["forward", "reverse", "random:1", "random:2"]
HOST_TO_DEVICE, DEVICE_TO_HOST = devices.HOST_TO_DEVICE, devices.DEVICE_TO_HOST

# driver_types.h
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONFIGURATION = 0, 1, 2, 9
NO_DEVICE, INVALID_HANDLE, NOT_READY = 100, 400, 600
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_MERGE, CAPTURE_UNMATCHED, CAPTURE_UNJOINED = 900, 901, 902, 903, 904
CAPTURE_ISOLATION, CAPTURE_IMPLICIT, CAPTURED_EVENT, CAPTURE_WRONG_THREAD, UPDATE_FAILURE = 905, 906, 907, 908, 910
ILLEGAL_ADDRESS, TIMEOUT, STACK_ERROR, MISALIGNED, LAUNCH_FAILURE, NOT_SUPPORTED = 700, 702, 714, 716, 719, 801
NON_BLOCKING = 1
CAPTURE_THREAD_LOCAL = 1
MAX_DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize

# What each bug of errors.cu must be reported as (a regular expression), and the status that the program gets: races and
# other things that a device does not notice leave it alone.
ERRORS = {
    "missing_syncthreads": ("race-in-block", SUCCESS),
    "missing_second_barrier": ("race-in-block", SUCCESS),
    "missing_syncwarp": ("race-in-warp", SUCCESS),
    "shuffle_is_no_fence": ("race-in-warp", SUCCESS),
    "half_warp_sync": ("race-in-warp", SUCCESS),
    "atomics_before_zero": ("race-in-(warp|block)", SUCCESS),
    "race_in_dynamic_shared": ("race-in-block", SUCCESS),
    "race_in_global": ("race-in-block", SUCCESS),
    "sum_without_atomic": ("race-between-blocks", SUCCESS),
    "neighbour_block": ("race-between-blocks", SUCCESS),
    "missing_fence": ("race-between-blocks", SUCCESS),
    "early_fence": ("race-between-blocks", SUCCESS),
    "uninitialised_shared": ("uninitialised", SUCCESS),
    "shared_of_block_before": ("uninitialised", SUCCESS),
    "uninitialised_global": ("uninitialised", SUCCESS),
    "one_too_many": ("out-of-bounds", ILLEGAL_ADDRESS),
    "far_outside": ("out-of-bounds", ILLEGAL_ADDRESS),
    "negative_index": ("out-of-bounds", ILLEGAL_ADDRESS),
    "array_index": ("out-of-bounds", ILLEGAL_ADDRESS),
    "dynamic_shared_bounds": ("out-of-bounds", ILLEGAL_ADDRESS),
    "misaligned": ("misaligned", MISALIGNED),
    "divergent_barrier": ("divergent-barrier", SUCCESS),
    "not_in_own_mask": ("warp-mask", SUCCESS),
    "lanes_have_exited": ("warp-mask", SUCCESS),
    "masks_differ": ("warp-mask", TIMEOUT),
    "operations_differ": ("warp-mismatch", LAUNCH_FAILURE),
    "deadlock": ("deadlock", TIMEOUT),
    "local_of_other_thread": ("local-memory", SUCCESS),
    "trap": ("trap", LAUNCH_FAILURE),
    "stack_overflow": ("stack-overflow", STACK_ERROR),
    "use_after_free": ("use-after-free", ILLEGAL_ADDRESS),
    "host_memory": ("host-memory", ILLEGAL_ADDRESS),
    "pinned_memory": ("host-memory", ILLEGAL_ADDRESS),
    "host_access": ("host-access", SUCCESS),
    "double_free": ("bad-free", INVALID_VALUE),
    "copy_direction": ("copy-direction", INVALID_VALUE),
    "copy_too_long": ("out-of-bounds", INVALID_VALUE),
    "copy_of_uninitialised": ("uninitialised", SUCCESS),
    "static_and_dynamic_shared": ("launch-limit", SUCCESS),
    "opt_in": ("launch-limit", INVALID_VALUE),
    "block_too_large": ("launch-limit", INVALID_CONFIGURATION),
    "block_too_deep": ("launch-limit", INVALID_CONFIGURATION),
    "grid_too_high": ("launch-limit", INVALID_CONFIGURATION),
    "empty_grid": ("launch-limit", INVALID_CONFIGURATION),
    "early_read": ("early-access", SUCCESS),
    "early_write": ("early-access", SUCCESS),
    "early_write_in_graph": ("early-access", SUCCESS),
    "early_atomic": ("early-access", SUCCESS),
    "early_copy": ("early-access", SUCCESS),
    "waited_elsewhere": ("early-access", SUCCESS),
    "early_end": ("early-end", SUCCESS),
    "early_on_old_device": ("launch-limit", NOT_SUPPORTED),
    "other_attribute": ("not-simulated", NOT_SUPPORTED),
    "capture_synchronize": ("stream-capture", CAPTURE_UNSUPPORTED),
    "capture_query": ("stream-capture", CAPTURED_EVENT),
    "capture_device": ("stream-capture", CAPTURE_UNSUPPORTED),
    "capture_legacy": ("stream-capture", CAPTURE_IMPLICIT),
    "capture_allocation": ("stream-capture", CAPTURE_UNSUPPORTED),
    "capture_pageable": ("stream-capture", CAPTURE_UNSUPPORTED),
    "capture_unjoined": ("stream-capture", CAPTURE_UNJOINED),
    "capture_isolation": ("stream-capture", CAPTURE_ISOLATION),
    "capture_merge": ("stream-capture", CAPTURE_MERGE),
    "capture_unmatched": ("stream-capture", CAPTURE_UNMATCHED),
    "capture_thread": ("stream-capture", CAPTURE_WRONG_THREAD),
    "capture_invalidated": ("stream-capture", CAPTURE_INVALIDATED),
    "captured_event": ("stream-capture", CAPTURED_EVENT),
}
# Those that need no checker: kernels compiled for speed show them as well (misaligned by the processor's own check).
SEEN_BY_FAST = [
    *("far_outside", "negative_index", "misaligned", "use_after_free", "stack_overflow", "trap", "double_free"),
    *("divergent_barrier", "not_in_own_mask", "lanes_have_exited", "masks_differ", "operations_differ", "deadlock"),
    *("early_end", "early_on_old_device", "other_attribute"),
    *("copy_direction", "copy_too_long", "opt_in", "block_too_large", "block_too_deep", "grid_too_high", "empty_grid"),
    *(name for name in ERRORS if name.startswith("capture")),
]


class Simulator:
    """libcudasim.so and one build of the sample kernels."""

    def __init__(self, variant: str) -> None:
        path = devices.SIMULATOR / "core_tests" / f"libcore_{variant}.so"
        if not path.exists():
            pytest.skip(f"there is no CUDA simulator in {devices.SIMULATOR}: scripts/test.sh builds it")
        self.runtime = ctypes.CDLL(str(devices.SIMULATOR / "libcudasim.so"), mode=ctypes.RTLD_GLOBAL)
        self.runtime.cudasim_report.restype = ctypes.c_char_p
        self.runtime.cudasim_launch_count.restype = ctypes.c_ulonglong
        self.runtime.cudaGetErrorName.restype = ctypes.c_char_p
        self.runtime.cudaGetErrorString.restype = ctypes.c_char_p
        self.kernels = ctypes.CDLL(str(path))

    def __getattr__(self, name: str):
        """A function of the runtime: sim.cudaMalloc(...)."""
        return getattr(self.runtime, name)

    def reports(self) -> list[str]:
        """The reports since the last call; clears the sticky error, too."""
        lines = self.runtime.cudasim_report().decode().splitlines()
        assert self.runtime.cudasim_error_count() == len(lines)
        self.runtime.cudasim_clear()
        return lines

    def reset(self) -> None:
        self.runtime.cudasim_set_schedule(b"forward")
        self.runtime.cudasim_set_lazy(0)
        self.runtime.cudasim_set_shared_memory(devices.LARGE)
        self.runtime.cudasim_clear()

    # --- memory; pointers are integers ---

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        assert self.runtime.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)) == SUCCESS
        return pointer.value or 0

    def pinned(self, count: int) -> np.ndarray:
        """A float array in pinned memory, which is never freed."""
        pointer = ctypes.c_void_p()
        assert self.runtime.cudaMallocHost(ctypes.byref(pointer), ctypes.c_size_t(4 * count)) == SUCCESS
        return np.frombuffer((ctypes.c_float * count).from_address(pointer.value or 0), np.float32)

    def upload(self, array: np.ndarray) -> int:
        pointer = self.allocate(array.nbytes)
        assert self.copy(pointer, array.ctypes.data, array.nbytes, HOST_TO_DEVICE) == SUCCESS
        return pointer

    def download(self, pointer: int, like: np.ndarray) -> np.ndarray:
        array = np.empty_like(like)
        assert self.copy(array.ctypes.data, pointer, array.nbytes, DEVICE_TO_HOST) == SUCCESS
        return array

    def copy(self, to: int, source: int, size: int, direction: int) -> int:
        return self.runtime.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), direction)

    def copy_async(self, to: int, source: int, size: int, direction: int, stream: ctypes.c_void_p) -> int:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
        return self.runtime.cudaMemcpyAsync(*pointers, ctypes.c_size_t(size), direction, stream)

    def free(self, *pointers: int) -> None:
        for pointer in pointers:
            assert self.runtime.cudaFree(ctypes.c_void_p(pointer)) == SUCCESS

    def stream(self, flags: int = 0) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        assert self.runtime.cudaStreamCreateWithFlags(ctypes.byref(handle), flags) == SUCCESS
        return handle

    def event(self) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        assert self.runtime.cudaEventCreate(ctypes.byref(handle)) == SUCCESS
        return handle

    def run(self, launcher: str, *arguments: np.ndarray | int) -> list[np.ndarray]:
        """Launches with the arrays on the device and returns them as they are afterwards."""
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        pointers = [self.upload(array) for array in arrays]
        rest = iter(pointers)
        converted = [ctypes.c_void_p(next(rest)) if isinstance(a, np.ndarray) else a for a in arguments]
        assert getattr(self.kernels, launcher)(*converted) == SUCCESS
        results = [self.download(pointer, array) for pointer, array in zip(pointers, arrays, strict=True)]
        self.free(*pointers)
        return results


@pytest.fixture(scope="module", params=["fast", "checked"])
def loaded(request: pytest.FixtureRequest) -> Simulator:
    return Simulator(request.param)


@pytest.fixture
def sim(loaded: Simulator) -> Iterator[Simulator]:
    """Both builds in turn. A test that does not fetch its reports must not provoke any."""
    loaded.reset()
    yield loaded
    assert loaded.reports() == []
    loaded.reset()


@pytest.fixture
def checked() -> Iterator[Simulator]:
    sim = Simulator("checked")
    sim.reset()
    yield sim
    assert sim.reports() == []
    sim.reset()


def add(sim: Simulator, x: int, count: int, value: float, stream: ctypes.c_void_p | None = None) -> None:
    """x[:count] += value on the device."""
    assert sim.kernels.add(ctypes.c_void_p(x), count, ctypes.c_float(value), stream) == SUCCESS


# --- reports ---------------------------------------------------------------------------------------------------------


def marked_places(name: str) -> list[str]:
    """The places of errors.cu that the reports of a case must name: first the one of the access."""
    lines = ERRORS_SOURCE.read_text().splitlines()
    places = []
    for role in ("here", "other"):
        marked = [i for i, line in enumerate(lines, 1) if re.search(rf"// {role}:.*\b{name}\b", line)]
        assert len(marked) <= 1, f"{role}: {name} is marked twice"
        places += [f"errors.cu:{line}" for line in marked]
    return places


def run_case(sim: Simulator, name: str, wrong: bool, schedule: str) -> tuple[int, list[str]]:
    assert sim.cudasim_set_schedule(schedule.encode()) == 1
    status = sim.kernels.run_case(name.encode(), int(wrong))
    return status, sim.reports()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ERRORS)
def test_bug_is_reported(checked: Simulator, name: str, schedule: str) -> None:
    kind, expected_status = ERRORS[name]
    status, reports = run_case(checked, name, True, schedule)
    assert status == expected_status
    places = marked_places(name)
    right = [r for r in reports if re.match(f"{kind}: ", r) and all(re.search(rf"{p}\b", r) for p in places)]
    assert right, f"no {kind} with {places} in {reports}"
    if places and kind not in ("host-access", "stream-capture"):  # the host's own
        assert "kernel " in right[0] and "block (" in right[0] and "thread (" in right[0]
    assert len(set(reports)) == len(reports), "a place was reported twice"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ERRORS)
def test_correct_twin_is_not_reported(checked: Simulator, name: str, schedule: str) -> None:
    assert run_case(checked, name, False, schedule) == (SUCCESS, [])


@pytest.mark.parametrize("name", SEEN_BY_FAST)
def test_bug_is_reported_without_the_checker(name: str) -> None:
    sim = Simulator("fast")
    sim.reset()
    kind, expected_status = ERRORS[name]
    status, reports = run_case(sim, name, True, "forward")
    assert status == expected_status
    assert any(report.startswith(f"{kind}: ") for report in reports)


def test_write_past_the_end_is_found_when_freed() -> None:
    sim = Simulator("fast")
    sim.reset()
    status, reports = run_case(sim, "one_too_many", True, "forward")
    assert status == SUCCESS
    assert len(reports) == 1
    assert reports[0].startswith("out-of-bounds: something wrote at offset 400 of an allocation of 400 bytes")


def test_failed_kernel_is_sticky(checked: Simulator) -> None:
    x = checked.upload(np.zeros(4, np.float32))
    assert checked.kernels.run_case(b"trap", 1) == LAUNCH_FAILURE
    assert checked.cudaDeviceSynchronize() == LAUNCH_FAILURE
    assert checked.cudaMemset(ctypes.c_void_p(x), 0, ctypes.c_size_t(4)) == LAUNCH_FAILURE
    assert checked.cudaGetLastError() == LAUNCH_FAILURE
    assert checked.cudaGetLastError() == LAUNCH_FAILURE
    assert checked.cudaGetErrorName(LAUNCH_FAILURE) == b"cudaErrorLaunchFailure"
    assert checked.cudaGetErrorString(LAUNCH_FAILURE) == b"unspecified launch failure"
    assert len(checked.reports()) == 1
    assert checked.cudaDeviceSynchronize() == SUCCESS
    checked.free(x)


def test_other_errors_are_forgotten_once_asked_for(sim: Simulator) -> None:
    pointer = ctypes.c_void_p()
    assert sim.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(1 << 50)) == OUT_OF_MEMORY
    assert sim.cudaPeekAtLastError() == OUT_OF_MEMORY
    assert sim.cudaGetLastError() == OUT_OF_MEMORY
    assert sim.cudaGetLastError() == SUCCESS


def test_fast_kernels_beside_checked_ones(checked: Simulator) -> None:
    """What a kernel without the checker has written counts as initialised."""
    fast = Simulator("fast")
    pointer = checked.allocate(4 * 64)
    fast.kernels.record_order(ctypes.c_void_p(pointer), ctypes.c_void_p(fast.upload(np.zeros(1, np.int32))), 1, 64)
    assert list(checked.download(pointer, np.empty(64, np.int32))) == list(range(64))
    checked.free(pointer)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES, "random:3"])
@pytest.mark.parametrize("n, blocks", [(1, 1), (1000, 5), (4099, 33)])
def test_sum_by_the_last_block(sim: Simulator, schedule: str, n: int, blocks: int) -> None:
    sim.cudasim_set_schedule(schedule.encode())
    x = (np.arange(n) * 7 % 101).astype(np.int32)  # integers below 2^24: exact in fp32 in any order
    for dtype, launcher in ((np.int32, "sum_ints"), (np.float32, "sum_floats")):
        zeros = np.zeros(1, dtype), np.zeros(blocks, dtype), np.zeros(1, np.uint32)
        total, _, arrived, _ = sim.run(launcher, *zeros, x.astype(dtype), n, blocks)
        assert total[0] == x.sum()
        assert arrived[0] == 0


def thread_order(sim: Simulator, schedule: str) -> list[int]:
    assert sim.cudasim_set_schedule(schedule.encode()) == 1
    order, _ = sim.run("record_order", np.zeros(5 * 96, np.int32), np.zeros(1, np.int32), 5, 96)
    return order.tolist()


def test_schedules(sim: Simulator) -> None:
    assert thread_order(sim, "forward") == list(range(480))
    assert thread_order(sim, "reverse") == list(range(479, -1, -1))
    random = [thread_order(sim, f"random:{seed}") for seed in (1, 2, 1)]
    assert random[0] == random[2] != random[1]
    for order in random[:2]:
        assert sorted(order) == list(range(480))
        blocks, warps = [i // 96 for i in order[::96]], [i // 32 for i in order[:96]]
        assert blocks != sorted(blocks)
        assert warps != sorted(warps)
        assert order[:32] != sorted(order[:32])
    for malformed in ("", "random", "random:", "random:x", "backward"):
        assert sim.cudasim_set_schedule(malformed.encode()) == 0


@pytest.mark.parametrize("width", [32, 16, 4])
def test_warp_functions(sim: Simulator, width: int) -> None:
    """CUDA C++ Programming Guide, "Warp Shuffle Functions", "Warp Vote", "Warp Match", "Warp Reduce"."""
    (out,) = sim.run("warp_functions", np.zeros((10, 32), np.int32), width)
    lanes = range(32)
    first = [lane // width * width for lane in lanes]
    assert out[0].tolist() == [first[lane] + 3 % width for lane in lanes]
    assert out[1].tolist() == [lane - 3 if lane - 3 >= first[lane] else lane for lane in lanes]
    assert out[2].tolist() == [lane + 3 if lane + 3 < first[lane] + width else lane for lane in lanes]
    # a lane of an earlier segment can be read, one of a later segment cannot
    assert out[3].tolist() == [lane ^ 5 if lane ^ 5 < first[lane] + width else lane for lane in lanes]
    assert out[4].view(np.uint32).tolist() == [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32
    assert out[5].tolist() == [1 + 2] * 32
    assert out[6].view(np.uint32).tolist() == [sum(1 << k for k in lanes if k // 5 == lane // 5) for lane in lanes]
    assert out[7].tolist() == [sum(lane - 16 for lane in lanes)] * 32
    assert out[8].tolist() == [-16] * 32
    *_, union = accumulate(range(0, 32, 2), lambda a, b: a | b)
    assert out[9].tolist() == [31 if lane % 2 else union for lane in lanes]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_that_count(sim: Simulator, schedule: str) -> None:
    sim.cudasim_set_schedule(schedule.encode())
    (out,) = sim.run("votes", np.full(3, -1, np.int32))
    assert out.tolist() == [32, 0, 1]


def test_integer_functions(sim: Simulator) -> None:
    x, y = 0x12345678, 0x9ABCDEF0
    (out,) = sim.run("integers", np.zeros(7, np.uint32), x, ctypes.c_uint(y))
    both = y << 32 | x
    assert out.tolist() == [
        x * y >> 32,
        (both << 4 & (1 << 64) - 1) >> 32,  # the shift is taken modulo 32
        both >> 4 & 0xFFFFFFFF,
        bin(x).count("1"),
        32 - x.bit_length(),
        (x & -x).bit_length(),
        x,
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics(sim: Simulator, schedule: str) -> None:
    sim.cudasim_set_schedule(schedule.encode())
    start = np.array([0, 0, 1000, 0, 0, 0, 100, 0, 200], np.uint32)
    (out,) = sim.run("atomics", start)
    xor = 0
    for i in range(96):
        xor ^= i
    # atomicDec: 200 > 100 gives 100, the other 95 threads count down
    assert out.tolist() == [sum(range(96)), 95, 0, 0xFFFFFFFF, xor, 7, 4, 9, 5]


def test_large_parameters(sim: Simulator) -> None:
    (out,) = sim.run("parameters", np.zeros(1000, np.int32))
    assert out.tolist() == [8 * i for i in range(1000)]


def test_shared_memory_of_a_type_with_constructors(sim: Simulator) -> None:
    x = np.arange(64, dtype=np.float32)  # exact in bf16, and doubled, too
    (out,) = sim.run("reverse_bf16", (x.view(np.uint32) >> 16).astype(np.uint16))
    assert (out.astype(np.uint32) << 16).view(np.float32).tolist() == [2.0 * (63 - i) for i in range(64)]


def test_kernels_run_on_any_thread(sim: Simulator) -> None:
    """Static shared memory is thread-local: the thread that runs a kernel may not have any yet."""
    results = []

    def work() -> None:
        zeros = np.zeros(1, np.int32), np.zeros(3, np.int32), np.zeros(1, np.uint32)
        results.append(int(sim.run("sum_ints", *zeros, np.arange(500, dtype=np.int32), 500, 3)[0][0]))

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert results == [sum(range(500))] * 2


def test_launch_count(sim: Simulator) -> None:
    before = sim.cudasim_launch_count()
    sim.run("votes", np.zeros(3, np.int32))
    assert sim.cudasim_launch_count() == before + 1


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lazy(sim: Simulator) -> Simulator:
    sim.cudasim_set_lazy(1)
    return sim


def test_nothing_runs_before_a_wait(lazy: Simulator) -> None:
    stream = lazy.stream()
    x, result = lazy.upload(np.zeros(4, np.float32)), lazy.pinned(4)
    result[:] = -1
    add(lazy, x, 4, 1, stream)
    lazy.copy_async(result.ctypes.data, x, 16, DEVICE_TO_HOST, stream)
    assert result.tolist() == [-1] * 4
    assert lazy.cudaStreamSynchronize(stream) == SUCCESS
    assert result.tolist() == [1] * 4
    lazy.free(x)


@pytest.mark.parametrize("waits", [True, False])
def test_missing_event_wait_shows(lazy: Simulator, waits: bool) -> None:
    first, second, event = lazy.stream(NON_BLOCKING), lazy.stream(NON_BLOCKING), lazy.event()
    x, result = lazy.upload(np.zeros(4, np.float32)), lazy.pinned(4)
    assert lazy.cudaDeviceSynchronize() == SUCCESS
    add(lazy, x, 4, 1, first)
    assert lazy.cudaEventRecord(event, first) == SUCCESS
    add(lazy, x, 4, 10, first)  # after the event: the second stream does not wait for it
    if waits:
        assert lazy.cudaStreamWaitEvent(second, event, 0) == SUCCESS
    lazy.copy_async(result.ctypes.data, x, 16, DEVICE_TO_HOST, second)
    assert lazy.cudaStreamSynchronize(second) == SUCCESS
    assert result.tolist() == [1 if waits else 0] * 4
    lazy.free(x)


@pytest.mark.parametrize("waits", [True, False])
def test_staging_buffer_written_too_early_shows(lazy: Simulator, waits: bool) -> None:
    stream, event = lazy.stream(), lazy.event()
    x, staging = lazy.allocate(16), lazy.pinned(4)
    staging[:] = 1
    lazy.copy_async(x, staging.ctypes.data, 16, HOST_TO_DEVICE, stream)
    assert lazy.cudaEventRecord(event, stream) == SUCCESS
    if waits:
        assert lazy.cudaEventSynchronize(event) == SUCCESS
    staging[:] = 2
    assert lazy.cudaStreamSynchronize(stream) == SUCCESS
    assert lazy.download(x, staging).tolist() == [1 if waits else 2] * 4
    lazy.free(x)


def test_pageable_memory_is_copied_before_the_call_returns(lazy: Simulator) -> None:
    stream = lazy.stream()
    x, host = lazy.allocate(16), np.ones(4, np.float32)
    lazy.copy_async(x, host.ctypes.data, 16, HOST_TO_DEVICE, stream)
    host[:] = 2
    add(lazy, x, 4, 10, stream)
    lazy.copy_async(host.ctypes.data, x, 16, DEVICE_TO_HOST, stream)
    assert host.tolist() == [11] * 4
    lazy.free(x)


@pytest.mark.parametrize("flags, seen", [(0, 1), (NON_BLOCKING, 0)])
def test_default_stream_waits_for_blocking_streams(lazy: Simulator, flags: int, seen: int) -> None:
    stream = lazy.stream(flags)
    x = lazy.upload(np.zeros(4, np.float32))
    add(lazy, x, 4, 1, stream)
    assert lazy.download(x, np.empty(4, np.float32)).tolist() == [seen] * 4  # cudaMemcpy: the default stream
    lazy.free(x)


@pytest.mark.parametrize("flags, seen", [(0, 1), (NON_BLOCKING, 0)])
def test_blocking_streams_wait_for_the_default_stream(lazy: Simulator, flags: int, seen: int) -> None:
    stream, result = lazy.stream(flags), lazy.pinned(4)
    x = lazy.upload(np.zeros(4, np.float32))
    assert lazy.cudaDeviceSynchronize() == SUCCESS
    add(lazy, x, 4, 1)
    lazy.copy_async(result.ctypes.data, x, 16, DEVICE_TO_HOST, stream)
    assert lazy.cudaStreamSynchronize(stream) == SUCCESS
    assert result.tolist() == [seen] * 4
    lazy.free(x)


def test_queries_do_not_wait_but_get_there(lazy: Simulator) -> None:
    stream, event = lazy.stream(), lazy.event()
    x = lazy.upload(np.zeros(4, np.float32))
    for _ in range(3):
        add(lazy, x, 4, 1, stream)
    assert lazy.cudaEventRecord(event, stream) == SUCCESS
    assert lazy.cudaEventQuery(event) == NOT_READY
    assert lazy.cudaStreamQuery(stream) == NOT_READY
    answers = [lazy.cudaEventQuery(event) for _ in range(3)]
    assert answers[-1] == SUCCESS
    assert lazy.cudaStreamQuery(stream) == SUCCESS
    lazy.free(x)


def test_events_measure_simulated_time(sim: Simulator) -> None:
    """Nothing but products of cuBLASLt takes any: what a program chooses by time is always the same."""
    start, end, milliseconds = sim.event(), sim.event(), ctypes.c_float(-1)
    assert sim.cudaEventElapsedTime(ctypes.byref(milliseconds), start, end) == INVALID_HANDLE  # not recorded
    assert sim.cudaEventRecord(start, None) == SUCCESS
    time.sleep(0.001)
    assert sim.cudaEventRecord(end, None) == SUCCESS
    assert sim.cudaEventElapsedTime(ctypes.byref(milliseconds), start, end) == SUCCESS
    assert milliseconds.value == 0


def test_destroyed_handles_are_reported(sim: Simulator) -> None:
    stream, event = sim.stream(), sim.event()
    assert sim.cudaStreamDestroy(stream) == SUCCESS
    assert sim.cudaEventDestroy(event) == SUCCESS
    assert sim.cudaStreamSynchronize(stream) == INVALID_HANDLE
    assert sim.cudaEventRecord(event, None) == INVALID_HANDLE
    assert [report.split(":")[0] for report in sim.reports()] == ["bad-handle"] * 2


# --- graphs ----------------------------------------------------------------------------------------------------------


def begin_capture(sim: Simulator, stream: ctypes.c_void_p) -> None:
    assert sim.cudaStreamBeginCapture(stream, CAPTURE_THREAD_LOCAL) == SUCCESS


def end_capture(sim: Simulator, stream: ctypes.c_void_p) -> ctypes.c_void_p:
    graph = ctypes.c_void_p()
    assert sim.cudaStreamEndCapture(stream, ctypes.byref(graph)) == SUCCESS
    return graph


def instantiate(sim: Simulator, graph: ctypes.c_void_p) -> ctypes.c_void_p:
    executable = ctypes.c_void_p()
    assert sim.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == SUCCESS
    assert sim.cudaGraphDestroy(graph) == SUCCESS
    return executable


def additions(sim: Simulator, stream: ctypes.c_void_p, x: int, *values: float) -> ctypes.c_void_p:
    """A graph that adds the values to x[:4]."""
    begin_capture(sim, stream)
    for value in values:
        add(sim, x, 4, value, stream)
    return end_capture(sim, stream)


def test_a_graph_does_what_was_captured(sim: Simulator) -> None:
    stream, x, staging = sim.stream(), sim.upload(np.zeros(4, np.float32)), sim.pinned(4)
    staging[:] = 5
    begin_capture(sim, stream)
    sim.copy_async(x, staging.ctypes.data, 16, HOST_TO_DEVICE, stream)
    add(sim, x, 4, 1, stream)
    executable = instantiate(sim, end_capture(sim, stream))
    assert sim.download(x, staging).tolist() == [0] * 4  # nothing has run
    before = sim.cudasim_launch_count()
    for value in (5, 7):  # what is in the buffer when it runs
        staging[:] = value
        assert sim.cudaGraphLaunch(executable, stream) == SUCCESS
        assert sim.download(x, staging).tolist() == [value + 1] * 4
    assert sim.cudasim_launch_count() == before + 2
    assert sim.cudaGraphExecDestroy(executable) == SUCCESS
    assert sim.cudaGraphLaunch(executable, stream) == INVALID_VALUE
    assert [report.split(":")[0] for report in sim.reports()] == ["bad-handle"]
    sim.free(x)


def test_an_update_is_for_later_launches(lazy: Simulator) -> None:
    stream, x = lazy.stream(), lazy.upload(np.zeros(4, np.float32))
    executable = instantiate(lazy, additions(lazy, stream, x, 1))
    assert lazy.cudaGraphLaunch(executable, stream) == SUCCESS
    info = (ctypes.c_longlong * 4)()
    assert lazy.cudaGraphExecUpdate(executable, additions(lazy, stream, x, 10), info) == SUCCESS
    assert lazy.cudaGraphLaunch(executable, stream) == SUCCESS
    assert lazy.cudaGraphExecUpdate(executable, additions(lazy, stream, x, 100, 100), info) == UPDATE_FAILURE
    assert lazy.cudaGraphLaunch(executable, stream) == SUCCESS
    assert lazy.cudaStreamSynchronize(stream) == SUCCESS
    assert lazy.download(x, np.empty(4, np.float32)).tolist() == [21] * 4
    lazy.free(x)


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_fork_that_is_joined_too_late_shows(sim: Simulator, joined: bool, schedule: str) -> None:
    main, side, fork, join = sim.stream(), sim.stream(), sim.event(), sim.event()
    x, result = sim.upload(np.zeros(4, np.float32)), sim.pinned(4)
    begin_capture(sim, main)
    assert sim.cudaEventRecord(fork, main) == SUCCESS
    assert sim.cudaStreamWaitEvent(side, fork, 0) == SUCCESS
    add(sim, x, 4, 1, side)
    assert sim.cudaEventRecord(join, side) == SUCCESS
    if joined:
        assert sim.cudaStreamWaitEvent(main, join, 0) == SUCCESS
    sim.copy_async(result.ctypes.data, x, 16, DEVICE_TO_HOST, main)
    if not joined:
        assert sim.cudaStreamWaitEvent(main, join, 0) == SUCCESS
    executable = instantiate(sim, end_capture(sim, main))
    assert sim.cudasim_set_schedule(schedule.encode()) == 1
    assert sim.cudaGraphLaunch(executable, main) == SUCCESS
    assert sim.cudaStreamSynchronize(main) == SUCCESS
    assert result.tolist() == [1 if joined or schedule == "forward" else 0] * 4
    sim.free(x)


def test_a_graph_of_memory_that_is_gone(checked: Simulator) -> None:
    stream, x = checked.stream(), checked.upload(np.zeros(4, np.float32))
    executable = instantiate(checked, additions(checked, stream, x, 1))
    checked.free(x)
    assert checked.cudaGraphLaunch(executable, stream) == SUCCESS
    assert checked.cudaStreamSynchronize(stream) == ILLEGAL_ADDRESS
    assert [report.split(":")[0] for report in checked.reports()] == ["use-after-free"]


# --- device and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared, capability", [(devices.LARGE, (9, 0)), (devices.SMALL, (8, 9))])
def test_device_attributes(sim: Simulator, shared: int, capability: tuple[int, int]) -> None:
    """Numbers of driver_types.h: enum cudaDeviceAttr."""
    sim.cudasim_set_shared_memory(shared)
    value = ctypes.c_int()
    expected = {1: 1024, 8: 48 * 1024, 10: 32, 97: shared, 75: capability[0], 76: capability[1]}
    for attribute, answer in expected.items():
        assert sim.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0) == SUCCESS
        assert value.value == answer, attribute


def test_opt_in_limit(sim: Simulator) -> None:
    sim.cudasim_set_shared_memory(devices.SMALL)
    kernel = ctypes.cast(sim.kernels.votes, ctypes.c_void_p)  # any address
    assert sim.cudaFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, devices.SMALL) == SUCCESS
    assert sim.cudaFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED, devices.SMALL + 1) == INVALID_VALUE
    assert [report.split(":")[0] for report in sim.reports()] == ["launch-limit"]


def test_occupancy(sim: Simulator) -> None:
    """2048 threads and 228 KiB of shared memory per multiprocessor, 1 KiB of it reserved for each block."""
    kernel = ctypes.cast(sim.kernels.add, ctypes.c_void_p)
    blocks = ctypes.c_int()

    def occupancy(threads: int, shared: int) -> int:
        arguments = ctypes.byref(blocks), kernel, threads, ctypes.c_size_t(shared)
        assert sim.cudaOccupancyMaxActiveBlocksPerMultiprocessor(*arguments) == SUCCESS
        return blocks.value

    assert occupancy(1024, 0) == 2
    assert occupancy(32, 0) == 32
    assert occupancy(128, 40 << 10) == 5
    assert occupancy(128, 49 << 10) == 0  # without opting in


def test_memory_is_counted_and_aligned(sim: Simulator) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def free_bytes() -> int:
        assert sim.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == SUCCESS
        return free.value

    before = free_bytes()
    pointers = [sim.allocate(size) for size in (1, 300, 5000)]
    assert before - free_bytes() == 5301
    assert all(pointer % 256 == 0 for pointer in pointers)
    assert all(sim.cudasim_is_device_pointer(ctypes.c_void_p(pointer)) for pointer in pointers)
    assert not sim.cudasim_is_device_pointer(ctypes.byref(free))
    sim.free(*pointers)
    assert free_bytes() == before


def test_new_memory_is_nan(sim: Simulator) -> None:
    x = sim.allocate(400)
    host = np.frombuffer((ctypes.c_float * 100).from_address(x), np.float32)
    assert np.isnan(host).all()
    sim.free(x)


def test_large_allocations_are_quick(sim: Simulator) -> None:
    start = time.perf_counter()
    x = sim.allocate(100 << 20)
    sim.cudaMemset(ctypes.c_void_p(x), 0, ctypes.c_size_t(100 << 20))
    sim.free(x)
    assert time.perf_counter() - start < 2  # 0.1 s; a shadow that is touched at once would take many


PROGRAM = """
import ctypes, sys
runtime = ctypes.CDLL(sys.argv[1])
count = ctypes.c_int(-1)
print(runtime.cudaGetDeviceCount(ctypes.byref(count)), count.value, end=" ")
free, total = ctypes.c_size_t(), ctypes.c_size_t()
print(runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)), total.value)
"""


@pytest.mark.parametrize(
    "environment, output",
    [
        ({}, f"0 1 0 {8 << 30}"),
        ({"CUDASIM_MEMORY": str(1 << 20)}, f"0 1 0 {1 << 20}"),
        ({"CUDASIM_DEVICES": "0"}, f"{NO_DEVICE} 0 {NO_DEVICE} 0"),
    ],
)
def test_environment(sim: Simulator, environment: dict[str, str], output: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(devices.SIMULATOR / "libcudasim.so")]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == output.split()
