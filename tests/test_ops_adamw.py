"""adamw against torch.optim.AdamW in float64 and against the rule of stochastic rounding."""

import math

import pytest
import torch
from devices import ops
from ops_testing import (
    DTYPES_X_G,
    F32,
    assert_same_for_all_thread_counts,
    assert_within,
    normal,
    round_stochastically,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("device")

HYPER = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
SIZES = [1, 8, 97, 513, 2049, 30011]


def reference(param: torch.Tensor, grads: list[torch.Tensor], weight_decay: float) -> tuple[torch.Tensor, ...]:
    """param, m and v after one step for each gradient, in float64."""
    w = param.double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [w], lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"], weight_decay=weight_decay
    )
    for grad in grads:
        w.grad = grad
        optimizer.step()
    return w.detach(), optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_avg_sq"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("n", SIZES)
def test_steps(n: int, dtype: torch.dtype, grad_dtype: torch.dtype, master_weights: bool, weight_decay: float) -> None:
    scale = 0.37
    steps = 4 if dtype == torch.float32 or master_weights else 1  # without master weights bf16 drifts by its rounding
    grads = [normal((n,), grad_dtype, seed) for seed in range(steps)]
    param = normal((n,), dtype, seed=99, scale=0.02)
    start = param.clone()
    master = param.float().clone() if master_weights else None
    m, v = torch.zeros(n), torch.zeros(n)
    for t, grad in enumerate(grads, start=1):
        ops.adamw(param, grad, m, v, master, **HYPER, weight_decay=weight_decay, t=t, grad_scale=scale, seed=7)

    w64, m64, v64 = reference(start, [g.double() * scale for g in grads], weight_decay)
    # m and v: scale and betas are rounded to fp32, each step has three or four operations; relative to the largest
    # gradient of the element, since m may cancel.
    largest = torch.stack([g.double().abs() * scale for g in grads]).amax(0)
    assert_within(m, m64, 8 * steps * F32 * largest)
    assert_within(v, v64, 12 * steps * F32 * largest**2)
    # The step: lr times a quotient with about ten roundings, more where m cancels; w itself is rounded once a step.
    ratio = largest / (v64 / (1 - HYPER["beta2"] ** steps)).sqrt()
    error = steps * (HYPER["lr"] * (24 * ratio + 4) + 2 * start.double().abs()) * F32
    if dtype == torch.float32:
        assert_within(param, w64, error)
    if master is not None:
        assert_within(master, w64, error)
    if dtype == torch.bfloat16:
        # Stochastic rounding is off by less than a whole unit in the last place.
        assert_within(param, w64, error + w64.abs() * 2.0**-7)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("layer", "first"), [(0, 0), (3, 0), (11, 1), (2, 511), (5, 1000003)])
def test_rounding_is_a_function_of_the_index(layer: int, first: int, grad_dtype: torch.dtype) -> None:
    n, seed = 1543, 0xDEADBEEF
    param, grad = normal((n,), torch.bfloat16, 1), normal((n,), grad_dtype, 2)
    master, m, v = param.float(), torch.zeros(n), torch.zeros(n)
    arguments = {**HYPER, "weight_decay": 0.1, "t": 1, "grad_scale": 1.0, "seed": seed, "layer": layer}
    ops.adamw(param, grad, m, v, master, **arguments, first=first)
    index = torch.arange(first, first + n)
    assert same_bits(param, round_stochastically(master, index % 512, 512 * (index // 512) + layer, seed))


@pytest.mark.parametrize(("layer", "first"), [(0, 0), (3, 0), (11, 1), (2, 511), (5, 1000003)])
@pytest.mark.parametrize("n", SIZES)
def test_round_parameters(n: int, layer: int, first: int) -> None:
    """The formula, and what an update that changes nothing leaves in param."""
    place = {"seed": 0xDEADBEEF, "layer": layer, "first": first}
    master = normal((n,), torch.float32, 1, scale=0.02)
    before = master.clone()
    rounded, updated = (torch.full((n,), 7.0, dtype=torch.bfloat16) for _ in range(2))
    ops.round_parameters(rounded, master, **place)
    index = torch.arange(first, first + n)
    assert same_bits(rounded, round_stochastically(master, index % 512, 512 * (index // 512) + layer, place["seed"]))

    m, v, grad = torch.zeros(n), torch.zeros(n), normal((n,), torch.bfloat16, 2)
    still = {**HYPER, "lr": 0.0, "weight_decay": 0.0, "t": 1, "grad_scale": 1.0}
    ops.adamw(updated, grad, m, v, master, **still, **place)
    assert same_bits(master, before)
    assert same_bits(rounded, updated)


def test_round_parameters_copies_to_fp32() -> None:
    master, param = normal((1543,), torch.float32, 1), torch.zeros(1543)
    ops.round_parameters(param, master, seed=1)
    assert same_bits(param, master)


def test_round_parameters_refuses_negative_indices() -> None:
    with pytest.raises(RuntimeError, match="round_parameters: layer=0 and first=-1 must not be negative"):
        ops.round_parameters(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), first=-1)


def test_slices_equal_the_whole() -> None:
    n = 2000
    whole = [normal((n,), torch.bfloat16, 1), normal((n,), torch.float32, 2), torch.zeros(n), torch.zeros(n)]
    parts = [t.clone() for t in whole]
    arguments = {**HYPER, "weight_decay": 0.1, "t": 3, "grad_scale": 0.5, "seed": 5, "layer": 2}
    ops.adamw(*whole, None, **arguments)
    for begin, end in [(0, 600), (600, 601), (601, n)]:
        ops.adamw(*[t[begin:end] for t in parts], None, **arguments, first=begin)
    for a, b in zip(whole, parts, strict=True):
        assert same_bits(a, b)


def test_fp32_weights_are_their_own_master() -> None:
    own = [normal((100,), torch.float32, seed) for seed in (1, 2)] + [torch.zeros(100), torch.zeros(100)]
    with_master = [t.clone() for t in own]
    master = own[0].clone()
    arguments = {**HYPER, "weight_decay": 0.1, "t": 1, "grad_scale": 1.0}
    ops.adamw(*own, None, **arguments)
    ops.adamw(*with_master, master, **arguments)
    assert same_bits(own[0], with_master[0]) and same_bits(own[0], master)


def test_bias_correction_of_late_steps() -> None:
    """At t = 100000 both corrections are 1."""
    m, v, param = torch.ones(1), torch.ones(1), torch.ones(1)
    ops.adamw(param, torch.ones(1), m, v, None, 0.5, 0.9, 0.95, 1e-8, 0.0, 100000, 1.0)
    assert param.item() == pytest.approx(0.5, abs=2 * F32)  # m = v = 1 up to one rounding each


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("n", SIZES)
def test_a_scale_of_nan_changes_nothing(
    n: int, dtype: torch.dtype, grad_dtype: torch.dtype, master_weights: bool
) -> None:
    """Whatever is in the gradients."""
    param, grad = normal((n,), dtype, 1), normal((n,), grad_dtype, 2)
    grad[n // 2] = math.inf
    m, v = normal((n,), torch.float32, 3), normal((n,), torch.float32, 4).abs()
    master = param.float().clone() if master_weights else None
    before = [t.clone() for t in (param, m, v, *([master] if master is not None else []))]
    assert ops.adamw(param, grad, m, v, master, **HYPER, weight_decay=0.1, t=2, grad_scale=math.nan, seed=7)
    for now, then in zip((param, m, v, master), before, strict=False):
        assert now is not None and same_bits(now, then)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "at"), [(1, 0), (97, 96), (2049, 2048), (2049, 3), (30011, 30010), (30011, 17)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_parameter_that_is_not_finite_is_reported(
    value: float, n: int, at: int, dtype: torch.dtype, master_weights: bool
) -> None:
    def update(broken: bool) -> bool:
        param, grad, m, v = normal((n,), dtype, 1), normal((n,), dtype, 2), torch.zeros(n), torch.zeros(n)
        master = param.float().clone() if master_weights else None
        if broken:
            (param if master is None else master)[at] = value
        return ops.adamw(param, grad, m, v, master, **HYPER, weight_decay=0.1, t=1, grad_scale=1.0)

    assert update(broken=False)
    assert not update(broken=True)


def test_an_update_that_overflows_is_reported() -> None:
    """Old weights, gradients and the factors are finite; the new weight is beyond fp32, or only beyond bf16."""

    def update(dtype: torch.dtype, weight: float, lr: float) -> bool:
        param, master = torch.full((5,), weight, dtype=dtype), torch.full((5,), weight)
        m, v = torch.zeros(5), torch.zeros(5)
        arguments = {**HYPER, "lr": lr, "weight_decay": 0.0, "t": 1, "grad_scale": 1.0}
        return ops.adamw(param, -torch.ones(5, dtype=dtype), m, v, master, **arguments)

    assert update(torch.float32, 3e38, 3e37)  # 3.3e38; fp32 ends at 3.403e38
    assert not update(torch.float32, 3e38, 5e37)
    assert update(torch.bfloat16, 3e38, 3e37)  # bf16 ends at 3.390e38; stochastic rounding goes up
    assert not update(torch.bfloat16, 3.2e38, 2.02e37)


def test_thread_counts() -> None:
    n = 30011
    start = [normal((n,), torch.bfloat16, 1), normal((n,), torch.bfloat16, 2), torch.zeros(n), torch.zeros(n)]

    def run() -> list[torch.Tensor]:
        tensors = [t.clone() for t in start]
        ops.adamw(*tensors, None, **HYPER, weight_decay=0.1, t=1, grad_scale=1.0, seed=3)
        return tensors

    assert_same_for_all_thread_counts(run)
