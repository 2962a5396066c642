"""layernorm_forward, residual_layernorm_forward and layernorm_backward against the formulas in float64."""

import pytest
import torch
from devices import ops
from ops_testing import DTYPES, DTYPES_X_G, F32, assert_same_for_all_thread_counts, assert_within, normal, same_bits

pytestmark = pytest.mark.usefixtures("device")

EPS = 1e-5
SHAPES = [(1, 8), (1, 768), (2, 1), (5, 33), (64, 97), (67, 128), (1031, 24), (129, 1600)]
# On CUDA: a block for each row; rows that shared memory cannot keep; rows with more vectors than a block has threads.
SHAPES += [(5, 1024), (35, 4104), (3, 12296), (2, 33000)]


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd in float64, as columns."""
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    return mean, 1 / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + EPS)


def check_forward(
    out: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    exact_mean, exact_rstd = statistics(x)
    w, b = weight.double(), bias.double()
    # A sum of C fp32 terms: the error grows like the square root of the length of its chains of additions, C/4 with the
    # shortest vectors. So 32 roundings of the mean magnitude are plenty for C <= 1600.
    mean_error = 32 * F32 * x.double().abs().mean(-1, keepdim=True)
    assert_within(mean, exact_mean.flatten(), mean_error.flatten())
    # The error of the mean enters the variance squared only; the sum of squares has no cancellation.
    assert_within(rstd, exact_rstd.flatten(), (32 * F32 * exact_rstd + mean_error**2 * exact_rstd**3).flatten())
    xhat = (x.double() - exact_mean) * exact_rstd
    error = mean_error * exact_rstd * w.abs() + 40 * F32 * (xhat * w).abs() + 2 * F32 * b.abs()
    assert_within(out, xhat * w + b, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1000])  # 1000: E[x²] - E[x]² in fp32 would lose the variance
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int], offset: float, dtype: torch.dtype) -> None:
    N, C = shape
    x = normal(shape, dtype, seed=C, scale=2, offset=offset)
    weight, bias = normal((C,), dtype, seed=1, offset=1), normal((C,), dtype, seed=2)
    out, mean, rstd = torch.full_like(x, torch.nan), torch.full((N,), torch.nan), torch.full((N,), torch.nan)
    ops.layernorm_forward(out, mean, rstd, x, weight, bias)
    check_forward(out, mean, rstd, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["apart", "in a", "in b"])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_forward(shape: tuple[int, int], place: str, dtype: torch.dtype) -> None:
    N, C = shape
    a, b = normal(shape, dtype, seed=C, scale=2), normal(shape, dtype, seed=C + 1)
    weight, bias = normal((C,), dtype, seed=1, offset=1), normal((C,), dtype, seed=2)
    expected = (a.float() + b.float()).to(dtype)
    residual = {"apart": torch.full_like(a, torch.nan), "in a": a, "in b": b}[place]
    out, mean, rstd = torch.empty_like(a), torch.empty(N), torch.empty(N)
    ops.residual_layernorm_forward(residual, out, mean, rstd, a, b, weight, bias)
    assert same_bits(residual, expected)
    check_forward(out, mean, rstd, residual, weight, bias)

    # Recomputation in the backward pass starts from the stored residual: it must find the same bits.
    again = [torch.empty_like(out), torch.empty(N), torch.empty(N)]
    ops.layernorm_forward(*again, residual, weight, bias)
    for x, y in zip(again, [out, mean, rstd], strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int], dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    C = shape[1]
    x, dout = normal(shape, dtype, seed=C, scale=2, offset=0.5), normal(shape, dtype, seed=C + 1)
    weight = normal((C,), dtype, seed=1, offset=1)
    mean, rstd = statistics(x)
    dx, dweight, dbias = normal(shape, dtype, 2), normal((C,), grad_dtype, 3), normal((C,), grad_dtype, 4)
    start = [t.double() for t in (dx, dweight, dbias)]
    mean32, rstd32 = mean.float().flatten(), rstd.float().flatten()
    ops.layernorm_backward(dx, dweight, dbias, dout, x, weight, mean32, rstd32)

    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    b64 = torch.zeros(C, dtype=torch.float64, requires_grad=True)
    out = torch.nn.functional.layer_norm(x64, (C,), w64, b64, EPS)
    grads = torch.autograd.grad(out, (x64, w64, b64), dout.double())

    # xhat inherits the rounding of mean and rstd; each result is a sum whose terms have a few roundings each and whose
    # chains of additions are short: 16 roundings of the sum of the terms' magnitudes (32 where xhat enters twice).
    xhat = ((x.double() - mean) * rstd).abs() + (mean * rstd).abs()
    g = (dout.double() * weight.double()).abs()
    dx_terms = rstd * (g + g.mean(-1, keepdim=True) + xhat * (g * xhat).mean(-1, keepdim=True))
    assert_within(dx, start[0] + grads[0], 32 * F32 * dx_terms + F32 * start[0].abs())
    assert_within(dweight, start[1] + grads[1], 16 * F32 * (dout.double().abs() * xhat).sum(0) + F32 * start[1].abs())
    assert_within(dbias, start[2] + grads[2], 16 * F32 * dout.double().abs().sum(0) + F32 * start[2].abs())

    # Without accumulation the parameters' gradients start from zero; dx always accumulates.
    expected, found = torch.zeros(2, C, dtype=grad_dtype), torch.full((2, C), torch.nan, dtype=grad_dtype)
    for gradients, how in ((expected, {}), (found, {"accumulate": False})):
        again = start[0].to(dtype)
        ops.layernorm_backward(again, *gradients, dout, x, weight, mean32, rstd32, **how)
        assert same_bits(again, dx)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
def test_thread_counts(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    shape = N, C = 1031, 40
    x, b, dout = (normal(shape, dtype, seed) for seed in range(3))
    weight, bias = normal((C,), dtype, 3), normal((C,), dtype, 4)

    def run() -> list[torch.Tensor]:
        residual, out, mean, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(N), torch.empty(N)
        ops.residual_layernorm_forward(residual, out, mean, rstd, x, b, weight, bias)
        dx, dweight, dbias = torch.zeros_like(x), torch.zeros(C, dtype=grad_dtype), torch.zeros(C, dtype=grad_dtype)
        ops.layernorm_backward(dx, dweight, dbias, dout, residual, weight, mean, rstd)
        return [residual, out, mean, rstd, dx, dweight, dbias]

    assert_same_for_all_thread_counts(run)
