"""fused_classifier against cross-entropy in float64."""

import math

import pytest
import torch
from devices import ops
from ops_testing import DTYPES, F32, assert_same_for_all_thread_counts, assert_within, normal

pytestmark = pytest.mark.usefixtures("device")

# (N, V, Vp): one row, no padding, V no multiple of a vector, more than one block (2048), GPT-2's vocabulary.
SHAPES = [(1, 1, 8), (1, 17, 64), (5, 64, 64), (67, 251, 256), (3, 2048, 2048), (4, 4099, 4224), (9, 50257, 50304)]
DLOSS = 0.37


def targets_of(N: int, V: int) -> torch.Tensor:
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N), dtype=torch.int32)
    targets[0], targets[-1] = 0, V - 1
    return targets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradient(shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> None:
    N, V, Vp = shape
    logits, targets = normal((N, Vp), dtype, seed=seed, scale=4), targets_of(N, V)
    logits[:, V:] = 1000  # the padding takes no part
    start = normal((N,), torch.float32, seed=seed)
    losses, gradient = start.clone(), logits.clone()
    ops.fused_classifier(gradient, losses, targets, V, DLOSS, True)

    leaf = logits[:, :V].double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, targets.long(), reduction="none")
    (loss.sum() * DLOSS).backward()
    # The sum of V exponentials, in chains of at most V/4 additions: √ of that, errors having either sign; some for the
    # exponential, the logarithm and the differences of logits, which are below 40.
    sum_error = (math.sqrt(V / 4) + 8) * F32
    assert_within(losses, start.double() + loss.detach(), sum_error + 4 * F32 * loss.detach() + F32 * 40)
    probabilities = leaf.detach().softmax(1)
    assert_within(
        gradient[:, :V], leaf.grad, DLOSS * (probabilities * (sum_error + 8 * F32) + 2 * F32 * (leaf.grad != 0))
    )
    assert (gradient[:, V:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradient_the_logits_stay(dtype: torch.dtype) -> None:
    logits, targets = normal((6, 320), dtype, seed=1), targets_of(6, 300)
    kept, losses, losses_with = logits.clone(), torch.zeros(6), torch.zeros(6)
    ops.fused_classifier(logits, losses, targets, 300, DLOSS, False)
    assert torch.equal(logits, kept)
    ops.fused_classifier(logits, losses_with, targets, 300, DLOSS, True)
    assert torch.equal(losses, losses_with)
    assert not torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype: torch.dtype) -> None:
    V = 2500  # two blocks
    logits = torch.full((5, V), -torch.inf, dtype=dtype)
    logits[0, 2400], logits[0, 3] = 2.0**100, -(2.0**100)  # a huge maximum in the last block
    logits[1, 0] = 2.0**100  # and in the first
    logits[2] = -(2.0**100)  # all the same: uniform
    logits[3, 7] = 5.0  # all others impossible
    logits[4] = 0
    logits[4, 9] = torch.nan
    losses = torch.zeros(5)
    ops.fused_classifier(logits, losses, torch.tensor([2400, 0, 8, 7, 1], dtype=torch.int32), V, 1.0, True)
    assert losses[:2].tolist() == [0, 0]
    # log(V) in fp32, after a sum of V ones, which is exact.
    assert abs(losses[2].item() - math.log(V)) < 4 * F32 * math.log(V)
    assert losses[3] == 0
    assert losses[4].isnan()
    assert (logits[:2] == 0).all()
    assert (logits[3] == 0).all()
    assert logits[4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    logits, targets = normal((130, 1024), dtype, seed=1), targets_of(130, 1000)

    def run() -> list[torch.Tensor]:
        gradient, losses = logits.clone(), torch.zeros(130)
        ops.fused_classifier(gradient, losses, targets, 1000, DLOSS, True)
        return [gradient, losses]

    assert_same_for_all_thread_counts(run)
