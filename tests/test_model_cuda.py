"""The training step on CUDA, in the simulator and on a GPU: against the CPU's, against PyTorch, and against itself."""

import math

import pytest
import torch
from devices import LARGE, SMALL, Simulator, gpu
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

# (maxT, V, L, NH, C, B, T): whole tiles; a head size that is padded; nothing a multiple of anything.
CASES = [
    (64, 256, 2, 2, 128, 2, 64),
    (64, 256, 1, 2, 160, 1, 64),
    (41, 331, 1, 3, 72, 3, 37),
]
ODD = CASES[2]
LONG = (140, 97, 1, 1, 40, 1, 140)  # several tiles of attention
BIG = (1024, 50257, 2, 12, 768, 4, 1024)  # for a GPU


def build_on(cuda, case, **options):
    return build(case, core=cuda.core, **{"device": "cuda", "tf32": False, **options})


def bits_after(model, case, steps):
    for step in range(1, steps + 1):
        train_step(model, *batch(case, seed=step), step)
    return bits(model)


def host(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def total_error(gradients, exact):
    return math.sqrt(sum(float((gradients[n][: len(exact[n])].double() - exact[n]).norm()) ** 2 for n in exact))


def gradients_on(cuda, case, seed, **options):
    model = build_on(cuda, case, **options)
    x, y = batch(case, seed)
    model.forward(x)
    model.backward(y)
    cuda.check()
    return model.loss(), host(model.gradients())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shared_memory", [SMALL, LARGE])
def test_loss_and_gradients_equal_the_cpus_in_fp32(cuda, case, shared_memory):
    model = build(case)
    x, y = batch(case, seed=3)
    model.forward(x)
    model.backward(y)
    if isinstance(cuda, Simulator):
        with cuda.settings(shared_memory=shared_memory):
            loss, gradients = gradients_on(cuda, case, seed=3)
    elif shared_memory == LARGE:
        loss, gradients = gradients_on(cuda, case, seed=3)
    else:
        pytest.skip("a GPU has the shared memory it has")
    # The same fp32 arithmetic in another order: rounding (6e-8) times the growth over the depth of the network.
    assert loss == pytest.approx(model.loss(), rel=1e-6)
    scale = max(float(g.norm()) for g in gradients.values())
    for name, expected in model.gradients().items():
        error = (gradients[name].double() - expected.double()).norm()
        assert error <= 1e-5 * expected.double().norm() + 1e-7 * scale, name


@pytest.mark.gpu
@pytest.mark.parametrize("gelu_fusion", [0, 2])
def test_gpt2s_sizes(gelu_fusion):
    """Two layers of GPT-2 124M on a GPU: fp32 against the CPU, bf16 against that, ten steps twice to the bit."""
    cuda = gpu()
    model = build(BIG)
    x, y = batch(BIG, seed=3)
    model.forward(x)
    model.backward(y)
    exact = host(model.gradients())
    scale = max(float(gradient.norm()) for gradient in exact.values())
    loss, gradients = gradients_on(cuda, BIG, seed=3)
    assert loss == pytest.approx(model.loss(), rel=1e-6)
    for name, expected in exact.items():  # sums of up to 4096 terms in another order
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * scale, name
    loss, gradients = gradients_on(cuda, BIG, seed=3, precision="bf16", gelu_fusion=gelu_fusion)
    assert loss == pytest.approx(model.loss(), rel=2e-3)
    for name, expected in exact.items():  # a dozen roundings to bf16, 2^-9 each, of weights and activations
        assert relative_error(gradients[name], expected) <= 0.05, name
    runs = [bits_after(build_on(cuda, BIG, precision="bf16", gelu_fusion=gelu_fusion), BIG, 10) for _ in range(2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gelu_fusion", [0, 2])
def test_bf16_gradients_as_good_as_pytorch_bf16(reference, cuda, case, gelu_fusion):
    """Error against fp64 gradients of the same bf16 weights: at most 1.5 times that of PyTorch in bf16."""
    fusion = {"gelu_fusion": gelu_fusion, "bias_fusion": gelu_fusion > 0}
    _, ours = gradients_on(cuda, case, seed=5, precision="bf16", **fusion)
    model = build(case, precision="bf16")
    x, y = batch(case, seed=5)
    exact = gradients_of(reference, reference_model(reference, model, torch.float64), x, y)
    peer = gradients_of(reference, reference_model(reference, model, torch.bfloat16), x, y)
    assert 0 < total_error(ours, exact) <= 1.5 * total_error(peer, exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tf32_is_better_than_bf16(reference, cuda, case):
    """TF32 has three more bits than bf16, so an eighth of its error; activations in fp32 can only help."""
    _, ours = gradients_on(cuda, case, seed=5, tf32=True)
    model = build(case)
    x, y = batch(case, seed=5)
    exact = gradients_of(reference, reference_model(reference, model, torch.float64), x, y)
    peer = gradients_of(reference, reference_model(reference, model, torch.bfloat16), x, y)
    assert 0 < total_error(ours, exact) <= total_error(peer, exact) / 4
    _, without = gradients_on(cuda, case, seed=5)
    assert total_error(without, exact) < total_error(ours, exact) / 10


@pytest.mark.parametrize("bias_fusion", [False, True])
def test_gradients_of_several_micro_steps_equal_the_cpus_in_fp32(cuda, bias_fusion):
    models = [build(ODD), build_on(cuda, ODD, bias_fusion=bias_fusion)]
    for model in models:
        for micro_step in range(3):
            x, y = batch(ODD, seed=micro_step)
            model.forward(x)
            model.backward(y, micro_step, 3)
    cuda.check()
    found = host(models[1].gradients())
    scale = max(float(g.norm()) for g in found.values())
    for name, expected in models[0].gradients().items():
        error = (found[name].double() - expected.double()).norm()
        assert error <= 1e-5 * expected.double().norm() + 1e-7 * scale, name  # as for one micro-step


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_ten_steps_follow_the_cpu(cuda, precision, tolerance):
    """Clipping, decay, stochastic rounding from the same seeds: bf16 differs by roundings of the activations (2^-9)."""
    on_cpu, on_gpu = build(ODD, precision=precision), build_on(cuda, ODD, precision=precision)
    for step in range(1, 11):
        x, y = batch(ODD, seed=step)
        expected = train_step(on_cpu, x, y, step)
        assert train_step(on_gpu, x, y, step) == pytest.approx(expected, rel=tolerance)
        assert on_gpu.grad_norm() == pytest.approx(on_cpu.grad_norm(), rel=10 * tolerance)
    cuda.check()
    for name, expected in on_cpu.parameters().items():
        # Adam turns a sign of a tiny gradient into a step of lr: compared as a whole, not element by element.
        assert relative_error(on_gpu.parameters()[name].cpu(), expected) <= 100 * tolerance, name


@pytest.mark.parametrize("layers", [37, 38])
def test_updates_of_many_tensors(cuda, layers):
    """A launch writes up to 448 slices: those of 37 layers."""
    model = build_on(cuda, (8, 11, layers, 1, 8, 1, 8), precision="bf16")
    model.start_optimizer()
    before = {name: parameter.clone() for name, parameter in host(model.parameters()).items()}
    for parameter in model.parameters().values():
        parameter.zero_()
    model.restore_parameters()  # of master weights that have the precision of bf16: rounding changes nothing
    cuda.check()
    for name, parameter in host(model.parameters()).items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_is_bit_equal(cuda, precision):
    results = []
    for recompute in (0, 1, 2, 3, 4):
        model = build_on(cuda, ODD, precision=precision, recompute=recompute)
        results.append(bits_after(model, ODD, steps=2))
    cuda.check()
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gelu_fusion", [1, 2])
def test_fused_gelu_is_within_rounding(cuda, precision, gelu_fusion):
    """The epilogue sees the sum before it is rounded. A GPU's may take the fast tanh of its hardware: 2^-11."""
    loss, plain = gradients_on(cuda, CASES[0], seed=1, precision=precision)
    fused_loss, fused = gradients_on(cuda, CASES[0], seed=1, precision=precision, gelu_fusion=gelu_fusion)
    unit = 2**-8 if precision == "bf16" else 2**-22 if isinstance(cuda, Simulator) else 2**-11
    assert fused_loss == pytest.approx(loss, rel=unit)
    for name, gradient in plain.items():
        assert relative_error(fused[name], gradient) <= 8 * unit, name  # a handful of roundings up the chain


def test_gradient_accumulation_and_chunks(cuda):
    """Micro-steps and chunks of the loss head add up, on the device as on the CPU."""
    x, y = batch(ODD)
    results = []
    options = {"batch_size": 1, "classifier_rows": 10, "precision": "bf16"}
    for model in (build(ODD, **options), build_on(cuda, ODD, **options)):
        for micro_step in range(3):
            model.forward(x[micro_step : micro_step + 1])
            model.backward(y[micro_step : micro_step + 1], micro_step, 3)
        results.append((model.loss(), host(model.gradients())))
    cuda.check()
    (loss, expected), (other_loss, gradients) = results
    assert other_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) <= 0.05, name  # bf16: 2^-8 of each of some 10 roundings


def test_evaluate_and_logits(cuda):
    on_cpu, on_gpu = build(ODD), build_on(cuda, ODD)
    x, y = batch(ODD)
    torch.testing.assert_close(on_gpu.evaluate(x, y), on_cpu.evaluate(x, y), rtol=1e-5, atol=1e-6)
    for model in (on_cpu, on_gpu):
        model.forward(x)
    torch.testing.assert_close(on_gpu.logits(5, 50), on_cpu.logits(5, 50), rtol=1e-4, atol=1e-5)
    cuda.check()


def test_memory_is_the_plans(cuda):
    """All scratch memory is in the plan: nothing is allocated on the way."""
    model = build_on(cuda, ODD, precision="bf16")
    x, y = batch(ODD)
    for step in (1, 2):
        train_step(model, x, y, step)
        assert model.allocated_bytes() == sum(model.memory().values())
    rows = cuda.core.plan(model.config, model.options)
    workspace = [row for row in rows if row[0] == "workspace"]
    assert len(workspace) == 1 and workspace[0][5] >= 32 * 2**20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [ODD, LONG], ids=str)
def test_every_schedule_gives_the_same_bits(cuda, case, precision):
    """The order of threads, warps and blocks, and work that is put off, change nothing."""
    if not isinstance(cuda, Simulator):
        pytest.skip("a GPU chooses its own schedule")
    results = []
    for schedule, lazy in (("forward", False), ("reverse", False), ("random:1", False), ("random:2", True)):
        with cuda.settings(schedule=schedule, lazy=lazy):
            model = build_on(cuda, case, precision=precision)
            results.append(bits_after(model, case, steps=2))
            cuda.check()
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_the_same_steps_again_give_the_same_bits(cuda):
    results = []
    for _ in range(2):
        model = build_on(cuda, CASES[0], precision="bf16", gelu_fusion=2)
        results.append(bits_after(model, CASES[0], steps=3))
    assert_same_bits(*results)
