"""attention_forward and attention_backward against softmax attention with its (T, T) matrix in float64."""

import math

import devices
import pytest
import torch
from devices import ops
from ops_testing import DTYPES, F32, UNIT_ROUNDOFF, assert_same_for_all_thread_counts, assert_within, normal

pytestmark = pytest.mark.usefixtures("device")

# (B, T, NH, HS): one position, less than a block of queries (64), exactly one, one more, many, more than one block of
# keys (1024); few heads (backward by blocks) and many (backward by heads); head sizes that are no multiple of a vector,
# and some for each of a GPU's tiles: 32, 64, 96, 128.
SHAPES = [
    (1, 1, 1, 8),
    (3, 1, 4, 16),
    (2, 5, 3, 40),
    (1, 64, 2, 64),
    (2, 64, 4, 32),
    (1, 65, 1, 128),
    (3, 67, 4, 24),
    (1, 259, 2, 64),
    (2, 131, 5, 48),
    (1, 70, 2, 80),
    (2, 33, 1, 96),
    (1, 1091, 1, 8),
    (2, 1091, 4, 16),
]


def heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, C) as (B, NH, T, HS)."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def exact(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and the probabilities in float64."""
    B, T, C3 = qkv.shape
    q, k, v = (heads(t, num_heads) for t in qkv.double().split(C3 // 3, dim=2))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    p = scores.softmax(-1)
    return (p @ v).transpose(1, 2).reshape(B, T, C3 // 3), scores.logsumexp(-1), p


def change_by_rounded_out(qkv: torch.Tensor, dout: torch.Tensor, error: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """How dqkv changes when out, an argument of the backward, is off by error: through delta = Σ dout·out."""
    num_heads = p.shape[1]
    q, k, _ = (heads(t, num_heads) for t in qkv.double().split(dout.shape[2], dim=2))
    ds = -p * heads(dout.double() * error, num_heads).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
    changes = [ds @ k, ds.transpose(-1, -2) @ q, torch.zeros_like(q)]
    return torch.cat([t.transpose(1, 2).reshape(dout.shape) for t in changes], dim=2)


def rounded_operands(qkv: torch.Tensor, dout: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much out and dqkv change at most when p and ds are rounded to bf16, as tensor cores need them."""
    num_heads, unit = p.shape[1], UNIT_ROUNDOFF[torch.bfloat16]
    q, k, v = (heads(t, num_heads) for t in qkv.double().split(dout.shape[2], dim=2))
    d = heads(dout.double(), num_heads)
    dp = d @ v.transpose(-1, -2)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).abs() / math.sqrt(q.shape[-1])
    changes = [ds @ k.abs(), ds.transpose(-1, -2) @ q.abs(), p.transpose(-1, -2) @ d.abs()]
    flat = [(unit * t).transpose(1, 2).reshape(dout.shape) for t in (p @ v.abs(), *changes)]
    return flat[0], torch.cat(flat[1:], dim=2)


def run(qkv: torch.Tensor, dout: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    B, T, _ = qkv.shape
    out, dqkv = torch.full_like(dout, torch.nan), torch.full_like(qkv, torch.nan)
    lse = torch.full((B, num_heads, T), torch.nan)
    ops.attention_forward(out, lse, qkv, num_heads)
    ops.attention_backward(dqkv, dout, out, lse, qkv, num_heads)
    return [out, lse, dqkv]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype, device: str) -> None:
    B, T, NH, HS = shape
    if device == "cudasim" and T > 512:
        pytest.skip("takes minutes in the simulator")
    qkv = normal((B, T, 3 * NH * HS), dtype, seed=seed)
    dout = normal((B, T, NH * HS), dtype, seed=seed + 10)
    out, lse, dqkv = run(qkv, dout, NH)

    leaf = qkv.double().requires_grad_()
    exact_out, exact_lse, p = exact(leaf, NH)
    exact_out.backward(dout.double())
    exact_out, exact_lse, p = exact_out.detach(), exact_lse.detach(), p.detach()
    # A score is a sum of HS products of magnitude 1, over √HS. Its error, a few F32·√HS, is that of lse and, relative,
    # that of a probability; probabilities sum to 1, so it is that of out too. The gradients sum such errors twice.
    score_error = 8 * F32 * math.sqrt(HS)
    assert_within(lse, exact_lse, score_error)
    out_error, dqkv_error = score_error, 3 * score_error
    if device != "cpu":
        # Rounded operands; in fp32 the terms of a sum follow each other, each addition rounds the sum so far.
        out_change, dqkv_change = rounded_operands(qkv, dout, p)
        part = 1 if dtype == torch.bfloat16 else math.sqrt(T) * F32 / UNIT_ROUNDOFF[torch.bfloat16]
        out_error, dqkv_error = out_error + part * out_change, dqkv_error + part * dqkv_change
    assert_within(out, exact_out, out_error)
    expected = leaf.grad + change_by_rounded_out(qkv, dout, out.double() - exact_out, p)
    assert_within(dqkv, expected, dqkv_error)


@pytest.mark.parametrize("shape", [(2, 67, 2, 40), (1, 131, 2, 64), (1, 70, 1, 88), (1, 70, 1, 128)])
def test_tf32(shape: tuple[int, int, int, int], device: str) -> None:
    """Operands rounded to 11 significant bits: an eighth of the error of bf16's, and no less than that of fp32."""
    if device == "cpu":
        pytest.skip("TF32 is a GPU's")
    B, T, NH, HS = shape
    qkv, dout = normal((B, T, 3 * NH * HS), torch.float32, seed=1), normal((B, T, NH * HS), torch.float32, seed=2)
    ops.allow_tf32(True)
    try:
        out, _, dqkv = run(qkv, dout, NH)
    finally:
        ops.allow_tf32(False)
    leaf = qkv.double().requires_grad_()
    exact_out, _, _ = exact(leaf, NH)
    exact_out.backward(dout.double())
    for actual, expected in ((out, exact_out.detach()), (dqkv, leaf.grad)):
        error = float((actual - expected).norm() / expected.norm())
        assert 2.0**-16 < error < 2.0**-10  # a unit roundoff of 2^-11, and several of them in a row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 96, 128])
def test_tiles_fit_into_the_shared_memory_of_consumer_gpus(head_size: int, dtype: torch.dtype, device: str) -> None:
    """99 KiB for a block; the same tiles, so the same bits, as with the 227 KiB of a Hopper."""
    if device != "cudasim":
        pytest.skip("only the simulator's shared memory can be chosen")
    qkv, dout = normal((1, 70, 3 * head_size), dtype, seed=1), normal((1, 70, head_size), dtype, seed=2)
    large = run(qkv, dout, 1)
    with devices.simulator().settings(shared_memory=devices.SMALL):
        small = run(qkv, dout, 1)
    assert all(map(torch.equal, small, large))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    B, T, NH, HS = 1, 70, 2, 16
    qkv = normal((B, T, 3 * NH * HS), dtype, seed=1, scale=300)  # scores around 300²·√16, far beyond exp's range
    out, lse, dqkv = run(qkv, torch.ones(B, T, NH * HS, dtype=dtype), NH)
    exact_out, exact_lse, _ = exact(qkv, NH)
    # The error of a score, about F32·300²·√16·√16 = 0.1, is the error of lse; almost all probabilities are 0 or 1.
    assert_within(lse, exact_lse, 0.5)
    assert out.isfinite().all()
    assert dqkv.isfinite().all()
    assert (out.double() - exact_out).abs().median() <= 300 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_future_has_no_influence(dtype: torch.dtype) -> None:
    B, T, NH, HS = 2, 150, 2, 16
    qkv, dout = normal((B, T, 3 * NH * HS), dtype, seed=1), normal((B, T, NH * HS), dtype, seed=2)
    past = 97
    changed = qkv.clone()
    changed[:, past:] = normal((B, T - past, 3 * NH * HS), dtype, seed=3)
    dout[:, past:] = 0
    out, lse, dqkv = run(qkv, dout, NH)
    other_out, other_lse, other_dqkv = run(changed, dout, NH)
    assert torch.equal(out[:, :past], other_out[:, :past])
    assert torch.equal(lse[:, :, :past], other_lse[:, :, :past])
    assert torch.equal(dqkv[:, :past], other_dqkv[:, :past])
    assert (dqkv[:, past:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 300, 2, 24), (3, 131, 4, 32)])
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, T, NH, HS = shape
    qkv, dout = normal((B, T, 3 * NH * HS), dtype, seed=1), normal((B, T, NH * HS), dtype, seed=2)
    assert_same_for_all_thread_counts(lambda: run(qkv, dout, NH))
