"""The simulated cuBLASLt and NCCL: results against float64, every rule with a call that breaks it, ranks that disagree."""

import ctypes
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from ops_testing import F32, assert_within

lt: Any = None  # libcudasim.so


@pytest.fixture(scope="module", autouse=True)
def load_library() -> None:
    global lt
    path = devices.SIMULATOR / "libcudasim.so"
    if not path.exists():
        pytest.skip(f"there is no CUDA simulator in {devices.SIMULATOR}: scripts/test.sh builds it")
    lt = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(devices.SIMULATOR / "library_tests" / "libptx_checked.so"))  # a checked module starts the checker
    lt.cudasim_report.restype = ctypes.c_char_p
    lt.cublasLtGetStatusName.restype = ctypes.c_char_p
    lt.cublasLtGetStatusString.restype = ctypes.c_char_p
    lt.cublasLtGetVersion.restype = ctypes.c_size_t
    lt.cudasim_cublaslt_reason.restype = ctypes.c_char_p
    lt.ncclGetLastError.restype = ctypes.c_char_p


@pytest.fixture(autouse=True)
def no_reports(load_library: None) -> Iterator[None]:
    """Every test must take the reports that it provokes."""
    lt.cudasim_clear()
    yield
    assert take_reports() == []


def take_reports() -> list[str]:
    """The kinds of the reports since the last call."""
    assert lt.cudaDeviceSynchronize() == 0
    lines = lt.cudasim_report().decode().splitlines()
    lt.cudasim_clear()
    return [line.split(":")[0] for line in lines]


# --- cuBLASLt ------------------------------------------------------------------------------------------------------

# Values of cublas_api.h, cublasLt.h and library_types.h.
SUCCESS, NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 7, 15
OP_N, OP_T = 0, 1
COMPUTE_64F, COMPUTE_32F, FAST_TF32, FAST_16BF = 70, 68, 77, 75
R_32F, R_16F, R_16BF, R_64F = 0, 2, 14, 1
ORDER_COL, ORDER_ROW, ORDER_COL32 = 0, 1, 2
TYPES = {torch.float32: R_32F, torch.bfloat16: R_16BF}
EPILOGUES = {
    "DEFAULT": 1,
    "RELU": 2,
    "BIAS": 4,
    "RELU_BIAS": 6,
    "GELU": 32,
    "GELU_BIAS": 36,
    "GELU_AUX": 160,
    "GELU_AUX_BIAS": 164,
    "DGELU": 192,
    "DGELU_BGRAD": 208,
    "BGRADA": 256,
    "BGRADB": 512,
}
# Attributes: id and ctypes type, from the comments of cublasLt.h.
i8, i32, u32, i64, u64, f32, ptr = (
    ctypes.c_int8,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_int64,
    ctypes.c_uint64,
    ctypes.c_float,
    ctypes.c_void_p,
)
DESCRIPTOR = {
    "COMPUTE_TYPE": (0, i32),
    "SCALE_TYPE": (1, i32),
    "POINTER_MODE": (2, i32),
    "TRANSA": (3, i32),
    "TRANSB": (4, i32),
    "TRANSC": (5, i32),
    "FILL_MODE": (6, i32),
    "EPILOGUE": (7, u32),
    "BIAS_POINTER": (8, ptr),
    "BIAS_BATCH_STRIDE": (10, i64),
    "EPILOGUE_AUX_POINTER": (11, ptr),
    "EPILOGUE_AUX_LD": (12, i64),
    "EPILOGUE_AUX_BATCH_STRIDE": (13, i64),
    "ALPHA_VECTOR_BATCH_STRIDE": (14, i64),
    "SM_COUNT_TARGET": (15, i32),
    "A_SCALE_POINTER": (17, ptr),
    "B_SCALE_POINTER": (18, ptr),
    "C_SCALE_POINTER": (19, ptr),
    "D_SCALE_POINTER": (20, ptr),
    "AMAX_D_POINTER": (21, ptr),
    "EPILOGUE_AUX_DATA_TYPE": (22, i32),
    "EPILOGUE_AUX_SCALE_POINTER": (23, ptr),
    "EPILOGUE_AUX_AMAX_POINTER": (24, ptr),
    "FAST_ACCUM": (25, i8),
    "BIAS_DATA_TYPE": (26, i32),
    "A_SCALE_MODE": (31, i32),
    "B_SCALE_MODE": (32, i32),
    "C_SCALE_MODE": (33, i32),
    "D_SCALE_MODE": (34, i32),
    "EPILOGUE_AUX_SCALE_MODE": (35, i32),
    "D_OUT_SCALE_POINTER": (36, ptr),
    "D_OUT_SCALE_MODE": (37, i32),
    "EMULATION_DESCRIPTOR": (38, ptr),
}
LAYOUT = {
    "TYPE": (0, u32),
    "ORDER": (1, i32),
    "ROWS": (2, u64),
    "COLS": (3, u64),
    "LD": (4, i64),
    "BATCH_COUNT": (5, i32),
    "STRIDED_BATCH_OFFSET": (6, i64),
    "PLANE_OFFSET": (7, i64),
    "BATCH_MODE": (8, u32),
}
PREFERENCE = {
    "SEARCH_MODE": (0, u32),
    "MAX_WORKSPACE_BYTES": (1, u64),
    "REDUCTION_SCHEME_MASK": (3, u32),
    "MIN_ALIGNMENT_A_BYTES": (5, u32),
    "MIN_ALIGNMENT_B_BYTES": (6, u32),
    "MIN_ALIGNMENT_C_BYTES": (7, u32),
    "MIN_ALIGNMENT_D_BYTES": (8, u32),
    "MAX_WAVES_COUNT": (9, f32),
    "IMPL_MASK": (12, u64),
}


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", u64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves_count", f32),
        ("reserved", ctypes.c_int * 4),
    ]


class DeviceTensor:
    """Device memory with a copy of a tensor's storage, so that strides and gaps are kept, and `room` zeros behind it."""

    def __init__(self, tensor: torch.Tensor, room: int = 0, upload: bool = True):
        self.tensor = tensor
        self.bytes = tensor.untyped_storage().nbytes()
        pointer = ptr()
        assert lt.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(self.bytes + room)) == 0
        self.pointer = pointer.value
        if upload:
            assert lt.cudaMemset(pointer, 0, ctypes.c_size_t(self.bytes + room)) == 0
            self.copy(pointer, ptr(self.start), devices.HOST_TO_DEVICE)

    @property
    def start(self) -> int:
        return self.tensor.untyped_storage().data_ptr()

    def copy(self, to: ptr, source: ptr, direction: int) -> None:
        assert lt.cudaMemcpy(to, source, ctypes.c_size_t(self.bytes), direction) == 0

    def download(self) -> torch.Tensor:
        self.copy(ptr(self.start), ptr(self.pointer), devices.DEVICE_TO_HOST)
        return self.tensor

    def __del__(self) -> None:
        lt.cudaFree(ptr(self.pointer))


def matrix(rows: int, cols: int, batch: int, dtype: torch.dtype, generator: torch.Generator, gap: int, order: int):
    """A random (batch, rows, cols) whose rows or columns lie `gap` elements apart in memory; gaps are NaN."""
    contiguous, pieces = (cols, rows) if order == ORDER_ROW else (rows, cols)
    storage = torch.full((batch, pieces, contiguous + gap), math.nan, dtype=dtype)
    storage[:, :, :contiguous] = torch.randn(batch, pieces, contiguous, generator=generator).to(dtype)
    x = storage[:, :, :contiguous]
    return x if order == ORDER_ROW else x.transpose(1, 2)


@dataclass
class Product:
    """One cublasLtMatmul call on random data. A test replaces what it is about; the rest is right."""

    m: int = 24
    n: int = 10
    k: int = 17
    trans_a: bool = False
    trans_b: bool = False
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    compute: int = COMPUTE_32F
    order: int = ORDER_COL
    epilogue: str = "DEFAULT"
    alpha: float = 1.0
    beta: float = 0.0
    in_place: bool = False
    batch: int = 1
    gap: int = 0
    seed: int = 0
    workspace: int = 1 << 16
    room: int = 0  # bytes behind every matrix and vector
    # Replacements, by the attribute's name; layouts by matrix and attribute.
    descriptor: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    query_layouts: dict[str, dict[str, Any]] = field(default_factory=dict)  # in the query for the algorithm only
    preference: dict[str, Any] = field(default_factory=dict)
    shift: dict[str, int] = field(default_factory=dict)  # bytes added to an address: "A", "bias", "workspace", ...
    pointer: dict[str, int | str | None] = field(default_factory=dict)  # an address, or the name whose address is taken
    workspace_given: int | None = None
    algo_given: str = "queried"  # or "none", "zero"
    handle_given: str = "live"  # or "null", "destroyed"
    requested: int = 1

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def make(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
            return matrix(rows, cols, self.batch, dtype, generator, self.gap, self.order)

        m, n, k = self.m, self.n, self.k
        self.a = make(k, m, self.dtype) if self.trans_a else make(m, k, self.dtype)
        self.b = make(n, k, self.dtype) if self.trans_b else make(k, n, self.dtype)
        self.c, self.d = make(m, n, self.out_dtype), make(m, n, self.out_dtype)
        self.bias = matrix(
            n if self.epilogue == "BGRADB" else m, 1, self.batch, self.out_dtype, generator, 0, ORDER_COL
        )
        self.aux = matrix(m, n, self.batch, self.out_dtype, generator, -m % 8, ORDER_COL)
        tensors = {"A": self.a, "B": self.b, "C": self.c, "D": self.d, "bias": self.bias, "aux": self.aux}
        tensors["workspace"] = torch.zeros(max(self.workspace, 4), dtype=torch.uint8)
        self.device = {name: DeviceTensor(tensor, self.room) for name, tensor in tensors.items()}
        if self.in_place:
            self.pointer = {"C": "D"} | self.pointer

    def address(self, name: str) -> int | None:
        given = self.pointer.get(name, name)
        address = self.device[given].pointer if isinstance(given, str) else given
        return address + self.shift.get(name, 0) if address is not None else None

    def _layout(self, name: str, changes: dict[str, dict[str, Any]]) -> ptr:
        x = {"A": self.a, "B": self.b, "C": self.c, "D": self.d}[name]
        ld = x.stride(1 if self.order == ORDER_ROW else 2)
        layout = ptr()
        assert (
            lt.cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[x.dtype], u64(x.size(1)), u64(x.size(2)), i64(ld))
            == 0
        )
        values = {"ORDER": self.order, "BATCH_COUNT": self.batch, "STRIDED_BATCH_OFFSET": x.stride(0)}
        for attribute, value in (values | changes.get(name, {})).items():
            assert set_attribute(lt.cublasLtMatrixLayoutSetAttribute, layout, LAYOUT[attribute], value) == 0
        return layout

    def run(self) -> tuple[str, int, str]:
        """Stage reached ("query", "matmul" or "done"), status and the reason of a refusal."""
        handle = ptr()
        assert lt.cublasLtCreate(ctypes.byref(handle)) == 0
        used_handle = ptr(None) if self.handle_given == "null" else handle
        if self.handle_given == "destroyed":
            assert lt.cublasLtDestroy(handle) == 0
        operation = ptr()
        assert lt.cublasLtMatmulDescCreate(ctypes.byref(operation), self.compute, R_32F) == 0
        values = {
            "TRANSA": int(self.trans_a),
            "TRANSB": int(self.trans_b),
            "EPILOGUE": EPILOGUES[self.epilogue],
            "BIAS_POINTER": self.address("bias"),
            "BIAS_BATCH_STRIDE": self.bias.stride(0),
            "EPILOGUE_AUX_POINTER": self.address("aux"),
            "EPILOGUE_AUX_LD": self.aux.stride(2),
            "EPILOGUE_AUX_BATCH_STRIDE": self.aux.stride(0),
        }
        for attribute, value in (values | self.descriptor).items():
            assert set_attribute(lt.cublasLtMatmulDescSetAttribute, operation, DESCRIPTOR[attribute], value) == 0
        preference = ptr()
        assert lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)) == 0
        for attribute, value in ({"MAX_WORKSPACE_BYTES": self.workspace} | self.preference).items():
            assert set_attribute(lt.cublasLtMatmulPreferenceSetAttribute, preference, PREFERENCE[attribute], value) == 0
        layouts = [self._layout(name, self.layouts) for name in "ABCD"]
        query_layouts = [self._layout(name, self.layouts | self.query_layouts) for name in "ABCD"]
        results, returned = (HeuristicResult * 8)(), i32(-1)
        try:
            status = lt.cublasLtMatmulAlgoGetHeuristic(
                used_handle, operation, *query_layouts, preference, self.requested, results, ctypes.byref(returned)
            )
            if status:
                return "query", status, lt.cudasim_cublaslt_reason().decode()
            assert 1 <= returned.value <= self.requested and results[0].state == 0
            assert results[0].workspace_size <= self.workspace
            self.results = results[: returned.value]
            algo = ctypes.byref(results[0].algo) if self.algo_given == "queried" else None
            if self.algo_given == "zero":
                algo = ctypes.byref((u64 * 8)())
            alpha, beta = f32(self.alpha), f32(self.beta)
            a, b, c, d = (ptr(self.address(name)) for name in "ABCD")
            la, lb, lc, ld = layouts
            workspace = self.workspace if self.workspace_given is None else self.workspace_given
            status = lt.cublasLtMatmul(
                used_handle, operation, ctypes.byref(alpha), a, la, b, lb, ctypes.byref(beta), c, lc, d, ld,
                algo, ptr(self.address("workspace")), ctypes.c_size_t(workspace), ptr(None),
            )  # fmt: skip
            if status:
                return "matmul", status, lt.cudasim_cublaslt_reason().decode()
            assert lt.cudaDeviceSynchronize() == 0
            return "done", SUCCESS, ""
        finally:
            for layout in layouts + query_layouts:
                lt.cublasLtMatrixLayoutDestroy(layout)
            lt.cublasLtMatmulPreferenceDestroy(preference)
            lt.cublasLtMatmulDescDestroy(operation)
            if self.handle_given != "destroyed":
                lt.cublasLtDestroy(handle)


def set_attribute(function: Any, target: ptr, attribute: tuple[int, Any], value: Any) -> int:
    number, kind = attribute
    holder = kind(value)
    return function(target, number, ctypes.byref(holder), ctypes.c_size_t(ctypes.sizeof(kind)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(gelu(x).sum(), x)[0]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """fp32 values with 10 fraction bits, rounded to nearest, ties away from zero."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def expected(p: Product) -> dict[str, torch.Tensor]:
    """float64 results by the formulas of the documentation; reads the operands before they are overwritten."""
    a, b = (tf32(p.a), tf32(p.b)) if p.compute == FAST_TF32 else (p.a, p.b)
    a, b = a.double(), b.double()
    a, b = a.mT if p.trans_a else a, b.mT if p.trans_b else b
    x = p.alpha * (a @ b)
    if p.beta:
        x = x + p.beta * (p.d if p.in_place else p.c).double()
    results = {}
    if p.epilogue in ("BIAS", "RELU_BIAS", "GELU_BIAS", "GELU_AUX_BIAS"):
        x = x + p.bias.double()
    if p.epilogue in ("GELU_AUX", "GELU_AUX_BIAS"):
        results["aux"] = x
    if p.epilogue.startswith("RELU"):
        x = x.relu()
    if p.epilogue.startswith("GELU"):
        x = gelu(x)
    if p.epilogue.startswith("DGELU"):
        x = x * gelu_derivative(p.aux.double())
    if p.epilogue == "DGELU_BGRAD":
        results["bias"] = x.sum(2, keepdim=True)
    if p.epilogue == "BGRADA":
        results["bias"] = a.sum(2, keepdim=True)
    if p.epilogue == "BGRADB":
        results["bias"] = b.sum(1).unsqueeze(2)
    return results | {"D": x}


def check(p: Product) -> None:
    results = expected(p)
    assert p.run() == ("done", SUCCESS, "")
    # Sums of k (bias gradients: n) products of size 1 in fp32: every addition rounds a partial sum, which grows like the
    # square root of its length; 4 for the tails of the normal distribution and for GELU's polynomial.
    length = max(p.k, p.n)
    for name, wanted in results.items():
        assert_within(p.device[name].download(), wanted, 4 * F32 * length * math.sqrt(length))


DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}


@pytest.mark.parametrize("types", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue: str, types: str) -> None:
    dtype, out_dtype = DTYPES[types]
    for seed, (m, n, k) in enumerate([(24, 10, 17), (33, 1, 5), (7, 65, 400), (1, 3, 1)]):
        check(Product(m, n, k, dtype=dtype, out_dtype=out_dtype, epilogue=epilogue, seed=seed))
        check(Product(m, n, k, True, True, dtype, out_dtype, epilogue=epilogue, beta=0.5, alpha=-1.5, seed=seed, gap=3))


@pytest.mark.parametrize("types", DTYPES)
@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
def test_transposes_orders_batches(trans_a: bool, trans_b: bool, types: str) -> None:
    dtype, out_dtype = DTYPES[types]
    for order in (ORDER_COL, ORDER_ROW):
        for batch in (1, 3):
            for in_place in (False, True):
                check(
                    Product(
                        19, 23, 33, trans_a, trans_b, dtype, out_dtype, order=order, batch=batch, gap=batch - 1,
                        beta=1.0, in_place=in_place, seed=batch,
                    )
                )  # fmt: skip


def test_batched_epilogues() -> None:
    for epilogue in ("BIAS", "GELU_AUX_BIAS", "DGELU", "DGELU_BGRAD"):
        check(Product(16, 5, 9, epilogue=epilogue, batch=3))


def test_tf32_rounds_the_operands() -> None:
    for trans in (False, True):
        check(Product(20, 20, 300, trans, trans, torch.float32, torch.float32, FAST_TF32))


def test_large_enough_for_all_blocks() -> None:
    check(Product(130, 70, 1000, dtype=torch.float32, out_dtype=torch.float32))


def test_gaps_are_not_written() -> None:
    p = Product(gap=3)
    check(p)
    storage = torch.empty(0, dtype=p.out_dtype).set_(p.d.untyped_storage()).view(p.n, p.m + 3)
    assert storage[:, p.m :].isnan().all() and not storage[:, : p.m].isnan().any()


def test_same_bits_twice() -> None:
    first, second = Product(), Product()
    for p in (first, second):
        assert p.run()[0] == "done"
        p.device["D"].download()
    assert torch.equal(first.d, second.d)


def test_workspace_is_trashed() -> None:
    p = Product()
    p.run()
    workspace = p.device["workspace"].download()
    assert (workspace == 0xFF).all()


def test_an_algorithm_without_workspace_is_offered_too() -> None:
    p = Product(requested=8)
    assert p.run()[0] == "done"
    assert [result.workspace_size for result in p.results] == [1 << 16, 0]


fp32 = {"dtype": torch.float32, "out_dtype": torch.float32}
# rule: what both calls have, what the right one has, what the wrong one has, where and how it is refused
RULES: dict[str, tuple[dict, dict, dict, str, int, str]] = {
    "handle null": ({}, {}, {"handle_given": "null"}, "query", NOT_INITIALIZED, "handle"),
    "handle destroyed": ({}, {}, {"handle_given": "destroyed"}, "query", NOT_INITIALIZED, "handle"),
    "compute type": ({}, {}, {"compute": FAST_16BF}, "query", NOT_SUPPORTED, "compute type 75"),
    "compute type 64F": ({}, {}, {"compute": COMPUTE_64F}, "query", NOT_SUPPORTED, "compute type 70"),
    "TF32 with bf16": ({"compute": FAST_TF32}, fp32, {}, "query", NOT_SUPPORTED, "needs R_32F"),
    "scale type": ({}, {}, {"descriptor": {"SCALE_TYPE": R_16BF}}, "query", NOT_SUPPORTED, "scale type 14"),
    "pointer mode": ({}, {}, {"descriptor": {"POINTER_MODE": 1}}, "query", NOT_SUPPORTED, "pointer mode"),
    "transpose value": ({}, {}, {"descriptor": {"TRANSA": 5}}, "query", INVALID_VALUE, "transposes 5"),
    "transpose C": ({}, {}, {"descriptor": {"TRANSC": OP_T}}, "query", NOT_SUPPORTED, "C cannot"),
    "fill mode": ({}, {}, {"descriptor": {"FILL_MODE": 0}}, "query", NOT_SUPPORTED, "fill mode"),
    "SM count": (
        {},
        {"descriptor": {"SM_COUNT_TARGET": 4}},
        {"descriptor": {"SM_COUNT_TARGET": -1}},
        "query",
        INVALID_VALUE,
        "SM count",
    ),
    "scale pointer": ({}, {}, {"descriptor": {"A_SCALE_POINTER": 256}}, "query", NOT_SUPPORTED, "8-bit"),
    "type": ({}, {}, {"layouts": {"A": {"TYPE": R_16F}, "B": {"TYPE": R_16F}}}, "query", NOT_SUPPORTED, "type 2"),
    "A and B types": ({}, {}, {"layouts": {"B": {"TYPE": R_32F}}}, "query", NOT_SUPPORTED, "A and B"),
    "C and D types": ({}, {}, {"layouts": {"C": {"TYPE": R_32F}}}, "query", NOT_SUPPORTED, "C and D"),
    "fp32 to bf16": (
        {"dtype": torch.float32},
        {"out_dtype": torch.float32},
        {"out_dtype": torch.bfloat16},
        "query",
        NOT_SUPPORTED,
        "give an R_32F",
    ),
    "order value": ({}, {}, {"layouts": {"A": {"ORDER": ORDER_COL32}}}, "query", NOT_SUPPORTED, "order 2"),
    "orders of C and D": (
        {"m": 10},
        {},
        {"layouts": {"C": {"ORDER": ORDER_ROW}}},
        "query",
        INVALID_VALUE,
        "different orders",
    ),
    "rows 0": ({}, {}, {"layouts": {"A": {"ROWS": 0}}}, "query", INVALID_VALUE, "0 x 17"),
    "rows beyond int": (
        {},
        {},
        {"layouts": {"A": {"ROWS": 1 << 31, "LD": 1 << 31}}},
        "query",
        INVALID_VALUE,
        "2147483648",
    ),
    "ld": (
        {"gap": 1},
        {"layouts": {"A": {"LD": 25}}},
        {"layouts": {"A": {"LD": 23}}},
        "query",
        INVALID_VALUE,
        "leading dimension 23",
    ),
    "ld negative": ({}, {}, {"layouts": {"D": {"LD": -24}}}, "query", INVALID_VALUE, "leading dimension -24"),
    "ld row-major": (
        {"order": ORDER_ROW},
        {},
        {"layouts": {"A": {"LD": 16}}},
        "query",
        INVALID_VALUE,
        "less than its 17 columns",
    ),
    "k of B": ({}, {}, {"layouts": {"B": {"ROWS": 16}}}, "query", INVALID_VALUE, "op(B) has 16 rows"),
    "transpose forgotten": ({}, {}, {"descriptor": {"TRANSB": OP_T}}, "query", INVALID_VALUE, "op(B) has 10 rows"),
    "rows of D": ({}, {}, {"layouts": {"D": {"ROWS": 23}}}, "query", INVALID_VALUE, "D is 23 x 10"),
    "cols of D": ({}, {}, {"layouts": {"D": {"COLS": 9}}}, "query", INVALID_VALUE, "D is 24 x 9"),
    "shape of C": ({}, {}, {"layouts": {"C": {"COLS": 9}}}, "query", INVALID_VALUE, "C is 24 x 9"),
    "batch counts": (
        {"batch": 2},
        {},
        {"layouts": {"B": {"BATCH_COUNT": 1}}},
        "query",
        INVALID_VALUE,
        "batch counts differ",
    ),
    "batch count 0": ({}, {}, {"layouts": {"A": {"BATCH_COUNT": 0}}}, "query", INVALID_VALUE, "batch count 0"),
    "batch stride": (
        {"batch": 2},
        {"layouts": {"A": {"STRIDED_BATCH_OFFSET": 0}}},  # the same A for both
        {"layouts": {"D": {"STRIDED_BATCH_OFFSET": 0}}},
        "matmul",
        INVALID_VALUE,
        "batches of D overlap",
    ),
    "batch stride negative": (
        {"batch": 2},
        {},
        {"layouts": {"A": {"STRIDED_BATCH_OFFSET": -408}}},
        "query",
        INVALID_VALUE,
        "batch stride -408",
    ),
    "batch mode": ({}, {}, {"layouts": {"A": {"BATCH_MODE": 1}}}, "query", NOT_SUPPORTED, "pointer-array"),
    "epilogue value": ({}, {}, {"descriptor": {"EPILOGUE": 12345}}, "query", INVALID_VALUE, "does not exist"),
    "ReLU mask": ({}, {}, {"descriptor": {"EPILOGUE": 130}}, "query", NOT_SUPPORTED, "ReLU masks"),
    "epilogue row-major": (
        {"epilogue": "BIAS"},
        {"order": ORDER_COL},
        {"order": ORDER_ROW},
        "query",
        NOT_SUPPORTED,
        "column-major",
    ),
    "bias gradient of batches": (
        {"epilogue": "BGRADB"},
        {"batch": 1},
        {"batch": 2},
        "query",
        NOT_SUPPORTED,
        "not simulated for batches",
    ),
    "bias null": ({"epilogue": "BIAS"}, {}, {"pointer": {"bias": None}}, "matmul", INVALID_VALUE, "pointer of bias"),
    "bias gradient null": (
        {"epilogue": "BGRADB"},
        {},
        {"pointer": {"bias": None}},
        "matmul",
        INVALID_VALUE,
        "pointer of bias gradient",
    ),
    "bias type": (
        {"epilogue": "BIAS"},
        {"descriptor": {"BIAS_DATA_TYPE": R_16BF}},
        {"descriptor": {"BIAS_DATA_TYPE": R_32F}},
        "query",
        NOT_SUPPORTED,
        "bias type 0",
    ),
    "bias alignment": (
        {"epilogue": "BIAS", "room": 16},
        {"shift": {"bias": 16}},
        {"shift": {"bias": 8}},
        "matmul",
        INVALID_VALUE,
        "bias vector at",
    ),
    "bias batch stride": (
        {"epilogue": "BIAS", "batch": 2},
        {"descriptor": {"BIAS_BATCH_STRIDE": 0}},
        {"descriptor": {"BIAS_BATCH_STRIDE": -1}},
        "query",
        INVALID_VALUE,
        "bias batch stride -1",
    ),
    "aux null": (
        {"epilogue": "GELU_AUX"},
        {},
        {"pointer": {"aux": None}},
        "matmul",
        INVALID_VALUE,
        "pointer of auxiliary",
    ),
    "aux ld not set": (
        {"epilogue": "GELU_AUX"},
        {},
        {"descriptor": {"EPILOGUE_AUX_LD": 0}},
        "query",
        INVALID_VALUE,
        "auxiliary leading dimension 0",
    ),
    "aux ld": (
        {"epilogue": "DGELU", "m": 20},
        {"descriptor": {"EPILOGUE_AUX_LD": 24}},
        {"descriptor": {"EPILOGUE_AUX_LD": 20}},
        "query",
        INVALID_VALUE,
        "multiple of 8",
    ),
    "aux type": (
        {"epilogue": "DGELU"},
        {"descriptor": {"EPILOGUE_AUX_DATA_TYPE": R_16BF}},
        {"descriptor": {"EPILOGUE_AUX_DATA_TYPE": R_32F}},
        "query",
        NOT_SUPPORTED,
        "auxiliary type 0",
    ),
    "aux batch stride": (
        {"epilogue": "DGELU", "batch": 2},
        {"descriptor": {"EPILOGUE_AUX_BATCH_STRIDE": 232}},
        {"descriptor": {"EPILOGUE_AUX_BATCH_STRIDE": 230}},
        "query",
        INVALID_VALUE,
        "auxiliary batch stride 230",
    ),
    "aux alignment": (
        {"epilogue": "DGELU", "room": 16},
        {"shift": {"aux": 16}},
        {"shift": {"aux": 8}},
        "matmul",
        INVALID_VALUE,
        "auxiliary matrix at",
    ),
    "alignment of A": (
        {"room": 16, "shift": {"A": 16}},
        {"preference": {"MIN_ALIGNMENT_A_BYTES": 16}},
        {},
        "matmul",
        INVALID_VALUE,
        "A at",
    ),
    "alignment of B": (
        {"room": 16, "shift": {"B": 6}, "preference": {"MIN_ALIGNMENT_B_BYTES": 4}},
        {"shift": {"B": 12}},
        {},
        "matmul",
        INVALID_VALUE,
        "B at",
    ),
    "alignment of C": (
        {"beta": 1.0, "room": 16, "preference": {"MIN_ALIGNMENT_C_BYTES": 2}},
        {"shift": {"C": 2}},
        {"shift": {"C": 1}},
        "matmul",
        INVALID_VALUE,
        "C at",
    ),
    "alignment of D": (
        {"room": 16, "shift": {"D": 8}},
        {"preference": {"MIN_ALIGNMENT_D_BYTES": 8}},
        {"preference": {"MIN_ALIGNMENT_D_BYTES": 16}},
        "matmul",
        INVALID_VALUE,
        "D at",
    ),
    "alignment not a power of two": (
        {},
        {"preference": {"MIN_ALIGNMENT_B_BYTES": 8}},
        {"preference": {"MIN_ALIGNMENT_B_BYTES": 12}},
        "query",
        INVALID_VALUE,
        "power of two",
    ),
    "search mode": ({}, {}, {"preference": {"SEARCH_MODE": 1}}, "query", NOT_SUPPORTED, "search mode 1"),
    "requested count": ({}, {}, {"requested": 0}, "query", INVALID_VALUE, "0 algorithms"),
    "algorithm null is fine, zero is not": (
        {},
        {"algo_given": "none"},
        {"algo_given": "zero"},
        "matmul",
        INVALID_VALUE,
        "not returned by a query",
    ),
    "algorithm of another shape": (
        {"gap": 8},
        {},
        {"query_layouts": {"A": {"LD": 24}}},
        "matmul",
        INVALID_VALUE,
        "another configuration",
    ),
    "workspace too small": (
        {},
        {"workspace_given": 1 << 16},
        {"workspace_given": (1 << 16) - 1},
        "matmul",
        INVALID_VALUE,
        "needs 65536 bytes",
    ),
    "workspace null": ({}, {}, {"pointer": {"workspace": None}}, "matmul", INVALID_VALUE, "workspace"),
    "workspace beyond its allocation": (
        {},
        {},
        {"shift": {"workspace": 256}},
        "matmul",
        INVALID_VALUE,
        "does not lie in one allocation",
    ),
    "A null": ({}, {}, {"pointer": {"A": None}}, "matmul", INVALID_VALUE, "pointer of A is null"),
    "C null": (
        {"pointer": {"C": None}},
        {"beta": 0.0},
        {"beta": 1.0},
        "matmul",
        INVALID_VALUE,
        "pointer of C is null",
    ),
    "A beyond its allocation": ({}, {}, {"shift": {"A": 2}}, "matmul", INVALID_VALUE, "A (816 bytes"),
    "D too large": ({}, {}, {"pointer": {"D": "bias"}}, "matmul", INVALID_VALUE, "D (480 bytes"),
    "D overlaps B": (
        {"m": 17, "n": 17},
        {},
        {"pointer": {"D": "B"}},
        "matmul",
        INVALID_VALUE,
        "D overlaps B",
    ),
    "C in place with another layout": (
        {"in_place": True, "beta": 1.0, "gap": 1},
        {},
        {"layouts": {"C": {"LD": 24}}},
        "matmul",
        INVALID_VALUE,
        "not their layout",
    ),
    "aux is D": (
        {"epilogue": "GELU_AUX"},
        {},
        {"pointer": {"aux": "D"}},
        "matmul",
        INVALID_VALUE,
        "overlaps",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    base, right, wrong, stage, status, reason = RULES[rule]
    assert Product(**(base | right)).run() == ("done", SUCCESS, "")
    assert take_reports() == []
    reached, got_status, got_reason = Product(**(base | wrong)).run()
    assert (reached, got_status) == (stage, status), got_reason
    assert reason in got_reason
    # A refused query may be a question; a refused product is a bug of the caller.
    assert take_reports() == (["cublaslt"] if stage == "matmul" else [])


def test_epilogue_without_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_WITHOUT", "DGELU,GELU_AUX_BIAS")
    for epilogue in EPILOGUES:
        stage, status, reason = Product(epilogue=epilogue).run()
        if epilogue in ("DGELU", "GELU_AUX_BIAS"):
            assert (stage, status) == ("query", NOT_SUPPORTED) and "CUDASIM_CUBLASLT_WITHOUT" in reason
        else:
            assert stage == "done"


def test_uninitialised_operands() -> None:
    for name, product in {"A": Product(), "C": Product(beta=1.0), "bias": Product(epilogue="BIAS")}.items():
        product.device[name] = DeviceTensor(product.device[name].tensor, upload=False)
        assert product.run()[0] == "done"
        assert take_reports() == ["uninitialised"], name


def test_version_and_status_names() -> None:
    assert lt.cublasLtGetVersion() // 10000 == 13
    assert lt.cublasLtGetStatusName(NOT_SUPPORTED) == b"CUBLAS_STATUS_NOT_SUPPORTED"
    assert lt.cublasLtGetStatusString(SUCCESS) == b"success"


def run_script(name: str, *arguments: str) -> Any:
    """The JSON that a script of cudasim/library_tests prints."""
    script = Path(__file__).parent / "cudasim" / "library_tests" / name
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_descriptors_answer_like_the_real_library() -> None:
    """Its calls for descriptors need no GPU. The comparison is in another process: the names are the same."""
    path = find_real_library("libcublasLt.so.13")
    if path is None:
        pytest.skip("the real cuBLASLt (package nvidia-cublas) is not installed")
    ours = run_script("cublaslt_answers.py", str(devices.SIMULATOR / "libcudasim.so"))
    real = run_script("cublaslt_answers.py", str(path))
    assert len(ours) > 500
    assert ours == real


def find_real_library(name: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    return next((path for folder in folders for path in folder.glob(f"*/lib/{name}")), None)


# --- NCCL ----------------------------------------------------------------------------------------------------------

# ncclResult_t
INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR = 4, 5, 6


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


@dataclass
class Ended:
    """What a rank printed; result None if it crashed."""

    result: int | None
    reports: list[str]
    seconds: float


def run_ranks(scenarios: list[str], size: int, timeout: float = 20) -> dict[str, list[Ended]]:
    """One process per rank runs the scenarios of cudasim/library_tests/nccl_rank.py; this process makes the ids."""
    arguments = []
    for scenario in scenarios:
        unique_id = UniqueId()
        assert lt.ncclGetUniqueId(ctypes.byref(unique_id)) == 0
        arguments += [scenario, bytes(unique_id).hex()]
    script = Path(__file__).parent / "cudasim" / "library_tests" / "nccl_rank.py"
    command = [sys.executable, str(script), str(devices.SIMULATOR / "libcudasim.so")]
    environment = os.environ | {"CUDASIM_NCCL_TIMEOUT": str(timeout)}
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), *arguments], env=environment, stdout=pipe, stderr=pipe, text=True
        )
        for rank in range(size)
    ]
    ended: dict[str, list[Ended]] = {scenario: [] for scenario in scenarios}
    for process in ranks:
        out, errors = process.communicate(timeout=60)
        crashed = process.returncode == -signal.SIGKILL
        assert crashed or process.returncode == 0, errors
        for index, scenario in enumerate(scenarios):
            ended[scenario].append(Ended(None, [], 0) if crashed else Ended(**json.loads(out)[index]))
    return ended


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks(size: int) -> None:
    scenarios = ["operations", "messages", "groups and streams"] + ["rounding"] * (size == 3)
    for scenario, ranks in run_ranks(scenarios, size).items():
        for rank in ranks:
            assert (rank.result, rank.reports) == (0, []), scenario


def test_an_id_serves_once() -> None:
    for rank in run_ranks(["id used twice"], 2)["id used twice"]:
        assert rank.result in (INVALID_ARGUMENT, INVALID_USAGE) and len(rank.reports) == 1


# scenario: what the reports of every rank contain, the results of the ranks
DISAGREEMENTS: dict[str, tuple[str, list[int]]] = {
    "count": (
        "rank 0 AllReduce(count 100, float32, sum), rank 1 AllReduce(count 99, float32, sum)",
        [INVALID_USAGE] * 3,
    ),
    "type": ("rank 1 AllReduce(count 100, int32, sum)", [INVALID_USAGE] * 3),
    "reduction": ("rank 1 AllReduce(count 100, float32, max)", [INVALID_USAGE] * 3),
    "operation": ("rank 1 ReduceScatter(count 100, float32, sum)", [INVALID_USAGE] * 3),
    "root": ("rank 1 Broadcast(count 100, float32, root 1)", [INVALID_USAGE] * 3),
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
    ended = disagreements[scenario]
    assert [rank.result for rank in ended] == results
    reports = [report for rank in ended for report in rank.reports]
    assert all(report.startswith("nccl: ") for report in reports)
    if results[0] == INVALID_USAGE:
        assert len(reports) == 3 and all(text in report for report in reports)
    else:
        assert any(text in report for report in reports)


# One scenario per process: the ranks end at different times.
@pytest.mark.parametrize("scenario", ["missing at the start", "missing call", "crash"])
def test_a_rank_does_not_come(scenario: str) -> None:
    before = set(os.listdir("/dev/shm"))
    ended = run_ranks([scenario], 3, timeout=1)[scenario]
    for rank in (ended[0], ended[2]):
        assert rank.result == REMOTE_ERROR and rank.seconds < 10
    assert any("waits for rank 1: not within 1 s" in report for report in ended[0].reports + ended[2].reports)
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.parametrize(
    "scenario, result, reason",
    [
        ("rank twice", INVALID_USAGE, "two processes join as rank 0"),
        ("sizes", INVALID_ARGUMENT, "ranks, another rank"),
    ],
)
def test_ranks_join_wrongly(scenario: str, result: int, reason: str) -> None:
    ended = run_ranks([scenario], 2, timeout=1)[scenario]
    assert sorted(rank.result or 0 for rank in ended) == [result, REMOTE_ERROR]
    assert any(reason in report for rank in ended for report in rank.reports)


class Communicator:
    """Of this process alone, with two arrays of 100 fp32 numbers in device memory."""

    def __init__(self) -> None:
        unique_id = UniqueId()
        self.comm = ptr()
        assert lt.ncclGetUniqueId(ctypes.byref(unique_id)) == 0
        assert lt.ncclCommInitRank(ctypes.byref(self.comm), 1, unique_id, 0) == 0
        self.x, self.y = DeviceTensor(torch.arange(100.0)), DeviceTensor(torch.zeros(100))


FLOAT32, FLOAT64, SUM, PROD = 7, 8, 0, 1
# rule: the arguments of ncclAllReduce that break it (send and recv as bytes from the start of their arrays), the reason
NCCL_RULES: dict[str, tuple[dict[str, Any], str]] = {
    "sendbuff null": ({"send": None}, "sendbuff is null"),
    "recvbuff null": ({"recv": None}, "recvbuff is null"),
    "sendbuff misaligned": ({"send": 2, "count": 99}, "not aligned"),
    "sendbuff too short": ({"count": 101}, "sendbuff (404 bytes"),
    "recvbuff too short": ({"recv": 4}, "recvbuff (400 bytes"),
    "overlap": ({"in_place": True, "recv": 4, "count": 99}, "not as an in-place operation"),
    "type": ({"type": 12}, "data type 12"),
    "type of a reduction": ({"type": FLOAT64, "count": 50}, "data type 8"),
    "reduction": ({"reduction": PROD}, "reduction 1"),
    "communicator": ({"comm": ptr(4096)}, "not a communicator"),
}


def all_reduce(c: Communicator, **changes: Any) -> int:
    send, recv = changes.get("send", 0), changes.get("recv", 0)
    recv_array = c.x if changes.get("in_place") else c.y
    return lt.ncclAllReduce(
        ptr(None if send is None else c.x.pointer + send),
        ptr(None if recv is None else recv_array.pointer + recv),
        ctypes.c_size_t(changes.get("count", 100)),
        changes.get("type", FLOAT32),
        changes.get("reduction", SUM),
        changes.get("comm", c.comm),
        None,
    )


@pytest.mark.parametrize("rule", NCCL_RULES)
def test_nccl_rule(rule: str) -> None:
    changes, reason = NCCL_RULES[rule]
    c = Communicator()
    assert all_reduce(c) == all_reduce(c, in_place=True) == SUCCESS
    assert c.y.download().tolist() == list(range(100))
    assert all_reduce(c, **changes) == INVALID_ARGUMENT
    assert reason in lt.ncclGetLastError(None).decode()
    assert take_reports() == ["nccl"]
    assert all_reduce(c) == SUCCESS  # a refused call leaves the communicator as it was


def test_nccl_roots_groups_and_handles() -> None:
    c = Communicator()
    x, hundred = ptr(c.x.pointer), ctypes.c_size_t(100)
    assert lt.ncclBroadcast(x, x, hundred, FLOAT32, 0, c.comm, None) == SUCCESS
    assert lt.ncclBroadcast(x, x, hundred, FLOAT32, 1, c.comm, None) == INVALID_ARGUMENT
    assert lt.ncclSend(x, hundred, FLOAT32, 1, c.comm, None) == INVALID_ARGUMENT
    assert lt.ncclGroupEnd() == INVALID_USAGE
    assert lt.ncclCommDestroy(c.comm) == SUCCESS
    assert lt.ncclCommDestroy(c.comm) == INVALID_ARGUMENT
    assert set(take_reports()) == {"nccl"}


def test_nccl_uninitialised() -> None:
    c = Communicator()
    c.x = DeviceTensor(c.x.tensor, upload=False)
    assert all_reduce(c) == SUCCESS
    assert take_reports() == ["uninitialised"]


def test_nccl_error_strings() -> None:
    lt.ncclGetErrorString.restype = ctypes.c_char_p
    assert lt.ncclGetErrorString(SUCCESS) == b"no error"
    assert b"invalid usage" in lt.ncclGetErrorString(INVALID_USAGE)
