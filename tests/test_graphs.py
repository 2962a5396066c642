"""CUDA graphs: the bits of the same launches one by one, whatever comes between the steps; how few launches remain."""

import devices
import pytest
import torch
from model_testing import assert_same_bits, batch, bits, build, train_step
from ranks_testing import run_ranks
from test_zero import ON_CUDA, run, whole_parameters

from llmc import _C
from llmc.cli.train import _main as command
from llmc.errors import UsageError

CASE = (12, 37, 2, 2, 32, 2, 9)
STEPS = 4  # one that warms up, one that is captured, and two of graphs


def make(cuda, graphs, case=CASE, **options):
    return build(case, core=cuda.core, device="cuda", tf32=False, cuda_graphs=graphs, **options)


def train(model, accumulation_steps=1, steps=STEPS, case=CASE, between=None):
    """Losses and norms of the steps; between(model, step): what else is done after each."""
    curve = []
    for step in range(1, steps + 1):
        for micro_step in range(accumulation_steps):
            x, y = batch(case, seed=10 * step + micro_step)
            model.forward(x)
            model.backward(y, micro_step, accumulation_steps)
        # Everything that changes from step to step does: rate, decay, count, the limit of the norm.
        model.update(lr=1e-3 / step, weight_decay=0.1 * step, step=step, grad_clip=1.0 / step)
        curve.append((model.loss(), model.grad_norm()))
        if between:
            between(model, step)
    return curve


def state(model):
    kinds = {**bits(model), "m": model.optimizer_state("m"), "v": model.optimizer_state("v")}
    return {kind: {name: tensor.clone() for name, tensor in tensors.items()} for kind, tensors in kinds.items()}


def assert_no_difference(cuda, accumulation_steps=1, between=None, case=CASE, **options):
    plain, graphs = make(cuda, False, case, **options), make(cuda, True, case, **options)
    expected = train(plain, accumulation_steps, between=between, case=case)
    assert train(graphs, accumulation_steps, between=between, case=case) == expected
    assert len(set(expected)) == STEPS  # every step is another one
    cuda.check()
    assert_same_bits(state(graphs), state(plain))


@pytest.mark.parametrize(
    ("precision", "recompute", "accumulation_steps"),
    [*(("bf16", recompute, 3) for recompute in range(5)), ("bf16", 1, 1), ("fp32", 0, 1), ("fp32", 4, 3)],
)
def test_bits_are_those_without(cuda, precision, recompute, accumulation_steps):
    assert_no_difference(cuda, accumulation_steps, precision=precision, recompute=recompute)


@pytest.mark.parametrize("options", [{"gelu_fusion": 2}, {"classifier_rows": 5}, {"offload_optimizer": True}], ids=str)
def test_bits_with_other_options(cuda, options):
    assert_no_difference(cuda, 2, precision="bf16", **options)


@pytest.mark.parametrize(("schedule", "lazy"), [("reverse", False), ("random:1", False), ("random:2", True)])
def test_bits_in_every_schedule(cuda, schedule, lazy):
    if not isinstance(cuda, devices.Simulator):
        pytest.skip("a GPU chooses its own schedule")
    expected = make(cuda, False, precision="bf16")
    curve = train(expected, 3)
    with cuda.settings(schedule=schedule, lazy=lazy):
        model = make(cuda, True, precision="bf16")
        assert train(model, 3) == curve
        cuda.check()
    assert_same_bits(state(model), state(expected))


def validate_and_sample(model, step):
    """Other shapes, in other memory: nothing of it may be taken for a part of a step."""
    x, y = batch(CASE, seed=100 + step)
    model.evaluate(x, y)
    model.evaluate(x[:1, :5], y[:1, :5])
    model.forward(x[:1, :4])
    model.extend(x[:1, 4:6])
    model.logits(0, 6)


def small_batch(model, step):
    x, y = batch(CASE, seed=100 + step)
    model.forward(x[:, :7])
    model.backward(y[:, :7])
    model.update(lr=1e-4, weight_decay=0, step=step)


def another_accumulation(model, step):
    for micro_step in range(2):
        x, y = batch(CASE, seed=100 + step + micro_step)
        model.forward(x)
        model.backward(y, micro_step, 2)
    model.update(lr=1e-4, weight_decay=0, step=step)


def norm_first(model, step):
    """The update finds the norm there, every other time: its graph has another shape."""
    x, y = batch(CASE, seed=100 + step)
    model.forward(x)
    model.backward(y)
    model.grad_norm()
    model.update(lr=1e-4, weight_decay=0, step=step)


def new_state(model, step):
    """m, v and master weights in other memory."""
    model.reset_optimizer()
    model.start_optimizer()


BETWEEN = [validate_and_sample, small_batch, another_accumulation, norm_first, new_state]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_what_comes_between_steps(cuda, between):
    assert_no_difference(cuda, between=between, precision="bf16", recompute=2)


def test_evaluation_by_a_graph(cuda):
    """The forward pass of a whole batch is the training's, and so is its graph."""
    plain, graphs = make(cuda, False), make(cuda, True)
    for model in (plain, graphs):
        train(model)
    for seed in range(3):
        x, y = batch(CASE, seed)
        assert torch.equal(graphs.evaluate(x, y), plain.evaluate(x, y))
    x, _ = batch(CASE, seed=9)
    for model in (plain, graphs):
        model.forward(x)
    assert torch.equal(graphs.logits(3, 18), plain.logits(3, 18))
    cuda.check()


@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_launches_of_a_step(accumulation_steps):
    """Kernels and graphs that the host launches: three graphs a micro-step (forward, backward, and the embedding's
    gradients, whose seed changes), one for the update. The warm-up and the capture launch what they did before."""
    cuda = devices.simulator("fast")
    counts = {}
    for graphs in (False, True):
        model = make(cuda, graphs)
        counts[graphs] = []
        for step in range(1, STEPS + 1):
            before = cuda.launches()
            train_one(model, step, accumulation_steps)
            counts[graphs].append(cuda.launches() - before)
    assert counts[True][-1] == 3 * accumulation_steps + 1
    assert counts[False][-1] == counts[False][-2] > 50 * accumulation_steps
    assert counts[True][0] <= counts[False][0]


def train_one(model, step, accumulation_steps):
    for micro_step in range(accumulation_steps):
        x, y = batch(CASE, seed=step)
        model.forward(x)
        model.backward(y, micro_step, accumulation_steps)
    model.update(lr=1e-3, weight_decay=0.1, step=step)


def test_memory_is_the_plans(cuda):
    """A capture allocates nothing."""
    model = make(cuda, True, precision="bf16")
    train(model)
    assert model.allocated_bytes() == sum(model.memory().values())


def test_two_models_at_once(cuda):
    """Each has graphs of its own memory."""
    pairs = [(make(cuda, True), make(cuda, False)) for _ in range(2)]
    for step in range(1, STEPS + 1):
        for i, pair in enumerate(pairs):
            x, y = batch(CASE, seed=2 * step + i)
            losses = [train_step(model, x, y, step) for model in pair]
            assert losses[0] == losses[1]


def train_on_ranks(ranks, jobs, schedule, lazy):
    torch.set_num_threads(1)
    simulator = devices.simulator("fast")
    core = simulator.core
    simulator.set(schedule, lazy, devices.LARGE)
    results = []
    *shape, B, T = ON_CUDA
    for accumulation_steps, options in jobs:
        identity = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else "", "identity")
        comm = core.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, 0, 60)
        model = build((*shape, B // comm.size, T), core=core, comm=comm, device="cuda", **options)
        before = simulator.launches()
        curve = run(model, ON_CUDA, STEPS, accumulation_steps)
        results.append((curve, whole_parameters(model, core), simulator.launches() - before))
        simulator.check()
    return results


@pytest.mark.parametrize(
    ("stage", "schedule", "lazy"),
    [(0, "forward", False), (1, "reverse", False), (2, "random:3", True), (3, "random:4", True)],
)
def test_bits_on_ranks(stage, schedule, lazy):
    """Collectives stay between the graphs."""
    devices.require_simulator()
    jobs = [
        (accumulation_steps, {"precision": "bf16", "zero_stage": stage, "cuda_graphs": graphs})
        for accumulation_steps in (1, 3)
        for graphs in (False, True)
    ]
    for results in run_ranks(2, train_on_ranks, jobs, schedule, lazy):
        for job in range(0, len(jobs), 2):
            (curve, parameters, launches), (other_curve, other_parameters, fewer) = results[job : job + 2]
            assert other_curve == curve, jobs[job]
            assert_same_bits({"parameters": other_parameters}, {"parameters": parameters})
            assert fewer < 0.7 * launches, jobs[job]


def test_refusals():
    with pytest.raises(_C.Error, match="cuda_graphs needs a GPU"):
        _C.plan(_C.GPT2Config(), _C.Options(cuda_graphs=True))
    flags = ["--dry-run", "-e", "d12", "-b", "4", "-t", "1024", "-x", "1", "--cuda-graphs", "1"]
    with pytest.raises(UsageError, match="--cuda-graphs 1 has no effect on a CPU, which launches no kernels: drop it"):
        command([*flags, "--device", "cpu"])
    command([*flags, "--device", "cuda", "--memory", "24"])
