"""The C++ GPT2 against PyTorch: logits, loss, gradients, updates; and against itself where bits must be equal."""

import itertools
import math

import pytest
import torch
from model_testing import (
    assert_same_bits,
    batch,
    bits,
    build,
    gradients_of,
    reference_model,
    relative_error,
    sizes,
    train_step,
)
from ops_testing import round_stochastically

from llmc import _C, debug_state, model_file

# (maxT, V, L, NH, C, B, T): odd batches, lengths below the context, vocabularies that are no multiple of anything.
SMALL = [
    (16, 29, 1, 1, 8, 1, 1),
    (17, 65, 2, 2, 16, 3, 17),
    (64, 257, 3, 3, 72, 2, 33),
    (130, 100, 2, 4, 512, 1, 129),
]
D12 = (1024, 50257, 12, 12, 768, 4, 64)


# --- against PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*SMALL, D12], ids=str)
def test_debug_state(reference, tmp_path, case):
    """Files of the reference: parameters in, logits, loss and every gradient compared."""
    shape, B, T = sizes(case)
    torch_model = reference.GPT(reference.GPTConfig(**shape))
    x, y = batch(case)
    reference.write_model(tmp_path / "model.bin", torch_model, "fp32")
    reference.write_debug_state(tmp_path / "debug.bin", torch_model, x, y)

    file_shape, _ = model_file.read_model_header(tmp_path / "model.bin")
    state = debug_state.read_debug_state(tmp_path / "debug.bin", file_shape)
    model = build(case, recompute=0)
    model_file.load_model(tmp_path / "model.bin", model.parameters())
    model.forward(torch.from_numpy(state.x))
    logits = model.logits(0, B * T).view(B, T, -1)
    model.backward(torch.from_numpy(state.y))

    # fp32 sums of up to 3072 terms in another order; the bounds are the project's acceptance limits.
    assert (logits - torch.from_numpy(state.logits)).abs().max() <= 2e-4
    assert abs(model.loss() - state.loss) <= 1e-5
    gradients = model.gradients()
    assert gradients.keys() == state.gradients.keys()
    # A gradient of exactly zero (attention over one position has no score gradient) is compared absolutely.
    floor = 1e-7 * max(float(torch.from_numpy(g).norm()) for g in state.gradients.values())
    for name, gradient in gradients.items():
        expected = torch.from_numpy(state.gradients[name])
        error = (gradient.double() - expected.double()).norm()
        assert error <= 1e-5 * expected.double().norm() + floor, name


@pytest.mark.parametrize("recompute", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_against_float64(reference, case, recompute):
    """With random vectors too, against PyTorch in double precision."""
    model = build(case, recompute=recompute)
    torch_model = reference_model(reference, model, torch.float64)
    x, y = batch(case, seed=3)
    expected = gradients_of(reference, torch_model, x, y)
    model.forward(x)
    model.backward(y)
    scale = max(float(g.norm()) for g in expected.values())
    for name, gradient in model.gradients().items():
        rows = expected[name].shape[0]
        # 1e-5: fp32 rounding (6e-8) times the growth over the depth of the network, as the acceptance limit.
        assert (gradient[:rows].double() - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7 * scale, name
        assert not gradient[rows:].any(), f"padding rows of {name}"


@pytest.mark.parametrize("case", SMALL[1:], ids=str)
def test_ten_steps_follow_pytorch(reference, case):
    """AdamW with decay, clipping and the loss: ten steps on changing batches."""
    model = build(case)
    torch_model = reference_model(reference, model)
    decay = [p for p in torch_model.parameters() if p.dim() >= 2]
    rest = [p for p in torch_model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(1, 11):
        x, y = batch(case, seed=step)
        optimizer.zero_grad()
        _, loss = torch_model(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        optimizer.step()
        ours = train_step(model, x, y, step)
        assert abs(ours - loss.item()) <= 1e-4
        assert math.isclose(model.grad_norm(), float(norm), rel_tol=1e-3)


def test_ten_steps_of_d12_follow_pytorch(reference):
    """From the descriptor's initialisation; PyTorch in fp32 is itself 1.7e-5 away from fp64 after these steps."""
    model = build(D12)
    model.init_random(seed=42)
    torch_model = reference_model(reference, model)
    optimizer = torch.optim.AdamW(torch_model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0)
    x, y = batch(D12)
    for step in range(1, 11):
        optimizer.zero_grad()
        _, loss = torch_model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        optimizer.step()
        model.forward(x)
        model.backward(y)
        model.update(lr=1e-4, weight_decay=0.0, step=step)
        assert abs(model.loss() - loss.item()) <= 1e-4


@pytest.mark.parametrize("case", SMALL[1:], ids=str)
def test_bf16_gradients_as_good_as_pytorch_bf16(reference, case):
    """Error against fp64 gradients of the same bf16 weights: at most 1.5 times that of PyTorch in bf16."""
    model = build(case, precision="bf16")
    x, y = batch(case, seed=5)
    exact = gradients_of(reference, reference_model(reference, model, torch.float64), x, y)
    peer = gradients_of(reference, reference_model(reference, model, torch.bfloat16), x, y)
    model.forward(x)
    model.backward(y)
    ours = {name: g[: exact[name].shape[0]] for name, g in model.gradients().items()}

    def total_error(gradients):
        return math.sqrt(sum(float((gradients[n].double() - exact[n]).norm()) ** 2 for n in exact))

    assert total_error(ours) <= 1.5 * total_error(peer)
    assert total_error(ours) > 0  # bf16 does round


def test_init_random_equals_the_reference(reference):
    """The same draws in the same order. Box-Muller's log, sin and cos differ in the last bits (5.4e-8 at std 0.02)."""
    case = (33, 100, 2, 3, 24, 1, 4)
    shape, B, T = sizes(case)
    model = _C.GPT2(_C.GPT2Config(**shape, padded_vocab_size=128), _C.Options(batch_size=B, seq_len=T))
    model.init_random(seed=42)
    parameters = model.parameters()
    for name, expected in reference.named_tensors(reference.GPT(reference.GPTConfig(**shape))).items():
        torch.testing.assert_close(parameters[name][: expected.shape[0]], expected.detach(), rtol=0, atol=1e-7)
    assert not parameters["wte"][100:].any()
    first = parameters["h0.qkvw"].clone()
    model.init_random(seed=43)
    assert not torch.equal(first, model.parameters()["h0.qkvw"])


# --- against itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_recompute_and_fusion_are_bit_equal(case, precision):
    results = []
    for recompute in (0, 1, 2, 3, 4):
        for gelu_fusion in (0, 1, 2):
            model = build(case, precision=precision, recompute=recompute, gelu_fusion=gelu_fusion)
            for step in (1, 2):
                train_step(model, *batch(case, seed=step), step)
            results.append(bits(model))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("precision,grad_dtype", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_classifier_chunks(precision, grad_dtype, rows):
    """One chunk or many: the sum over rows is cut differently, so equal within rounding only."""
    case = SMALL[1]
    x, y = batch(case)
    results = []
    for classifier_rows in (0, rows):
        model = build(case, precision=precision, grad_dtype=grad_dtype, classifier_rows=classifier_rows)
        for _ in range(2):  # the second step must not see the sums of the first
            model.forward(x)
            model.backward(y)
        results.append((model.loss(), {n: g.clone() for n, g in model.gradients().items()}))
    (loss, one), (chunked_loss, many) = results
    assert abs(loss - chunked_loss) <= 1e-6
    # bf16: the single chunk and the fp32 sum of many are each rounded once, so they differ by a rounding at most.
    tolerance = 1e-6 if precision == "fp32" else 2**-8
    for name in one:
        assert relative_error(many[name], one[name]) <= tolerance, name


def test_gradient_accumulation_equals_one_batch():
    """Four micro-batches of 2 rows make the gradient of one batch of 8."""
    case = (32, 65, 2, 2, 32, 8, 32)
    x, y = batch(case)
    whole = build(case)
    whole.forward(x)
    whole.backward(y)
    parts = build(case, batch_size=2)
    for step in range(4):
        parts.forward(x[2 * step : 2 * step + 2])
        parts.backward(y[2 * step : 2 * step + 2], step, 4)
    assert abs(parts.loss() - whole.loss()) <= 1e-6
    for name, gradient in parts.gradients().items():
        assert relative_error(gradient, whole.gradients()[name]) <= 1e-5, name  # sums in another order


def test_evaluate_leaves_the_step_alone():
    case = SMALL[2]
    x, y = batch(case)
    model = build(case)
    model.forward(x)
    model.backward(y)
    loss, gradient = model.loss(), model.gradients()["h0.fcw"].clone()
    losses = model.evaluate(x, y)
    assert torch.equal(model.evaluate(x, y), losses)
    assert losses.shape == x.shape
    # The most that an fp32 sum can be off, in any order: that of the loss depends on the compiler's vectors.
    assert abs(float(losses.double().mean()) - loss) <= losses.numel() * 2**-24 * loss
    assert model.loss() == loss
    assert torch.equal(model.gradients()["h0.fcw"], gradient)


def test_shorter_batches_fit():
    """Any (b, t) up to (B, T) runs: the same tokens give the same logits as in a model of exactly that size."""
    case = SMALL[2]
    x, _ = batch(case)
    model, small = build(case), build((*case[:5], 1, 9))
    model.forward(x[:1, :9])
    small.forward(x[:1, :9])
    assert torch.equal(model.logits(0, 9), small.logits(0, 9))
    # BLAS sums another number of rows in another order.
    torch.testing.assert_close(model.logits(3, 5), small.logits(0, 9)[3:5], rtol=1e-5, atol=1e-6)


def test_causality():
    """A later token changes no earlier logits."""
    case = SMALL[3]
    x, _ = batch(case)
    model = build(case)
    model.forward(x)
    before = model.logits(0, x.numel())
    x[0, 100] = (x[0, 100] + 1) % 100
    model.forward(x)
    after = model.logits(0, x.numel())
    assert torch.equal(before[:100], after[:100])
    assert not torch.equal(before[100:], after[100:])


def test_same_bits_again():
    """Two runs of the same steps give the same bits, whatever the number of threads."""
    case = SMALL[3]
    results = []
    threads = torch.get_num_threads()
    for count in (threads, 1, threads):
        torch.set_num_threads(count)
        model = build(case, precision="bf16")
        for step in (1, 2, 3):
            train_step(model, *batch(case, seed=step), step)
        results.append(bits(model))
    torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_has_nothing_to_shard(stage):
    case = SMALL[2]
    results = []
    for zero_stage in (0, stage):
        model = build(case, zero_stage=zero_stage)
        assert model.options.zero_stage == 0 and (model.rank, model.world_size) == (0, 1)
        train_step(model, *batch(case))
        results.append(bits(model))
    assert_same_bits(*results)


def test_master_weights():
    """bf16 parameters are the stochastically rounded master weights: each is one of the master's two neighbours."""
    case = SMALL[2]
    model = build(case, precision="bf16", master_weights=True)
    start = {name: p.float().clone() for name, p in model.parameters().items()}
    for step in (1, 2, 3):
        train_step(model, *batch(case, seed=step), step)
    master = model.optimizer_state("master")
    for name, before in start.items():
        # Adam moves a value by about lr a step at most (2 lr while the moments are young), and decay by lr * wd * w.
        assert ((master[name] - before).abs() <= 3 * 1e-3 * (2 + 0.1 * before.abs())).all(), name
    moved = 0
    for name, parameter in model.parameters().items():
        down = (master[name].view(torch.int32) & ~0xFFFF).view(torch.float32)
        up = ((master[name].view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
        p = parameter.float()
        assert ((p == down) | (p == up)).all(), name
        moved += int((master[name] != start[name]).sum())
    assert moved > 0
    plain = build(case, precision="bf16", master_weights=False)
    train_step(plain, *batch(case))
    with pytest.raises(_C.Error, match="no master weights"):
        plain.optimizer_state("master")


def test_rounding_of_the_update_follows_the_element():
    """bf16 parameters are the master weights rounded with noise of (element, layer) and one seed for each kind."""
    case = SMALL[2]
    model = build(case, precision="bf16")
    model.forward(batch(case)[0])
    model.backward(batch(case)[1])
    model.update(lr=1e-3, weight_decay=0.1, step=1)
    state = 13371337
    _, state = _C.random.xorshift64(state)  # of the embedding's backward
    seeds = {}
    for kind, _ in model_file.ModelShape(64, 257, 384, 3, 3, 72).tensors():
        seeds[kind], state = _C.random.xorshift64(state)
    master = model.optimizer_state("master")
    for name, parameter in model.parameters().items():
        block, _, kind = name.rpartition(".")
        i = torch.arange(parameter.numel())
        layer = int(block[1:] or 0)
        expected = round_stochastically(master[name].flatten(), i % 512, 512 * (i // 512) + layer, seeds[kind])
        assert torch.equal(parameter.flatten(), expected), name


@pytest.mark.parametrize("grad_clip", [0.01, 1.0, 100.0])
def test_gradients_are_clipped_at_the_given_norm(grad_clip):
    """After the first step m = 0.1 * scale * gradient, with scale = min(1, grad_clip / norm)."""
    case = SMALL[1]
    model = build(case)
    train_step(model, *batch(case), grad_clip=grad_clip)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in model.gradients().values()))
    assert math.isclose(model.grad_norm(), norm, rel_tol=1e-5)  # fp32 against fp64
    for name, m in model.optimizer_state("m").items():
        expected = model.gradients()[name] * (0.1 * min(1, grad_clip / norm))
        # 0.1 is 1 - 0.9 in fp32, which is off by 2.4e-7 of it
        torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-12)


def three_steps():
    """A bf16 model with master weights after three updates."""
    model = build(SMALL[2], precision="bf16")
    for step in (1, 2, 3):
        train_step(model, *batch(SMALL[2], seed=step), step)
    return model


def test_restored_parameters_are_those_of_the_last_update():
    model = three_steps()
    before = bits(model)["parameters"]

    def restore():
        for parameter in model.parameters().values():
            parameter.zero_()
        model.restore_parameters()

    state = model.rng_state
    restore()
    assert_same_bits({"parameters": before}, bits(model))
    assert model.rng_state == state
    x, y = batch(SMALL[2], seed=9)
    model.forward(x)
    model.backward(y)
    assert model.rng_state != state
    restore()
    assert_same_bits({"parameters": before}, bits(model))
    with pytest.raises(_C.Error, match="logits need a forward"):  # the last one saw other parameters
        model.logits(0, 1)


def test_restored_parameters_follow_the_formula():
    """bf16 of any master weights: 16 seeds from last_update_rng_state, the one of fcw is the eleventh."""
    model = build(SMALL[2], precision="bf16")
    model.start_optimizer()
    master = model.optimizer_state("master")["h1.fcw"]
    master.normal_(generator=torch.Generator().manual_seed(3))
    model.last_update_rng_state = state = 987654321
    for _ in range(11):
        seed, state = _C.random.xorshift64(state)
    model.restore_parameters()
    i = torch.arange(master.numel())
    expected = round_stochastically(master.flatten(), i % 512, 512 * (i // 512) + 1, seed)
    assert torch.equal(model.parameters()["h1.fcw"].flatten(), expected)
    assert model.rng_state == 13371337


def test_a_model_goes_on_from_its_optimizer_state():
    """m, v, master and the two random states are all of a bf16 model."""
    first = three_steps()
    second = build(SMALL[2], precision="bf16")
    second.init_random(seed=1)
    second.start_optimizer()
    for name in ("m", "v", "master"):
        theirs = first.optimizer_state(name)
        for tensor, state in second.optimizer_state(name).items():
            state.copy_(theirs[tensor])
    second.rng_state, second.last_update_rng_state = first.rng_state, first.last_update_rng_state
    second.restore_parameters()
    for step in (4, 5):
        for model in (first, second):
            train_step(model, *batch(SMALL[2], seed=step), step)
        assert_same_bits(bits(first), bits(second))


def test_start_optimizer():
    model = build(SMALL[1], precision="bf16")
    with pytest.raises(_C.Error, match="m is not allocated yet, it exists after start_optimizer or the first update"):
        model.optimizer_state("m")
    model.start_optimizer()
    for name, parameter in model.parameters().items():
        assert torch.equal(model.optimizer_state("master")[name], parameter.float())
        assert not model.optimizer_state("m")[name].any()
        assert not model.optimizer_state("v")[name].any()
    for name in ("m", "master"):
        model.optimizer_state(name)["wte"].fill_(0.5)
    model.start_optimizer()  # does nothing to a state that is there
    for name in ("m", "master"):
        assert (model.optimizer_state(name)["wte"] == 0.5).all()


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16", "master_weights": False}], ids=str)
def test_without_master_weights_nothing_is_restored(options):
    model = build(SMALL[1], **options)
    model.start_optimizer()
    with pytest.raises(_C.Error, match="restored from master weights, and this model has none"):
        model.restore_parameters()


def test_rows_of_the_embedding_are_visited_by_token():
    case = SMALL[3]
    x, y = batch(case)
    model = build(case)
    model.forward(x)
    model.backward(y)
    assert torch.equal(model.buffer("token_order").long(), torch.argsort(x.flatten(), stable=True))


def test_rng_state_counts_the_draws():
    """One draw per micro-step and 16 per update, from xorshift64* at 13371337."""
    case = SMALL[1]
    model = build(case)
    assert model.rng_state == model.last_update_rng_state == 13371337
    train_step(model, *batch(case))
    _, state = _C.random.xorshift64(13371337)
    assert model.last_update_rng_state == state
    for _ in range(16):
        _, state = _C.random.xorshift64(state)
    assert model.rng_state == state


# --- looking inside -------------------------------------------------------------------------------------------------


def test_views_write_through():
    model = build(SMALL[1])
    model.parameters()["h1.fcw"].fill_(0.5)
    assert (model.parameters()["h1.fcw"] == 0.5).all()
    x, _ = batch(SMALL[1])
    model.forward(x)
    assert model.buffer("h1.atty").shape == (3, 17, 16)
    view = model.parameters()["wte"]
    del model
    view.add_(1)  # the view keeps the memory alive


def test_plan_describes_the_memory():
    """Buffers lie inside their allocation, aligned, and only declared overlays overlap."""
    config = _C.GPT2Config(
        max_seq_len=64, vocab_size=100, padded_vocab_size=128, num_layers=3, num_heads=2, channels=48
    )
    for recompute in (0, 1, 2, 3, 4):
        options = _C.Options(batch_size=3, seq_len=17, precision="bf16", recompute=recompute)
        rows = _C.plan(config, options)
        check_places(rows, _C.GPT2(config, options).memory())
        names = [row[0] for row in rows]
        assert ("h0.fch_gelu" in names) == (recompute == 0)
        assert ("h0.ln1" in names) == (recompute < 2)
        assert ("h0.qkv" in names) == ("h0.residual2" in names) == (recompute < 3)
        assert ("h0.atty" in names) == ("h0.fch" in names) == ("h0.lse" in names) == (recompute < 4)
        assert "h0.residual3" in names


@pytest.mark.parametrize("fp8", [1, 2])
@pytest.mark.parametrize("recompute", [0, 1, 2, 3, 4])
def test_plan_with_fp8(fp8, recompute):
    config = _C.GPT2Config(
        max_seq_len=64, vocab_size=100, padded_vocab_size=128, num_layers=3, num_heads=2, channels=48
    )
    settings = {"batch_size": 4, "seq_len": 24, "precision": "bf16", "device": "cuda", "recompute": recompute}
    rows = _C.plan(config, _C.Options(**settings, fp8=fp8))
    check_places(rows)
    names = [row[0] for row in rows]
    assert ("h0.weights_fp8" in names) == ("h0.fch_gelu_fp8" in names) == ("h0.atty_fp8" in names) == (recompute == 0)
    assert ("h0.ln1" in names) == (recompute < 2) and "fch_gelu" not in names
    assert ("fp8_head" in names) == (fp8 == 2)


def check_places(rows, sizes=None):
    """Buffers lie inside their allocation, aligned, and only declared overlays overlap."""
    by_lifetime = {}
    for name, lifetime, dtype, shape, offset, size in rows:
        assert offset % 256 == 0
        assert size == math.prod(shape) * {"fp32": 4, "bf16": 2, "int32": 4, "e4m3": 1}[dtype]
        assert sizes is None or offset + size <= sizes[lifetime]
        by_lifetime.setdefault(lifetime, []).append((offset, offset + size, name))
    for buffers in by_lifetime.values():
        for (begin, end, first), (other_begin, other_end, second) in itertools.combinations(buffers, 2):
            apart = end <= other_begin or other_end <= begin
            blocks, head = ("dresidual", "scratch_bt4c", "fp8_operands"), ("logits", "fp8_head")
            assert apart or (first in blocks and second in head)


def test_plan_of_d12_per_sequence():
    """Activations of d12 at T = 1024 in bf16: the sum over the saved tensors, worked out by hand."""
    C, L, T, NH = 768, 12, 1024, 12
    config = _C.GPT2Config()
    for recompute, per_layer in ((0, 16), (1, 12), (2, 10)):  # in units of T*C values of bf16
        sizes = [
            sum(_C.plan(config, _C.Options(batch_size=B, seq_len=T, precision="bf16", recompute=recompute))[-1][-2:])
            for B in (64, 65)
        ]
        saved = 2 * T * C * (L * per_layer + 1 + 1) + 4 * L * (NH + 4) * T + 2 * 4 * T + 2 * 4 * T + 3 * 4 * T
        scratch = 2 * T * C * 6 + (
            2 * 4 * T * C if recompute else 0
        )  # dresidual, scratch_btc, scratch_bt4c, shared GELU
        assert sizes[1] - sizes[0] == saved + scratch


# --- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"channels": 49}, "channels .49. must be a multiple of num_heads"),
        ({"channels": 24}, "multiples of 8 up to 128"),
        ({"num_heads": 1, "channels": 256}, "multiples of 8 up to 128"),
        ({"padded_vocab_size": 99}, "padded_vocab_size is 99"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_layers": 2**18, "channels": 2**20, "num_heads": 2**13}, "it must be between 1 and"),
    ],
)
def test_impossible_configs(change, message):
    valid = dict(max_seq_len=64, vocab_size=100, padded_vocab_size=128, num_layers=3, num_heads=2, channels=48)
    with pytest.raises(_C.Error, match=message):
        _C.GPT2Config(**{**valid, **change})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 18}, "seq_len is 18, it must be between 1 and the model's context of 17"),
        ({"recompute": 5}, "recompute is 5"),
        ({"gelu_fusion": -1}, "gelu_fusion is -1"),
        ({"precision": "fp16"}, "the dtype is fp16"),
        ({"grad_dtype": "bf16"}, "must be fp32"),
        ({"zero_stage": 4}, "zero_stage is 4, it must be 0, 1, 2 or 3"),
        ({"zero_stage": -1}, "zero_stage is -1"),
        ({"batch_size": 2**62}, "must fit in 31 bits"),
    ],
)
def test_impossible_options(change, message):
    with pytest.raises(_C.Error, match=message):
        build(SMALL[1], **change)


def test_wrong_calls():
    case = SMALL[1]
    x, y = batch(case)
    model = build(case)
    with pytest.raises(_C.Error, match="backward needs a forward"):
        model.backward(y)
    with pytest.raises(_C.Error, match="not allocated yet"):
        model.gradients()
    with pytest.raises(_C.Error, match="needs the last micro-step"):
        model.update(lr=1e-3, weight_decay=0.0, step=1)
    model.forward(x)
    with pytest.raises(_C.Error, match="must have the shape of the last forward"):
        model.backward(y[:, :5])
    model.backward(y, 0, 2)
    with pytest.raises(_C.Error, match="needs the last micro-step"):
        model.loss()
    with pytest.raises(_C.Error, match="backward needs a forward"):
        model.backward(y, 1, 2)
    bad = x.clone()
    bad[2, 3] = 65
    with pytest.raises(_C.Error, match=r"id 65 at row 2, position 3 of tokens is outside the vocabulary \[0, 65\)"):
        model.forward(bad)
    with pytest.raises(_C.Error, match="does not fit"):
        model.forward(torch.zeros(4, 17, dtype=torch.int32))
    with pytest.raises(_C.Error, match="must be int32 or int64"):
        model.forward(x.float())
    model.forward(x)
    with pytest.raises(_C.Error, match="rows"):
        model.logits(0, 52)
    with pytest.raises(_C.Error, match="no buffer named"):
        model.buffer("nonsense")
    with pytest.raises(_C.Error, match="ids are 32 bits wide"):
        model.forward(torch.full((1, 1), 2**32 + 5))
    for change, message in (
        ({"beta1": 1.0}, "beta1 is 1"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": 0.0}, "eps is 0"),
        ({"grad_clip": 0.0}, "grad_clip is 0"),
        ({"lr": math.nan}, "learning_rate is nan"),
        ({"lr": -1.0}, "learning_rate is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"step": 0}, "step is 0"),
    ):
        with pytest.raises(_C.Error, match=message):
            model.update(**{"lr": 1e-3, "weight_decay": 0.0, "step": 1, **change})


def test_micro_steps_must_follow_each_other():
    case = SMALL[1]
    x, y = batch(case)
    model = build(case)
    model.forward(x)
    model.backward(y, 0, 3)
    model.forward(x)
    with pytest.raises(_C.Error, match="micro_step is 2, the next of this step is 1"):
        model.backward(y, 2, 3)
    with pytest.raises(_C.Error, match="accumulation_steps is 2, this step began with 3"):
        model.backward(y, 1, 2)
    model.forward(x[:1])
    with pytest.raises(_C.Error, match="a batch of 17 tokens in a step of batches of 51"):
        model.backward(y[:1], 1, 3)


@pytest.mark.parametrize("recompute", [0, 2, 3, 4])
def test_logits_are_those_of_the_last_forward_or_refused(recompute):
    case = SMALL[1]
    x, y = batch(case)
    model = build(case, recompute=recompute)
    model.forward(x)
    before = model.logits(0, 51)
    model.backward(y)
    if recompute == 0:
        assert torch.equal(model.logits(0, 51), before)
    else:  # the layernorm they come from is overwritten
        with pytest.raises(_C.Error, match="logits need a forward"):
            model.logits(0, 51)
    model.update(lr=1e-3, weight_decay=0.0, step=1)
    with pytest.raises(_C.Error, match="logits need a forward"):
        model.logits(0, 51)
    with pytest.raises(_C.Error, match="outside the vocabulary"):
        model.forward(torch.full_like(x, 65))
    with pytest.raises(_C.Error, match="logits need a forward"):
        model.logits(0, 51)


@pytest.mark.parametrize("how", ["init_random", "written from outside"])
def test_new_parameters_forget_the_optimizer_state(how):
    """A model that was trained and then gets other parameters trains like a new one."""
    case = SMALL[1]
    used, new = (build(case, precision="bf16") for _ in range(2))
    train_step(used, *batch(case))
    if how == "init_random":
        used.init_random(seed=42)
        new.init_random(seed=42)
    else:
        for name, parameter in used.parameters().items():
            parameter.copy_(new.parameters()[name])
        used.reset_optimizer()
    used.rng_state = new.rng_state
    for model in (used, new):
        train_step(model, *batch(case, seed=4))
    assert_same_bits(bits(used), bits(new))
