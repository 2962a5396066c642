"""The simulated PTX instructions against the tables of the PTX ISA, and the mistakes that must show.

The layouts are written down here from the ISA's text, independently of the simulator. There groupID = %laneid >> 2 and
threadID_in_group = %laneid % 4.
"""

import ctypes
import math
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from cudasim_testing import DeviceTensor, kinds, load_kernels, load_library, take_reports
from ops_testing import F32

LANES = range(32)
NAN_BITS = 0xFFFFFFFF  # what cp.async makes of its destination until the wait


class Kernels:
    """The launchers of cudasim/library_tests/ptx_kernels.cu, called with numpy arrays."""

    def __init__(self, variant: str) -> None:
        load_library()
        self.launchers = load_kernels(variant)

    def run(self, launcher: str, *arguments: Any, out: list[np.ndarray]) -> list[str]:
        """Arrays travel to the device, those of out back. Returns the reports, which name kernel and line."""
        take_reports()
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        device = {id(array): DeviceTensor(torch.from_numpy(array.view(np.uint8))) for array in arrays}
        pointers = {key: ctypes.c_void_p(tensor.pointer) for key, tensor in device.items()}
        status = getattr(self.launchers, launcher)(*(pointers.get(id(argument), argument) for argument in arguments))
        reports = take_reports()
        assert reports or status == 0, f"CUDA error {status} without a report"
        for array in out:
            device[id(array)].download()  # into the array, whose memory the tensor shares
        return reports


@pytest.fixture(scope="module", params=["fast", "checked"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return Kernels("checked")


def assert_reported(reports: list[str], kind: str, *consequences: str) -> None:
    """The mistake is reported at its line; nothing but its consequences beside it."""
    assert kind in kinds(reports) and set(kinds(reports)) <= {kind, *consequences}, reports
    assert all("ptx_kernels.cu:" in report for report in reports)


# --- mma -----------------------------------------------------------------------------------------------------------
# Each function gives (row, col) of element i of a lane's fragment.


def a_bf16(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k16, multiplicand A, .f16 and .bf16: a0 to a7, two in each register, low to high.

    row =      groupID            for ai where  0 <= i < 2 || 4 <= i < 6
              groupID + 8         Otherwise
    col =  (threadID_in_group * 2) + (i & 0x1)          for ai where i <  4
           (threadID_in_group * 2) + (i & 0x1) + 8      for ai where i >= 4
    """
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8


def b_bf16(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k16, multiplicand B, .f16 and .bf16: b0 to b3.

    row =  (threadID_in_group * 2) + (i & 0x1)           for bi where i <  2
           (threadID_in_group * 2) + (i & 0x1) + 8       for bi where i >= 2
    col =  groupID
    """
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k8, multiplicand A, .tf32: a0 to a3, one in each register.

    row =      groupID            for a0 and a2
              groupID + 8         for a1 and a3
    col =  threadID_in_group       for a0 and a1
           threadID_in_group + 4   for a2 and a3
    """
    group, thread = lane >> 2, lane % 4
    return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k8, multiplicand B, .tf32: b0 and b1.

    row =  threadID_in_group        for b0
           threadID_in_group + 4    for b1
    col =  groupID
    """
    group, thread = lane >> 2, lane % 4
    return thread if i == 0 else thread + 4, group


def c_f32(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k16 and mma.m16n8k8, accumulators C and D, .f32: c0 to c3.

    row =      groupID                            for ci where i <  2
             groupID + 8                          for ci where i >= 2
    col =  (threadID_in_group * 2) + (i & 0x1)    for ci where i = {0,..,3}
    """
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


FRAGMENTS = {
    # shape of the matrix, elements of a lane
    a_bf16: ((16, 16), 8),
    b_bf16: ((16, 8), 4),
    a_tf32: ((16, 8), 4),
    b_tf32: ((8, 8), 2),
    c_f32: ((16, 8), 4),
}
MMA = {"bf16": (a_bf16, b_bf16), "tf32": (a_tf32, b_tf32)}


def to_fragments(matrix: np.ndarray, position: Any) -> np.ndarray:
    """(32, elements): what each lane holds of a matrix."""
    shape, elements = FRAGMENTS[position]
    assert matrix.shape == shape
    return np.array([[matrix[position(lane, i)] for i in range(elements)] for lane in LANES], dtype=matrix.dtype)


def from_fragments(fragments: np.ndarray, position: Any) -> np.ndarray:
    shape, elements = FRAGMENTS[position]
    matrix = np.full(shape, np.nan, dtype=fragments.dtype)
    for lane in LANES:
        for i in range(elements):
            matrix[position(lane, i)] = fragments[lane, i]
    return matrix


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16."""
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_operands(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fp32 matrices A, B, C, of which A and B have values of the kind."""
    rng = np.random.default_rng(seed)
    a_shape, b_shape = (FRAGMENTS[position][0] for position in MMA[kind])
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in (a_shape, b_shape, (16, 8)))
    if kind == "bf16":
        return from_bf16(to_bf16(a)), from_bf16(to_bf16(b)), c
    return (
        (a.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32),
        (b.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32),
        c,
    )


def registers(kind: str, matrix: np.ndarray, position: Any) -> np.ndarray:
    """(32, registers) as the instruction takes them; for tf32 with noise in the bits that it must ignore."""
    fragments = to_fragments(matrix, position)
    if kind == "bf16":
        return np.ascontiguousarray(to_bf16(fragments)).view(np.uint32)  # the lower element in the lower half
    noise = np.random.default_rng(1).integers(0, 1 << 13, fragments.shape, dtype=np.uint32)
    return fragments.view(np.uint32) | noise


def run_mma(kernels: Kernels, kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, lanes: int = 32) -> list[str]:
    """Replaces the matrix c by a·b + c."""
    of_a, of_b = MMA[kind]
    fragments = to_fragments(c, c_f32)
    reports = kernels.run(
        "run_mma",
        int(kind == "bf16"),
        lanes,
        fragments,
        registers(kind, a, of_a),
        registers(kind, b, of_b),
        out=[fragments],
    )
    c[:] = from_fragments(fragments, c_f32)
    return reports


@pytest.mark.parametrize("position", FRAGMENTS)
def test_tables_cover_each_element_once(position: Any) -> None:
    shape, elements = FRAGMENTS[position]
    places = {position(lane, i) for lane in LANES for i in range(elements)}
    assert len(places) == 32 * elements == math.prod(shape)


@pytest.mark.parametrize("kind", MMA)
def test_mma(kernels: Kernels, kind: str) -> None:
    for seed in range(3):
        a, b, c = random_operands(kind, seed)
        expected = a.astype(np.float64) @ b + c
        # The products are exact; up to 16 fp32 additions of partial sums no larger than the sum of magnitudes.
        error = 16 * F32 * (np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c))
        assert run_mma(kernels, kind, a, b, c) == []
        assert (np.abs(c - expected) <= error).all()


@pytest.mark.parametrize("kind", MMA)
def test_mma_element_by_element(kernels: Kernels, kind: str) -> None:
    """A single 1 in a fragment of A, at every place: the row of B that it selects appears in its row of the result."""
    position, _ = MMA[kind]
    _, b, _ = random_operands(kind, 0)
    (rows, depth), elements = FRAGMENTS[position]
    for lane in LANES:
        for i in range(elements):
            row, k = position(lane, i)
            a, c = np.zeros((rows, depth), dtype=np.float32), np.zeros((16, 8), dtype=np.float32)
            a[row, k] = 1
            assert run_mma(kernels, kind, a, b, c) == []
            expected = np.zeros((16, 8), dtype=np.float32)
            expected[row] = b[k]
            assert np.array_equal(c, expected)


@pytest.mark.parametrize("kind", MMA)
def test_mma_needs_all_lanes(kernels: Kernels, kind: str) -> None:
    reports = run_mma(kernels, kind, *random_operands(kind, 0), lanes=31)
    assert_reported(reports, "warp-mask")


# --- ldmatrix ------------------------------------------------------------------------------------------------------


class Loading(IntEnum):
    """As in ptx_kernels.cu."""

    RIGHT, WITHOUT_BARRIER, UNINITIALISED, MISALIGNED, FROM_GLOBAL, BEYOND_SHARED = range(6)


def ldmatrix_element(lane: int, half: int, transposed: bool) -> tuple[int, int]:
    """(row, col) of the lower or upper half of the register that a lane receives of an 8x8 matrix.

    PTX ISA, ldmatrix, figure of the fragment layout for .b16: "a group of four consecutive threads loads one row";
    thread 0 holds elements 0 and 1 of row 0, thread 1 elements 2 and 3, ..., thread 4 elements 0 and 1 of row 1.
    .trans: the matrix is loaded in column-major format, so the same holds with rows and columns exchanged.
    """
    major, minor = lane // 4, lane % 4 * 2 + half
    return (minor, major) if transposed else (major, minor)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(kernels: Kernels, count: int, transposed: bool) -> None:
    matrices = np.random.default_rng(count).permutation(1 << 16)[: count * 64].astype(np.uint16).reshape(count, 8, 8)
    got = np.zeros((32, count), dtype=np.uint32)
    assert kernels.run("run_ldmatrix", count, int(transposed), got, matrices, int(Loading.RIGHT), out=[got]) == []
    for lane in LANES:
        for i in range(count):
            low, high = (int(matrices[(i, *ldmatrix_element(lane, half, transposed))]) for half in (0, 1))
            assert got[lane, i] == low | high << 16


def test_ldmatrix_feeds_mma(kernels: Kernels) -> None:
    """The layouts fit: A by ldmatrix.x4, B by ldmatrix.x2.trans, as matrix products load them."""
    a, b, _ = random_operands("bf16", 7)
    quarters = np.stack([a[:8, :8], a[8:, :8], a[:8, 8:], a[8:, 8:]])
    got_a, got_b = np.zeros((32, 4), dtype=np.uint32), np.zeros((32, 2), dtype=np.uint32)
    assert kernels.run("run_ldmatrix", 4, 0, got_a, to_bf16(quarters), int(Loading.RIGHT), out=[got_a]) == []
    assert kernels.run("run_ldmatrix", 2, 1, got_b, to_bf16(b).reshape(2, 8, 8), int(Loading.RIGHT), out=[got_b]) == []
    assert np.array_equal(got_a, registers("bf16", a, a_bf16))
    assert np.array_equal(got_b, registers("bf16", b, b_bf16))


@pytest.mark.parametrize(
    "how, kind",
    [
        (Loading.WITHOUT_BARRIER, "race-in-warp"),
        (Loading.UNINITIALISED, "uninitialised"),
        (Loading.MISALIGNED, "ldmatrix"),
        (Loading.FROM_GLOBAL, "ldmatrix"),
        (Loading.BEYOND_SHARED, "out-of-bounds"),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_wrong_ldmatrix(checked: Kernels, how: Loading, kind: str, count: int) -> None:
    matrices, got = np.zeros((count, 8, 8), dtype=np.uint16), np.zeros((32, count), dtype=np.uint32)
    reports = checked.run("run_ldmatrix", count, 0, got, matrices, int(how), out=[])
    assert_reported(reports, kind, "uninitialised")


# --- cp.async ------------------------------------------------------------------------------------------------------


class Copying(IntEnum):
    """As in ptx_kernels.cu."""

    (
        RIGHT,
        WITHOUT_WAIT,
        WITHOUT_COMMIT,
        WITHOUT_BARRIER,
        WAIT_FOR_THE_OLDER,
        READ_THE_NEWER,
        FAR_ENOUGH,
        REFILLED_TOO_EARLY,
        NEVER_WAITED,
        BEYOND_THE_SOURCE,
        MISALIGNED,
        FROM_SHARED,
    ) = range(12)


THREADS = 64


def run_cp_async(kernels: Kernels, how: Copying, valid: int = 2 * THREADS) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(2,64) elements of 16 bytes, as four numbers each: what was read, what a right kernel reads, the reports.

    The source has `valid` elements; what lies behind must be read as zeros.
    """
    source = np.random.default_rng(valid).integers(1, 1 << 32, (max(valid, 1), 4), dtype=np.uint32)
    copied = np.zeros((2 * THREADS, 4), dtype=np.uint32)
    copied[:valid] = source[:valid]
    right = np.roll(copied.reshape(2, THREADS, 4), -1, axis=1)
    got = np.zeros_like(right)
    return got, right, kernels.run("run_cp_async", got, source, valid, int(how), out=[got])


@pytest.mark.parametrize("how", [Copying.RIGHT, Copying.WAIT_FOR_THE_OLDER, Copying.FAR_ENOUGH])
@pytest.mark.parametrize("valid", [2 * THREADS, 100, 37, 0])
def test_cp_async(kernels: Kernels, how: Copying, valid: int) -> None:
    got, right, reports = run_cp_async(kernels, how, valid)
    assert reports == []
    assert np.array_equal(got, right)


@pytest.mark.parametrize("how", [Copying.WITHOUT_WAIT, Copying.WITHOUT_COMMIT])
def test_cp_async_without_wait(kernels: Kernels, how: Copying) -> None:
    got, _, reports = run_cp_async(kernels, how)
    assert (got == NAN_BITS).all()
    assert_reported(reports, "cp-async")


def test_cp_async_of_a_pending_group(kernels: Kernels) -> None:
    got, _, _ = run_cp_async(kernels, Copying.READ_THE_NEWER)
    assert (got[1] == NAN_BITS).all()


@pytest.mark.parametrize(
    "how, kind, consequences",
    [
        (Copying.WITHOUT_BARRIER, "race-in-block", ["race-in-warp", "uninitialised"]),
        (Copying.REFILLED_TOO_EARLY, "race-in-block", ["race-in-warp"]),
        (Copying.NEVER_WAITED, "cp-async", []),
        (Copying.BEYOND_THE_SOURCE, "out-of-bounds", ["cp-async"]),  # the kernel ends there
        (Copying.MISALIGNED, "cp-async", ["uninitialised"]),
        (Copying.FROM_SHARED, "cp-async", ["uninitialised"]),
    ],
)
def test_wrong_cp_async(checked: Kernels, how: Copying, kind: str, consequences: list[str]) -> None:
    _, _, reports = run_cp_async(checked, how)
    assert_reported(reports, kind, *consequences)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_arithmetic(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(-(1 << 11), 1 << 11, dtype=np.float32) * 2 + 1) * np.float32(2.0**-11)  # halfway around 1 to 2
    x = np.concatenate([rng.standard_normal(2000) * 40, ties, [0.0, -0.0, 126.0, -126.0, -127.0, -149.0, -1000.0]])
    x = np.concatenate([x, [np.inf, -np.inf, np.nan, 3.4e38]]).astype(np.float32)
    rounded, power = np.zeros(x.shape, dtype=np.uint32), np.zeros(x.shape, dtype=np.float32)
    assert kernels.run("run_arithmetic", rounded, power, x, len(x), out=[rounded, power]) == []
    # cvt.rna.tf32.f32: 10 fraction bits, to nearest, ties away from zero.
    with np.errstate(invalid="ignore", over="ignore"):
        fraction, exponent = np.frexp(x.astype(np.float64))
        units = np.trunc(np.abs(fraction) * 2**11 + 0.5)
        expected = np.copysign(np.ldexp(units, exponent - 11), x).astype(np.float32)
    finite = np.isfinite(x)
    assert np.array_equal(rounded[finite], expected[finite].view(np.uint32))
    assert np.array_equal(rounded.view(np.float32)[~finite], x[~finite], equal_nan=True)
    assert (rounded & 0x1FFF == 0).all()
    # ex2.approx.ftz.f32: a relative error of 2^-22; subnormal results are 0.
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.exp2(x.astype(np.float64))
        exact[exact < 2.0**-126] = 0
        exact[exact > np.finfo(np.float32).max] = np.inf
    np.testing.assert_allclose(power, exact, rtol=2.0**-22)
