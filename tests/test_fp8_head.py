"""The loss head in FP8, --fp8 2: against PyTorch in fp64 with the same conversions, and its scales by hand."""

import math
import re
from types import SimpleNamespace

import devices
import numpy as np
import pytest
import torch
from model_testing import batch, build, relative_error, train_step
from ranks_testing import run_ranks
from test_fp8 import CASE, DRY, ON_RANKS, WINDOW, _has_fp8, scales_of  # noqa: F401
from test_graphs import assert_no_difference, validate_and_sample
from test_zero import run, whole_parameters

from llmc import _C
from llmc.build import check_fp8
from llmc.cli.train import _main as command
from llmc.errors import UsageError
from llmc.model_file import ModelShape

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
V, N = CASE[1], CASE[5] * CASE[6]
INPUTS = 40  # tokens that a batch is of, where it matters
INPUT, WEIGHT, GRADIENTS = 16, 17, 18  # of 26 tensors: those of two blocks' inputs and weights, the head's, gradients
LARGEST = np.array([448.0] * GRADIENTS + [57344.0] * 8)


def build_on(cuda, case=CASE, **options):
    return build(case, core=cuda.core, **{"device": "cuda", "precision": "bf16", "fp8": 2, **options})


# --- the step ---------------------------------------------------------------------------------------------------------


def converted(x, dtype, scale=None):
    """To the numbers of an FP8 format, in the scale or that of its own largest value; what is beyond them saturates."""
    largest = torch.finfo(dtype).max
    if scale is None:
        scale = 2.0 ** math.floor(math.log2(largest / float(x.abs().max())))
    return (x * scale).clamp(-largest, largest).to(dtype).double() / scale


def itself(x, dtype, scale=None):
    return x


def head(lnf, wte, targets, dloss, rows, conversion=converted, scales=(None, None)):
    """(losses, dlnf, dwte) in fp64, over chunks of rows. The logits are rounded to bf16, as on the GPU."""
    losses, dlnf, dwte = [], [], 0
    wte = conversion(wte, E4M3, scales[1])
    for chunk, target in zip(lnf.split(rows), targets.split(rows), strict=True):
        x = conversion(chunk, E4M3, scales[0])
        logits = (x @ wte.T).to(torch.bfloat16).double()[:, :V].requires_grad_()
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        (loss.sum() * dloss).backward()
        gradient = torch.nn.functional.pad(logits.grad, (0, len(wte) - V))
        gradient = conversion(gradient, E5M2, 2.0 ** math.floor(math.log2(57344 / dloss)))
        losses.append(loss.detach())
        dlnf.append(gradient @ wte)
        dwte = dwte + gradient.T @ x
    return torch.cat(losses), torch.cat(dlnf), dwte


def step(model, seed, micro_steps=1):
    """A step of micro-batches without the update, of the first INPUTS tokens; what the head had in each."""
    parts = []
    for micro_step in range(micro_steps):
        x, y = batch(CASE, seed + micro_step)
        model.forward(x % INPUTS)
        model.backward(y, micro_step, micro_steps)
        part = {name: model.buffer(name).cpu().double() for name in ("lnf", "h1.residual3", "lnf_mean", "lnf_rstd")}
        part = {name: tensor.flatten(0, 1) for name, tensor in part.items()}
        normalised = (part["h1.residual3"] - part["lnf_mean"][:, None]) * part["lnf_rstd"][:, None]
        parts.append(SimpleNamespace(targets=y.flatten(), lnf=part["lnf"], normalised=normalised))
    return parts


def gradients(parts, wte, rows, **how):
    """What reaches the parameters; wte's of the tokens that were no input, as the embedding adds to the others."""
    losses, dlnfw, dlnfb, dwte = 0, 0, 0, 0
    for part in parts:
        loss, dlnf, own = head(part.lnf, wte, part.targets, 1 / (N * len(parts)), rows, **how)
        losses, dwte = losses + loss, dwte + own
        dlnfw, dlnfb = dlnfw + (dlnf * part.normalised).sum(0), dlnfb + dlnf.sum(0)
    return {"losses": losses, "lnfw": dlnfw, "lnfb": dlnfb, "wte": dwte[INPUTS:]}


def found_on(model):
    names = {"lnfw": slice(None), "lnfb": slice(None), "wte": slice(INPUTS, None)}
    found = {name: model.gradients()[name].cpu()[part] for name, part in names.items()}
    return {"losses": model.buffer("losses").cpu().flatten(), **found}


@pytest.mark.parametrize(
    ("options", "micro_steps"),
    [
        ({}, 1),
        ({"grad_dtype": "fp32"}, 2),
        ({"classifier_rows": 16}, 2),
        ({"classifier_rows": 41, "grad_dtype": "fp32"}, 1),  # rounded up to 48: a chunk of those, and one of 16
    ],
    ids=str,
)
def test_losses_and_gradients_are_pytorchs_with_the_same_conversions(cuda, options, micro_steps):
    model = build_on(cuda, recompute=0, **options)
    parts = step(model, 3, micro_steps)
    cuda.check()
    rows = {0: N, 16: 16, 41: 48}[options.get("classifier_rows", 0)]
    assert model.buffer("logits").shape[0] == rows
    wte = model.parameters()["wte"].cpu().double()
    expected, exact = gradients(parts, wte, rows), gradients(parts, wte, rows, conversion=itself)
    found = found_on(model)
    # Logits are sums in fp32 before they are rounded: a few lie on the other side of a boundary of bf16, 2^-8 of 0.3.
    assert (found["losses"].double() - expected["losses"]).abs().max() < micro_steps * 2e-4
    assert (exact["losses"] - expected["losses"]).abs().max() > 2e-3
    for name in ("lnfw", "lnfb", "wte"):
        # bf16's rounding, of dlnf or of the gradient, is 2^-9 at most; so are the losses' errors here.
        assert relative_error(found[name], expected[name]) < 2.0**-8, name
        assert relative_error(exact[name], expected[name]) > 0.01, name
    assert (model.gradients()["wte"][V:] == 0).all()


@pytest.mark.parametrize("factor", [1.0, 0.125, 16.0])
def test_scales_are_those_of_the_history(cuda, factor):
    """A history of smaller values than come now, where they saturate, and of larger ones."""
    model = build_on(cuda, recompute=0)
    train_step(model, *batch(CASE, 1), 1)
    history = np.array(model.fp8_history, np.float32).reshape(len(LARGEST), WINDOW)
    history[[INPUT, WEIGHT]] *= factor
    model.fp8_history = history.flatten().tolist()
    scales = model.buffer("fp8_scales").cpu().numpy()[:, 0]
    assert np.array_equal(scales, scales_of(history, LARGEST))
    parts = step(model, 3)
    wte = model.parameters()["wte"].cpu().double()
    expected = gradients(parts, wte, N, scales=(float(scales[INPUT]), float(scales[WEIGHT])))
    found = found_on(model)
    assert (found["losses"].double() - expected["losses"]).abs().max() < 2e-4
    for name in ("lnfw", "lnfb", "wte"):
        assert relative_error(found[name], expected[name]) < 2.0**-8, name


def test_all_products_are_in_fp8(cuda):
    model = build_on(cuda)
    model.choose_algorithms({}, True)
    train_step(model, *batch(CASE, 1), 1)
    names = list(model.algorithms())
    for text in ("e4m3 (64,64) (64,128)T = bf16, fast accumulation", "e5m2,e4m3 (64,128) (128,64)T = bf16,",
                 "e5m2,e4m3 (128,64) (64,64)T = bf16,"):  # fmt: skip
        assert [name for name in names if name.startswith(text)], (text, names)
    assert not [name for name in names if name.startswith(("bf16", "fp32"))]


def test_graphs_have_the_same_bits(cuda):
    case = (16, 37, 2, 2, 32, 2, 16)
    options = {"precision": "bf16", "fp8": 2, "classifier_rows": 16}
    assert_no_difference(cuda, 2, validate_and_sample, case, **options)


def test_memory_is_the_plans(cuda):
    model = build_on(cuda)
    train_step(model, *batch(CASE, 1), 1)
    assert model.allocated_bytes() == sum(model.memory().values())
    # wte and the input twice, and the gradient of the logits, behind the logits; the blocks work in the same memory.
    rows = cuda.core.plan(model.config, model.options)
    plan = {name: (offset, offset + size) for name, _, _, _, offset, size in rows}
    assert model.buffer("fp8_head").numel() == 2 * (128 + N) * 64 + N * 128
    assert plan["logits"][0] == plan["dresidual"][0] and plan["fp8_head"][0] == plan["logits"][1]
    assert plan["fp8_operands"][0] == plan["scratch_bt4c"][1]
    sizes = {"max_seq_len": 40, "vocab_size": 5000, "num_layers": 1, "num_heads": 2, "channels": 32}
    wide = _C.GPT2Config(**sizes, padded_vocab_size=5008)
    options = _C.Options(batch_size=1, seq_len=40, precision="bf16", device="cuda", fp8=2, classifier_rows=9)
    rows = {row[0]: row[3] for row in _C.plan(wide, options)}
    assert rows["logits"] == (16, 5008) and rows["fp8_head"] == (2 * (5008 + 16) * 32 + 16 * 5008,)


# --- scales -----------------------------------------------------------------------------------------------------------


def test_the_history_of_the_head(cuda):
    """Over chunks and micro-steps; the input's and the weight's own largest values, not those of a validation."""
    case = (16, 61, 2, 2, 32, 2, 16)
    model = build_on(cuda, case, recompute=0, classifier_rows=16)
    expected = np.zeros((2, WINDOW), np.float32)
    for number in (1, 2, 3):
        largest, others = 0.0, 0.0
        for micro_step in range(2):
            for name in ("lnfw", "lnfb"):
                model.parameters()[name].mul_(2)
            model.evaluate(*batch(case, 1))
            others = max(others, float(model.buffer("lnf").abs().max()))
            for name in ("lnfw", "lnfb"):
                model.parameters()[name].div_(2)
            x, y = batch(case, 2 * number + micro_step)
            model.forward(x)
            model.backward(y, micro_step, 2)
            largest = max(largest, float(model.buffer("lnf").abs().max()))
        assert others > largest
        weight = float(model.parameters()["wte"].abs().max())
        amax = model.buffer("fp8_amax").cpu().numpy()
        assert amax.shape == (len(LARGEST),) and (amax > 0).all()
        assert amax[[INPUT, WEIGHT]].tolist() == [largest, weight]
        model.update(lr=1e-2, weight_decay=0.1, step=number)
        expected = np.roll(expected, -1, axis=1)
        expected[:, -1] = largest, weight
        history = np.array(model.fp8_history, np.float32).reshape(len(LARGEST), WINDOW)
        assert np.array_equal(history[[INPUT, WEIGHT]], expected)
        assert np.array_equal(model.buffer("fp8_scales").cpu().numpy()[:, 0], scales_of(history, LARGEST))


def test_other_rows_and_samples_are_not_in_fp8(cuda):
    x, y = batch(CASE, 1)
    models = [build_on(cuda, fp8=fp8) for fp8 in (1, 2)]
    for rows, same in [(slice(0, 31), True), (slice(0, 32), False)]:
        losses = [model.evaluate(x[:1, rows], y[:1, rows]) for model in models]
        assert losses[0].equal(losses[1]) == same
        assert losses[0].allclose(losses[1], atol=0.05)
        logits = [model.logits(0, 31) for model in models]  # of the same rows, in bf16
        assert logits[0].equal(logits[1])


def test_a_history_of_another_level_does_not_fit(cuda):
    model, blocks = build_on(cuda), build_on(cuda, fp8=1)
    train_step(model, *batch(CASE, 1), 1)
    with pytest.raises(cuda.core.Error, match="history of this model's scales has 384 values, not 416"):
        blocks.fp8_history = model.fp8_history
    other = build_on(cuda)
    other.fp8_history = model.fp8_history
    assert other.buffer("fp8_scales").equal(model.buffer("fp8_scales"))


# --- ranks ------------------------------------------------------------------------------------------------------------


def train_on_rank(ranks, stages):
    torch.set_num_threads(1)
    simulator = devices.simulator("fast")
    core = simulator.core
    *shape, B, T = ON_RANKS
    results = []
    for stage in stages:
        identity = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else "", "identity")
        comm = core.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, 0, 60)
        model = build_on(simulator, (*shape, B // comm.size, T), comm=comm, zero_stage=stage)
        curve = run(model, ON_RANKS, 2, 2)
        history = np.array(model.fp8_history, np.float32).reshape(len(LARGEST), WINDOW)
        results.append((curve, history[[INPUT, WEIGHT], -2:].tolist(), whole_parameters(model, core)))
        simulator.check()
    return results


def test_ranks_have_scales_of_their_own():
    """Of the input, in their own batches; the weight is the same, and so are the updated parameters."""
    devices.require_simulator()
    first, second = run_ranks(2, train_on_rank, [0, 3])
    for (curve, history, parameters), (other_curve, other_history, others) in zip(first, second, strict=True):
        assert curve == other_curve and history[1] == other_history[1] and history[0] != other_history[0]
        assert all(tensor.equal(others[name]) for name, tensor in parameters.items())
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, first[0][0], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-3) and norm == pytest.approx(expected_norm, rel=2e-2)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_it_learns_like_bf16():
    """Thirty steps on three batches: FP8 ends within a twentieth of what bf16 gains, and both learn."""
    curves = {}
    for fp8 in (0, 1, 2):
        model = build_on(devices.simulator("fast"), fp8=fp8)
        curves[fp8] = [train_step(model, *batch(CASE, number % 3), number, lr=3e-3) for number in range(1, 31)]
    start, end = curves[0][0], curves[0][-1]
    assert start - end > 1.0
    assert abs(curves[2][-1] - end) < 0.05 * (start - end)
    assert curves[2] not in (curves[0], curves[1])


@pytest.mark.parametrize("rows", [0, 16])
def test_validation_has_the_losses_of_training(cuda, rows):
    """In chunks or not, before there are scales and after."""
    model = build_on(cuda, classifier_rows=rows)
    for step in (1, 2):
        x, y = batch(CASE, step)
        expected = model.evaluate(x, y)
        model.forward(x)
        model.backward(y)
        assert model.buffer("losses").cpu().equal(expected)
        model.update(lr=1e-3, weight_decay=0.1, step=step)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    config = {"padded_vocab_size": 50264, "vocab_size": 50257}
    options = _C.Options(fp8=2, device="cuda", precision="bf16")
    with pytest.raises(_C.Error, match="needs a padded_vocab_size that is a multiple of 16, not 50264"):
        _C.plan(_C.GPT2Config(**config), options)
    with pytest.raises(_C.Error, match="fp8 is 3, it must be 0, 1 or 2"):
        _C.plan(_C.GPT2Config(), _C.Options(fp8=3, device="cuda", precision="bf16"))
    with pytest.raises(UsageError, match="--fp8 2 needs a GPU, this run is on a CPU: drop it"):
        command([*DRY, "--fp8", "2", "--device", "cpu"])


def test_a_vocabulary_of_a_file():
    shape = ModelShape(max_seq_len=32, vocab_size=61, padded_vocab_size=72, num_layers=2, num_heads=2, channels=64)
    config = SimpleNamespace(fp8=2, model="odd.bin", batch_size=2, seq_len=32, gelu_fusion=-1)
    device = SimpleNamespace(is_cuda=True, has_fp8=True, name="GPU")
    message = "--fp8 2 needs a padded vocabulary of a multiple of 16, -e odd.bin has 72: use --fp8 1"
    with pytest.raises(UsageError, match=message):
        check_fp8(config, shape, "bf16", device)
    config.fp8 = 1
    check_fp8(config, shape, "bf16", device)


def test_a_plan_and_a_prediction(capsys):
    command(["--dry-run", "-e", "d12", "-b", "64", "-x", "1", "-g", "80", "--fp8", "2", "--roofline", "H100"])
    output = capsys.readouterr().out
    for text in ("dlogits_unscale", "logits, input twice, to FP8", "logits, gradient transposed"):
        assert text in output
    shared = dict(re.findall(r"^  activations +(\w+) .* \(shares memory with (.+)\)$", output, re.MULTILINE))
    assert shared == {"logits": "dresidual, scratch_bt4c, fp8_operands", "fp8_head": "fp8_operands"}
