"""fp8_classifier against the gradient of cross-entropy in float64, as torch rounds it to E5M2."""

import math

import pytest
import torch
from devices import RealGPU, Simulator, ops
from ops_testing import F32, normal, same_bits
from test_ops_classifier import DLOSS, targets_of
from test_ops_fp8 import _device  # noqa: F401

from llmc import _C

BF16, E5M2 = torch.bfloat16, torch.float8_e5m2
LARGEST = 57344.0
# (N, V, Vp): one row, no padding, V no multiple of a vector, odd, more than one block (4096), GPT-2's vocabulary.
SHAPES = [(1, 1, 16), (1, 17, 64), (5, 64, 64), (67, 251, 256), (3, 4096, 4096), (4, 8195, 8320), (9, 50257, 50304)]


def classify(
    logits: torch.Tensor, targets: torch.Tensor, V: int, dloss: float
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """(dlogits, unscale, losses), over what was there."""
    dlogits = torch.full(logits.shape, math.nan).to(E5M2)
    unscale, losses = torch.tensor([math.nan]), torch.ones(len(logits))
    ops.fp8_classifier(dlogits, unscale, losses, logits, targets, V, dloss)
    return dlogits, float(unscale), losses


def unscale_of(dloss: float) -> float:
    """1 / the largest power of two by which dloss is finite."""
    return 2.0 ** -math.floor(math.log2(LARGEST / dloss))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient(shape: tuple[int, int, int], seed: int) -> None:
    N, V, Vp = shape
    logits, targets = normal((N, Vp), BF16, seed=seed, scale=4), targets_of(N, V)
    logits[:, V:] = 1000  # the padding takes no part
    kept, in_place, expected_losses = logits.clone(), logits.clone(), torch.ones(N)
    dlogits, unscale, losses = classify(logits, targets, V, DLOSS)
    assert unscale == unscale_of(DLOSS)
    assert logits.equal(kept)
    ops.fused_classifier(in_place, expected_losses, targets, V, DLOSS, True)
    assert losses.equal(expected_losses)  # the same arithmetic, which test_ops_classifier.py checks
    assert (dlogits[:, V:].float() == 0).all()

    leaf = logits[:, :V].double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, targets.long(), reduction="sum") * DLOSS
    loss.backward()
    # fp32 before the rounding is off as in test_ops_classifier.py; so it is a number between those of either end.
    probabilities = leaf.detach().softmax(1)
    error = DLOSS * (probabilities * (math.sqrt(V / 4) + 16) * F32 + 2 * F32 * (leaf.grad != 0))
    low, nearest, high = (((leaf.grad + e) / unscale).float().to(E5M2).float() for e in (-error, 0, error))
    found = dlogits[:, :V].float()
    assert ((low <= found) & (found <= high)).all()
    assert (found == nearest).double().mean() > 0.99


@pytest.mark.parametrize("dloss", [1.0, 1.75, 1.7578125, 0.875, 1 / 65536, 1 / 3e6, 1e-30, 3e4])
def test_the_whole_loss_fits(dloss: float) -> None:
    """Where the target is impossible, and another token is certain: the largest gradients there are. The scale leaves
    them less than half of what the format has."""
    logits = torch.full((2, 32), -100.0, dtype=BF16)
    logits[:, 5] = 100
    dlogits, unscale, _ = classify(logits, torch.tensor([7, 30], dtype=torch.int32), 31, dloss)
    assert unscale == unscale_of(dloss) and LARGEST / 2 < dloss / unscale <= LARGEST
    expected = torch.zeros(2, 32)
    expected[:, 5] = dloss / unscale
    expected[0, 7] = expected[1, 30] = -dloss / unscale
    assert dlogits.float().equal(expected.to(E5M2).float())
    assert dlogits.float().isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 40, 299])  # in a vector, and behind the last one
def test_what_is_not_finite_shows(value: float, column: int) -> None:
    logits, targets = normal((3, 304), BF16, seed=1), targets_of(3, 300)
    logits[1, column] = value
    dlogits, _, losses = classify(logits, targets, 300, DLOSS)
    kept, _, kept_losses = classify(logits[[0, 2]], targets[[0, 2]], 300, DLOSS)
    if value < 0:  # an impossible token
        assert dlogits[1, column].float() == 0 and dlogits.float().isfinite().all() and losses.isfinite().all()
    else:
        assert dlogits[1, :300].float().isnan().all() and losses[1].isnan()
    assert (dlogits[:, 300:].float() == 0).all()
    assert dlogits[[0, 2]].float().equal(kept.float()) and losses[[0, 2]].equal(kept_losses)


def test_same_bits_in_every_schedule(cuda: Simulator | RealGPU) -> None:
    if not isinstance(cuda, Simulator):
        pytest.skip("a GPU chooses its own schedule")
    logits, targets = normal((5, 1024), BF16, seed=5), targets_of(5, 1000)
    results = []
    for schedule in ("forward", "reverse", "random:1"):
        with cuda.settings(schedule=schedule):
            dlogits, unscale, losses = classify(logits, targets, 1000, DLOSS)
        results.append((dlogits.float(), torch.tensor([unscale]), losses))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals(cuda: Simulator | RealGPU) -> None:
    logits, targets = normal((2, 32), BF16, 1), targets_of(2, 30)
    for dloss in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(cuda.core.Error, match=r"dloss is .*, it must be positive"):
            classify(logits, targets, 30, dloss)
    with pytest.raises(cuda.core.Error, match="logits is fp32, it must be bf16"):
        classify(logits.float(), targets, 30, 1.0)
    with pytest.raises(cuda.core.Error, match="vocab_size=33 must be in"):
        classify(logits, targets, 33, 1.0)
    with pytest.raises(cuda.core.Error, match="targets holds 30 at index 0"):
        classify(logits, torch.tensor([30, 0], dtype=torch.int32), 30, 1.0)
    losses, unscale, e4m3 = torch.zeros(2), torch.zeros(1), torch.zeros(2, 32).to(torch.float8_e4m3fn)
    with pytest.raises(cuda.core.Error, match="dlogits must be float8_e5m2"):
        ops.fp8_classifier(e4m3, unscale, losses, logits, targets, 30, 1.0)
    with pytest.raises(_C.Error, match="fp8_classifier needs a GPU of compute capability"):
        _C.ops.fp8_classifier(e4m3.float().to(E5M2), unscale, losses, logits, targets, 30, 1.0)
