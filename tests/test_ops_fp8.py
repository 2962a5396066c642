"""FP8: conversions against torch's, bit by bit, scales against a formula, products against float64."""

import math
from collections.abc import Iterator

import devices
import pytest
import torch
from devices import RealGPU, Simulator, ops
from ops_testing import F32, assert_within, gelu, gelu_grad, normal, same_bits

from llmc import _C

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = [E4M3, E5M2]
BF16 = torch.bfloat16
# One tile or less, whole tiles, and tiles that end early either way.
SHAPES = [(16, 16), (64, 128), (48, 80), (192, 16), (80, 400), (144, 272)]


@pytest.fixture(autouse=True)
def _device(cuda: Simulator | RealGPU) -> Iterator[None]:
    if isinstance(cuda, RealGPU) and _C.cuda_devices()[0]["compute_capability"] < (8, 9):
        pytest.skip("this GPU has no FP8")
    devices.ops.device = cuda
    yield
    devices.ops.device = None


def quantized(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """By torch, which does not saturate by itself."""
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), (x.float() * scale).clamp(-largest, largest), math.nan).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, or both NaN, of which there are several."""
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan)
    assert torch.equal(actual.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def pair(scale: float) -> torch.Tensor:
    return torch.tensor([scale, 1 / scale])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wanted", ["out", "transposed", "both"])
def test_layouts(shape: tuple[int, int], dtype: torch.dtype, wanted: str) -> None:
    N, C = shape
    x = normal(shape, BF16, seed=N + C)
    expected = quantized(x, 4.0, dtype)
    out = empty((N, C), dtype) if wanted != "transposed" else None
    transposed = empty((C, N), dtype) if wanted != "out" else None
    amax = torch.zeros(1)
    ops.quantize(out, transposed, amax, x, pair(4.0))
    if out is not None:
        assert_same(out, expected)
    if transposed is not None:
        assert_same(transposed, expected.T.contiguous())
    assert amax == x.abs().max()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-126, -20, -8, -1, 0, 3, 7, 30, 126])
def test_all_numbers_of_bf16(dtype: torch.dtype, exponent: int) -> None:
    """Ties, the smallest numbers and those beyond the largest; infinities and NaN become NaN, which is seen later."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).view(256, 256)
    out, transposed = empty((256, 256), dtype), empty((256, 256), dtype)
    ops.quantize(out, transposed, None, x, pair(2.0**exponent))
    expected = quantized(x, 2.0**exponent, dtype)
    assert expected.float().isnan().sum() == 2 * 128  # all that is not finite, and nothing else
    assert_same(out, expected)
    assert_same(transposed, expected.T.contiguous())


@pytest.mark.parametrize("place", [(0, 0), (63, 127), (64, 128), (79, 399)])
@pytest.mark.parametrize("value", [-7.0, math.inf, math.nan])
def test_amax_of_one_value(place: tuple[int, int], value: float) -> None:
    x = torch.zeros(80, 400, dtype=BF16)
    x[place] = value
    for before, expected in [(0.0, abs(value)), (3.0, abs(value)), (math.nan, math.nan)]:
        amax, out = torch.tensor([before]), empty((80, 400), E4M3)
        ops.quantize(out, None, amax, x, pair(1.0))
        assert amax.equal(torch.tensor([expected])) or (amax.isnan().all() and math.isnan(expected))


def test_amax_keeps_the_larger() -> None:
    amax = torch.tensor([9.0])
    ops.quantize(None, empty((16, 16), E5M2), amax, normal((16, 16), BF16, seed=1), pair(1.0))
    assert amax == 9.0


def test_no_bank_conflicts(cuda: Simulator | RealGPU) -> None:
    if not isinstance(cuda, Simulator):
        pytest.skip("only the simulator counts them")
    out, transposed, amax = empty((128, 256), E5M2), empty((256, 128), E5M2), torch.zeros(1)
    with cuda.shared_accesses() as accesses:
        ops.quantize_gradient(out, transposed, amax, empty((256,), BF16), normal((128, 256), BF16, 2), None, pair(1.0))
    own = [access for access in accesses if "quantize_kernel" in access.kernel]
    assert {(access.kind, access.bytes) for access in own} >= {("write", 4), ("read", 16), ("read", 4)}
    assert [access for access in own if access.wavefronts > access.least] == []


# --- what is computed on the way --------------------------------------------------------------------------------------


def assert_rounded(
    actual: torch.Tensor, exact: torch.Tensor, scale: float, dtype: torch.dtype, error: torch.Tensor | float
) -> None:
    """Of FP8 numbers: those of exact, or of what is off by error; smaller is as good as 0 below the smallest number."""
    low, high = (quantized(exact + sign * error, scale, dtype).float() for sign in (-1, 1))
    assert ((low <= actual.float()) & (actual.float() <= high)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu(shape: tuple[int, int]) -> None:
    N, C = shape
    pre = 2 * normal(shape, BF16, seed=N + C)
    out, transposed, amax = empty((N, C), E4M3), empty((C, N), E4M3), torch.zeros(1)
    ops.quantize_gelu(out, transposed, amax, pre, pair(8.0))
    expected = gelu(pre.double())
    assert_rounded(out, expected, 8.0, E4M3, 2.0**-16 * pre.double().abs())  # of the fast exponential
    assert_same(transposed, out.T.contiguous())
    assert float(amax) == pytest.approx(float(expected.abs().max()), rel=2.0**-16)
    only = empty((C, N), E4M3)
    ops.quantize_gelu(None, only, None, pre, pair(8.0))
    assert_same(only, transposed)
    largest = torch.zeros(1)
    ops.quantize_gelu(None, None, largest, pre, None)
    assert largest.equal(amax)


@pytest.mark.parametrize("through", [False, True], ids=["itself", "gelu"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape: tuple[int, int], dtype: torch.dtype, accumulate: bool, through: bool) -> None:
    N, C = shape
    dout, pre = normal(shape, BF16, seed=N + C), 2 * normal(shape, BF16, seed=N + C + 1)
    exact = dout.double() * (gelu_grad(pre.double()) if through else 1)
    error = 2.0**-15 * dout.double().abs() if through else 0.0 * exact  # of the fast exponential
    before = normal((C,), dtype, 3) if accumulate else empty((C,), dtype)
    out, transposed, amax, dbias = empty((N, C), E5M2), empty((C, N), E5M2), torch.zeros(1), before.clone()
    ops.quantize_gradient(out, transposed, amax, dbias, dout, pre if through else None, pair(0.25), accumulate)
    assert_rounded(out, exact, 0.25, E5M2, error)
    assert_same(transposed, out.T.contiguous())
    assert float(amax) == pytest.approx(float(exact.abs().max()), rel=2.0**-15)
    expected = exact.sum(0) + (before.double() if accumulate else 0)
    # Each of N additions in fp32 is off by half a unit of a partial sum.
    assert_within(dbias, expected, (N + 1) * F32 * exact.abs().sum(0) + error.sum(0) + F32 * expected.abs())


def test_gradients_largest_value_alone() -> None:
    """Before there is a scale: the bias's gradient is not added twice."""
    dout, pre, amax = normal((80, 400), BF16, 1), normal((80, 400), BF16, 2), torch.zeros(1)
    ops.quantize_gradient(None, None, amax, None, dout, pre, None)
    again = torch.zeros(1)
    ops.quantize_gradient(empty((80, 400), E5M2), None, again, None, dout, pre, pair(1.0))
    assert amax.equal(again) and amax > 0


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transpose(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.arange(math.prod(shape), dtype=torch.int64).mul(167).to(torch.uint8).view(shape)
    out = torch.zeros(shape[::-1], dtype=torch.uint8)
    ops.fp8_transpose(out.view(dtype), x.view(dtype))
    assert out.equal(x.T)


# A row of a warp, of a block, and one that is too long to be kept.
@pytest.mark.parametrize("shape", [(16, 16), (48, 400), (16, 2064), (16, 24592)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_layernorm(shape: tuple[int, int], residual: bool) -> None:
    """What layernorm_forward computes, but rounded to E4M3 instead of bf16; mean, rstd and residual are its bits."""
    N, C = shape
    a, b, weight, bias = (normal(s, BF16, seed) for seed, s in enumerate([shape, shape, (C,), (C,)]))
    mean, rstd, expected_mean, expected_rstd = (empty((N,), torch.float32) for _ in range(4))
    sums = [empty(shape, BF16) for _ in range(2)] if residual else [None, None]
    out, amax, plain = empty(shape, E4M3), torch.zeros(1), empty(shape, BF16)
    ops.fp8_layernorm_forward(out, amax, sums[0], mean, rstd, a, b if residual else None, weight, bias, pair(4.0))
    if residual:
        ops.residual_layernorm_forward(sums[1], plain, expected_mean, expected_rstd, a, b, weight, bias)
        assert same_bits(sums[0], sums[1])
    else:
        ops.layernorm_forward(plain, expected_mean, expected_rstd, a, weight, bias)
    assert mean.equal(expected_mean) and rstd.equal(expected_rstd)
    x = (sums[0] if residual else a).double()
    exact = (x - x.mean(1, keepdim=True)) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt() * weight + bias
    # Mean and rstd are off by some units in the last place: test_ops_layernorm.py.
    assert_rounded(out, exact, 4.0, E4M3, 2.0**-18 * (exact.abs() + weight.double().abs() + bias.double().abs()))
    assert float(amax) == pytest.approx(float(exact.abs().max()), rel=2.0**-16)
    largest = torch.zeros(1)
    ops.fp8_layernorm_forward(None, largest, sums[0], mean, rstd, a, b if residual else None, weight, bias, None)
    assert largest.equal(amax)


def test_layernorm_shows_what_is_not_finite() -> None:
    a, weight, bias = normal((32, 48), BF16, 1), torch.ones(48, dtype=BF16), torch.zeros(48, dtype=BF16)
    a[31, 47] = math.inf
    out, amax, mean, rstd = empty((32, 48), E4M3), torch.zeros(1), torch.zeros(32), torch.zeros(32)
    ops.fp8_layernorm_forward(out, amax, None, mean, rstd, a, None, weight, bias, pair(1.0))
    assert amax.isnan().all() and out.float()[31].isnan().all() and not out.float()[:31].isnan().any()


def scale_of(amax: float, dtype: torch.dtype) -> float:
    """The largest power of two by which amax stays in the format."""
    if amax == 0 or not math.isfinite(amax):
        return 1.0
    return 2.0 ** min(math.floor(math.log2(torch.finfo(dtype).max / amax)), 126)


AMAXES = [1.0, 1.75, 1.7578125, 448.0, 450.0, 57344.0, 1e-30, 3e38, 1e-40, 0.0, math.inf, math.nan]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("amax", AMAXES)
def test_scale_of_a_tensor(amax: float, dtype: torch.dtype) -> None:
    x = torch.zeros(48, 80, dtype=BF16)
    x[31, 17] = -amax
    scale, largest = empty((2,), torch.float32), torch.zeros(1)
    ops.quantize(None, None, largest, x, None)
    ops.fp8_scale(scale, largest, dtype == E5M2)
    expected = scale_of(float(x[31, 17].abs()), dtype)
    assert scale.tolist() == [expected, 1 / expected]
    out = empty((48, 80), dtype)
    ops.quantize(out, None, None, x, scale)
    value = float(x[31, 17])
    if math.isfinite(value):  # nothing was saturated: it is within half of the format's distance
        assert abs(float(out[31, 17]) * float(scale[1]) - value) <= abs(value) * 2.0 ** (-4 if dtype == E4M3 else -3)


def test_raise() -> None:
    """Infinity is more than all numbers, and NaN more than that."""
    values = torch.tensor([0.0, 1e-40, 1.0, 2.0, math.inf, math.nan]).repeat(60)  # more than a block
    for shift in range(6):
        amax, other = values.clone(), values.roll(shift)
        ops.raise_amax(amax, other)
        order = torch.arange(6).repeat(60)
        assert amax.nan_to_num(7, 8).equal(values[torch.maximum(order, order.roll(shift))].nan_to_num(7, 8))


def test_history() -> None:
    """Three tensors, the last in E5M2, over more updates than the window has, by a few lines of Python."""
    window = 3
    scales, history = empty((3, 2), torch.float32), torch.zeros(3, window)
    past: list[list[float]] = [[], [], []]
    updates = [([1.0, 0.0, 5.0], 1.0), ([8.0, 0.0, math.inf], 0.5), ([2.0, math.nan, 1e-3], 1.0),
               ([99.0, 99.0, 99.0], math.nan), ([0.5, 0.0, 2.0], 1.0), ([0.25, 3.0, 1e-5], 1.0)]  # fmt: skip
    for amax, grad_scale in updates:
        ops.update_fp8_scales(scales, history, torch.tensor(amax), torch.tensor([grad_scale]), 2)
        for i, value in enumerate(amax):
            if math.isfinite(grad_scale) and math.isfinite(value):
                past[i] = (past[i] + [value])[-window:]
            expected = scale_of(max(past[i], default=0.0), E4M3 if i < 2 else E5M2)
            assert scales[i].tolist() == [expected, 1 / expected]
            values = torch.tensor(past[i], dtype=torch.float32)
            assert history[i].equal(torch.nn.functional.pad(values, (window - len(past[i]), 0)))
    again = empty((3, 2), torch.float32)
    ops.update_fp8_scales(again, history, None, None, 2)
    assert again.equal(scales)


def test_many_tensors() -> None:
    history = normal((700, 16), torch.float32, seed=3).abs()
    scales = empty((700, 2), torch.float32)
    ops.update_fp8_scales(scales, history, None, None, 467)
    for i, row in enumerate(history.tolist()):
        assert scales[i, 0] == scale_of(max(row), E4M3 if i < 467 else E5M2)


# --- products ---------------------------------------------------------------------------------------------------------

PRODUCTS = [(16, 16, 16), (48, 80, 32), (128, 272, 144)]  # N, IC, OC


def factor(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return normal(shape, torch.float32, seed).to(dtype)


def exact(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a·bᵀ/4 of the FP8 numbers, and the error that fp32 makes of it: product_error of test_ops_matmul.py."""
    a, b = a.double(), b.double()
    return a @ b.T / 4, (math.sqrt(a.shape[1]) + 4) * F32 * (a.abs() @ b.abs().T) / 4


UNSCALE = torch.tensor([8.0]), torch.tensor([2.0**-5])  # together 1/4


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_forward(shape: tuple[int, int, int]) -> None:
    N, IC, OC = shape
    x, weight, bias = factor((N, IC), E4M3, 1), factor((OC, IC), E4M3, 2), normal((OC,), BF16, 3)
    out = empty((N, OC), BF16)
    ops.fp8_matmul_forward(out, x, UNSCALE[0], weight, UNSCALE[1], bias)
    product, error = exact(x, weight)
    expected = product + bias.double()
    assert_within(out, expected, error + F32 * expected.abs())


@pytest.mark.parametrize("formats", [(E5M2, E4M3), (E4M3, E5M2), (E4M3, E4M3)], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_backward(
    shape: tuple[int, int, int], dtype: torch.dtype, accumulate: bool, formats: tuple[torch.dtype, torch.dtype]
) -> None:
    N, K, M = shape
    a, b = factor((N, K), formats[0], 1), factor((M, K), formats[1], 2)
    before = normal((N, M), dtype, 3) if accumulate else empty((N, M), dtype)
    out = before.clone()
    ops.fp8_matmul_backward(out, a, UNSCALE[0], b, UNSCALE[1], accumulate)
    expected, error = exact(a, b)
    if accumulate:
        expected = expected + before.double()
        error = error + F32 * expected.abs()
    assert_within(out, expected, error)


def test_same_bits_in_every_schedule(cuda: Simulator | RealGPU) -> None:
    if not isinstance(cuda, Simulator):
        pytest.skip("a GPU chooses its own schedule")
    x = normal((144, 272), BF16, seed=5)
    results = []
    for schedule in ("forward", "reverse", "random:1", "random:2"):
        amax, out, transposed = torch.zeros(1), empty((144, 272), E5M2), empty((272, 144), E5M2)
        dbias = empty((272,), torch.float32)
        with cuda.settings(schedule=schedule):
            ops.quantize_gradient(out, transposed, amax, dbias, x, None, pair(2.0))
        results.append((amax, out.float(), transposed.float(), dbias))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"), [((24, 16), "N=24 must be a multiple of 16"), ((16, 40), "C=40 must be a multiple of 16")]
)
def test_sizes(shape: tuple[int, int], message: str, cuda: Simulator | RealGPU) -> None:
    with pytest.raises(cuda.core.Error, match=message):
        ops.quantize(empty(shape, E4M3), None, None, normal(shape, BF16, 1), pair(1.0))


def test_not_on_a_cpu() -> None:
    x, out = torch.zeros(16, 16, dtype=BF16), torch.zeros(16, 16, dtype=E4M3)
    with pytest.raises(_C.Error, match="quantize needs a GPU of compute capability"):
        _C.ops.quantize(out, None, None, x, pair(1.0))
