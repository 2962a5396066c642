"""ZeRO 0 to 3 on several ranks: the numbers of one process, the same bits on all ranks, the memory of the plan."""

import devices
import pytest
import torch
from model_testing import build
from ranks_testing import run_ranks

from llmc import _C
from llmc.build import Buffer, bytes_by_lifetime

STEPS = 20
# C is no multiple of 128, and the last layernorm has less than a slice for each of 8 ranks: shards cut through tensors.
# B is that of a micro-step over all ranks.
CASE = (16, 61, 3, 2, 48, 24, 16)


def micro_batches(case, steps, accumulation_steps):
    """Inputs and targets (steps, accumulation_steps, B, T), the same in every process."""
    _, vocab_size, *_, B, T = case
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocab_size, (steps, accumulation_steps, B, T + 1), generator=generator)
    return tokens[..., :-1], tokens[..., 1:]


def make_model(case, comm=None, core=_C, **options):
    *shape, B, T = case
    return build((*shape, B // (comm.size if comm else 1), T), core=core, comm=comm, **options)


def run(model, case, steps, accumulation_steps):
    """Losses and gradient norms of `steps` steps on this rank's rows."""
    inputs, targets = micro_batches(case, steps, accumulation_steps)
    rows = model.options.batch_size
    mine = slice(model.rank * rows, (model.rank + 1) * rows)
    results = []
    for step in range(steps):
        for micro_step in range(accumulation_steps):
            model.forward(inputs[step, micro_step, mine])
            model.backward(targets[step, micro_step, mine], micro_step, accumulation_steps)
        model.update(lr=1e-4, weight_decay=0.1, step=step + 1)
        results.append((model.loss(), model.grad_norm()))
    return results


def whole_parameters(model, core=_C):
    units = len(core.parameter_units(model.config, model.world_size))
    return {name: tensor.clone() for unit in range(units) for name, tensor in model.gather_parameters(unit).items()}


def bytes_of_plan(model, core=_C):
    """Allocated bytes by lifetime, as worked out from the plan's rows."""
    return bytes_by_lifetime([Buffer(*row) for row in core.plan(model.config, model.options, model.world_size)])


def train_on_rank(ranks, case, jobs):
    """One rank's part of several trainings: losses and norms, parameters, allocated and planned bytes of each."""
    torch.set_num_threads(1)
    comm = _C.gloo_communicator(ranks.group_name) if ranks.size > 1 else None
    results = []
    for accumulation_steps, options in jobs:
        model = make_model(case, comm, **options)
        curve = run(model, case, STEPS, accumulation_steps)
        results.append((curve, whole_parameters(model), model.allocated_bytes(), bytes_of_plan(model)))
    return results


def train_in_simulator(ranks, case, jobs, steps, schedule, lazy):
    """The same on simulated GPUs, each process with one, through NCCL."""
    torch.set_num_threads(1)
    simulator = devices.simulator()
    core = simulator.core
    simulator.set(schedule, lazy, devices.LARGE)
    results = []
    for accumulation_steps, options in jobs:
        identity = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else "", "identity")
        comm = core.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, 0, 60)
        model = make_model(case, comm, core, device="cuda", **options)
        curve = run(model, case, steps, accumulation_steps)
        results.append((curve, whole_parameters(model, core), model.allocated_bytes(), bytes_of_plan(model, core)))
        simulator.check()
    return results


def alone(case, jobs, steps=STEPS):
    """Losses and norms of one process on the CPU."""
    return [run(make_model(case, **options), case, steps, accumulation) for accumulation, options in jobs]


def assert_same_curve(curve, expected, job):
    """fp32 sums in another order: losses of about 4 differ by a few ulps at first, more after 20 updates."""
    losses, norms = (torch.tensor(column, dtype=torch.float64) for column in zip(*curve, strict=True))
    true_losses, true_norms = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected, strict=True))
    assert abs(losses[0] - true_losses[0]) < 1e-5, job
    assert (losses - true_losses).abs().max() < 1e-4, job
    assert ((norms - true_norms) / true_norms).abs().max() < 1e-3, job


def assert_same_on_all_ranks(ranks, job):
    """Losses, norms and parameters to the bit, and the memory of the plan."""
    curve, parameters, allocated, planned = ranks[0][job]
    assert allocated == sum(planned.values())
    for other in ranks[1:]:
        assert other[job][0] == curve
        assert all(torch.equal(other[job][1][name], parameter) for name, parameter in parameters.items())
        assert other[job][2:] == (allocated, planned)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_curve_of_one_process(world_size):
    jobs = [(accumulation, {"zero_stage": stage}) for accumulation in (1, 4) for stage in range(4)]
    expected = alone(CASE, [(accumulation, {}) for accumulation, _ in jobs])
    ranks = run_ranks(world_size, train_on_rank, CASE, jobs)
    for job in range(len(jobs)):
        assert_same_on_all_ranks(ranks, job)
        assert_same_curve(ranks[0][job][0], expected[job], jobs[job])
    by_stage = [ranks[0][stage][3] for stage in range(4)]
    parameters = by_stage[0]["parameters"]
    assert by_stage[0]["optimizer"] == 2 * parameters
    assert [plan["optimizer"] for plan in by_stage[1:]] == [2 * parameters // world_size] * 3


def test_bf16_stays_the_same_on_all_ranks():
    """Stochastic rounding, with and without master weights, in either precision of the gradients."""
    settings = [{}, {"grad_dtype": "fp32"}, {"master_weights": False}]
    jobs = [
        (2, {"precision": "bf16", "grad_dtype": "bf16", "zero_stage": stage, **setting})
        for setting in settings
        for stage in range(4)
    ]
    expected = alone(CASE, [(accumulation, {**options, "zero_stage": 0}) for accumulation, options in jobs])
    ranks = run_ranks(3, train_on_rank, CASE, jobs)
    for job, (_, options) in enumerate(jobs):
        assert_same_on_all_ranks(ranks, job)
        # Losses of bf16 models are good to about 2^-9 of 4; the noise of the gradients changes them by less.
        for (loss, _), (true_loss, _) in zip(ranks[0][job][0], expected[job], strict=True):
            assert abs(loss - true_loss) < 0.02, options


def test_master_weights_of_all_stages_are_the_same():
    """With fp32 sums, an update does not depend on the stage: only the order of the sum of squares (the clip) does."""
    jobs = [(1, {"precision": "bf16", "grad_dtype": "fp32", "zero_stage": stage}) for stage in range(4)]
    ranks = run_ranks(2, train_on_rank, CASE, jobs)
    parameters = [ranks[0][job][1] for job in range(4)]
    for stage in (1, 2, 3):
        for name, expected in parameters[0].items():
            # The clip differs in the last bit; a bf16 parameter then rarely rounds the other way.
            different = (parameters[stage][name] != expected).double().mean()
            assert different < 0.02, (stage, name, float(different))


# Shapes of the kernels: C a multiple of 8, odd T and V.
ON_CUDA = (16, 61, 2, 2, 48, 12, 9)


@pytest.mark.parametrize(("world_size", "schedule", "lazy"), [(2, "forward", False), (4, "random:1", True)])
def test_nccl_in_the_simulator(world_size, schedule, lazy):
    devices.require_simulator()
    steps = 2
    jobs = [(accumulation, {"zero_stage": stage, "tf32": False}) for accumulation in (1, 2) for stage in range(4)]
    expected = alone(ON_CUDA, [(accumulation, {}) for accumulation, _ in jobs], steps)
    ranks = run_ranks(world_size, train_in_simulator, ON_CUDA, jobs, steps, schedule, lazy)
    for job in range(len(jobs)):
        assert_same_on_all_ranks(ranks, job)
        assert_same_curve(ranks[0][job][0], expected[job], jobs[job])


def test_bf16_in_the_simulator():
    devices.require_simulator()
    jobs = [(1, {"zero_stage": stage, "precision": "bf16", "grad_dtype": "bf16"}) for stage in range(4)]
    expected = alone(ON_CUDA, [(1, {"precision": "bf16", "grad_dtype": "bf16"})] * 4, 2)
    ranks = run_ranks(3, train_in_simulator, ON_CUDA, jobs, 2, "forward", True)
    for job in range(len(jobs)):
        assert_same_on_all_ranks(ranks, job)
        for (loss, _), (true_loss, _) in zip(ranks[0][job][0], expected[job], strict=True):
            assert abs(loss - true_loss) < 0.02, jobs[job]


def recomputing(precision, stages, **options):
    """A job at each level of recomputation, with two micro-steps."""
    return [
        (2, {"zero_stage": stage, "precision": precision, "recompute": recompute, **options})
        for stage in stages
        for recompute in range(5)
    ]


def assert_same_at_all_levels(ranks, jobs):
    """Losses, norms and parameters to the bit."""
    for job, (_, options) in enumerate(jobs):
        assert_same_on_all_ranks(ranks, job)
        first = job - options["recompute"]
        assert ranks[0][job][0] == ranks[0][first][0], options
        for name, parameter in ranks[0][first][1].items():
            assert torch.equal(ranks[0][job][1][name], parameter), (options, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_is_bit_equal(precision):
    """A block computes again what it needs while its parameters are there for its backward pass."""
    jobs = recomputing(precision, stages=(0, 3))
    assert_same_at_all_levels(run_ranks(2, train_on_rank, CASE, jobs), jobs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_is_bit_equal_in_the_simulator(precision):
    devices.require_simulator()
    jobs = recomputing(precision, stages=(3,), tf32=False)
    assert_same_at_all_levels(run_ranks(2, train_in_simulator, ON_CUDA, jobs, 2, "forward", True), jobs)
