"""The step with FP8 products: against PyTorch with the same conversions, against bf16, and its scales by hand."""

import copy
import math

import devices
import numpy as np
import pytest
import torch
from devices import RealGPU
from model_testing import (
    assert_same_bits,
    batch,
    bits,
    build,
    gradients_of,
    reference_model,
    relative_error,
    train_step,
)
from ops_testing import F32, assert_within
from ranks_testing import run_ranks
from test_graphs import assert_no_difference, validate_and_sample
from test_zero import run, whole_parameters

from llmc import _C
from llmc.cli.train import _main as command
from llmc.errors import UsageError

CASE = (32, 61, 2, 2, 64, 2, 32)
PRODUCTS = ("qkv", "attproj", "fc", "fcproj")
WINDOW = 16
LARGEST = np.repeat([448.0, 448.0, 57344.0], 2 * len(PRODUCTS))  # of E4M3 and E5M2: inputs, weights, gradients


@pytest.fixture(autouse=True)
def _has_fp8(request):
    on_gpu = "cuda" in request.fixturenames and isinstance(request.getfixturevalue("cuda"), RealGPU)
    if on_gpu and _C.cuda_devices()[0]["compute_capability"] < (8, 9):
        pytest.skip("this GPU has no FP8")


def build_on(cuda, case=CASE, **options):
    return build(case, core=cuda.core, **{"device": "cuda", "precision": "bf16", "fp8": True, **options})


def gradients_on(cuda, seed=3, **options):
    model = build_on(cuda, **options)
    x, y = batch(CASE, seed)
    model.forward(x)
    model.backward(y)
    cuda.check()
    return model.loss(), {name: tensor.cpu().clone() for name, tensor in model.gradients().items()}


def tensor(role, layer, product):
    """Its number among those with a scale."""
    return (role * 2 + layer) * len(PRODUCTS) + PRODUCTS.index(product)


# --- the step ---------------------------------------------------------------------------------------------------------


def rounded(x, dtype):
    """To the numbers of an FP8 format, scaled by its own largest value, as tensors are before the first update."""
    scale = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / float(x.abs().max())))
    return (x * scale).to(dtype).to(x.dtype) / scale


class Fp8Linear(torch.autograd.Function):
    """x·weightᵀ + bias with all factors of the three products rounded."""

    @staticmethod
    def forward(context, x, weight, bias):
        x, weight = rounded(x, torch.float8_e4m3fn), rounded(weight, torch.float8_e4m3fn)
        context.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(context, dout):
        x, weight = context.saved_tensors
        dbias = dout.flatten(0, -2).sum(0)
        dout = rounded(dout, torch.float8_e5m2)
        return dout @ weight, dout.flatten(0, -2).T @ x.flatten(0, -2), dbias


def with_fp8(torch_model):
    model = copy.deepcopy(torch_model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.forward = lambda x, m=module: Fp8Linear.apply(x, m.weight, m.bias)
    return model


@pytest.mark.parametrize("options", [{}, {"recompute": 0}, {"grad_dtype": "fp32"}], ids=str)
def test_gradients_are_pytorchs_with_the_same_conversions(reference, cuda, options):
    """In fp64 but for the conversions. After bf16's rounding one value in forty lies on the other side of a boundary of
    FP8. It is off by the whole distance d of two numbers, others by d/sqrt(12) on average: together sqrt(12/40) = 0.55
    of what the conversions change."""
    model = build(CASE, precision="bf16")
    x, y = batch(CASE, 3)
    exact_model = reference_model(reference, model, torch.float64)
    exact = gradients_of(reference, exact_model, x, y)
    twin = gradients_of(reference, with_fp8(exact_model), x, y)
    loss, gradients = gradients_on(cuda, **options)
    with torch.no_grad():
        assert loss == pytest.approx(float(exact_model(x, y)[1]), rel=1e-3)
    for name in twin:
        if "h0." in name or "h1." in name:
            found, change = (relative_error(t[: len(twin[name])], twin[name]) for t in (gradients[name], exact[name]))
            assert found < change or found < 0.01, name
    names = [name for name in twin if name.endswith(("qkvw", "attprojw", "fcw", "fcprojw"))]
    errors = [relative_error(gradients[name], twin[name]) for name in names]
    changes = [relative_error(exact[name], twin[name]) for name in names]
    # A factor of E5M2 is off by an eighth at most, 0.04 on average, one of E4M3 by half of that; through two layers.
    assert max(changes) < 0.2 and min(changes) > 0.03
    assert sum(errors) < 0.75 * sum(changes)


def inputs_of(model, layer):
    """The exact inputs of its products but for attention's: in fp64 from what they are computed of."""

    def layernorm(x, name):
        weight, bias = (model.parameters()[f"h{layer}.{name}{kind}"].cpu().double() for kind in "wb")
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def rows(name):
        return model.buffer(name).cpu().double().flatten(0, -2)

    return {
        "ln1": layernorm(rows(f"h{layer - 1}.residual3"), "ln1"),
        "ln2": layernorm(rows(f"h{layer}.residual2"), "ln2"),
        "fch_gelu": torch.nn.functional.gelu(rows(f"h{layer}.fch"), approximate="tanh"),
    }


def test_the_products_of_a_block_are_those_of_its_tensors(cuda):
    """Forward in the second block, and backward in the first one, whose tensors are the last: with all factors
    converted, the products in fp64 but for fp32's sums, rounded to bf16."""
    model = build_on(cuda, recompute=0)
    x, y = batch(CASE, 3)
    model.forward(x)
    model.backward(y)
    cuda.check()
    parameters = model.parameters()

    def rows(name):
        return model.buffer(name).cpu().flatten(0, -2)

    def converted(name, product, layer):
        return rows(f"h{layer}.{name}").double() / float(model.buffer("fp8_scales")[tensor(0, layer, product), 0])

    def check(found, a, b, bias=0.0):
        a, b = (rounded(factor[0].double(), factor[1]) if isinstance(factor, tuple) else factor for factor in (a, b))
        error = (math.sqrt(a.shape[1]) + 4) * F32 * (a.abs() @ b.abs().T)  # as in test_ops_matmul.py
        expected = a @ b.T + bias
        assert_within(found.cpu(), expected, error + F32 * expected.abs())

    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for x_name, product, out in (("ln1", "qkv", "qkv"), ("ln2", "fc", "fch")):
        weight, bias = parameters[f"h1.{product}w"].cpu(), parameters[f"h1.{product}b"].cpu()
        check(rows(f"h1.{out}"), converted(x_name, product, 1), (weight, e4m3), bias.double())
    dqkv = model.buffer("scratch_bt4c").cpu().view(-1)[: 64 * 192].view(64, 192)
    weight = parameters["h0.qkvw"].cpu()
    check(rows("scratch_btc"), (dqkv, e5m2), (weight.T, e4m3))
    check(model.gradients()["h0.qkvw"], (dqkv.T, e5m2), converted("ln1", "qkv", 0).T)

    # The inputs themselves: what fp32 makes of the numbers in between is near the boundary of two of E4M3's, if at all.
    for x_name, product in (("ln1", "qkv"), ("ln2", "fc"), ("fch_gelu", "fcproj")):
        exact = inputs_of(model, 1)[x_name]
        gelu = x_name == "fch_gelu"  # which is kept for the backward pass, transposed
        found = model.buffer("h1.fch_gelu_fp8").cpu().double().T if gelu else rows(f"h1.{x_name}").double()
        found = found / float(model.buffer("fp8_scales")[tensor(0, 1, product), 0])
        different = (found - rounded(exact, e4m3)).abs() > 0
        assert different.float().mean() < 1e-3
        assert ((found - exact).abs() <= exact.abs() * 2.0**-4 * 1.001 + 2.0**-12).all()


@pytest.mark.parametrize(("level", "recompute"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 4)])
def test_recomputation_changes_no_bits(cuda, level, recompute):
    """What is computed again is converted again with the same scale."""
    models = [build_on(cuda, fp8=level, recompute=r) for r in (0, recompute)]
    for step in (1, 2):
        losses = [train_step(model, *batch(CASE, step), step) for model in models]
        assert losses[0] == losses[1]
    cuda.check()
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_algorithms_know_the_types(cuda):
    model = build_on(cuda)
    model.choose_algorithms({}, True)
    gradients = train_step(model, *batch(CASE, 1), 1)
    assert math.isfinite(gradients)
    names = list(model.algorithms())
    for text in ("e4m3 (64,64) (64,192)T = bf16, fast accumulation", "e5m2,e4m3 (64,192) (192,64)T = bf16,",
                 "e5m2,e4m3 (192,64) (64,64)T = bf16,", "bf16 (64,64) (64,128)T"):  # fmt: skip
        assert [name for name in names if name.startswith(text)], text


@pytest.mark.parametrize(("options", "accumulation_steps"), [({"recompute": 2}, 3), ({"recompute": 0}, 1)], ids=str)
def test_graphs_have_the_same_bits(cuda, options, accumulation_steps):
    """The first step, before there are scales, has graphs of its own."""
    case = (16, 37, 2, 2, 32, 2, 16)
    assert_no_difference(cuda, accumulation_steps, validate_and_sample, case, precision="bf16", fp8=True, **options)


def test_memory_is_the_plans(cuda):
    model = build_on(cuda)
    train_step(model, *batch(CASE, 1), 1)
    assert model.allocated_bytes() == sum(model.memory().values())
    # The fc layer's backward pass: its gradient twice, and the larger of weight and input.
    assert model.buffer("fp8_operands").numel() == 2 * 64 * 256 + 64 * 256


# --- scales -----------------------------------------------------------------------------------------------------------


def scales_of(history, numbers=LARGEST):
    """A few lines of numpy: the largest power of two that keeps the largest value of the window in the format."""
    largest = history.max(axis=1)
    return np.where(largest > 0, 2.0 ** np.floor(np.log2(numbers / np.where(largest > 0, largest, 1))), 1)


def amaxes(model):
    return model.buffer("fp8_amax").cpu().numpy().copy()


def history_of(model):
    return np.array(model.fp8_history, np.float32).reshape(len(LARGEST), WINDOW)


def test_scales_follow_the_history(cuda):
    """More steps than the window, of two micro-steps each; amax is that of the tensors that are there to look at."""
    case = (16, 61, 2, 2, 32, 1, 16)
    model = build_on(cuda if isinstance(cuda, RealGPU) else devices.simulator("fast"), case, recompute=0)
    assert list(model.fp8_history) == []
    expected = np.zeros((len(LARGEST), WINDOW), np.float32)
    for step in range(1, WINDOW + 4):
        seen = dict.fromkeys(("ln1", "atty", "ln2", "fch_gelu"), 0.0)
        weights = {n: float(model.parameters()[f"h1.{n}w"].abs().max()) for n in PRODUCTS}
        last_gradient = 0.0
        for micro_step in range(2):
            x, y = batch(case, 2 * step + micro_step)
            model.forward(x)
            model.backward(y, micro_step, 2)
            inputs = {**inputs_of(model, 1), "atty": model.buffer("h1.atty")}
            seen = {name: max(value, float(inputs[name].abs().max())) for name, value in seen.items()}
            dqkv = model.buffer("scratch_bt4c").view(-1)[: 16 * 96]  # of the first block, the last one backward
            last_gradient = max(last_gradient, float(dqkv.abs().max()))
        amax = amaxes(model)
        for product, name in zip(PRODUCTS, seen, strict=True):
            assert amax[tensor(0, 1, product)] == pytest.approx(seen[name], rel=0 if name == "atty" else 1e-5)
            assert amax[tensor(1, 1, product)] == weights[product]
        assert amax[tensor(2, 0, "qkv")] == last_gradient
        assert (amax > 0).all()
        model.update(lr=1e-2, weight_decay=0.1, step=step)
        expected = np.roll(expected, -1, axis=1)
        expected[:, -1] = amax
        assert np.array_equal(history_of(model), expected)
        scales = model.buffer("fp8_scales").cpu().numpy()
        assert np.array_equal(scales[:, 0], scales_of(expected)) and np.array_equal(scales[:, 1], 1 / scales[:, 0])


@pytest.mark.parametrize("level", [1, 2])
def test_evaluation_leaves_the_scales_alone(cuda, level):
    models = [build_on(cuda, fp8=level) for _ in range(2)]
    for step in (1, 2, 3):
        x, y = batch(CASE, 100 + step)
        models[0].evaluate(x, y)
        models[0].evaluate(x[:1, :5], y[:1, :5])  # five rows: in bf16
        models[0].forward(x[:1, :4])
        models[0].extend(x[:1, 4:20])
        models[0].logits(0, 20)
        models[0].forward(x)
        models[0].logits(0, 20)
        losses = [train_step(model, *batch(CASE, step), step) for model in models]
        assert losses[0] == losses[1]
        assert models[0].fp8_history == models[1].fp8_history
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_a_batch_that_is_not_in_fp8_has_no_backward_pass(cuda):
    model = build_on(cuda)
    x, y = batch(CASE, 1)
    model.forward(x[:1, :31])
    with pytest.raises(cuda.core.Error, match="fp8 needs a batch of a multiple of 16 tokens, not of 31"):
        model.backward(y[:1, :31])


def test_no_backward_pass_in_other_scales(cuda):
    """What the forward pass has converted has the scales of that time."""
    model, other = build_on(cuda), build_on(cuda)
    x, y = batch(CASE, 1)
    train_step(other, x, y, 1)
    model.forward(x)
    model.fp8_history = other.fp8_history
    with pytest.raises(cuda.core.Error, match="backward needs a forward of its own first"):
        model.backward(y)
    model.forward(x)
    model.backward(y)
    model.forward(x)
    model.update(lr=1e-3, weight_decay=0.1, step=1)
    with pytest.raises(cuda.core.Error, match="backward needs a forward of its own first"):
        model.backward(y)


def test_other_rows_are_not_in_fp8(cuda):
    """Their products need multiples of 16."""
    x, y = batch(CASE, 1)
    models = [build_on(cuda, fp8=fp8) for fp8 in (False, True)]
    for rows, same in [(slice(0, 31), True), (slice(0, 32), False)]:
        losses = [model.evaluate(x[:1, rows], y[:1, rows]) for model in models]
        assert losses[0].equal(losses[1]) == same


@pytest.mark.parametrize(
    ("level", "place", "value"),
    [
        (1, "h0.qkvw", math.inf),
        (1, "h1.fcw", math.nan),
        (1, "lnfw", -math.inf),
        (2, "wte", math.nan),
        (2, "lnfb", math.inf),
    ],
)
def test_a_broken_step_changes_nothing(cuda, level, place, value):
    """What is not finite is not hidden by the conversion: --on-nan sees it. The scales are those from before."""
    model = build_on(cuda, fp8=level)
    train_step(model, *batch(CASE, 1), 1)
    history, scales = list(model.fp8_history), model.buffer("fp8_scales").clone()
    weight = model.parameters()[place].view(-1)
    good = float(weight[7])
    weight[7] = value
    m = {name: tensor.clone() for name, tensor in model.optimizer_state("m").items()}
    loss = train_step(model, *batch(CASE, 2), 2)
    assert not math.isfinite(loss) and not math.isfinite(model.grad_norm())
    assert list(model.fp8_history) == history and model.buffer("fp8_scales").equal(scales)
    assert all(tensor.equal(m[name]) for name, tensor in model.optimizer_state("m").items())
    weight[7] = good
    assert math.isfinite(train_step(model, *batch(CASE, 2), 2))
    history = np.array(model.fp8_history).reshape(-1, WINDOW)
    assert len(set(np.count_nonzero(history, axis=1))) == 1  # two updates of every tensor


def test_gradients_of_zero(cuda):
    """At a learning rate of 0 nothing ever leaves the loss head, if lnfw is 0: amax is 0, and the scale 1."""
    model = build_on(cuda, master_weights=False)
    model.parameters()["lnfw"].zero_()
    for step in (1, 2):
        train_step(model, *batch(CASE, step), step, lr=0)
        assert (amaxes(model)[2 * len(LARGEST) // 3 :] == 0).all()
        assert (model.buffer("fp8_scales")[2 * len(LARGEST) // 3 :] == 1).all()
    # Then they come: one step with that scale, in which small ones are lost, and the next one has the right scale.
    model.parameters()["lnfw"].fill_(1)
    for step in (3, 4):
        train_step(model, *batch(CASE, step), step, lr=0)
    amax = amaxes(model)[2 * len(LARGEST) // 3 :]
    assert (amax > 0).all() and (model.buffer("fp8_scales")[2 * len(LARGEST) // 3 :, 0] > 2**14).all()


def test_history_goes_to_another_model(cuda):
    model, other = build_on(cuda), build_on(cuda)
    train_step(model, *batch(CASE, 1), 1)
    other.fp8_history = model.fp8_history
    assert other.buffer("fp8_scales").equal(model.buffer("fp8_scales"))
    other.fp8_history = []
    assert list(other.fp8_history) == []
    with pytest.raises(cuda.core.Error, match="history of this model's scales has 384 values, not 3"):
        other.fp8_history = [1.0, 2.0, 3.0]
    model.reset_optimizer()
    assert list(model.fp8_history) == []


# --- ranks ------------------------------------------------------------------------------------------------------------

ON_RANKS = (16, 61, 2, 2, 48, 4, 16)


def train_on_rank(ranks, stages, accumulation_steps):
    torch.set_num_threads(1)
    simulator = devices.simulator("fast")
    core = simulator.core
    *shape, B, T = ON_RANKS
    results = []
    for stage in stages:
        identity = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else "", "identity")
        comm = core.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, 0, 60)
        options = {"device": "cuda", "precision": "bf16", "fp8": True, "zero_stage": stage}
        model = build((*shape, B // comm.size, T), core=core, comm=comm, **options)
        curve = run(model, ON_RANKS, 3, accumulation_steps)
        results.append((curve, history_of(model), whole_parameters(model, core)))
        simulator.check()
    return results


def test_ranks_have_scales_of_their_own():
    """And the same parameters. Stages differ in how sums over ranks are rounded: only their first history is equal."""
    devices.require_simulator()
    first, second = run_ranks(2, train_on_rank, [0, 1, 2, 3], 2)
    for (curve, history, parameters), (other_curve, other_history, others) in zip(first, second, strict=True):
        assert curve == other_curve
        assert all(tensor.equal(others[name]) for name, tensor in parameters.items())
        assert history[8:16, -3:].tolist() == other_history[8:16, -3:].tolist()  # of the weights
        assert (history[:8, -3] != other_history[:8, -3]).any()
        assert history[:, -3].tolist() == first[0][1][:, -3].tolist()
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, first[0][0], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-3) and norm == pytest.approx(expected_norm, rel=2e-2)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_it_learns_like_bf16():
    """Thirty steps on three batches: FP8 ends within a twentieth of what bf16 gains, and both learn."""
    curves = {}
    for fp8 in (False, True):
        model = build_on(devices.simulator("fast"), fp8=fp8)
        curves[fp8] = [train_step(model, *batch(CASE, step % 3), step, lr=3e-3) for step in range(1, 31)]
    start, end = curves[False][0], curves[False][-1]
    assert start - end > 1.0
    assert abs(curves[True][-1] - end) < 0.05 * (start - end)
    assert curves[True] != curves[False]


# --- refusals ---------------------------------------------------------------------------------------------------------

DRY = ["--dry-run", "-e", "custom:l=2,c=64,h=2,t=32,v=61", "-b", "2", "-t", "32", "-x", "1", "-g", "8", "--fp8", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device cpu", "--fp8 1 needs a GPU, this run is on a CPU: drop it"),
        ("--device cuda --memory 8 --precision fp32", "--fp8 1 needs --precision bf16, this run is in fp32: drop it"),
        ("--roofline A100", "a GPU of compute capability 8.9 or newer, which NVIDIA A100-SXM4-80GB is not: drop it"),
        (
            "--device cuda --memory 8 -ge 1",
            "-ge 1 cannot be with --fp8 1, which computes the GELU with the conversion: drop -ge",
        ),
        ("--device cuda --memory 8 -b 1 -t 24", "a multiple of 16 tokens, -b 1 times -t 24 is 24: change one of them"),
        (
            "--device cuda --memory 8 -e custom:l=2,c=72,h=3,t=32,v=61",
            "channels that are a multiple of 16, -e custom:l=2,c=72,h=3,t=32,v=61 has 72: drop it",
        ),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UsageError, match=message):
        command([*DRY, *flags.split()])


def test_refusals_of_the_core():
    with pytest.raises(_C.Error, match="fp8 needs a GPU and bf16: the precision is bf16 on cpu"):
        _C.plan(_C.GPT2Config(), _C.Options(fp8=True, precision="bf16"))
    with pytest.raises(_C.Error, match="fp8 needs a GPU and bf16: the precision is fp32 on cuda:0"):
        _C.plan(_C.GPT2Config(), _C.Options(fp8=True, device="cuda"))
    with pytest.raises(_C.Error, match="fp8 computes the GELU with the conversion: gelu_fusion is 1, it must be 0"):
        _C.plan(_C.GPT2Config(), _C.Options(fp8=True, device="cuda", precision="bf16", gelu_fusion=1))
    with pytest.raises(_C.Error, match="fp8 needs channels that are a multiple of 16, not 72"):
        config = _C.GPT2Config(channels=72, num_heads=3)
        _C.plan(config, _C.Options(fp8=True, device="cuda", precision="bf16"))
    with pytest.raises(_C.Error, match="without fp8 has no history"):
        build(CASE).fp8_history = []


def test_a_plan_and_a_prediction(capsys):
    command([*DRY, "--roofline", "4090"])
    output = capsys.readouterr().out
    for text in ("fp8_operands", "fp8_history", "165 TFLOP/s in bf16, of which the MFU is, and 330 in FP8", "to FP8"):
        assert text in output
