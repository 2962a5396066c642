"""gelu_forward and gelu_backward against the formulas in float64."""

import math

import pytest
import torch
from devices import ops
from ops_testing import DTYPES, F32, assert_same_for_all_thread_counts, assert_within, gelu, gelu_grad, normal

pytestmark = pytest.mark.usefixtures("device")

SIZES = [1, 7, 8, 33, 1000, 16385, 100003]  # below and above the size from which threads work


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_forward(n: int, dtype: torch.dtype) -> None:
    x = normal((n,), dtype, seed=n, scale=3)
    out = torch.full_like(x, torch.nan)
    ops.gelu_forward(out, x)
    # 1.3e-7·max(1, |x|) is the measured maximum (csrc/cpu/math.h).
    assert_within(out, gelu(x), 1.3e-7 * x.double().abs().clamp(min=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_backward(n: int, dtype: torch.dtype) -> None:
    x = normal((n,), dtype, seed=n, scale=3)
    dout = normal((n,), dtype, seed=n + 1)
    dx = dout.clone()
    ops.gelu_backward(dx, x)
    # 2.4e-7 is the measured maximum of the derivative's error.
    assert_within(dx, dout.double() * gelu_grad(x), 2.4e-7 * dout.double().abs())


def test_the_negative_tail_keeps_its_relative_accuracy() -> None:
    x = torch.linspace(-5, -1, 1001)
    out = torch.empty_like(x)
    ops.gelu_forward(out, x)
    exact = x.double() / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)))
    # The argument 2u, 17 at most, has five roundings, which the exponential turns into 5·17 of the result; and a few.
    # 0.5·x·(1 + tanh u) in fp32 would be wrong by half its value at -5.
    assert ((out.double() - exact) / exact).abs().max() < 90 * F32


def test_extreme_values() -> None:
    x = torch.tensor([0.0, -0.0, 11.0, 1e10, 1e30, torch.inf, -15.0, -1e10, -1e30])
    out = torch.empty_like(x)
    ops.gelu_forward(out, x)
    assert out.tolist() == [0, 0, 11, 1e10, x[4].item(), math.inf, 0, 0, 0]
    dx = torch.ones_like(x)
    ops.gelu_backward(dx, x)
    torch.testing.assert_close(dx, torch.tensor([0.5, 0.5, 1, 1, 1, 1, 0, 0, 0]), rtol=0, atol=1e-30)

    nan = torch.tensor([torch.nan])
    ops.gelu_forward(out[:1], nan)
    assert out[0].isnan()
    dx = torch.ones(1)
    ops.gelu_backward(dx, nan)
    assert dx.isnan()


def test_thread_counts() -> None:
    x = normal((50021,), torch.float32, seed=1)

    def run() -> list[torch.Tensor]:
        out, dx = torch.empty_like(x), x.clone()
        ops.gelu_forward(out, x)
        ops.gelu_backward(dx, x)
        return [out, dx]

    assert_same_for_all_thread_counts(run)
