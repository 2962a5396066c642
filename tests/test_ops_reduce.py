"""sum_of_squares, clip_scale, sum, cast and accumulate."""

import math

import numpy as np
import pytest
import torch
from devices import ops
from ops_testing import DTYPES, F32, assert_same_for_all_thread_counts, normal, same_bits

pytestmark = pytest.mark.usefixtures("device")

# A work item has 16384 elements and a parallel region 512 of them.
SIZES = [1, 7, 1023, 1025, 16384, 16385, 100003, 700 * 16384 + 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_sum_of_squares(n: int, dtype: torch.dtype) -> None:
    x = normal((n,), dtype, seed=n)
    # Blocks of 1024 are added in fp32, in chains of at most 256 additions, the rest in double; all terms are positive.
    assert ops.sum_of_squares([x]) == pytest.approx(x.double().square().sum().item(), rel=16 * F32)


def test_sum_of_squares_of_a_list() -> None:
    tensors = [normal((3 * i + 1,), DTYPES[i % 2], seed=i) for i in range(50)] + [normal((40000,), torch.bfloat16, 1)]
    expected = sum(x.double().square().sum().item() for x in tensors)
    assert ops.sum_of_squares(tensors) == pytest.approx(expected, rel=16 * F32)


@pytest.mark.parametrize("count", [211, 128])
def test_sum_of_squares_of_a_long_list(count: int) -> None:
    """More tensors than fit into the table of one CUDA launch, which holds 64, of changing lengths and dtypes."""
    tensors = [normal((1 + 37 * i % 5000,), DTYPES[i % 2], seed=i) for i in range(count)]
    expected = sum(t.double().square().sum().item() for t in tensors)
    assert ops.sum_of_squares(tensors) == pytest.approx(expected, rel=16 * F32)


def test_sum_of_squares_keeps_nan() -> None:
    x = torch.zeros(20000)
    x[17000] = torch.nan
    assert math.isnan(ops.sum_of_squares([torch.ones(3), x]))


@pytest.mark.parametrize("n", SIZES)
def test_sum(n: int) -> None:
    x = normal((n,), torch.float32, seed=n, offset=0.5)
    exact = x.double()
    assert ops.sum(x) == pytest.approx(exact.sum().item(), abs=16 * F32 * exact.abs().sum().item())


@pytest.mark.parametrize(
    ("total", "loss", "max_norm", "norm", "scale"),
    [
        (0.0, 2.0, 1.0, 0.0, 1.0),
        (0.25, 2.0, 1.0, 0.5, 1.0),
        (1.0, 2.0, 1.0, 1.0, 1.0),
        (16.0, 2.0, 1.0, 4.0, 0.25),
        (9.0, 2.0, 1.5, 3.0, 0.5),
        (2.0**126, 2.0**127, 1.0, 2.0**63, 2.0**-63),
        (math.inf, 2.0, 1.0, math.inf, math.nan),
        (math.nan, 2.0, 1.0, math.nan, math.nan),
        (0.25, math.nan, 1.0, 0.5, math.nan),
        (0.25, math.inf, 1.0, 0.5, math.nan),
        (16.0, -math.inf, 1.0, 4.0, math.nan),
    ],
)
def test_clip_scale(device: str, total: float, loss: float, max_norm: float, norm: float, scale: float) -> None:
    found = ops.clip_scale(total, loss, max_norm, device="cpu" if device == "cpu" else "cuda")
    assert found == pytest.approx((norm, scale), rel=0, abs=0, nan_ok=True)


def test_thread_counts() -> None:
    x, y = normal((300007,), torch.float32, 1), normal((40001,), torch.bfloat16, 2)
    assert_same_for_all_thread_counts(lambda: [torch.tensor([ops.sum(x), ops.sum_of_squares([x, y])])])


def all_bf16() -> torch.Tensor:
    return torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def test_cast_of_every_bf16_value_and_back() -> None:
    x = all_bf16()
    wide, back = torch.empty(65536), torch.empty_like(x)
    ops.cast(wide, x)
    assert same_bits(wide, x.float())
    ops.cast(back, wide)
    number = ~x.isnan()
    assert same_bits(back[number], x[number])
    assert back[~number].isnan().all()


@pytest.mark.parametrize("n", [1, 31, 70001])
def test_cast_rounds_to_nearest_even(n: int) -> None:
    bits = np.random.default_rng(n).integers(0, 2**32, n, dtype=np.uint32)
    bits[: n // 2] = bits[: n // 2] & 0xFFFF0000 | 0x8000  # ties
    x = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    out = torch.empty(n, dtype=torch.bfloat16)
    ops.cast(out, x)
    number = ~x.isnan()
    assert same_bits(out[number], x.to(torch.bfloat16)[number])
    assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_to_the_same_dtype_copies(dtype: torch.dtype) -> None:
    x = normal((1001,), dtype, 1)
    out = torch.empty_like(x)
    ops.cast(out, x)
    assert same_bits(out, x)


@pytest.mark.parametrize("n", [1, 31, 70001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_accumulate(n: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    out, x = normal((n,), out_dtype, 1), normal((n,), dtype, 2)
    expected = (out.float() + x.float()).to(out_dtype)
    ops.accumulate(out, x)
    assert same_bits(out, expected)
