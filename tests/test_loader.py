"""The loader against a few-line model of llm.c's reading order, over unequal shards, ranks and epochs."""

import dataclasses
import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.data.loader import DataLoader, LoaderState, permutation, torch_mt19937
from llmc.data.shards import write_shard
from llmc.errors import RunError
from llmc.state_file import TrainState, read_state, write_state

VECTORS = json.loads((Path(__file__).parent / "vectors" / "loader.json").read_text())


def make_shards(directory: Path, sizes: list[int]) -> list[list[int]]:
    """Shards whose tokens count up across all of them, so that a token tells its shard and offset."""
    ends = list(itertools.accumulate(sizes))
    shards = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    for i, shard in enumerate(shards):
        write_shard(directory / f"s_{i:03d}.bin", np.array(shard))
    return shards


class Twister:
    """A 32-bit Mersenne Twister and llm.c's shuffle, written out from their definitions."""

    def __init__(self, seed: int) -> None:
        self.state = [seed]
        for i in range(1, 624):
            previous = self.state[-1] ^ self.state[-1] >> 30
            self.state.append((1812433253 * previous + i) % 2**32)
        self.words = self.generate()

    def generate(self) -> Iterator[int]:
        s = self.state
        while True:
            for i in range(624):
                y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7FFFFFFF)
                s[i] = s[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y % 2 else 0)
            for y in list(s):
                y ^= y >> 11
                y ^= y << 7 & 0x9D2C5680
                y ^= y << 15 & 0xEFC60000
                yield y ^ y >> 18

    def shuffle(self, items: list[int]) -> None:
        for i in range(len(items) - 1, 0, -1):
            j = next(self.words) % (i + 1)
            items[i], items[j] = items[j], items[i]


def model(shards: list[list[int]], n: int, rank: int, ranks: int, seed: int | None) -> Iterator[list[int]]:
    """The n+1 tokens of every batch, for ever; shuffled if there is a seed."""
    twister = Twister(seed + rank) if seed is not None else None
    order = list(range(len(shards)))
    while True:
        if twister:
            twister.shuffle(order)
        for shard in order:
            samples = list(range((len(shards[shard]) - 1) // (ranks * n)))
            if twister:
                twister.shuffle(samples)
            for sample in samples:
                start = (sample * ranks + rank) * n
                yield shards[shard][start : start + n + 1]


def check(loader: DataLoader, expected: Iterator[list[int]], batches: int) -> None:
    for tokens in itertools.islice(expected, batches):
        inputs, targets = loader.next_batch()
        assert inputs.flatten().tolist() == tokens[:-1]
        assert targets.flatten().tolist() == tokens[1:]


@pytest.mark.parametrize("seed", [None, 42, 1337])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[700], [97, 200, 65, 140, 61]])
def test_order(tmp_path: Path, sizes: list[int], ranks: int, seed: int | None) -> None:
    shards = make_shards(tmp_path, sizes)
    B, T = 4, 5  # 61 = 3 * 20 + 1: the smallest shard that three ranks can use
    for rank in range(ranks):
        shuffle = {} if seed is None else {"shuffle": True, "seed": seed}
        loader = DataLoader(f"{tmp_path}/s_*.bin", B, T, rank, ranks, **shuffle)
        assert (loader.num_tokens, loader.num_shards) == (sum(sizes), len(sizes))
        per_epoch = sum((size - 1) // (ranks * B * T) for size in sizes)
        check(loader, model(shards, B * T, rank, ranks, seed), 5 * per_epoch + 1)


def test_long_shuffle_crosses_the_generator_state(tmp_path: Path) -> None:
    """2000 samples draw more than the generator's 624 words."""
    shards = make_shards(tmp_path, [2001, 1501])
    check(DataLoader(f"{tmp_path}/s_*.bin", 1, 1, shuffle=True), model(shards, 1, 0, 1, 42), 3 * 3500)


def test_default_seed_is_42_and_not_shuffled(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [300])
    check(DataLoader(f"{tmp_path}/s_*.bin", 2, 3), model(shards, 6, 0, 1, None), 60)
    check(DataLoader(f"{tmp_path}/s_*.bin", 2, 3, shuffle=True), model(shards, 6, 0, 1, 42), 60)


def test_reset_mid_epoch(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [100, 90, 80])
    loader = DataLoader(f"{tmp_path}/s_*.bin", 2, 4)
    for batches in (3, 14, 40):
        check(loader, model(shards, 8, 0, 1, None), batches)
        loader.reset()

    # Shuffled, a reset goes on from the generator's state and the last order of the shards.
    loader = DataLoader(f"{tmp_path}/s_*.bin", 2, 4, shuffle=True)
    loader.reset()
    twister, order, samples = Twister(42), [0, 1, 2], [0]
    for _ in range(2):
        twister.shuffle(order)
        samples = list(range((len(shards[order[0]]) - 1) // 8))
        twister.shuffle(samples)
    assert loader.shard_order.tolist() == order
    assert loader.sample_order.tolist() == samples
    check(loader, (shards[order[0]][8 * sample : 8 * sample + 9] for sample in samples), len(samples))


def test_shape_type_and_memory(tmp_path: Path) -> None:
    make_shards(tmp_path, [40])
    inputs, targets = DataLoader(f"{tmp_path}/s_*.bin", 3, 5).next_batch()
    for tensor in (inputs, targets):
        assert tensor.dtype == torch.int32 and tensor.shape == (3, 5) and tensor.is_contiguous()
    inputs.zero_()
    assert targets.flatten().tolist() == list(range(1, 16))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_token_once_per_epoch(tmp_path: Path, ranks: int, shuffle: bool) -> None:
    """4 shards of 140 tokens, B=4, T=8: in 4 epochs each token that fits is an input 4 times, a shard's tail never."""
    shards = make_shards(tmp_path, [140] * 4)
    loaders = [DataLoader(f"{tmp_path}/s_*.bin", 4, 8, rank, ranks, shuffle) for rank in range(ranks)]
    seen: Counter[int] = Counter()
    for _ in range(4 * 4 * (4 // ranks)):
        for loader in loaders:
            seen.update(loader.next_batch()[0].flatten().tolist())
    assert seen == {token: 4 for shard in shards for token in shard[: 4 * 32]}


def test_vectors() -> None:
    raw = torch_mt19937(42).random_raw(700)
    assert raw[:16].tolist() == VECTORS["mt_seed42_u32_first16"]
    assert raw[699] == VECTORS["mt_seed42_u32_700th"]
    assert torch_mt19937(137).random_raw(5).tolist() == VECTORS["mt_seed137_u32_first5"]
    for seed, n in itertools.product((42, 43), (3, 10, 100)):
        generator = torch_mt19937(seed)
        assert permutation(generator, n).tolist() == VECTORS[f"permutation_n{n}_seed{seed}"]
        if n == 10:  # the second one permutes the first further
            first = np.array(VECTORS[f"permutation_n10_seed{seed}"])
            assert first[permutation(generator, 10)].tolist() == VECTORS[f"permutation_n10_seed{seed}_again"]


def test_generator_is_torchs() -> None:
    """torch's uniform floats are (u32 & 0xFFFFFF) / 2^24."""
    expected = torch.rand(1000, generator=torch.Generator().manual_seed(7))
    assert np.array_equal((torch_mt19937(7).random_raw(1000) & 0xFFFFFF) / 2**24, expected.numpy())


@pytest.mark.parametrize("n", [0, 1])
def test_small_permutations_draw_nothing(n: int) -> None:
    generator = torch_mt19937(42)
    assert permutation(generator, n).tolist() == list(range(n))
    assert generator.random_raw() == VECTORS["mt_seed42_u32_first16"][0]


def test_shard_too_small(tmp_path: Path) -> None:
    make_shards(tmp_path, [200, 60])
    DataLoader(f"{tmp_path}/s_*.bin", 1, 59)
    with pytest.raises(
        RunError, match=r"s_001.bin has 60 tokens, one batch needs 61 \(-b 4 \* -t 15 \+ 1\): .*smaller"
    ):
        DataLoader(f"{tmp_path}/s_*.bin", 4, 15)
    with pytest.raises(RunError, match=r"one batch needs 61 \(3 ranks \* -b 4 \* -t 5 \+ 1\)"):
        DataLoader(f"{tmp_path}/s_*.bin", 4, 5, 0, 3)


def test_every_shard_is_checked_at_start(tmp_path: Path) -> None:
    make_shards(tmp_path, [100, 100])
    (tmp_path / "s_002.bin").write_bytes(b"no shard")
    with pytest.raises(RunError, match=r"s_002.bin is not a token shard"):
        DataLoader(f"{tmp_path}/s_*.bin", 1, 1)
    with pytest.raises(RunError, match="no token shards match"):
        DataLoader(f"{tmp_path}/x_*.bin", 1, 1)


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    make_shards(tmp_path, [50, 100])  # shard 1 holds tokens 50 to 149
    loader = DataLoader(f"{tmp_path}/s_*.bin", 2, 5, vocab_size=73)
    for _ in range(4 + 2):  # the last of these ends with target 70
        loader.next_batch()
    with pytest.raises(RunError, match=r"s_001.bin: token 73 at offset 23 is outside the model's vocabulary of 73"):
        loader.next_batch()


def test_last_target_is_checked_too(tmp_path: Path) -> None:
    make_shards(tmp_path, [11])
    DataLoader(f"{tmp_path}/s_*.bin", 2, 5, vocab_size=11).next_batch()
    with pytest.raises(RunError, match="token 10 at offset 10 "):
        DataLoader(f"{tmp_path}/s_*.bin", 2, 5, vocab_size=10).next_batch()


def write(path: Path, loader: LoaderState) -> None:
    """A state file of a model of one parameter."""
    state = TrainState(1, 1, 1, 0, 0, False, 1, 1, 0, 0, loader, (), ())
    write_state(path, state, {"m": [torch.zeros(1)], "v": [torch.zeros(1)]})


@pytest.mark.parametrize("seed", [None, 42, 1337])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_go_on_from_any_position(tmp_path: Path, rank: int, ranks: int, seed: int | None) -> None:
    """Stopped before every batch of two epochs, and after the last one; through a file, into the third epoch."""
    sizes = [97, 200, 65, 140, 61]
    shards = make_shards(tmp_path, sizes)
    per_epoch = sum((size - 1) // (ranks * 20) for size in sizes)
    expected = list(itertools.islice(model(shards, 20, rank, ranks, seed), 3 * per_epoch + 1))
    straight = DataLoader(f"{tmp_path}/s_*.bin", 4, 5, rank, ranks, seed is not None, seed or 0)
    for done in range(2 * per_epoch + 1):
        write(tmp_path / "state.bin", straight.state())
        # Of another seed: everything must come from the file.
        resumed = DataLoader(f"{tmp_path}/s_*.bin", 4, 5, rank, ranks, seed is not None, 7)
        resumed.load_state(read_state(tmp_path / "state.bin").loader, "state.bin")
        check(resumed, iter(expected[done:]), per_epoch + 1)
        check(straight, iter(expected[done:]), 1)


@pytest.mark.parametrize("draws", [0, 1, 299, 623, 624, 625, 1300])
def test_generator_in_a_state_file(tmp_path: Path, draws: int) -> None:
    """llm.c counts `left` down before it takes a number, and makes a new state of 624 numbers when it is 0."""
    make_shards(tmp_path, [draws + 2])
    twister = Twister(42)
    twister.shuffle(list(range(draws + 1)))  # of the samples: draws as many numbers
    write(tmp_path / "state.bin", DataLoader(f"{tmp_path}/s_*.bin", 1, 1, shuffle=True).state())
    raw = bytearray((tmp_path / "state.bin").read_bytes())
    offset = 1024 + 2 * 4 + (8 + 4) + (8 + 4 * (draws + 1))
    _, left, position, *words = struct.unpack_from("<QiI624I", raw, offset)
    assert words == twister.state
    if draws:
        assert (left, position) == (625 - position, (draws - 1) % 624 + 1)
    else:
        assert left == 1
        struct.pack_into("<I", raw, offset + 12, 0)  # where llm.c's fresh generator stands
        (tmp_path / "state.bin").write_bytes(raw)

    loader = DataLoader(f"{tmp_path}/s_*.bin", 1, 1, shuffle=True, seed=7)
    loader.load_state(read_state(tmp_path / "state.bin").loader, "state.bin")
    assert loader.generator.random_raw(700).tolist() == list(itertools.islice(twister.words, 700))


@pytest.mark.parametrize(
    ("shuffle", "change", "message"),
    [
        (True, {"shuffle": False}, r"is of a run with -a 1: resume it with that"),
        (False, {"shuffle": True}, r"is of a run with -a 0: resume it with that"),
        (True, {"shard_order": np.array([0, 1])}, r"is of a run over 2 shards, now there are 3: .* the same data -i"),
        (True, {"shard_order": np.array([0, 1, 1])}, r"is of a run over 3 shards"),
        (True, {"shard_order": np.array([1, 2, 3])}, r"is of a run over 3 shards"),
        (True, {"shard_order": np.array([-1, 0, 1])}, r"is of a run over 3 shards"),
        (True, {"shard_index": 3}, r"it stands in shard 3 of 3"),
        (False, {"shard_index": 3}, r"it stands in shard 3 of 3"),
        (False, {"shard_index": 2**64 - 1}, r"of a run over other data"),
        (True, {"consumed": {0: {3: np.array([[0, 8]])}}}, r"of a run over other data: it stands in shard 3 of 3"),
        (True, {"sample_order": np.arange(4)}, r"is of a run that read 4 batches from .*s_00[0-2].bin, now it has 9"),
        (True, {"sample_order": np.zeros(9, int)}, r"is of a run that read 9 batches from"),
        (True, {"sample_order": np.arange(-1, 8)}, r"is of a run that read 9 batches from"),
        (True, {"next_sample": 10}, r"stands at batch 10 of .*s_00[0-2].bin, which has 9"),
        (False, {"next_sample": 2**64 - 1}, r"stands at batch \d+ of .*s_000.bin, which has 9"),
    ],
)
def test_positions_that_do_not_fit(tmp_path: Path, shuffle: bool, change: dict[str, object], message: str) -> None:
    make_shards(tmp_path, [73, 79, 80])
    state = DataLoader(f"{tmp_path}/s_*.bin", 2, 4, shuffle=shuffle).state()
    with pytest.raises(RunError, match=rf"^state\.bin [^\n]*{message}"):
        DataLoader(f"{tmp_path}/s_*.bin", 2, 4, shuffle=shuffle).load_state(
            dataclasses.replace(state, **change), "state.bin"
        )


def test_positions_of_other_data_or_batches(tmp_path: Path) -> None:
    make_shards(tmp_path, [73, 79, 80])
    state = DataLoader(f"{tmp_path}/s_*.bin", 2, 4, shuffle=True).state()
    unknown = dataclasses.replace(state, B=None, T=None)
    for B, T, ranks in [(1, 4, 1), (2, 8, 1), (2, 4, 2)]:
        loader = DataLoader(f"{tmp_path}/s_*.bin", B, T, 0, ranks, shuffle=True)
        with pytest.raises(RunError, match=r"^state\.bin is of a run that read 9 batches from .* the same data -i$"):
            loader.load_state(state, "state.bin")
        with pytest.raises(RunError, match=r"^state\.bin is of a run that read 9 batches from .* -i, -b and -t$"):
            loader.load_state(unknown, "state.bin")
    (tmp_path / "s_001.bin").unlink()
    with pytest.raises(RunError, match=r"^state\.bin is of a run over 3 shards, now there are 2: .* -i$"):
        DataLoader(f"{tmp_path}/s_*.bin", 2, 4, shuffle=True).load_state(state, "state.bin")


def test_uint32_shards(tmp_path: Path) -> None:
    """A large vocabulary; a token too large for int32 is no token of any."""
    tokens = np.arange(100_000, 100_020, dtype=np.uint32)
    write_shard(tmp_path / "s.bin", tokens)
    loader = DataLoader(f"{tmp_path}/s.bin", B=2, T=4, vocab_size=128_256)
    for start in (0, 8, 0):
        inputs, targets = loader.next_batch()
        assert inputs.dtype == targets.dtype == torch.int32
        assert inputs.flatten().tolist() == list(range(100_000 + start, 100_008 + start))
        assert targets.flatten().tolist() == list(range(100_001 + start, 100_009 + start))
    tokens[3] = 2**32 - 1
    write_shard(tmp_path / "s.bin", tokens)
    loader = DataLoader(f"{tmp_path}/s.bin", B=2, T=4, vocab_size=128_256)
    with pytest.raises(RunError, match="token 4294967295 at offset 3 is outside the model's vocabulary of 128256"):
        loader.next_batch()
