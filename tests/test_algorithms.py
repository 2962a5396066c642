"""Algorithms of cuBLASLt: the file that keeps them, whole and damaged; how the core chooses, in the simulator."""

import json
import multiprocessing
from pathlib import Path

import devices
import pytest
import torch

from llmc import algorithms
from llmc.algorithms import read_algorithms, write_algorithms
from llmc.errors import RunError

LARGEST = 2**64 - 1
DEVICES = {
    "GPU A, 132 multiprocessors, cuBLASLt 130101": {"a product": [*range(7), LARGEST], "another": [0] * 8},
    "GPU ü": {},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / algorithms.NAME


# --- the file ---------------------------------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    assert read_algorithms(path) == {}
    write_algorithms(path, DEVICES)
    assert read_algorithms(path) == DEVICES
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_its_format(path: Path) -> None:
    """As docs/file-formats.md has it."""
    write_algorithms(path, {"b": {"y": [1] * 8, "x": [2] * 8}})
    # gzip's of {"b": {"x": [2, 2, 2, 2, 2, 2, 2, 2], "y": [1, 1, 1, 1, 1, 1, 1, 1]}}
    assert json.loads(path.read_text()) == {
        "format": 1,
        "checksum": "bf608889",
        "devices": {"b": {"y": [1] * 8, "x": [2] * 8}},
    }


def test_every_damaged_byte_is_seen(path: Path) -> None:
    """What is read is what was written, or refused."""
    write_algorithms(path, DEVICES)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for damage in (0x01, 0x04, 0x20, 0x80):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ damage]) + whole[at + 1 :])
            assert reads_nothing_else(path)
        path.write_bytes(whole[:at])
        with pytest.raises(RunError):
            read_algorithms(path)


def reads_nothing_else(path: Path) -> bool:
    try:
        return read_algorithms(path) == DEVICES  # after a changed space
    except RunError as error:
        return str(path) in str(error) and "\n" not in str(error)


def content(devices: object, **changes: object) -> str:
    return json.dumps({"format": 1, "checksum": algorithms.checksum(devices), "devices": devices} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "no JSON"),
        ("\x00" * 100, "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("9" * 10_000, "no JSON"),
        ("[]", "must hold format, checksum and devices"),
        (content({}, more=1), "must hold format, checksum and devices"),
        (content({}, format=2), "another format than 1"),
        (content({}, checksum="00000000"), "its checksum is wrong"),
        (content([]), "8 numbers of 64 bits"),
        (content({"a": [1]}), "8 numbers of 64 bits"),
        (content({"a": {"b": 1}}), "8 numbers of 64 bits"),
        (content({"a": {"b": [1] * 7}}), "8 numbers of 64 bits"),
        (content({"a": {"b": [1] * 7 + [LARGEST + 1]}}), "8 numbers of 64 bits"),
        (content({"a": {"b": [1] * 7 + [-1]}}), "8 numbers of 64 bits"),
        (content({"a": {"b": [1] * 7 + [True]}}), "8 numbers of 64 bits"),
        (content({"a": {"b": [1] * 7 + [1.0]}}), "8 numbers of 64 bits"),
        (" " * (2**24 + 1), "more than 16777216 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(path: Path, text: str, why: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RunError, match=why):
        read_algorithms(path)


def test_a_directory_in_its_place(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(RunError, match="cannot read"):
        read_algorithms(path)
    with pytest.raises(RunError, match="cannot write"):
        write_algorithms(path, DEVICES)


def write_often(path: Path, writer: int) -> None:
    for i in range(30):
        chosen = {f"product {writer} {i}": [i] * 8}
        algorithms.merge_or_warn(path, read_algorithms(path), f"GPU {writer}", chosen)


def test_runs_that_write_at_once(path: Path) -> None:
    """The file is whole at every moment."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, writer)) for writer in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read_algorithms(path)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert any(read_algorithms(path).values())


# --- the choice -------------------------------------------------------------------------------------------------------

KINDS = 20  # products of a step: 5 forward, 5 of inputs' gradients, 5 of weights', which overwrite and which add


class Model:
    """Three layers of a tiny GPT-2 on a simulated GPU."""

    def __init__(self, precision: str = "fp32", bias_fusion: bool = False) -> None:
        _C = devices.simulator("fast").core
        config = _C.GPT2Config(
            max_seq_len=16, vocab_size=65, padded_vocab_size=128, num_layers=3, num_heads=2, channels=64
        )
        options = _C.Options(
            batch_size=2, seq_len=16, precision=precision, bias_fusion=bias_fusion, device="cuda", tf32=False
        )
        self.core = _C.GPT2(config, options)
        self.core.init_random(1)
        generator = torch.Generator().manual_seed(2)
        self.tokens, self.targets = torch.randint(65, (2, 2, 16), generator=generator)

    def choose(self, known: dict[str, list[int]], timing: bool) -> dict[str, list[int]]:
        self.core.choose_algorithms(known, timing)
        self.step()
        return self.core.algorithms()

    def step(self) -> dict[str, torch.Tensor]:
        for micro_step in range(2):
            self.core.forward(self.tokens)
            self.core.backward(self.targets, micro_step, 2)
        devices.simulator("fast").check()
        to_host = devices.simulator("fast").to_host
        return {name: to_host(gradient) for name, gradient in self.core.gradients().items()}


@pytest.mark.parametrize(
    "fastest, chosen",
    [
        (0, 0),
        (2, 2),
        (3, 3),
        (4, 0),  # adds partial sums in bf16, and may not be offered
        (5, 0),  # does not run
        (6, 0),  # not for this
    ],
)
def test_the_fastest_of_those_that_run(monkeypatch: pytest.MonkeyPatch, fastest: int, chosen: int) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", str(fastest))
    for precision in ("fp32", "bf16"):
        found = Model(precision).choose({}, timing=True)
        assert len(found) == KINDS
        assert {algorithm[0] for algorithm in found.values()} == {chosen}


def test_without_timing_it_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Model().step()
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "3")
    model = Model()
    assert model.choose({}, timing=False) == {}
    assert_equal(model.step(), plain)


def test_algorithms_change_the_bits_and_the_known_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Model().step()
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "3")
    model = Model()
    chosen = model.choose({}, timing=True)
    timed = model.step()
    assert not torch.equal(timed["h0.qkvw"], plain["h0.qkvw"])
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "2")
    for timing in (False, True):
        other = Model()
        assert other.choose(chosen, timing) == chosen
        assert_equal(other.step(), timed)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_timing_takes_what_is_known_and_times_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "3")
    chosen = Model().choose({}, timing=True)
    known = dict(list(chosen.items())[:7])
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "2")
    found = Model().choose(known, timing=True)
    assert {name: algorithm[0] for name, algorithm in found.items()} == {
        name: 3 if name in known else 2 for name in chosen
    }


@pytest.mark.parametrize("damage", ["another product's", "zeros", "more workspace"])
def test_an_algorithm_that_is_refused_here(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """cublasLtMatmulAlgoCheck says so; the first is taken then, or the fastest."""
    monkeypatch.setenv("CUDASIM_CUBLASLT_FASTEST", "3")
    chosen = Model().choose({}, timing=True)
    first, *_, other = chosen
    bad = {
        "another product's": chosen[other],
        "zeros": [0] * 8,
        "more workspace": with_workspace(chosen[first], 2**30),
    }[damage]
    assert with_workspace(chosen[first], chosen[first][2]) == chosen[first]
    assert Model().choose({first: bad}, timing=False) == {}
    assert Model().choose({first: bad}, timing=True) == chosen


def with_workspace(algorithm: list[int], workspace: int) -> list[int]:
    """As struct Algorithm in cudasim/src/cublaslt.h has it, with its checksum."""
    number, configuration, _, alignments_ab, alignments_cd, _, *rest = algorithm
    parts = [number, configuration, workspace]
    parts += [half for word in (alignments_ab, alignments_cd) for half in (word & 0xFFFFFFFF, word >> 32)]
    checksum = 0x9E3779B97F4A7C15
    for part in parts:
        checksum = (checksum ^ part) * 0x100000001B3 % 2**64
    return [number, configuration, workspace, alignments_ab, alignments_cd, checksum, *rest]


# --- gradients of biases inside the products or apart -----------------------------------------------------------------


def fused_and_apart(chosen: dict[str, list[int]]) -> list[int]:
    """Of the products with an epilogue BGRADB (512): how many have an algorithm, and how many have none."""
    zeros = [algorithm == [0] * 8 for name, algorithm in chosen.items() if "epilogue 512" in name]
    return [zeros.count(False), zeros.count(True)]


def test_biases_gradients_are_fused_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products of weights' gradients that overwrite and four that add, timed in both ways."""
    model = Model(bias_fusion=True)
    chosen = model.choose({}, timing=True)
    assert fused_and_apart(chosen) == [8, 0] and len(chosen) == KINDS + 8
    apart = Model(bias_fusion=False)
    launches = [launches_of(apart), launches_of(model)]
    # Two micro-steps, three layers: one kernel where it adds, none where it does not, instead of two.
    assert launches[0] - launches[1] == 2 * 3 * 4 * 2 - 3 * 4

    monkeypatch.setenv("CUDASIM_CUBLASLT_SLOW", "BGRADB")
    model = Model(bias_fusion=True)
    chosen = model.choose({}, timing=True)
    assert fused_and_apart(chosen) == [0, 8] and len(chosen) == KINDS + 8
    assert_equal(model.step(), apart.step())
    assert launches_of(model) == launches[0]

    monkeypatch.delenv("CUDASIM_CUBLASLT_SLOW")
    for timing in (False, True):
        model = Model(bias_fusion=True)
        assert model.choose(chosen, timing) == chosen
        assert launches_of(model) == launches[0]


def launches_of(model: Model) -> int:
    model.step()
    before = devices.simulator("fast").launches()
    model.step()
    return devices.simulator("fast").launches() - before


def test_without_an_algorithm_for_both_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDASIM_CUBLASLT_WITHOUT", "BGRADB")
    model = Model(bias_fusion=True)
    assert fused_and_apart(chosen := model.choose({}, timing=True)) == [0, 0] and len(chosen) == KINDS
    assert_equal(model.step(), Model().step())
