"""The simulated cuBLASLt: results against float64; for every rule a call that breaks it beside one that does not."""

import ctypes
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cudasim_testing import LIBRARY, SUCCESS, DeviceTensor, kinds, load_library, run_script, take_reports
from ops_testing import F32, assert_within

# Values of cublas_api.h, cublasLt.h and library_types.h.
NOT_INITIALIZED, INVALID_VALUE, NOT_SUPPORTED = 1, 7, 15
COMPUTE_32F, COMPUTE_64F, FAST_16BF, FAST_TF32 = 68, 70, 75, 77
R_32F, R_16F, R_16BF = 0, 2, 14
ORDER_COL, ORDER_ROW, ORDER_COL32 = 0, 1, 2
FP8 = {torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
TYPES = {torch.float32: R_32F, torch.bfloat16: R_16BF, **FP8}
EPILOGUES = {
    "DEFAULT": 1, "RELU": 2, "BIAS": 4, "RELU_BIAS": 6, "GELU": 32, "GELU_BIAS": 36, "GELU_AUX": 160,
    "GELU_AUX_BIAS": 164, "DGELU": 192, "DGELU_BGRAD": 208, "BGRADA": 256, "BGRADB": 512,
}  # fmt: skip
RELU_AUX = 130

i32, u32, i64, u64, f32 = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
pointer = ctypes.c_void_p
# Attributes that the tests set: number and type.
DESCRIPTOR = {
    "SCALE_TYPE": (1, i32), "POINTER_MODE": (2, i32), "TRANSA": (3, i32), "TRANSB": (4, i32), "TRANSC": (5, i32),
    "FILL_MODE": (6, i32), "EPILOGUE": (7, u32), "BIAS_POINTER": (8, pointer), "BIAS_BATCH_STRIDE": (10, i64),
    "AUX_POINTER": (11, pointer), "AUX_LD": (12, i64), "AUX_BATCH_STRIDE": (13, i64), "SM_COUNT_TARGET": (15, i32),
    "A_SCALE_POINTER": (17, pointer), "B_SCALE_POINTER": (18, pointer), "D_SCALE_POINTER": (20, pointer),
    "AUX_DATA_TYPE": (22, i32), "FAST_ACCUM": (25, ctypes.c_int8), "BIAS_DATA_TYPE": (26, i32),
    "A_SCALE_MODE": (31, i32),
}  # fmt: skip
LAYOUT = {
    "TYPE": (0, u32), "ORDER": (1, i32), "ROWS": (2, u64), "COLS": (3, u64), "LD": (4, i64), "BATCH_COUNT": (5, i32),
    "BATCH_STRIDE": (6, i64), "PLANE_OFFSET": (7, i64), "BATCH_MODE": (8, u32),
}  # fmt: skip
PREFERENCE = {
    "SEARCH_MODE": (0, u32), "MAX_WORKSPACE_BYTES": (1, u64), "REDUCTION_SCHEME_MASK": (3, u32),
    "ALIGNMENT_A": (5, u32), "ALIGNMENT_B": (6, u32), "ALIGNMENT_C": (7, u32), "ALIGNMENT_D": (8, u32),
}  # fmt: skip

lt: Any = None


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Every test must take the reports that it provokes."""
    global lt
    lt = load_library()
    take_reports()
    yield
    assert take_reports() == []


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", u64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves_count", f32),
        ("reserved", ctypes.c_int * 4),
    ]


def set_attributes(kind: str, target: Any, table: dict[str, tuple[int, Any]], values: dict[str, Any]) -> None:
    for name, value in values.items():
        number, ctype = table[name]
        holder, size = ctype(value), ctypes.c_size_t(ctypes.sizeof(ctype))
        assert getattr(lt, f"cublasLt{kind}SetAttribute")(target, number, ctypes.byref(holder), size) == SUCCESS


def matrix(
    rows: int, cols: int, batch: int, dtype: torch.dtype, generator: torch.Generator, gap: int, order: int
) -> torch.Tensor:
    """A random (batch, rows, cols) whose columns (row-major: rows) lie `gap` elements apart in memory; gaps are NaN."""
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
    b_dtype: torch.dtype | None = None  # None: as A's
    # Replacements
    descriptor: dict[str, Any] = field(default_factory=dict)  # by attribute
    preference: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by matrix and attribute
    query_layouts: dict[str, dict[str, Any]] = field(default_factory=dict)  # in the query for the algorithm only
    shift: dict[str, int] = field(default_factory=dict)  # bytes added to an address: "A", "bias", "workspace", ...
    address: dict[str, str | None] = field(default_factory=dict)  # the name whose memory is taken, or null
    workspace_given: int | None = None
    algo: str = "queried"  # or "none", "zero"
    handle: str = "live"  # or "null", "destroyed"
    requested: int = 1
    chosen: int = 0  # of the results of the query

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def make(rows: int, cols: int, dtype: torch.dtype, gap: int, order: int) -> torch.Tensor:
            return matrix(rows, cols, self.batch, dtype, generator, gap, order)

        m, n, k = self.m, self.n, self.k
        a_shape, b_shape = (k, m) if self.trans_a else (m, k), (n, k) if self.trans_b else (k, n)
        self.a = make(*a_shape, self.dtype, self.gap, self.order)
        self.b = make(*b_shape, self.b_dtype or self.dtype, self.gap, self.order)
        self.c, self.d = (make(m, n, self.out_dtype, self.gap, self.order) for _ in "CD")
        self.bias = make(n if self.epilogue == "BGRADB" else m, 1, self.out_dtype, 0, ORDER_COL)
        self.aux = make(m, n, self.out_dtype, -m % 8, ORDER_COL)
        tensors = {"A": self.a, "B": self.b, "C": self.c, "D": self.d, "bias": self.bias, "aux": self.aux}
        tensors["workspace"] = torch.zeros(self.workspace, dtype=torch.uint8)
        tensors["scale A"], tensors["scale B"] = torch.tensor([0.375]), torch.tensor([2.5])  # of FP8
        self.device = {name: DeviceTensor(tensor, self.room) for name, tensor in tensors.items()}
        if self.in_place:
            self.address = {"C": "D"} | self.address

    def pointer(self, name: str) -> int | None:
        source = self.address.get(name, name)
        return self.device[source].pointer + self.shift.get(name, 0) if source else None

    def layout(self, name: str, changes: dict[str, dict[str, Any]]) -> ctypes.c_void_p:
        x = {"A": self.a, "B": self.b, "C": self.c, "D": self.d}[name]
        rows, cols, ld = u64(x.size(1)), u64(x.size(2)), i64(x.stride(1 if self.order == ORDER_ROW else 2))
        layout = pointer()
        assert lt.cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[x.dtype], rows, cols, ld) == SUCCESS
        values = {"ORDER": self.order, "BATCH_COUNT": self.batch, "BATCH_STRIDE": x.stride(0)} | changes.get(name, {})
        set_attributes("MatrixLayout", layout, LAYOUT, values)
        return layout

    def run(self) -> tuple[str, int, str]:
        """The stage reached ("query", "matmul" or "done"), the status and the reason of a refusal."""
        handle, operation, preference = pointer(), pointer(), pointer()
        assert lt.cublasLtCreate(ctypes.byref(handle)) == SUCCESS
        if self.handle == "destroyed":
            lt.cublasLtDestroy(handle)
        assert lt.cublasLtMatmulDescCreate(ctypes.byref(operation), self.compute, R_32F) == SUCCESS
        values = {
            "TRANSA": int(self.trans_a),
            "TRANSB": int(self.trans_b),
            "EPILOGUE": EPILOGUES[self.epilogue],
            "BIAS_POINTER": self.pointer("bias"),
            "BIAS_BATCH_STRIDE": self.bias.stride(0),
            "AUX_POINTER": self.pointer("aux"),
            "AUX_LD": self.aux.stride(2),
            "AUX_BATCH_STRIDE": self.aux.stride(0),
        }
        if self.dtype in FP8:
            values |= {f"{name}_SCALE_POINTER": self.pointer(f"scale {name}") for name in "AB"}
        set_attributes("MatmulDesc", operation, DESCRIPTOR, values | self.descriptor)
        assert lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)) == SUCCESS
        values = {"MAX_WORKSPACE_BYTES": self.workspace} | self.preference
        set_attributes("MatmulPreference", preference, PREFERENCE, values)
        layouts = [self.layout(name, self.layouts) for name in "ABCD"]
        query_layouts = [self.layout(name, self.layouts | self.query_layouts) for name in "ABCD"]
        try:
            return self.call(None if self.handle == "null" else handle, operation, preference, layouts, query_layouts)
        finally:
            for layout in layouts + query_layouts:
                lt.cublasLtMatrixLayoutDestroy(layout)
            lt.cublasLtMatmulPreferenceDestroy(preference)
            lt.cublasLtMatmulDescDestroy(operation)
            if self.handle != "destroyed":
                lt.cublasLtDestroy(handle)

    def call(
        self, handle: Any, operation: Any, preference: Any, layouts: list[Any], query_layouts: list[Any]
    ) -> tuple[str, int, str]:
        results, returned = (HeuristicResult * 8)(), i32(-1)
        query = [handle, operation, *query_layouts, preference, self.requested, results, ctypes.byref(returned)]
        status = lt.cublasLtMatmulAlgoGetHeuristic(*query)
        if status:
            return "query", status, lt.cudasim_cublaslt_reason().decode()
        assert 1 <= returned.value <= self.requested
        self.results = results[: returned.value]
        algo = {"queried": results[self.chosen].algo, "zero": (u64 * 8)(), "none": None}[self.algo]
        alpha, beta = f32(self.alpha), f32(self.beta)
        a, b, c, d, workspace = (pointer(self.pointer(name)) for name in (*"ABCD", "workspace"))
        workspace_size = self.workspace if self.workspace_given is None else self.workspace_given
        start, end, milliseconds = pointer(), pointer(), f32()
        for event in (start, end):
            assert lt.cudaEventCreate(ctypes.byref(event)) == SUCCESS
        assert lt.cudaEventRecord(start, None) == SUCCESS
        status = lt.cublasLtMatmul(
            handle, operation, ctypes.byref(alpha), a, layouts[0], b, layouts[1], ctypes.byref(beta), c, layouts[2],
            d, layouts[3], algo, workspace, ctypes.c_size_t(workspace_size), None,
        )  # fmt: skip
        if status:
            return "matmul", status, lt.cudasim_cublaslt_reason().decode()
        assert lt.cudaEventRecord(end, None) == SUCCESS
        assert lt.cudaDeviceSynchronize() == SUCCESS
        assert lt.cudaEventElapsedTime(ctypes.byref(milliseconds), start, end) == SUCCESS
        self.milliseconds = milliseconds.value
        return "done", SUCCESS, ""


DONE = ("done", SUCCESS, "")

# --- results -------------------------------------------------------------------------------------------------------


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(gelu(x).sum(), x)[0]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest values with 10 fraction bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def expected(p: Product) -> dict[str, torch.Tensor]:
    """float64 results by the formulas of cublasLt.h; reads the operands before they are overwritten."""
    a, b = (tf32(p.a), tf32(p.b)) if p.compute == FAST_TF32 else (p.a, p.b)
    a, b = a.double(), b.double()
    a, b = a.mT if p.trans_a else a, b.mT if p.trans_b else b
    x = p.alpha * (a @ b)
    if p.dtype in FP8:
        x = x * 0.375 * 2.5
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
    assert p.run() == DONE
    # Sums of k (bias gradients: n) products of size 1 in fp32: every addition rounds a partial sum, which grows like
    # the square root of its length; 4 for the tails of the normal distribution and for GELU's polynomial.
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
                rest = dict(order=order, batch=batch, gap=batch - 1, beta=1.0, in_place=in_place, seed=batch)
                check(Product(19, 23, 33, trans_a, trans_b, dtype, out_dtype, **rest))


@pytest.mark.parametrize("epilogue", ["BIAS", "GELU_AUX_BIAS", "DGELU", "DGELU_BGRAD"])
def test_batched_epilogues(epilogue: str) -> None:
    check(Product(16, 5, 9, epilogue=epilogue, batch=3))


@pytest.mark.parametrize("trans", [False, True])
def test_tf32_rounds_the_operands(trans: bool) -> None:
    check(Product(20, 20, 300, trans, trans, torch.float32, torch.float32, FAST_TF32))


def test_many_blocks() -> None:
    check(Product(130, 70, 1000, dtype=torch.float32, out_dtype=torch.float32))


def test_gaps_are_not_written() -> None:
    p = Product(gap=3)
    check(p)
    storage = torch.empty(0, dtype=p.out_dtype).set_(p.d.untyped_storage()).view(p.n, p.m + 3)
    assert storage[:, p.m :].isnan().all() and not storage[:, : p.m].isnan().any()


@pytest.mark.parametrize("second, rounded", [(0.0, 1.0), (2.0**-7, 1 + 2.0**-6)])
def test_bf16_results_round_ties_to_even(second: float, rounded: float) -> None:
    """1 + second + 2^-8 lies halfway between two bf16 numbers."""
    p = Product(m=1, n=1, k=3)
    p.device["A"] = DeviceTensor(torch.tensor([1.0, second, 2.0**-4], dtype=torch.bfloat16))
    p.device["B"] = DeviceTensor(torch.tensor([1.0, 1.0, 2.0**-4], dtype=torch.bfloat16))
    assert p.run() == DONE
    assert p.device["D"].download().item() == rounded


def test_same_bits_twice() -> None:
    first, second = Product(), Product()
    for p in (first, second):
        assert p.run() == DONE
        p.device["D"].download()
    assert torch.equal(first.d, second.d)


def test_workspace_is_trashed() -> None:
    p = Product()
    assert p.run() == DONE
    assert (p.device["workspace"].download() == 0xFF).all()


def test_several_algorithms_are_offered() -> None:
    p = Product(requested=8)
    assert p.run() == DONE
    sums = 24 * 10 * 4  # bytes of a result in fp32
    assert [result.workspace_size for result in p.results[:5]] == [1 << 16, 0, 2 * sums, 3 * sums, 2 * sums]
    assert [result.state for result in p.results] == [SUCCESS] * 6 + [NOT_SUPPORTED]


@pytest.mark.parametrize(
    "allowed, offered",
    [
        ({"REDUCTION_SCHEME_MASK": 2}, [0, 1, 2, 3, 5, 6]),  # COMPUTE_TYPE
        ({"REDUCTION_SCHEME_MASK": 0}, [0, 1, 5, 6]),
        ({"MAX_WORKSPACE_BYTES": 2 * 24 * 10 * 4}, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_algorithms_that_the_preference_allows(allowed: dict[str, int], offered: list[int]) -> None:
    p = Product(requested=8, preference=allowed)
    assert p.run() == DONE
    assert [result.algo[0] for result in p.results] == offered


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_algorithm_computes_the_product(number: int, epilogue: str) -> None:
    check(Product(requested=8, chosen=number, epilogue=epilogue, k=100, beta=0.5, out_dtype=torch.float32))


@pytest.mark.parametrize(
    "values, out_dtype, sums",
    [
        # After 2^24 a single 1 is lost, as fp32 has 24 bits; two of them added up before are not.
        ([2.0**24, 1, 1, 1], torch.float32, [2**24, 2**24, 2**24 + 2, 2**24 + 2, 2**24 + 2]),
        # The last one rounds 1 + 2^-8, halfway between two bf16 numbers, to 1.
        ([1, 2.0**-8, 2.0**-8, 2.0**-8], torch.bfloat16, [1 + 2.0**-6] * 4 + [1 + 2.0**-7]),
    ],
)
def test_algorithms_round_differently(values: list[float], out_dtype: torch.dtype, sums: list[float]) -> None:
    for number, expected_sum in enumerate(sums):
        p = Product(m=1, n=1, k=4, out_dtype=out_dtype, requested=8, chosen=number)
        p.device["A"] = DeviceTensor(torch.tensor(values, dtype=torch.bfloat16))
        p.device["B"] = DeviceTensor(torch.ones(4, dtype=torch.bfloat16))
        assert p.run() == DONE
        assert p.device["D"].download().item() == expected_sum


def test_an_algorithm_that_does_not_run() -> None:
    """Its refusal is the caller's to handle, and no bug."""
    stage, status, reason = Product(requested=8, chosen=5).run()
    assert (stage, status) == ("matmul", NOT_SUPPORTED) and "does not run" in reason


def test_time_of_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "2")
    monkeypatch.setenv("CUDASIM_CUBLASLT_SLOW", "BGRADB,BIAS")
    times = []
    for epilogue in ("DEFAULT", "BIAS"):
        for number in (0, 2):
            p = Product(requested=8, chosen=number, epilogue=epilogue)
            assert p.run() == DONE
            times.append(p.milliseconds)
    assert times == [1, 0.5, 4, 2]


# --- rules ---------------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """A wrong call and where, with which status and why it is refused; `right` instead of `wrong` makes a right one."""

    wrong: dict[str, Any]
    stage: str
    status: int
    reason: str
    right: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)


def descriptor(**values: Any) -> dict[str, Any]:
    return {"descriptor": values}


def preference(**values: Any) -> dict[str, Any]:
    return {"preference": values}


def layout(name: str, **values: Any) -> dict[str, Any]:
    return {"layouts": {name: values}}


def shift(**values: Any) -> dict[str, Any]:
    return {"shift": values, "room": 16}


def null(name: str) -> dict[str, Any]:
    return {"address": {name: None}}


FP32, BATCH = {"dtype": torch.float32, "out_dtype": torch.float32}, {"batch": 2}
BIAS, DGELU, GELU_AUX, BGRADB = ({"epilogue": name} for name in ("BIAS", "DGELU", "GELU_AUX", "BGRADB"))
RULES = {
    "handle is null": Rule({"handle": "null"}, "query", NOT_INITIALIZED, "handle"),
    "handle is destroyed": Rule({"handle": "destroyed"}, "query", NOT_INITIALIZED, "handle"),
    # descriptor
    "compute type": Rule({"compute": FAST_16BF}, "query", NOT_SUPPORTED, "compute type 75"),
    "compute type 64F": Rule({"compute": COMPUTE_64F}, "query", NOT_SUPPORTED, "compute type 70"),
    "scale type": Rule(descriptor(SCALE_TYPE=R_16BF), "query", NOT_SUPPORTED, "scale type 14"),
    "pointer mode": Rule(descriptor(POINTER_MODE=1), "query", NOT_SUPPORTED, "pointer mode"),
    "transpose": Rule(descriptor(TRANSA=5), "query", INVALID_VALUE, "transposes 5"),
    "transpose of C": Rule(descriptor(TRANSC=1), "query", NOT_SUPPORTED, "C cannot"),
    "fill mode": Rule(descriptor(FILL_MODE=0), "query", NOT_SUPPORTED, "fill mode"),
    "SM count": Rule(
        descriptor(SM_COUNT_TARGET=-1), "query", INVALID_VALUE, "SM count", right=descriptor(SM_COUNT_TARGET=4)
    ),
    "scale pointer": Rule(descriptor(A_SCALE_POINTER=256), "query", NOT_SUPPORTED, "need FP8 operands"),
    "fast accumulation": Rule(descriptor(FAST_ACCUM=1), "query", NOT_SUPPORTED, "need FP8 operands"),
    "scale of D": Rule(descriptor(D_SCALE_POINTER=256), "query", NOT_SUPPORTED, "keep their defaults"),
    # types
    "type": Rule(layout("A", TYPE=R_16F), "query", NOT_SUPPORTED, "type 2"),
    "types of A and B": Rule(layout("B", TYPE=R_32F), "query", NOT_SUPPORTED, "A and B"),
    "types of C and D": Rule(layout("C", TYPE=R_32F), "query", NOT_SUPPORTED, "C and D"),
    "fp32 to bf16": Rule(
        {"out_dtype": torch.bfloat16}, "query", NOT_SUPPORTED, "give an R_32F", right={"out_dtype": torch.float32},
        common={"dtype": torch.float32},
    ),
    "TF32 of bf16": Rule({}, "query", NOT_SUPPORTED, "needs R_32F", right=FP32, common={"compute": FAST_TF32}),
    # layouts
    "order": Rule(layout("A", ORDER=ORDER_COL32), "query", NOT_SUPPORTED, "order 2"),
    "orders of C and D": Rule(
        layout("C", ORDER=ORDER_ROW), "query", INVALID_VALUE, "different orders", common={"m": 10}
    ),
    "no rows": Rule(layout("A", ROWS=0), "query", INVALID_VALUE, "0 x 17"),
    "too many rows": Rule(layout("A", ROWS=1 << 31, LD=1 << 31), "query", INVALID_VALUE, "2147483648"),
    "ld": Rule(
        layout("A", LD=23), "query", INVALID_VALUE, "leading dimension 23", right=layout("A", LD=25), common={"gap": 1}
    ),
    "ld is negative": Rule(layout("D", LD=-24), "query", INVALID_VALUE, "leading dimension -24"),
    "ld of rows": Rule(
        layout("A", LD=16), "query", INVALID_VALUE, "less than its 17 columns", common={"order": ORDER_ROW}
    ),
    "k of B": Rule(layout("B", ROWS=16), "query", INVALID_VALUE, "op(B) has 16 rows"),
    "transpose forgotten": Rule(descriptor(TRANSB=1), "query", INVALID_VALUE, "op(B) has 10 rows"),
    "rows of D": Rule(layout("D", ROWS=23), "query", INVALID_VALUE, "D is 23 x 10"),
    "columns of D": Rule(layout("D", COLS=9), "query", INVALID_VALUE, "D is 24 x 9"),
    "columns of C": Rule(layout("C", COLS=9), "query", INVALID_VALUE, "C is 24 x 9"),
    "batch counts": Rule(
        layout("B", BATCH_COUNT=1), "query", INVALID_VALUE, "batch counts differ", common=BATCH
    ),
    "no batch": Rule(layout("A", BATCH_COUNT=0), "query", INVALID_VALUE, "batch count 0"),
    "batches overlap": Rule(
        layout("D", BATCH_STRIDE=232), "matmul", INVALID_VALUE, "batches of D", right=layout("A", BATCH_STRIDE=0),
        common=BATCH,
    ),
    "batch stride": Rule(
        layout("A", BATCH_STRIDE=-408), "query", INVALID_VALUE, "batch stride -408", common=BATCH
    ),
    "batch mode": Rule(layout("A", BATCH_MODE=1), "query", NOT_SUPPORTED, "pointer-array"),
    "planar complex": Rule(layout("A", PLANE_OFFSET=8), "query", NOT_SUPPORTED, "planar complex"),
    # epilogues
    "epilogue": Rule(descriptor(EPILOGUE=12345), "query", INVALID_VALUE, "does not exist"),
    "ReLU mask": Rule(descriptor(EPILOGUE=RELU_AUX), "query", NOT_SUPPORTED, "ReLU masks"),
    "epilogue of rows": Rule({"order": ORDER_ROW}, "query", NOT_SUPPORTED, "column-major", common=BIAS),
    "bias gradient of batches": Rule(BATCH, "query", NOT_SUPPORTED, "not simulated for batches", common=BGRADB),
    "bias is null": Rule(null("bias"), "matmul", INVALID_VALUE, "pointer of bias is null", common=BIAS),
    "bias gradient is null": Rule(null("bias"), "matmul", INVALID_VALUE, "of bias gradient is null", common=BGRADB),
    "bias type": Rule(
        descriptor(BIAS_DATA_TYPE=R_32F), "query", NOT_SUPPORTED, "bias type 0",
        right=descriptor(BIAS_DATA_TYPE=R_16BF), common=BIAS,
    ),
    "bias alignment": Rule(
        shift(bias=8), "matmul", INVALID_VALUE, "the bias vector at", right=shift(bias=16), common=BIAS
    ),
    "bias batch stride": Rule(
        descriptor(BIAS_BATCH_STRIDE=-1), "query", INVALID_VALUE, "bias batch stride -1",
        right=descriptor(BIAS_BATCH_STRIDE=0), common=BIAS | BATCH,
    ),
    "aux is null": Rule(null("aux"), "matmul", INVALID_VALUE, "of auxiliary matrix is null", common=GELU_AUX),
    "aux ld is not set": Rule(
        descriptor(AUX_LD=0), "query", INVALID_VALUE, "auxiliary leading dimension 0", common=GELU_AUX
    ),
    "aux ld": Rule(
        descriptor(AUX_LD=20), "query", INVALID_VALUE, "multiple of 8", right=descriptor(AUX_LD=24),
        common=DGELU | {"m": 20},
    ),
    "aux ld is short": Rule(descriptor(AUX_LD=16), "query", INVALID_VALUE, "at least the 24 rows", common=DGELU),
    "aux type": Rule(
        descriptor(AUX_DATA_TYPE=R_32F), "query", NOT_SUPPORTED, "auxiliary type 0",
        right=descriptor(AUX_DATA_TYPE=R_16BF), common=DGELU,
    ),
    "aux batch stride": Rule(
        descriptor(AUX_BATCH_STRIDE=236), "query", INVALID_VALUE, "auxiliary batch stride 236",
        right=descriptor(AUX_BATCH_STRIDE=232), common=DGELU | BATCH,
    ),
    "aux alignment": Rule(
        shift(aux=8), "matmul", INVALID_VALUE, "the auxiliary matrix at", right=shift(aux=16), common=DGELU
    ),
    # algorithm
    "alignment is no power of two": Rule(
        preference(ALIGNMENT_B=12), "query", INVALID_VALUE, "power of two", right=preference(ALIGNMENT_B=8)
    ),
    "alignment of A": Rule({}, "matmul", INVALID_VALUE, "A at", right=preference(ALIGNMENT_A=16), common=shift(A=16)),
    "alignment of B": Rule(
        shift(B=6), "matmul", INVALID_VALUE, "B at", right=shift(B=12), common=preference(ALIGNMENT_B=4)
    ),
    "alignment of C": Rule(
        shift(C=1), "matmul", INVALID_VALUE, "C at", right=shift(C=2), common=preference(ALIGNMENT_C=2) | {"beta": 1.0}
    ),
    "alignment of D": Rule(
        preference(ALIGNMENT_D=16), "matmul", INVALID_VALUE, "D at", right=preference(ALIGNMENT_D=8), common=shift(D=8)
    ),
    "alignment of an element": Rule(
        shift(A=2), "matmul", INVALID_VALUE, "A at", right=shift(A=4), common=FP32 | {"algo": "none"}
    ),
    "search mode": Rule(preference(SEARCH_MODE=1), "query", NOT_SUPPORTED, "search mode 1"),
    "number of algorithms": Rule({"requested": 0}, "query", INVALID_VALUE, "0 algorithms"),
    "algorithm of zeros": Rule(
        {"algo": "zero"}, "matmul", INVALID_VALUE, "not returned by a query", right={"algo": "none"}
    ),
    "algorithm of another layout": Rule(
        {"query_layouts": {"A": {"LD": 24}}}, "matmul", INVALID_VALUE, "another configuration", common={"gap": 8}
    ),
    # memory
    "workspace size": Rule({"workspace_given": 65535}, "matmul", INVALID_VALUE, "needs 65536 bytes"),
    "workspace is null": Rule(null("workspace"), "matmul", INVALID_VALUE, "the workspace (65536 bytes"),
    "workspace bounds": Rule(
        {"shift": {"workspace": 256}}, "matmul", INVALID_VALUE, "does not lie in one", right={"shift": {"workspace": 0}}
    ),
    "workspace alignment": Rule(
        {"shift": {"workspace": 16}}, "matmul", INVALID_VALUE, "not aligned to 256",
        right={"shift": {"workspace": 256}}, common={"room": 256},
    ),
    "workspace overlap": Rule(
        {"address": {"B": "workspace"}}, "matmul", INVALID_VALUE, "the workspace overlaps B"
    ),
    "A is null": Rule(null("A"), "matmul", INVALID_VALUE, "pointer of A is null"),
    "C is null": Rule({"beta": 1.0}, "matmul", INVALID_VALUE, "pointer of C is null", common=null("C")),
    "bounds of A": Rule({"shift": {"A": 2}}, "matmul", INVALID_VALUE, "A (816 bytes"),
    "bounds of D": Rule({"address": {"D": "bias"}}, "matmul", INVALID_VALUE, "D (480 bytes"),
    "bounds of batches": Rule(
        layout("B", BATCH_STRIDE=178), "matmul", INVALID_VALUE, "B (696 bytes", right=layout("B", BATCH_STRIDE=170),
        common=BATCH,
    ),
    "D overlaps B": Rule(
        {"address": {"D": "B"}}, "matmul", INVALID_VALUE, "D overlaps B", common={"m": 17, "n": 17}
    ),
    "C in place has another layout": Rule(
        layout("C", LD=24), "matmul", INVALID_VALUE, "not their layout",
        common={"in_place": True, "beta": 1.0, "gap": 1},
    ),
    "aux is D": Rule({"address": {"aux": "D"}}, "matmul", INVALID_VALUE, "overlaps", common=GELU_AUX),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    rule = RULES[name]
    assert Product(**(rule.common | rule.right)).run() == DONE
    assert take_reports() == []
    stage, status, reason = Product(**(rule.common | rule.wrong)).run()
    assert (stage, status) == (rule.stage, rule.status), reason
    assert rule.reason in reason
    # A refused query may be a question; a refused product is a bug of the caller.
    assert kinds(take_reports()) == (["cublaslt"] if stage == "matmul" else [])


def test_interleaved_matrices_do_not_overlap() -> None:
    """D's columns fill the gaps between B's."""
    p = Product(m=16, n=10, k=16, gap=16, preference={"ALIGNMENT_D": 32})
    p.address, p.shift, p.layouts = {"D": "B"}, {"D": 32}, {"D": {"LD": 32}}
    assert p.run() == DONE


def test_epilogue_without_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_WITHOUT", "DGELU,GELU_AUX_BIAS")
    for epilogue in EPILOGUES:
        for algo in ("queried", "none"):
            stage, status, reason = Product(epilogue=epilogue, algo=algo).run()
            if epilogue in ("DGELU", "GELU_AUX_BIAS"):
                assert (stage, status) == ("query", NOT_SUPPORTED) and "names the epilogue" in reason
            else:
                assert stage == "done"
    monkeypatch.setenv("CUDASIM_CUBLASLT_WITHOUT", "GELU_")
    stage, status, reason = Product().run()
    assert (stage, status) == ("query", INVALID_VALUE) and "GELU_, which is not an epilogue" in reason


@pytest.mark.parametrize("name, changes", [("A", {}), ("C", {"beta": 1.0}), ("bias", BIAS), ("aux", DGELU)])
def test_uninitialised_operand(name: str, changes: dict[str, Any]) -> None:
    p = Product(**changes)
    p.device[name] = DeviceTensor(p.device[name].tensor, upload=False)
    p.run()
    assert kinds(take_reports()) == ["uninitialised"]


@pytest.mark.parametrize("columns, reports", [(17, []), (16, ["uninitialised"])])
def test_gaps_may_be_uninitialised(columns: int, reports: list[str]) -> None:
    """Only that many columns of A (24,17) have been written, and no gap."""
    p = Product(gap=3)
    p.device["A"] = DeviceTensor(p.a, upload=False)
    for column in range(columns):
        start = pointer(p.device["A"].pointer + column * (24 + 3) * 2)
        assert lt.cudaMemset(start, 0, ctypes.c_size_t(24 * 2)) == SUCCESS
    assert p.run() == DONE
    assert kinds(take_reports()) == reports


def test_descriptors_answer_like_the_real_library() -> None:
    """Its calls that need no GPU, in processes of their own: the names are the same."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    real = [path for folder in folders for path in folder.glob("*/lib/libcublasLt.so.13")]
    if not real:
        pytest.skip("the real cuBLASLt (package nvidia-cublas) is not installed")
    answers = run_script("cublaslt_answers.py", str(LIBRARY))
    assert len(answers) > 500
    assert answers == run_script("cublaslt_answers.py", str(real[0]))
