"""FP8 in the simulated cuBLASLt: every number of the formats, products against float64, the library's rules."""

from typing import Any

import pytest
import test_cudasim_cublaslt as cublaslt
import torch
from cudasim_testing import DeviceTensor, kinds, take_reports
from test_cudasim_cublaslt import (
    DONE,
    FP8,
    INVALID_VALUE,
    NOT_SUPPORTED,
    ORDER_ROW,
    Product,
    Rule,
    check,
    descriptor,
    layout,
    shift,
)

library = cublaslt.library  # the fixture: every test must take the reports that it provokes
E4M3, E5M2 = FP8
PAIRS = [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]


def product(**changes: Any) -> Product:
    return Product(**{"m": 32, "n": 16, "k": 48, "trans_a": True, "dtype": E4M3} | changes)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_number(dtype: torch.dtype) -> None:
    """The 256 bit patterns, sixteen at a time: each is the only value of its row that is not 0, and times 1."""
    bits = torch.arange(256, dtype=torch.uint8)
    values = bits.view(dtype).float()
    for first in range(0, 256, 16):
        a = torch.zeros(16, 16, dtype=torch.uint8)
        a[range(16), range(16)] = bits[first : first + 16]
        p = product(m=16, n=16, k=16, dtype=dtype, b_dtype=E4M3, out_dtype=torch.float32)
        p.device["A"] = DeviceTensor(a.view(dtype))
        p.device["B"] = DeviceTensor(torch.ones(16, 16, dtype=E4M3))
        assert p.run() == DONE
        rows = p.device["D"].download()[0]  # (m, n): row i is number i, times the scales
        expected = values[first : first + 16] * 0.375 * 2.5
        assert torch.equal(rows.nan_to_num(7, 8, 9), expected[:, None].expand(16, 16).nan_to_num(7, 8, 9))


@pytest.mark.parametrize("types", PAIRS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rest", [{}, {"beta": 1.0, "in_place": True}, {"descriptor": {"FAST_ACCUM": 1}}], ids=str)
def test_products(types: tuple[torch.dtype, torch.dtype], out_dtype: torch.dtype, rest: dict[str, Any]) -> None:
    a, b = types
    for m, n, k in [(32, 16, 48), (16, 80, 400)]:
        check(product(m=m, n=n, k=k, dtype=a, b_dtype=b, out_dtype=out_dtype, **rest))


@pytest.mark.parametrize("epilogue", ["BIAS", "GELU_AUX", "GELU_AUX_BIAS", "DGELU"])
def test_epilogues(epilogue: str) -> None:
    check(product(epilogue=epilogue, dtype=E4M3, b_dtype=E5M2))


RULES = {
    "one operand": Rule({"b_dtype": torch.bfloat16}, "query", NOT_SUPPORTED, "both must be FP8"),
    "the other operand": Rule(
        {"dtype": torch.bfloat16, "b_dtype": E4M3}, "query", NOT_SUPPORTED, "both must be FP8"
    ),
    "two gradients": Rule({"dtype": E5M2}, "query", NOT_SUPPORTED, "both R_8F_E5M2", right={"dtype": E4M3}),
    "A not transposed": Rule({"trans_a": False}, "query", NOT_SUPPORTED, "A transposed"),
    "B transposed": Rule({"trans_b": True}, "query", NOT_SUPPORTED, "B not"),
    "row-major": Rule({"order": ORDER_ROW}, "query", NOT_SUPPORTED, "column-major"),
    "compute type": Rule({"compute": cublaslt.FAST_TF32}, "query", NOT_SUPPORTED, "compute type 32F"),
    "m": Rule({"m": 24}, "query", NOT_SUPPORTED, "multiples of 16"),
    "n": Rule({"n": 8}, "query", NOT_SUPPORTED, "multiples of 16"),
    "k": Rule({"k": 40}, "query", NOT_SUPPORTED, "multiples of 16"),
    "ld": Rule({"gap": 8}, "query", NOT_SUPPORTED, "leading dimensions", right={"gap": 16}),
    "alignment": Rule(
        shift(A=8), "matmul", INVALID_VALUE, "A at", right=shift(A=16),
        common={"preference": {"ALIGNMENT_A": 8}},
    ),
    "alignment without an algorithm": Rule(
        shift(D=8), "matmul", INVALID_VALUE, "which FP8 needs", right=shift(D=16), common={"algo": "none"}
    ),
    "bias gradient": Rule(
        {"epilogue": "BGRADB"}, "query", NOT_SUPPORTED, "no epilogue BGRADB", right={"epilogue": "BIAS"}
    ),
    "epilogue in fp32": Rule(
        {"out_dtype": torch.float32}, "query", NOT_SUPPORTED, "result in R_16BF", common={"epilogue": "BIAS"}
    ),
    "result": Rule(layout("D", TYPE=28), "query", NOT_SUPPORTED, "D has type 28"),
    "mode of a scale": Rule(descriptor(A_SCALE_MODE=1), "query", NOT_SUPPORTED, "keep their defaults"),
    "fast accumulation": Rule(
        descriptor(FAST_ACCUM=2), "query", INVALID_VALUE, "0 or 1", right=descriptor(FAST_ACCUM=1)
    ),
    "scale on the host": Rule(
        descriptor(B_SCALE_POINTER=4096), "matmul", INVALID_VALUE, "the scale of B",
        right=descriptor(B_SCALE_POINTER=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    rule = RULES[name]
    assert product(**(rule.common | rule.right)).run() == DONE
    assert take_reports() == []
    stage, status, reason = product(**(rule.common | rule.wrong)).run()
    assert (stage, status) == (rule.stage, rule.status), reason
    assert rule.reason in reason
    assert kinds(take_reports()) == (["cublaslt"] if stage == "matmul" else [])


@pytest.mark.parametrize("name", ["A", "scale A", "scale B"])
def test_uninitialised_operand(name: str) -> None:
    p = product()
    p.device[name] = DeviceTensor(p.device[name].tensor, upload=False)
    p.run()
    assert kinds(take_reports()) == ["uninitialised"]
