"""State files: llm.c's, laid out by hand, are read; ours are taken apart by hand; damaged ones are refused by name."""

import dataclasses
import json
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from llmc.data.loader import LoaderState
from llmc.errors import RunError
from llmc.state_file import TrainState, map_arrays, read_state, write_state

N = 7


def generator_block(left, position, key, seed=0xDEADBEEF):
    return struct.pack("<QiI", seed, left, position) + key.astype("<u4").tobytes() + struct.pack("<2I", 0, 0x9908B0DF)


KEY = np.random.default_rng(0).integers(0, 2**32, 624, dtype=np.uint32)


def state_of_llm_c(master=True, shuffle=True, left=525, position=100, shards=(2, 0, 1), samples=(3, 1, 0, 2)):
    """As llm.c writes it: N is not in the header, nothing follows the loader's block."""
    slots = [0] * 256
    slots[0:6] = [20240527, 1, 1, 0, int(master), int(shuffle)]
    slots[10] = 300
    raw = bytearray(struct.pack("<256i", *slots))
    struct.pack_into("<QQ", raw, 4 * 20, 0x123456789ABCDEF0, 0xFEDCBA9876543210)
    struct.pack_into("<QQ", raw, 4 * 30, 1, 2)
    for i in range(3 if master else 2):
        raw += (np.arange(N) + 100.5 * i).astype("<f4").tobytes()
    if shuffle:
        raw += struct.pack(f"<Q{len(shards)}i", len(shards), *shards)
        raw += struct.pack(f"<Q{len(samples)}i", len(samples), *samples)
        raw += generator_block(left, position, KEY)
    return bytes(raw)


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_file_of_llm_c(tmp_path, master, shuffle):
    path = tmp_path / "state_00000300_00000.bin"
    path.write_bytes(state_of_llm_c(master, shuffle))
    state = read_state(path, N)
    assert (state.version, state.step, state.world_size, state.rank, state.zero_stage) == (1, 300, 1, 0, 0)
    assert (state.has_master, state.num_parameters, state.array_size) == (master, N, N)
    assert (state.rng_state, state.last_update_rng_state) == (0x123456789ABCDEF0, 0xFEDCBA9876543210)
    assert (state.loss_window, state.norm_window) == ((), ())
    loader = state.loader
    assert (loader.shuffle, loader.shard_index, loader.next_sample) == (shuffle, 1, 2)
    assert (loader.B, loader.T, loader.epoch, loader.consumed) == (None, None, 0, {})
    if shuffle:
        assert loader.shard_order.tolist() == [2, 0, 1]
        assert loader.sample_order.tolist() == [3, 1, 0, 2]
        assert np.array_equal(loader.generator, KEY)
        assert loader.position == 100
    arrays = map_arrays(path, state)
    assert list(arrays) == (["m", "v", "master"] if master else ["m", "v"])
    for i, array in enumerate(arrays.values()):
        assert array.tolist() == [k + 100.5 * i for k in range(N)]
    with pytest.raises(RunError, match="does not say how many parameters it is for"):
        read_state(path)


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_a_file_of_llm_c_at_stage_1(tmp_path, ranks, master, shuffle):
    """Arrays of N / P values under the same header: only the size of the file tells."""
    path = tmp_path / "state_00000300_00000.bin"
    path.write_bytes(changed(state_of_llm_c(master, shuffle), 4 * 2, "<i", ranks))
    state = read_state(path, ranks * N)
    assert (state.version, state.world_size, state.zero_stage) == (1, ranks, 0 if ranks == 1 else 1)
    assert (state.num_parameters, state.array_size) == (ranks * N, N)
    assert [array.tolist() for array in map_arrays(path, state).values()] == [
        [k + 100.5 * i for k in range(N)] for i in range(3 if master else 2)
    ]
    for other in (N + 1, ranks * N + 1, 5 * ranks * N):
        with pytest.raises(RunError, match=r"state_00000300_00000\.bin is (truncated or of another model|too long): "):
            read_state(path, other)


@pytest.mark.parametrize(
    ("left", "position", "expected"),
    [(1, 0, 624), (1, 624, 624), (624, 1, 1), (2, 623, 623)],  # just seeded; used up; one number drawn; one left
)
def test_positions_of_the_generator(tmp_path, left, position, expected):
    (tmp_path / "s.bin").write_bytes(state_of_llm_c(left=left, position=position))
    assert read_state(tmp_path / "s.bin", N).loader.position == expected


CONSUMED = {2: {0: np.array([[0, 7]]), 11: np.array([[3, 4], [9, 2**40]])}, 3: {1: np.array([[1, 2]])}}


def our_state(master=True, shuffle=True, position=17, stage=0):
    order = np.array([1, 0], np.int32), np.array([4, 2, 0, 1, 3], np.int32)
    empty = np.zeros(0, np.int32), np.zeros(0, np.int32)
    return TrainState(
        version=1 if stage == 0 else 2,
        step=41,
        world_size=4,
        rank=3,
        zero_stage=stage,
        has_master=master,
        num_parameters=N if stage == 0 else 25,
        array_size=N,
        rng_state=2**64 - 2,
        last_update_rng_state=2**63 + 5,
        loader=LoaderState(shuffle, 1, 5, *(order if shuffle else empty), KEY, position, 6, 32, 2, CONSUMED),
        loss_window=(0.1, 1e-300, 1 / 3, 4.170298),
        norm_window=(1e300, 5e-324),
        fp8_history=() if stage == 0 else (0.0, 448.0, 1e-30),
    )


def write(path, state):
    names = ("m", "v", "master") if state.has_master else ("m", "v")
    # In pieces, of any shape and dtype that holds the values.
    write_state(path, state, {n: [torch.full((2, 3), i + 0.5), torch.tensor([-1.0])] for i, n in enumerate(names)})


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("stage", "position"), [(0, 17), (0, 624), (1, 17), (2, 624), (3, 17)])
def test_what_is_written(tmp_path, master, shuffle, stage, position):
    """At stage 0 it is what llm.c reads, but for the trailer."""
    path = tmp_path / "state.bin"
    write(path, our_state(master, shuffle, position, stage))
    raw = path.read_bytes()
    slots = struct.unpack_from("<256i", raw)
    assert slots[:7] == (20240527, 1 if stage == 0 else 2, 4, 3, int(master), int(shuffle), stage)
    assert slots[10] == 41
    assert struct.unpack_from("<QQ", raw, 4 * 20) == (2**64 - 2, 2**63 + 5)
    assert struct.unpack_from("<QQ", raw, 4 * 30) == (1, 5)
    assert struct.unpack_from("<QQ", raw, 4 * 12) == ((N, 0) if stage == 0 else (25, N))  # ours
    used = {0, 1, 2, 3, 4, 5, 6, 10, 12, 13, 14, 15, 20, 21, 22, 23, 30, 31, 32, 33, 40, 41}
    assert not any(slot for i, slot in enumerate(slots) if i not in used)
    offset = 1024
    for i in range(3 if master else 2):
        assert struct.unpack_from(f"<{N}f", raw, offset) == (*[i + 0.5] * 6, -1.0)
        offset += 4 * N
    if shuffle:
        assert struct.unpack_from("<Q2i", raw, offset) == (2, 1, 0)
        assert struct.unpack_from("<Q5i", raw, offset + 16) == (5, 4, 2, 0, 1, 3)
        offset += 16 + 28
        assert raw[offset : offset + 2520] == generator_block(625 - position, position, KEY, seed=0)
        offset += 2520
    magic, length = struct.unpack_from("<iQ", raw, offset)
    assert (magic, offset + 12 + length) == (20261124, len(raw))
    assert json.loads(raw[offset + 12 :]) == {
        "loss_window": [0.1, 1e-300, 1 / 3, 4.170298],
        "norm_window": [1e300, 5e-324],
        **({} if stage == 0 else {"fp8_history": [0.0, 448.0, 1e-30]}),
        "B": 6,
        "T": 32,
        "epoch": 2,
        "consumed": {"2": {"0": [[0, 7]], "11": [[3, 4], [9, 2**40]]}, "3": {"1": [[1, 2]]}},
    }


@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("stage", "position"), [(0, 1), (0, 300), (2, 624)])
def test_round_trip(tmp_path, master, shuffle, stage, position):
    state = our_state(master, shuffle, position, stage)
    write(tmp_path / "state.bin", state)
    for count in (None, state.num_parameters):
        found = read_state(tmp_path / "state.bin", count)
        for field in dataclasses.fields(TrainState):
            if field.name != "loader":
                assert getattr(found, field.name) == getattr(state, field.name)
        for field in dataclasses.fields(LoaderState):
            if field.name == "consumed":
                assert found.loader.consumed.keys() == CONSUMED.keys()
                for epoch, shards in CONSUMED.items():
                    assert found.loader.consumed[epoch].keys() == shards.keys()
                    assert all(np.array_equal(found.loader.consumed[epoch][i], shards[i]) for i in shards)
            elif shuffle or field.name in ("shuffle", "shard_index", "next_sample"):
                assert np.array_equal(getattr(found.loader, field.name), getattr(state.loader, field.name))


def changed(raw, offset, layout, *values):
    raw = bytearray(raw)
    struct.pack_into(layout, raw, offset, *values)
    return bytes(raw)


BLOCK = 1024 + 12 * N  # where the loader's block begins in a file with master weights
TRAILER = BLOCK + 16 + 28 + 2520
DAMAGES = {
    **{
        f"kind {magic}": (
            lambda raw, magic=magic: changed(raw, 0, "<i", magic),
            f"is not a training state: it is a {kind}",
        )
        for magic, kind in [
            (20240327, "debug state"),
            (20240328, "tokenizer"),
            (20240520, "token shard"),
            (20240522, "multiple-choice evaluation file"),
            (20240801, "token shard (uint32)"),
        ]
    },
    "no kind": (lambda raw: changed(raw, 0, "<i", 5), "is not a training state: its magic number is 5"),
    "version": (lambda raw: changed(raw, 4, "<i", 3), "training state of version 3, this program reads version 1 or 2"),
    "stage of version 1": (lambda raw: changed(raw, 24, "<i", 1), "is damaged: version 1 at ZeRO stage 1"),
    "stage of version 2": (lambda raw: changed(raw, 4, "<i", 2), "is damaged: version 2 at ZeRO stage 0"),
    "master flag": (lambda raw: changed(raw, 16, "<i", 2), "header slot 4 is 2, expected 0 or 1"),
    "shuffle flag": (lambda raw: changed(raw, 20, "<i", -1), "header slot 5 is -1, expected 0 or 1"),
    "other model": (lambda raw: changed(raw, 48, "<q", 8), "is of another model: it has the state of 8 parameters"),
    "no master after all": (lambda raw: changed(raw, 16, "<i", 0), "is truncated or of another model"),
    "header": (lambda raw: raw[:1000], "it has 1000 bytes, the header alone takes 1024"),
    "in m": (lambda raw: raw[:1030], "the optimizer state needs 78 more bytes than it has"),
    "before the block": (lambda raw: raw[: BLOCK + 3], "the order of the shards needs 5 more bytes"),
    "in the samples": (lambda raw: raw[: BLOCK + 16 + 20], "the order of the samples needs 8 more bytes"),
    "in the generator": (lambda raw: raw[: TRAILER - 1], "the shuffle's generator needs 1 more bytes"),
    "in the trailer": (lambda raw: raw[: TRAILER + 5], "the trailer needs 7 more bytes"),
    "at the end": (lambda raw: raw[:-1], "the trailer needs 1 more bytes"),
    "too long": (lambda raw: raw + b"xy", "is too long: 2 bytes follow the trailer"),
    "absurd shards": (lambda raw: changed(raw, BLOCK, "<Q", 2**60), "the order of the shards needs"),
    "absurd samples": (lambda raw: changed(raw, BLOCK + 16, "<Q", 2**61), "the order of the samples needs"),
    "absurd trailer": (lambda raw: changed(raw, TRAILER + 4, "<Q", 2**62), "the trailer needs"),
    "nothing left": (lambda raw: changed(raw, TRAILER - 2520 + 8, "<i", 0), "generator has 0 numbers left at 17"),
    "too much left": (
        lambda raw: changed(raw, TRAILER - 2520 + 8, "<iI", 625, 0),
        "generator has 625 numbers left at 0",
    ),
    "left at": (lambda raw: changed(raw, TRAILER - 2520 + 12, "<I", 2**32 - 1), "608 numbers left at 4294967295"),
    "generator": (lambda raw: changed(raw, TRAILER - 2520 + 8, "<i", 9), "generator has 9 numbers left at 17"),
    "trailer magic": (lambda raw: changed(raw, TRAILER, "<i", 3), "bytes do not belong to it"),
    "trailer text": (lambda raw: changed(raw, TRAILER + 12, "<c", b"["), "its trailer cannot be read"),
    "trailer value": (lambda raw: raw.replace(b"0.1,", b"NaN,"), "its trailer cannot be read"),
    "trailer batch": (lambda raw: raw.replace(b'"B": 6', b'"B": 0'), "its trailer cannot be read (0 is not a whole"),
    "consumed backwards": (lambda raw: raw.replace(b"[0, 7]", b"[7, 0]"), "consumed tokens are not in order"),
    "consumed no pair": (lambda raw: raw.replace(b"[0, 7]", b"[1234]"), "consumed tokens are not pairs"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused_by_name(tmp_path, case):
    path = tmp_path / "state_00000041_00000.bin"
    write(path, our_state())
    change, message = DAMAGES[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RunError) as caught:
        read_state(path, N)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_anywhere(tmp_path):
    """Also just before the trailer: a header that states N is ours."""
    path = tmp_path / "state.bin"
    write(path, our_state())
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(RunError, match=r"state\.bin is (truncated|not a training state: it has)"):
            read_state(path, N)
    path.write_bytes(raw)
    read_state(path, N)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, N - 1, N + 1, 1000, 2**61])
def test_a_file_of_llm_c_for_another_model(tmp_path, count, shuffle):
    """Only its length can tell."""
    path = tmp_path / "state.bin"
    path.write_bytes(state_of_llm_c(shuffle=shuffle))
    with pytest.raises(RunError, match=r"state\.bin is (truncated or of another model|too long): [^\n]*$"):
        read_state(path, count)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b'"loss_window"',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"loss_window": [1]}',
        b'{"loss_window": [1], "norm_window": [1], "B": 1.5}',
        b'{"loss_window": [1], "norm_window": [1], "T": "4"}',
        b'{"loss_window": [1], "norm_window": [1], "epoch": -1}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": []}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": [[1, 2]]}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"x": [[1, 2]]}}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"0": [[1, 2], [2, 3]]}}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"0": [[1, 2], [3]]}}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"0": [[-1, 2]]}}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"0": [[1, 2e9]]}}}',
        b'{"loss_window": [1], "norm_window": [1], "consumed": {"0": {"0": [[1, 99999999999999999999]]}}}',
        b'{"loss_window": [1], "norm_window": 1}',
        b'{"loss_window": [1], "norm_window": ["1"]}',
        b'{"loss_window": [1], "norm_window": [Infinity]}',
        b'{"loss_window": [1], "norm_window": [1' + b"0" * 400 + b"]}",  # no float is that large
        b'{"loss_window": [1], "norm_window": [1' + b"0" * 5000 + b"]}",  # Python reads no integer of that length
    ],
    ids=lambda text: repr(text[-40:]),
)
def test_trailers_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "state.bin"
    path.write_bytes(state_of_llm_c() + struct.pack("<iQ", 20261124, len(text)) + text)
    with pytest.raises(RunError, match=r"state\.bin is damaged: its trailer cannot be read [^\n]*$"):
        read_state(path, N)


@pytest.mark.parametrize("what", ["the order of the shards", "its trailer"])
def test_sizes_that_the_file_has_but_no_run(tmp_path, what):
    """A file with a hole takes no room on the disk, and all of it in memory."""
    path = tmp_path / "state.bin"
    shuffle = what != "its trailer"
    raw = state_of_llm_c(shuffle=shuffle)
    size = 2**40
    end = 1024 + 4 * 3 * N
    start = raw[:end] + struct.pack("<Q", size // 4) if shuffle else raw + struct.pack("<iQ", 20261124, size)
    path.write_bytes(start)
    os.truncate(path, len(start) + size)
    with pytest.raises(RunError, match=rf"state\.bin is damaged: {what} has {size // 4 if shuffle else size} "):
        read_state(path, N)


def test_missing_file(tmp_path):
    with pytest.raises(RunError, match=r"cannot read training state .*no\.bin: No such file or directory"):
        read_state(tmp_path / "no.bin", N)
    with pytest.raises(RunError, match=r"cannot read training state .*: Is a directory"):
        read_state(tmp_path, N)


def test_mutations_never_crash(tmp_path):
    """Whatever the bytes say: a state or one clear error, never more memory than the file has."""
    path = tmp_path / "state.bin"
    write(path, our_state())
    good = path.read_bytes()
    generator = random.Random(5)
    refused = 0
    tracemalloc.start()
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            raw[generator.choice([generator.randrange(len(raw)), generator.randrange(136)])] = generator.randrange(256)
        path.write_bytes(raw[: generator.choice([len(raw), generator.randrange(len(raw))])])
        try:
            read_state(path, generator.choice([N, None]))
        except RunError:
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 200 < refused < 400
    assert peak < 2**20  # of a file of 4 KiB: its parts, parsed, and what Python itself keeps
