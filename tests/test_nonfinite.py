"""Loss, gradients and parameters that are not finite: what the model does, and what the trainer says and does.

The truth for a step that is left out is a run that never had it.
"""

import math

import pytest
import torch
from model_testing import assert_same_bits, batch, bits, build, train_step
from ranks_testing import run_ranks

from llmc import _C

# (maxT, V, L, NH, C, B, T)
CASE = (16, 61, 2, 2, 48, 3, 11)


def poison_loss(model):
    model.buffer("loss_sum").fill_(math.inf)


def poison_gradient(model):
    model.gradients()["h1.fcw"][3, 5] = math.nan


def poison_with_overflow(model):
    """Finite gradients, a sum of squares beyond fp32."""
    model.gradients()["h0.qkvb"][1] = 1e20


def state_bits(model):
    """A copy of all that an update changes."""
    names = ["m", "v", *(["master"] if model.options.precision == "bf16" and model.options.master_weights else [])]
    return {
        "parameters": {name: tensor.clone() for name, tensor in model.parameters().items()},
        **{name: {n: t.clone() for n, t in model.optimizer_state(name).items()} for name in names},
    }


def check_left_out(model, poison, wait_first):
    """Three steps, the second one poisoned: it changes nothing, and the third is as if it had not been."""
    train_step(model, *batch(CASE, 1), step=1)
    before, random = state_bits(model), (model.rng_state, model.last_update_rng_state)
    x, y = batch(CASE, 2)
    model.forward(x)
    model.backward(y)
    poison(model)
    if wait_first:
        model.grad_norm()
    model.update(lr=1e-3, weight_decay=0.1, step=2)
    assert not (math.isfinite(model.loss()) and math.isfinite(model.grad_norm()))
    assert model.parameters_finite()
    assert_same_bits(state_bits(model), before)
    model.rng_state, model.last_update_rng_state = random
    train_step(model, *batch(CASE, 3), step=3)
    assert math.isfinite(model.loss()) and math.isfinite(model.grad_norm())
    return {**bits(model), **state_bits(model)}


def check_model(poison, core=_C, **options):
    expected = build(CASE, core=core, **options)
    train_step(expected, *batch(CASE, 1), step=1)
    train_step(expected, *batch(CASE, 3), step=3)
    for wait_first in (False, True):
        found = check_left_out(build(CASE, core=core, **options), poison, wait_first)
        assert_same_bits(found, {**bits(expected), **state_bits(expected)})


POISONS = [poison_loss, poison_gradient, poison_with_overflow]
PRECISIONS = [
    {"precision": "fp32"},
    {"precision": "bf16"},
    {"precision": "bf16", "master_weights": False, "grad_dtype": "fp32"},
]


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_a_broken_step_changes_nothing(poison, options):
    check_model(poison, **options)


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_a_broken_step_changes_nothing_on_cuda(cuda, poison, options):
    check_model(poison, cuda.core, **options, device="cuda", tf32=False)
    cuda.check()


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
def test_parameters_that_an_update_breaks(options):
    """A weight of a position that no batch reaches, so that neither loss nor gradients know: decay turns it over."""
    model = build(CASE, **options)
    model.parameters()["wpe"][15] = 3e38
    train_step(model, *batch(CASE, 1), step=1)
    assert model.parameters_finite()
    train_step(model, *batch(CASE, 2), step=2, lr=25)  # times 1 - 25 * 0.1
    assert math.isfinite(model.loss()) and math.isfinite(model.grad_norm())
    assert not model.parameters_finite()
    assert model.parameters()["wpe"][15].isinf().all()


def break_on_one_rank(ranks, jobs):
    """Of each job: whether the broken step left this rank's state as it was, its loss and norm, and the weights."""
    torch.set_num_threads(1)
    results = []
    for poisoned, stage, precision in jobs:
        model = build(CASE, comm=_C.gloo_communicator(ranks.group_name), zero_stage=stage, precision=precision)
        train_step(model, *batch(CASE, 10 + ranks.rank), step=1)
        before = state_bits(model)
        model.forward(batch(CASE, 20 + ranks.rank)[0])
        if ranks.rank == 1:
            model.buffer(poisoned)[1, 4] = math.nan
        model.backward(batch(CASE, 20 + ranks.rank)[1])
        model.update(lr=1e-3, weight_decay=0.1, step=2)
        after = state_bits(model)
        same = all(torch.equal(after[kind][name], before[kind][name]) for kind in before for name in before[kind])
        broken = (model.loss(), model.grad_norm())
        train_step(model, *batch(CASE, 30 + ranks.rank), step=3)
        fine = (model.loss(), model.grad_norm(), model.parameters_finite())
        if ranks.rank == 1:  # one of its own, in the last unit it keeps a part of
            part = next(t for t in reversed(model.optimizer_state("m").values()) if t.numel() > 0)
            part[0] = math.inf
        train_step(model, *batch(CASE, 40 + ranks.rank), step=4)
        results.append((same, broken, fine, model.parameters_finite()))
    return results


def test_all_ranks_leave_the_same_step_out():
    """One rank's NaN, in the loss or only in the gradients, at every stage; and one that a rank's own update writes."""
    jobs = [(name, stage, X) for name in ("lnf", "h1.qkv") for stage in range(4) for X in ("fp32", "bf16")]
    ranks = run_ranks(3, break_on_one_rank, jobs)
    for job, (poisoned, stage, _) in enumerate(jobs):
        for same, (loss, norm), fine, finite in (results[job] for results in ranks):
            assert same, jobs[job]
            assert math.isnan(norm) and math.isnan(loss) == (poisoned == "lnf"), jobs[job]
            assert all(map(math.isfinite, fine)) and fine[2], jobs[job]
            assert fine == ranks[0][job][2], jobs[job]
            if stage > 0:
                assert not finite, jobs[job]
