"""Where state files have what, for every stage and number of ranks, and values that come back bit by bit."""

import itertools
import math
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks_testing import run_ranks

from llmc import _C, snapshot
from llmc.checkpoint import Checkpoint
from llmc.checkpoint_copies import copy_buffers
from llmc.checkpoint_writer import CheckpointWriter
from llmc.config import TrainConfig
from llmc.data.loader import LoaderState
from llmc.errors import RunError
from llmc.model_file import ModelShape
from llmc.outliers import OutlierDetector
from llmc.ranks import Ranks
from llmc.resharding import model_units, moves, own_parts, tensor_slices, unit_slices, whole_tensors
from llmc.state_file import TrainState, write_state

# Sizes that neither 128 nor the numbers of ranks divide, but for those of llm.c's stage 1.
SHAPE = ModelShape(max_seq_len=5, vocab_size=7, padded_vocab_size=128, num_layers=3, num_heads=3, channels=24)
ORDER = [name for name, _ in SHAPE.parameters()]
SIZES = {name: math.prod(size) for name, size in SHAPE.parameters()}
STARTS = dict(zip(ORDER, np.cumsum([0, *SIZES.values()])[:-1].tolist(), strict=True))
N = SHAPE.num_parameters


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def layout(P: int) -> list[tuple[int, int, list[tuple[str, int, int]]]]:
    """The rules of the layout once more: units of layers, tensors padded to 128 values, units to 128 * P."""
    names = [["wte", "wpe"], *([n for n in ORDER if n.startswith(f"h{i}.")] for i in range(3)), ["lnfw", "lnfb"]]
    units, position = [], 0
    for unit in names:
        begin, tensors = position, []
        for name in unit:
            tensors.append((name, position, SIZES[name]))
            position += padded(SIZES[name], 128)
        position = begin + padded(position - begin, 128 * P)
        units.append((begin, position - begin, tensors))
    return units


def values(array: str) -> np.ndarray:
    """(N,) in file order; each value is there once, in all three arrays."""
    return (np.arange(N) + N * ["m", "v", "master"].index(array)).astype("<f4")


def shard(array: str, rank: int, P: int) -> np.ndarray:
    """What rank `rank` of P keeps, cut out of the whole layout."""
    units = layout(P)
    whole = np.zeros(sum(size for _, size, _ in units), "<f4")
    for _, _, tensors in units:
        for name, offset, numel in tensors:
            whole[offset : offset + numel] = values(array)[STARTS[name] : STARTS[name] + numel]
    return np.concatenate([whole[b + rank * n // P : b + (rank + 1) * n // P] for b, n, _ in units])


def slices_of_llm_c(array: str, rank: int, P: int) -> np.ndarray:
    """By the formulas of llm.c: tensor i begins at its offset / P, its layers follow each other with stride n / P."""
    result = np.full(N // P, np.nan, "<f4")
    offset = 0
    for _, size in SHAPE.tensors():
        layers = size[0] if len(size) > 1 and size[0] == 3 else 1
        n = math.prod(size) // layers
        for layer in range(layers):
            first = offset + layer * n + rank * n // P
            result[offset // P + layer * (n // P) :][: n // P] = values(array)[first : first + n // P]
        offset += math.prod(size)
    return result


def test_the_layout_is_the_cores() -> None:
    for P in (1, 2, 3, 4, 8):
        units = [(offset, size, list(tensors)) for offset, size, tensors in model_units(SHAPE, P)]
        assert units == layout(P)


@pytest.mark.parametrize("P", [1, 2, 3, 4, 7])
def test_unit_slices(P: int) -> None:
    arrays = [shard("m", rank, P) for rank in range(P)]
    check_placement(unit_slices(layout(P), P), arrays)


def test_unit_slices_by_hand() -> None:
    """Tensors that end with a slice, cross one, and lie inside one; the second unit begins at 512 / 2."""
    units = [(0, 512, [("a", 0, 256), ("b", 256, 200)]), (512, 256, [("c", 512, 130), ("d", 768 - 100, 100)])]
    assert unit_slices(units, 2) == {
        "a": [(0, 256, 0, 0)],
        "b": [(0, 200, 1, 0)],
        "c": [(0, 128, 0, 256), (128, 130, 1, 256)],
        "d": [(0, 100, 1, 256 + 28)],
    }
    assert own_parts(units, 0, 2) == {"a": (0, 256), "b": (0, 0), "c": (0, 128), "d": (0, 0)}


@pytest.mark.parametrize("P", [1, 2, 4, 8])
def test_tensor_slices(P: int) -> None:
    arrays = [slices_of_llm_c("m", rank, P) for rank in range(P)]
    assert not np.isnan(arrays).any()
    check_placement(tensor_slices(SHAPE, P), arrays)


def check_placement(placement, arrays) -> None:
    assert placement.keys() == SIZES.keys()
    for name, segments in placement.items():
        assert segments[0].begin == 0 and segments[-1].end == SIZES[name]
        for one, next_one in itertools.pairwise(segments):
            assert one.end == next_one.begin and one.rank < next_one.rank
        found = np.concatenate([arrays[s.rank][s.offset : s.offset + s.end - s.begin] for s in segments])
        assert np.array_equal(found, values("m")[STARTS[name] : STARTS[name] + SIZES[name]])


@pytest.mark.parametrize("P", [1, 2, 3, 5])
def test_own_parts(P: int) -> None:
    """Of all ranks together each value once; in a rank's array in their order, between padding."""
    covered = {name: np.zeros(size, int) for name, size in SIZES.items()}
    for rank in range(P):
        parts = own_parts(layout(P), rank, P)
        own = [
            values("m")[STARTS[name] + begin : STARTS[name] + end]
            for _, _, tensors in layout(P)
            for name, _, _ in tensors
            for begin, end in [parts[name]]
        ]
        for name, (begin, end) in parts.items():
            covered[name][begin:end] += 1
        array = shard("m", rank, P)
        assert np.array_equal(np.concatenate(own)[np.concatenate(own) > 0], array[array > 0])
    assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "P"), [("units", 1), ("units", 3), ("units", 4), ("tensors", 4), ("whole", 2)])
def test_moves(kind: str, P: int, wanted: int) -> None:
    """From any files to the parts of any rank."""
    if kind == "units":
        placement, arrays = unit_slices(layout(P), P), [shard("v", rank, P) for rank in range(P)]
    elif kind == "tensors":
        placement, arrays = tensor_slices(SHAPE, P), [slices_of_llm_c("v", rank, P) for rank in range(P)]
    else:
        placement, arrays = tensor_slices(SHAPE, 1), [values("v")]
    for rank in range(wanted):
        for parts in (own_parts(layout(wanted), rank, wanted), whole_tensors(SHAPE)):
            targets = {name: np.full(end - begin, -1, "<f4") for name, (begin, end) in parts.items()}
            for source, found in moves(placement, parts).items():
                for move in found:
                    assert move.source.stop > move.source.start
                    targets[move.tensor][move.target] = arrays[source][move.source]
            for name, (begin, end) in parts.items():
                assert np.array_equal(targets[name], values("v")[STARTS[name] + begin : STARTS[name] + end])


# ---- through files, with models of several ranks

LOADER = LoaderState(True, 0, 1, np.arange(2), np.arange(3), np.arange(624, dtype=np.uint32), 5, 2, 4)


def build(ranks: Ranks, stage: int, precision: str, master_weights: bool = True) -> "_C.GPT2":
    comm = _C.gloo_communicator(ranks.group_name) if ranks.size > 1 else None
    options = _C.Options(batch_size=1, seq_len=4, precision=precision, zero_stage=stage, master_weights=master_weights)
    return _C.GPT2(_C.GPT2Config(**vars(SHAPE)), options, comm)


def fill(model: "_C.GPT2", ranks: Ranks) -> None:
    """m, v, master weights or fp32 parameters of known values, each where its rank has it; others at random."""
    model.init_random(3)
    model.start_optimizer()
    stage = model.options.zero_stage
    own = own_parts(layout(ranks.size), ranks.rank, ranks.size)
    fp32 = model.options.precision == "fp32"
    for array in ("m", "v", "master"):
        if array == "master" and not fp32 and not model.options.master_weights:
            continue
        tensors = model.parameters() if array == "master" and fp32 else model.optimizer_state(array)
        cut = stage == 3 if array == "master" and fp32 else stage > 0
        for name, tensor in tensors.items():
            begin, end = own[name] if cut else (0, SIZES[name])
            tensor.view(-1).copy_(torch.from_numpy(values(array)[STARTS[name] + begin : STARTS[name] + end]))
    model.rng_state, model.last_update_rng_state = 77, 78
    if not fp32 and model.options.master_weights:
        model.restore_parameters()


def collect(model: "_C.GPT2", ranks: Ranks) -> dict[str, dict[str, tuple[int, np.ndarray]]]:
    """What a rank has of each array: first value and values, by tensor."""
    stage = model.options.zero_stage
    own = own_parts(layout(ranks.size), ranks.rank, ranks.size)
    result = {}
    for array in ("m", "v", "master", "parameters"):
        if array == "master" and (model.options.precision == "fp32" or not model.options.master_weights):
            continue
        tensors = model.parameters() if array == "parameters" else model.optimizer_state(array)
        cut = stage == 3 if array == "parameters" else stage > 0
        result[array] = {
            name: (own[name][0] if cut else 0, tensor.float().view(-1).numpy().copy())
            for name, tensor in tensors.items()
        }
    return result


def save_on(ranks: Ranks, directory, stage: int, precision: str, master_weights=True, in_background=False):
    model = build(ranks, stage, precision, master_weights)
    fill(model, ranks)
    run = SimpleNamespace(
        config=TrainConfig(checkpoint_every=10, keep_checkpoints=1, async_checkpoint=in_background),
        ranks=ranks,
        shape=SHAPE,
        precision=precision,
        model=model,
        buffers=copy_buffers(SHAPE, model.options, ranks.size, ranks.rank, []),
        train_loader=SimpleNamespace(state=lambda: LOADER),
        loss_outliers=OutlierDetector([1.0]),
        norm_outliers=OutlierDetector([2.0]),
        resumed=None,
        passed_over=[],
    )
    result = collect(model, ranks)
    spoiled, write = threading.Event(), snapshot.write
    if in_background:
        snapshot.write = lambda *arguments: (spoiled.wait(), write(*arguments))[1]
    writer = CheckpointWriter(run, directory)
    writer.write(20)
    assert writer.busy == in_background
    spoil(model, precision == "bf16" and master_weights)
    spoiled.set()
    writer.finish()
    return result


def spoil(model: "_C.GPT2", has_master: bool) -> None:
    """What the steps that follow would do to it."""
    for tensors in (model.parameters(), *map(model.optimizer_state, ["m", "v", *["master"] * has_master])):
        for tensor in tensors.values():
            tensor.fill_(-1)
    model.rng_state = model.last_update_rng_state = 0


def restore_on(ranks: Ranks, directory, stage: int, precision: str, master_weights: bool = True):
    model = build(ranks, stage, precision, master_weights)
    checkpoint = Checkpoint(directory, 20)
    stored = snapshot.read(checkpoint)
    assert stored.shape == SHAPE
    snapshot.check_master(stored, TrainConfig(master_weights=master_weights), precision)
    snapshot.restore(stored, model)
    assert (model.rng_state, model.last_update_rng_state) == (77, 78)
    return collect(model, ranks)


def whole(parts: list, array: str) -> dict[str, np.ndarray]:
    """The tensors of an array, put together from what the ranks have; whole tensors must be the same on all."""
    result = {}
    for name in ORDER:
        tensor = np.full(SIZES[name], np.nan, "<f4")
        for rank in parts:
            begin, found = rank[array][name]
            there = tensor[begin : begin + len(found)]
            assert np.isnan(there).all() or np.array_equal(there, found)
            there[:] = found
        result[name] = tensor
    return result


def check_whole(parts: list, arrays=("m", "v", "master")) -> None:
    for array in arrays:
        source = "parameters" if array == "master" and "master" not in parts[0] else array
        for name, tensor in whole(parts, source).items():
            assert np.array_equal(tensor, values(array)[STARTS[name] : STARTS[name] + SIZES[name]]), (array, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_ranks_and_stage_to_any_other(tmp_path, precision: str) -> None:
    """A chain through all stages, and numbers of ranks that divide each other and that do not."""
    (tmp_path / "0").mkdir()
    saved = run_ranks(3, save_on, tmp_path / "0", 1, precision)
    check_whole(saved)
    parameters = whole(saved, "parameters")
    for ranks, stage in ((3, 1), (2, 3), (4, 2), (1, 0), (2, 0), (3, 3)):
        found = run_ranks(ranks, restore_on, tmp_path / "0", stage, precision)
        check_whole(found)
        assert all(np.array_equal(tensor, parameters[name]) for name, tensor in whole(found, "parameters").items())


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 1), (3, 2), (2, 3)])
def test_files_of_every_stage(tmp_path, ranks: int, stage: int, precision: str, in_background: bool) -> None:
    """Byte by byte: arrays, model file; then back into two ranks of stage 3."""
    saved = run_ranks(ranks, save_on, tmp_path, stage, precision, True, in_background)
    checkpoint = Checkpoint(tmp_path, 20)
    assert checkpoint.complete and checkpoint.world_size == ranks
    for rank in range(ranks):
        raw = checkpoint.state(rank).read_bytes()
        expected = [values(a) if stage == 0 else shard(a, rank, ranks) for a in ("m", "v", "master")]
        assert struct.unpack_from("<7i", raw) == (20240527, 2 if stage else 1, ranks, rank, 1, 1, stage)
        assert struct.unpack_from("<QQ", raw, 48) == (N, len(expected[0]) if stage else 0)
        assert raw[1024:].startswith(b"".join(array.tobytes() for array in expected))
        assert raw[1024 + 3 * expected[0].nbytes :].startswith(struct.pack("<Q2iQ3i", 2, 0, 1, 3, 0, 1, 2))
    parameters = whole(saved, "parameters")
    stored = np.fromfile(checkpoint.model, "<f4" if precision == "fp32" else "<u2", offset=1024)
    if precision == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(stored, np.concatenate([parameters[name] for name in ORDER]))
    found = run_ranks(2, restore_on, tmp_path, 3, precision)
    check_whole(found)


@pytest.mark.parametrize("in_background", [False, True])
def test_without_master_weights(tmp_path, in_background: bool) -> None:
    saved = run_ranks(2, save_on, tmp_path, 3, "bf16", False, in_background)
    found = run_ranks(3, restore_on, tmp_path, 3, "bf16", False)
    check_whole(found, ("m", "v"))
    parameters = whole(saved, "parameters")
    assert all(np.array_equal(tensor, parameters[name]) for name, tensor in whole(found, "parameters").items())


@pytest.mark.parametrize("P", [2, 4])
def test_files_of_llm_c_at_stage_1(tmp_path, P: int) -> None:
    """Resumed at stages 0 and 1: the header says neither N nor the stage, and nothing follows the loader's block."""
    run_ranks(1, save_on, tmp_path, 0, "fp32")
    checkpoint = Checkpoint(tmp_path, 20)
    for rank in range(P):
        state = TrainState(1, 20, P, rank, 0, True, 0, 0, 77, 78, LOADER, (), ())
        arrays = {a: [torch.from_numpy(slices_of_llm_c(a, rank, P))] for a in ("m", "v", "master")}
        write_state(checkpoint.state(rank), state, arrays)
        raw = checkpoint.state(rank).read_bytes()
        checkpoint.state(rank).write_bytes(raw[: raw.rindex(struct.pack("<i", 20261124))])
    for ranks, stage in ((P, 1), (1, 0), (3, 3)):
        check_whole(run_ranks(ranks, restore_on, tmp_path, stage, "fp32"))


def test_files_that_do_not_belong_together(tmp_path) -> None:
    for name, ranks, stage in (("a", 3, 1), ("b", 2, 2), ("c", 3, 3)):
        (tmp_path / name).mkdir()
        run_ranks(ranks, save_on, tmp_path / name, stage, "fp32")
    here = Checkpoint(tmp_path / "a", 20)
    good = here.state(1).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(RunError) as caught:
            snapshot.read(here)
        assert str(caught.value) == message

    here.state(1).write_bytes(here.state(2).read_bytes())
    refused(f"{here.state(1)} is of rank 2 of 3, not of 1 of 3")
    here.state(1).write_bytes(Checkpoint(tmp_path / "b", 20).state(1).read_bytes())
    refused(f"{here.state(1)} is of rank 1 of 2, not of 1 of 3")
    here.state(1).write_bytes(Checkpoint(tmp_path / "c", 20).state(1).read_bytes())
    refused(f"{here.state(1)} and {here.state(0)} are of different runs: zero_stage is 3 and 1")
    here.state(1).write_bytes(good[:40] + struct.pack("<i", 19) + good[44:])
    refused(f"{here.state(1)} is of step 19, not of 20 as its name says")
    here.state(1).write_bytes(good[:48] + struct.pack("<q", N + 1) + good[56:])
    refused(f"{here.state(1)} is of another model: it has the state of {N + 1} parameters, the model has {N}")
    here.state(1).write_bytes(good[:5000])
    with pytest.raises(RunError, match=r"state_00000020_00001\.bin is truncated"):
        snapshot.read(here)
    here.state(1).unlink()
    assert not here.complete and list(here.missing()) == [here.state(1)]
