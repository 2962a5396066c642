"""Optimizer state in host memory: the same bits as on the GPU, however the copies and the work take turns."""

import itertools
import re

import devices
import pytest
import torch
from model_testing import assert_same_bits, batch, build, train_step
from ranks_testing import run_ranks
from test_zero import ON_CUDA, run, whole_parameters

from llmc import _C
from llmc.build import Buffer, host_bytes, total_bytes
from llmc.cli.train import _main as command
from llmc.errors import UsageError
from llmc.kernels import Fetch, Kernel, Step, Store
from llmc.roofline import GPUS, Machine, Timeline, predict

CASE = (20, 61, 3, 2, 48, 2, 13)
MIB = 2**20


def state_names(precision, master_weights=True):
    return ["m", "v", "master"] if precision == "bf16" and master_weights else ["m", "v"]


def everything(model, names):
    """Parameters and optimizer state, copied to the host."""
    kinds = {"parameters": model.parameters(), **{state: model.optimizer_state(state) for state in names}}
    return {kind: {name: tensor.cpu().clone() for name, tensor in found.items()} for kind, found in kinds.items()}


def trained(cuda, steps=3, **options):
    model = build(CASE, core=cuda.core, device="cuda", tf32=False, **options)
    for step in range(1, steps + 1):
        train_step(model, *batch(CASE, seed=step), step)
    return model


# Elements of a piece: many that cut tensors anywhere, whole units and their rest, everything.
PIECES = [1000, 20000, 0]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(("precision", "master_weights"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_bits_are_those_without(cuda, precision, master_weights, piece, lazy):
    options = {"precision": precision, "master_weights": master_weights}
    names = state_names(precision, master_weights)
    expected = everything(trained(cuda, **options), names)
    offloaded = {**options, "offload_optimizer": True, "offload_piece": piece}
    if isinstance(cuda, devices.Simulator):
        with cuda.settings(lazy=lazy):
            found = everything(trained(cuda, **offloaded), names)
    elif lazy:
        pytest.skip("a GPU chooses the order itself")
    else:
        found = everything(trained(cuda, **offloaded), names)
    cuda.check()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_state_that_is_written_and_restored(cuda, lazy):
    """As a resume does it: what another model has comes through the host, parameters from the master weights."""
    if lazy and not isinstance(cuda, devices.Simulator):
        pytest.skip("a GPU chooses the order itself")
    other = trained(cuda, precision="bf16")
    model = build(
        CASE, core=cuda.core, device="cuda", tf32=False, precision="bf16", offload_optimizer=True, offload_piece=1000
    )
    if isinstance(cuda, devices.Simulator):
        cuda.set("forward", lazy, devices.LARGE)
    model.start_optimizer()
    for name, master in model.optimizer_state("master").items():
        assert torch.equal(master, model.parameters()[name].cpu().float())
    for state in ("m", "v", "master"):
        theirs = other.optimizer_state(state)
        for name, tensor in model.optimizer_state(state).items():
            assert tensor.device.type == "cpu"
            tensor.copy_(theirs[name].cpu())
    model.rng_state, model.last_update_rng_state = other.rng_state, other.last_update_rng_state
    model.restore_parameters()
    for each in (model, other):
        train_step(each, *batch(CASE, seed=9), 4)
    names = state_names("bf16")
    found, expected = everything(model, names), everything(other, names)
    cuda.check()
    if isinstance(cuda, devices.Simulator):
        cuda.set("forward", False, devices.LARGE)
    assert_same_bits(found, expected)


def test_a_new_state_after_a_reset(cuda):
    """The memory comes and goes; the second state is as clean as the first."""
    model = trained(cuda, offload_optimizer=True, offload_piece=1000)
    memory = model.memory()
    device = sum(size for lifetime, size in memory.items() if lifetime != "host")
    assert model.allocated_bytes() == device
    model.reset_optimizer()
    assert model.allocated_bytes() == device - memory["optimizer"]
    with pytest.raises(
        cuda.core.Error, match="m is not allocated yet, it exists after start_optimizer or the first update"
    ):
        model.optimizer_state("m")
    model.start_optimizer()
    assert not any(tensor.any() for state in ("m", "v") for tensor in model.optimizer_state(state).values())


def train_offloaded(ranks, jobs, lazy):
    """On simulated GPUs: curve, parameters and this rank's state."""
    torch.set_num_threads(1)
    simulator = devices.simulator()
    core = simulator.core
    simulator.set("forward", lazy, devices.LARGE)
    results = []
    *shape, B, T = ON_CUDA
    for options in jobs:
        identity = ranks.broadcast(core.nccl_unique_id().hex() if ranks.rank == 0 else "", "identity")
        comm = core.nccl_communicator(bytes.fromhex(identity), ranks.rank, ranks.size, 0, 60)
        model = build((*shape, B // comm.size, T), core=core, comm=comm, device="cuda", **options)
        curve = run(model, ON_CUDA, 2, 1)
        state = {name: [t.clone() for t in model.optimizer_state(name).values()] for name in ("m", "v", "master")}
        results.append((curve, whole_parameters(model, core), state))
        simulator.check()
    return results


def test_every_stage_on_ranks():
    devices.require_simulator()
    jobs = [
        {"precision": "bf16", "zero_stage": stage, "offload_optimizer": offload, "offload_piece": 700 * offload}
        for stage in range(4)
        for offload in (False, True)
    ]
    for results in run_ranks(2, train_offloaded, jobs, True):
        for stage in range(4):
            (curve, parameters, state), (other_curve, other_parameters, other_state) = results[
                2 * stage : 2 * stage + 2
            ]
            assert other_curve == curve
            assert_same_bits({"parameters": other_parameters}, {"parameters": parameters})
            for name, tensors in state.items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, other_state[name], strict=True)), (stage, name)


# --- plan, roofline, command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 8), ("bf16", 12)])
def test_the_plan_of_d12(precision, bytes_each):
    """m, v and master weights of 124475904 parameters in host memory; two pieces of 4 Mi of each on the GPU."""
    rows = [
        [
            Buffer(*row)
            for row in _C.plan(
                _C.GPT2Config(), _C.Options(precision=precision, device="cuda", offload_optimizer=offload)
            )
        ]
        for offload in (False, True)
    ]
    assert host_bytes(rows[0]) == 0 and host_bytes(rows[1]) == bytes_each * 124475904
    assert total_bytes(rows[0]) - total_bytes(rows[1]) == bytes_each * (124475904 - 2 * 2**22)


def test_the_plan_of_a_small_model_needs_no_more_than_its_units():
    config = _C.GPT2Config(max_seq_len=16, vocab_size=65, padded_vocab_size=128, num_layers=2, num_heads=2, channels=32)
    shapes = {
        row[0]: row[3] for row in _C.plan(config, _C.Options(seq_len=16, device="cuda", offload_optimizer=True), 4)
    }
    largest = max(size for _, size, _ in _C.parameter_units(config, 4))
    assert shapes["m_ring"] == shapes["v_ring"] == (2, largest)
    sharded = _C.Options(seq_len=16, device="cuda", offload_optimizer=True, zero_stage=1)
    shapes = {row[0]: row[3] for row in _C.plan(config, sharded, 4)}
    assert shapes["m_ring"] == (2, largest // 4)


def test_what_moves():
    """Every number of the state comes and goes once a step, slots in turn."""
    step = Step(_C.GPT2Config(), _C.Options(precision="bf16", device="cuda", offload_optimizer=True))
    events = [event for phase, _ in step.phases() for event in phase()]
    for kind in (Fetch, Store):
        moves = [event for event in events if isinstance(event, kind)]
        assert sum(move.bytes for move in moves) == 12 * 124475904
        assert 12 * 2**21 < max(move.bytes for move in moves) <= 12 * 2**22
        assert {(a.slot, b.slot) for a, b in itertools.pairwise(moves)} == {(0, 1), (1, 0)}
    adamw = [event.bytes for event in events if isinstance(event, Kernel) and event.what == "AdamW"]
    assert sum(adamw) == pytest.approx(28 * 124475904)


def test_time_of_the_copies():
    """Pieces of 1 s each way and kernels of no time, by hand: the third waits until the first has gone."""
    machine = Machine(GPUS["A100"], "bf16")
    second = round(0.77 * 32e9)
    timeline = Timeline(machine, 1)
    ends = []
    for slot in (0, 1, 0, 1):
        timeline.play(Fetch(slot, second))
        ends.append(timeline.kernels)
        timeline.play(Store(slot, second))
    assert ends == pytest.approx([1, 2, 3, 4]) and timeline.stored == pytest.approx(5)
    step = Step(_C.GPT2Config(), _C.Options(precision="bf16", device="cuda", offload_optimizer=True))
    without = Step(_C.GPT2Config(), _C.Options(precision="bf16", device="cuda"))
    slow, fast = predict(step, machine), predict(without, machine)
    # One way of the whole state, less what comes before the update; a few launches more.
    copies = 12 * 124475904 / second
    assert 0 < slow.losses["waiting for the optimizer's state"] < copies
    assert slow.seconds - fast.seconds < copies + 1e-3


def test_refusals_and_the_dry_run(capsys):
    with pytest.raises(_C.Error, match="offload_optimizer needs a GPU"):
        _C.plan(_C.GPT2Config(), _C.Options(offload_optimizer=True))
    flags = ["--dry-run", "-e", "d12", "-b", "4", "-t", "1024", "-x", "1", "--offload-optimizer", "1"]
    with pytest.raises(
        UsageError, match="--offload-optimizer 1 has no effect on a CPU, whose memory is the host's: drop it"
    ):
        command([*flags, "--device", "cpu"])
    command([*flags, "--device", "cuda", "--memory", "24"])
    text = capsys.readouterr().out
    host = int(re.search(r"^host: (\d+) bytes", text, re.M)[1])
    totals = [
        int(re.search(rf"^{lifetime}: (\d+) bytes", text, re.M)[1])
        for lifetime in ("parameters", "gradients", "optimizer", "activations")
    ]
    assert host == 12 * 124475904 and totals[2] == 2 * 12 * 2**22
    assert int(re.search(r"^total without host: (\d+) bytes", text, re.M)[1]) == sum(totals)
    assert re.search(r"^  host +master +fp32 ", text, re.M)
    command([*flags, "--roofline", "4090"])
    assert "waiting for the optimizer's state" in capsys.readouterr().out
