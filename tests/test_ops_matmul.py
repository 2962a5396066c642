"""The matrix products and bias_backward against float64, and the fused forms against the separate operations."""

import math

import devices
import pytest
import torch
from devices import ops
from ops_testing import (
    DTYPES,
    DTYPES_X_G,
    F32,
    UNIT_ROUNDOFF,
    assert_same_for_all_thread_counts,
    assert_within,
    gelu,
    gelu_grad,
    normal,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("device")

# (N, IC, OC): a single row, single elements, primes, several tiles in both directions, several bf16 panels
# (512) deep; a large one, whose transposed operands are copied to panels in fp32 too, two of them deep.
SHAPES = [
    (1, 8, 8),
    (1, 1, 1),
    (3, 768, 1),
    (7, 24, 40),
    (61, 97, 211),
    (768, 128, 384),
    (1031, 131, 517),
    (130, 1100, 900),
    (781, 901, 1091),
]


def product_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of a @ b in fp32. Rounding errors of either sign add up like the square root of the number of terms, each at most
    F32 of the sum of magnitudes so far; 4 covers sums of a few terms."""
    return (math.sqrt(a.shape[1]) + 4) * F32 * (a.double().abs() @ b.double().abs())


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_accumulation_gradients_start_from_zero(
    shape: tuple[int, int, int], dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    N, IC, OC = shape
    dout, x = normal((N, OC), dtype, seed=N), normal((N, IC), dtype, seed=IC)
    for result, gradient in [((OC, IC), lambda d, **how: ops.matmul_backward_weight(d, dout, x, **how)),
                             ((OC,), lambda d, **how: ops.bias_backward(d, dout, **how))]:  # fmt: skip
        expected, found = torch.zeros(result, dtype=grad_dtype), torch.full(result, torch.nan, dtype=grad_dtype)
        gradient(expected)
        gradient(found, accumulate=False)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype) -> None:
    N, IC, OC = shape
    x, weight = normal((N, IC), dtype, seed=N), normal((OC, IC), dtype, seed=OC, scale=0.1)
    bias = normal((OC,), dtype, seed=3) if with_bias else None
    out = torch.full((N, OC), torch.nan, dtype=dtype)
    ops.matmul_forward(out, x, weight, bias)
    expected, error = x.double() @ weight.double().T, product_error(x, weight.T)
    if bias is not None:
        expected += bias.double()
        error += F32 * expected.abs()
    assert_within(out, expected, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_input(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, IC, OC = shape
    dout, weight = normal((N, OC), dtype, seed=N), normal((OC, IC), dtype, seed=OC, scale=0.1)
    dx = torch.full((N, IC), torch.nan, dtype=dtype)
    ops.matmul_backward_input(dx, dout, weight)
    assert_within(dx, dout.double() @ weight.double(), product_error(dout, weight))


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_weight_accumulates(shape: tuple[int, int, int], dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    N, IC, OC = shape
    dout, x = normal((N, OC), dtype, seed=N), normal((N, IC), dtype, seed=IC)
    start = normal((OC, IC), grad_dtype, seed=5, scale=10)
    dweight = start.clone()
    ops.matmul_backward_weight(dweight, dout, x)
    # The running sum may include the start value: each of its N additions rounds by F32 of it at most.
    error = product_error(dout.T, x) + (math.sqrt(N) + 4) * F32 * start.double().abs()
    assert_within(dweight, start.double() + dout.double().T @ x.double(), error)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 64), (1031, 131), (700, 768)])
def test_bias_backward_accumulates(shape: tuple[int, int], dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    N, OC = shape
    dout, start = normal(shape, dtype, seed=N), normal((OC,), grad_dtype, seed=5, scale=10)
    dbias = start.clone()
    ops.bias_backward(dbias, dout)
    error = (math.sqrt(N) + 4) * F32 * dout.double().abs().sum(0) + F32 * start.double().abs()
    assert_within(dbias, start.double() + dout.double().sum(0), error)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gradients_of_weight_and_bias(
    shape: tuple[int, int, int], accumulate: bool, dtype: torch.dtype, grad_dtype: torch.dtype, device: str
) -> None:
    N, IC, OC = shape
    dout, x = normal((N, OC), dtype, seed=N), normal((N, IC), dtype, seed=IC)
    found = normal((OC, IC), grad_dtype, seed=5, scale=10), normal((OC,), grad_dtype, seed=6, scale=10)
    if not accumulate:
        for gradient in found:
            gradient.fill_(torch.nan)
    separate = [gradient.clone() for gradient in found]
    exact = [dout.double().T @ x.double(), dout.double().sum(0)]
    errors = [product_error(dout.T, x), (math.sqrt(N) + 4) * F32 * dout.double().abs().sum(0)]
    if accumulate:
        exact = [total + gradient.double() for total, gradient in zip(exact, found, strict=True)]
        errors[0] += (math.sqrt(N) + 4) * F32 * found[0].double().abs()
        errors[1] += F32 * found[1].double().abs() + UNIT_ROUNDOFF[grad_dtype] * dout.double().sum(0).abs()
    ops.matmul_bias_backward_weight(*found, dout, x, accumulate=accumulate)
    ops.matmul_backward_weight(separate[0], dout, x, accumulate=accumulate)
    ops.bias_backward(separate[1], dout, accumulate=accumulate)
    for gradient, expected, error in zip(found, exact, errors, strict=True):
        assert_within(gradient, expected, error)
    if device == "cpu":
        assert same_bits(found[0], separate[0]) and same_bits(found[1], separate[1])


@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_of_weight_and_bias_that_cublaslt_cannot_fuse(
    accumulate: bool, cuda: devices.Simulator | devices.RealGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as by the separate operations."""
    if not isinstance(cuda, devices.Simulator):
        pytest.skip("a GPU's cuBLASLt can")
    monkeypatch.setattr(ops, "device", cuda)
    monkeypatch.setenv("CUDASIM_CUBLASLT_WITHOUT", "BGRADB")
    for dtype, grad_dtype in DTYPES_X_G:
        dout, x = normal((100, 24), dtype, seed=1), normal((100, 40), dtype, seed=2)
        found = normal((24, 40), grad_dtype, seed=3), normal((24,), grad_dtype, seed=4)
        separate = [gradient.clone() for gradient in found]
        ops.matmul_bias_backward_weight(*found, dout, x, accumulate=accumulate)
        ops.matmul_backward_weight(separate[0], dout, x, accumulate=accumulate)
        ops.bias_backward(separate[1], dout, accumulate=accumulate)
        assert same_bits(found[0], separate[0]) and same_bits(found[1], separate[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gelu_equals_the_separate_operations(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype, device: str
) -> None:
    N, IC, OC = shape
    x, weight = normal((N, IC), dtype, seed=N), normal((OC, IC), dtype, seed=OC, scale=0.1)
    bias = normal((OC,), dtype, seed=3) if with_bias else None
    pre, out = (torch.full((N, OC), torch.nan, dtype=dtype) for _ in range(2))
    ops.matmul_gelu_forward(out, pre, x, weight, bias)
    expected_pre, expected_out = torch.empty_like(pre), torch.empty_like(out)
    ops.matmul_forward(expected_pre, x, weight, bias)
    ops.gelu_forward(expected_out, expected_pre)
    assert same_bits(pre, expected_pre)
    if device == "cpu":
        assert same_bits(out, expected_out)
    else:  # cuBLASLt's GELU sees the sum before or after it is rounded; the slope of GELU is below 1.13
        total = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
        error = product_error(x, weight.T) + UNIT_ROUNDOFF[dtype] * total.abs()
        assert_within(out, gelu(total), 1.13 * error + 4 * F32 * total.abs())

    # Backward, the other way through the same weight: pre belongs to its input.
    pre, dout = normal((N, IC), dtype, seed=6), normal((N, OC), dtype, seed=7)
    dpre, expected = torch.full_like(pre, torch.nan), torch.empty_like(pre)
    ops.matmul_gelu_backward_input(dpre, dout, weight, pre)
    ops.matmul_backward_input(expected, dout, weight)
    ops.gelu_backward(expected, pre)
    if device == "cpu":
        assert same_bits(dpre, expected)
    else:
        total, slope = dout.double() @ weight.double(), gelu_grad(pre)
        error = product_error(dout, weight) + UNIT_ROUNDOFF[dtype] * total.abs()
        assert_within(dpre, total * slope, 1.13 * error + 8 * F32 * total.abs())


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("shape", [(768, 128, 384), (259, 768, 770), (781, 901, 1091)])
def test_results_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, int, int], dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    N, IC, OC = shape
    x, dout = normal((N, IC), dtype, seed=1), normal((N, OC), dtype, seed=2)
    weight, bias = normal((OC, IC), dtype, seed=3), normal((OC,), dtype, seed=4)

    def run() -> list[torch.Tensor]:
        out, pre, dx, dpre = (torch.empty_like(t) for t in (dout, dout, x, x))
        dweight, dbias = torch.ones(OC, IC, dtype=grad_dtype), torch.ones(OC, dtype=grad_dtype)
        ops.matmul_gelu_forward(out, pre, x, weight, bias)
        ops.matmul_backward_input(dx, dout, weight)
        ops.matmul_gelu_backward_input(dpre, dout, weight, x)
        ops.matmul_backward_weight(dweight, dout, x)
        ops.bias_backward(dbias, dout)
        return [out, pre, dx, dpre, dweight, dbias]

    assert_same_for_all_thread_counts(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate(dtype: torch.dtype) -> None:
    x, weight = torch.ones(4, 16, dtype=dtype), torch.ones(24, 16, dtype=dtype)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    out = torch.empty(4, 24, dtype=dtype)
    ops.matmul_forward(out, x, weight, None)
    assert out[1].isnan().all()
    assert (out[2] == torch.inf).all()
    assert (out[0] == 16).all()
    assert (out[3] == 16).all()
