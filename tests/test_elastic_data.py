"""Data after a change of the number of ranks or of the batch: nothing twice and nothing left out within an epoch."""

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.data.consumed import NOTHING, consumed_by, contains, merged
from llmc.data.loader import DataLoader, LoaderState
from llmc.data.shards import write_shard
from llmc.errors import RunError
from llmc.state_file import TrainState, read_state, write_state

Place = tuple[int, int]  # shard and token


def make_shards(directory: Path, sizes: list[int]) -> None:
    for i, size in enumerate(sizes):
        write_shard(directory / f"s_{i:03d}.bin", np.arange(size))


def through_a_file(path: Path, rank: int, ranks: int, state: LoaderState) -> LoaderState:
    write_state(
        path,
        TrainState(2, 1, ranks, rank, 1, False, 1, 1, 0, 0, state, (), ()),
        {"m": [torch.zeros(1)], "v": [torch.zeros(1)]},
    )
    return read_state(path).loader


class Run:
    """The loaders of all ranks, and by epoch what they began each batch with, since the last change."""

    def __init__(self, directory: Path, ranks: int, B: int, T: int) -> None:
        self.directory, self.B, self.T = directory, B, T
        self.loaders = [DataLoader(f"{directory}/s_*.bin", B, T, rank, ranks, shuffle=True) for rank in range(ranks)]
        self.consumed: dict[int, Counter[Place]] = {}  # tokens, by epoch, of all runs
        self.visited: list[dict[int, Counter[Place]]] = [{} for _ in range(ranks)]  # batches of this run

    def goes_on(self, ranks: int, B: int, T: int) -> "Run":
        """Another run that goes on from this one's state files."""
        states = [
            through_a_file(self.directory / "state.bin", rank, len(self.loaders), loader.state())
            for rank, loader in enumerate(self.loaders)
        ]
        run = Run(self.directory, ranks, B, T)
        for loader in run.loaders:
            loader.load_states(states, [f"state_{rank}" for rank in range(len(states))])
        run.consumed = self.consumed
        return run

    def step(self) -> None:
        for rank, loader in enumerate(self.loaders):
            inputs, targets = loader.next_batch()
            first = int(inputs[0, 0])  # tokens count up within each shard
            assert torch.equal(inputs.flatten(), torch.arange(first, first + self.B * self.T, dtype=torch.int32))
            assert torch.equal(targets.flatten(), inputs.flatten() + 1)
            shard = int(loader.path.stem[-3:])
            tokens = self.consumed.setdefault(loader.epoch, Counter())
            assert (shard, first) not in tokens, "consumed twice in the epoch"
            tokens.update((shard, token) for token in range(first, first + self.B * self.T))
            self.visited[rank].setdefault(loader.epoch, Counter())[shard, first] += 1

    def grid(self, rank: int, sizes: list[int]) -> set[Place]:
        """Where the batches of a rank begin."""
        n, ranks = self.B * self.T, len(self.loaders)
        return {
            (shard, begin)
            for shard, size in enumerate(sizes)
            for begin in range(rank * n, (size - 1) // (ranks * n) * ranks * n, ranks * n)
        }


SIZES = [230, 97, 180, 61, 133, 75]


@pytest.mark.parametrize("seed", range(60))
def test_nothing_twice_and_nothing_left_out(tmp_path: Path, seed: int) -> None:
    """Changes at random moments, with ranks in different epochs too; the last run goes on for two epochs more."""
    generator = random.Random(seed)
    make_shards(tmp_path, SIZES)
    run = Run(tmp_path, 4, 3, 2)
    for _ in range(generator.randint(1, 5)):
        for _ in range(generator.choice([0, 1, generator.randint(2, 30), generator.randint(30, 80)])):
            run.step()
        before = {epoch: set(tokens) for epoch, tokens in run.consumed.items()}
        ranks = generator.choice([count for count in (1, 2, 3, 4, 5) if count != len(run.loaders)])
        B, T = generator.choice([(3, 2), (3, 2), (1, 5), (2, 4)])
        began = min(loader.epoch for loader in run.loaders)
        run = run.goes_on(ranks, B, T)
        assert {loader.epoch for loader in run.loaders} == {began}
    while min(loader.epoch for loader in run.loaders) < began + 3:
        run.step()
    for rank, visited in enumerate(run.visited):
        for epoch in range(began, began + 3):
            left = {place for place in run.grid(rank, SIZES) if place not in before.get(epoch, set())}
            assert visited.get(epoch, Counter()) == Counter(left)
    # What was carried along is gone with its epoch.
    assert all(loader.consumed.keys() <= {epoch for epoch in before if epoch >= loader.epoch} for loader in run.loaders)


def test_four_two_three(tmp_path: Path) -> None:
    """102 of the 120 batches of one epoch, which every number of ranks cuts alike."""
    make_shards(tmp_path, [601, 601])
    run = Run(tmp_path, 4, 2, 5)
    for ranks, steps in ((4, 10), (2, 13), (3, 12)):
        run = run if ranks == 4 else run.goes_on(ranks, 2, 5)
        for _ in range(steps):
            run.step()
    assert len(run.consumed[0]) == 1020 and set(run.consumed[0].values()) == {1}


def test_same_ranks_and_batch_to_the_bit(tmp_path: Path) -> None:
    """Also after a change before it, with carried intervals."""
    make_shards(tmp_path, SIZES)
    run = Run(tmp_path, 4, 3, 2)
    for _ in range(9):
        run.step()
    run = run.goes_on(2, 3, 2)
    for _ in range(7):
        run.step()
    straight = [[loader.next_batch()[0].tolist() for _ in range(100)] for loader in run.loaders]
    again = Run(tmp_path, 4, 3, 2)
    for _ in range(9):
        again.step()
    again = again.goes_on(2, 3, 2)
    for _ in range(7):
        again.step()
    again = again.goes_on(2, 3, 2)
    assert all(loader.consumed[0] for loader in again.loaders)
    assert [[loader.next_batch()[0].tolist() for _ in range(100)] for loader in again.loaders] == straight


def test_the_new_order_is_that_of_a_new_run(tmp_path: Path) -> None:
    make_shards(tmp_path, SIZES)
    run = Run(tmp_path, 4, 3, 2)
    for _ in range(5):
        run.step()
    before = set(run.consumed[0])
    run = run.goes_on(2, 3, 2)
    for rank, loader in enumerate(run.loaders):
        fresh = DataLoader(f"{tmp_path}/s_*.bin", 3, 2, rank, 2, shuffle=True)
        places = [(int(fresh.path.stem[-3:]), int(fresh.next_batch()[0][0, 0])) for _ in range(6)]
        places = [(int(fresh.path.stem[-3:]), first) for _, first in places]  # all of the first shard
        expected = [first for shard, first in places if (shard, first) not in before]
        assert [int(loader.next_batch()[0][0, 0]) for _ in range(len(expected))] == expected


def test_everything_consumed(tmp_path: Path) -> None:
    """Ranks that have nothing left go on to the next epoch, over epochs that are consumed already, never for ever."""
    make_shards(tmp_path, [61, 31])
    whole = {0: np.array([[0, 60]]), 1: np.array([[0, 30]])}
    state = dataclasses.replace(
        DataLoader(f"{tmp_path}/s_*.bin", 1, 10, shuffle=True).state(), epoch=4, consumed={4: whole, 5: whole, 6: whole}
    )
    for rank in range(3):
        loader = DataLoader(f"{tmp_path}/s_*.bin", 1, 10, rank, 3, shuffle=True)
        loader.load_states([state], ["state"])
        assert loader.epoch == 4
        places = [int(loader.next_batch()[0][0, 0]) for _ in range(3)]
        assert (loader.epoch, loader.consumed) == (7, {})
        assert sorted(places) == sorted([10 * rank, 30 + 10 * rank, 10 * rank])


def test_unshuffled_loaders_begin_anew(tmp_path: Path) -> None:
    make_shards(tmp_path, SIZES)
    loaders = [DataLoader(f"{tmp_path}/s_*.bin", 3, 2, rank, 4) for rank in range(4)]
    for loader in loaders:
        loader.next_batch()
    loader = DataLoader(f"{tmp_path}/s_*.bin", 3, 2, 1, 2)
    loader.load_states([one.state() for one in loaders], list("abcd"))
    assert loader.next_batch()[0].flatten().tolist() == list(range(6, 12))


def test_files_of_llm_c(tmp_path: Path) -> None:
    """They do not tell B and T: the same as now are taken, if the number of samples allows it."""
    make_shards(tmp_path, [241, 241])
    loaders = [DataLoader(f"{tmp_path}/s_*.bin", 3, 2, rank, 4, shuffle=True) for rank in range(4)]
    for loader in loaders:
        for _ in range(13):  # 10 in each shard
            loader.next_batch()
    known = [loader.state() for loader in loaders]
    unknown = [dataclasses.replace(state, B=None, T=None) for state in known]
    expected, found = (DataLoader(f"{tmp_path}/s_*.bin", 3, 2, 0, 2, shuffle=True) for _ in range(2))
    expected.load_states(known, list("abcd"))
    found.load_states(unknown, list("abcd"))
    assert {shard: array.tolist() for shard, array in found.consumed[0].items()} == {
        shard: array.tolist() for shard, array in expected.consumed[0].items()
    }
    other = DataLoader(f"{tmp_path}/s_*.bin", 1, 5, 0, 2, shuffle=True)
    other.load_states(known, list("abcd"))
    with pytest.raises(RunError, match=r"^a is of a run that read 10 batches .*, now it has 12: .* -i, -b and -t$"):
        DataLoader(f"{tmp_path}/s_*.bin", 1, 5, 0, 2, shuffle=True).load_states(unknown, list("abcd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shuffle": False}, "of a run with -a 1"),
        ({"shard_order": np.array([0])}, "of a run over 1 shards, now there are 2"),
        ({"shard_index": 2}, "it stands in shard 2 of 2"),
        ({"sample_order": np.arange(9)}, r"read 9 batches from .*, now it has 10: resume it with the same data -i$"),
        ({"epoch": 2**40}, f"is damaged: it knows of the epochs 0 and {2**40} at once"),  # each would be gone through
        ({"consumed": {5000: {}}}, "is damaged: it knows of the epochs 0 and 5000 at once"),
        ({"next_sample": 11}, "stands at batch 11 of .*, which has 10"),
        ({"B": 4}, r"is of a run with -b 4 -t 2, a with -b 3 -t 2: put the right file back$"),
    ],
)
def test_states_that_do_not_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make_shards(tmp_path, [241, 241])
    states = [DataLoader(f"{tmp_path}/s_*.bin", 3, 2, rank, 4, shuffle=True).state() for rank in range(4)]
    states[2] = dataclasses.replace(states[2], **change)
    with pytest.raises(RunError, match=f"^c .*{message}"):
        DataLoader(f"{tmp_path}/s_*.bin", 3, 2, 0, 2, shuffle=True).load_states(states, list("abcd"))


@pytest.mark.parametrize("seed", range(20))
def test_intervals(seed: int) -> None:
    """Against sets of tokens."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(generator.choice([0, 1, 5, 20])):
        begin = generator.randrange(60)
        pairs.append([begin, begin + generator.randint(1, 9)])
    tokens = {token for begin, end in pairs for token in range(begin, end)}
    intervals = merged(np.array(pairs, np.int64).reshape(-1, 2))
    assert intervals.dtype == np.int64
    assert [token for begin, end in intervals.tolist() for token in range(begin, end)] == sorted(tokens)
    assert np.all(intervals[1:, 0] > intervals[:-1, 1])  # as few as can be
    asked = np.arange(70)
    assert contains(intervals, asked).tolist() == [token in tokens for token in asked]
    assert not contains(NOTHING, asked).any()


def test_ranks_in_different_epochs(tmp_path: Path) -> None:
    """The rank that is ahead has dropped what was carried, and has consumed all that is its own of the epoch behind."""
    make_shards(tmp_path, [41])
    ahead, behind = (DataLoader(f"{tmp_path}/s_*.bin", 1, 5, rank, 2, shuffle=True).state() for rank in range(2))
    carried = {3: {0: np.array([[0, 3], [15, 17], [27, 28]])}, 4: {0: np.array([[7, 9]])}}
    ahead = dataclasses.replace(ahead, epoch=4, consumed={4: carried[4]}, sample_order=np.arange(4), next_sample=2)
    behind = dataclasses.replace(behind, epoch=3, consumed=carried, sample_order=np.array([3, 1, 0, 2]), next_sample=2)
    for states in ([ahead, behind], [behind, ahead]):
        rank = 0 if states[0] is ahead else 1
        ours, theirs = ([0, 10, 20, 30], [15, 35]) if rank == 0 else ([5, 15, 25, 35], [10, 30])
        begins = [begin for begin in (*ours, *theirs) if begin not in (0, 15)]  # those were left out
        expected = {0, 1, 2, 15, 16, 27, *(begin + i for begin in begins for i in range(5))}
        consumed = consumed_by(states, 5, [4])
        assert {t for begin, end in consumed[3][0].tolist() for t in range(begin, end)} == expected
        expected = {7, 8, *(begin + i for begin in (ours[0], ours[1]) for i in range(5))}
        assert {t for begin, end in consumed[4][0].tolist() for t in range(begin, end)} == expected


def test_intervals_stay_few(tmp_path: Path) -> None:
    """A shard that all ranks have behind them is one interval."""
    make_shards(tmp_path, [241, 241])
    states = []
    for rank in range(4):
        loader = DataLoader(f"{tmp_path}/s_*.bin", 3, 2, rank, 4, shuffle=True)
        for _ in range(20):
            loader.next_batch()
        states.append(loader.state())
    consumed = consumed_by(states, 6, [10, 10])
    assert {shard: array.tolist() for shard, array in consumed[0].items()} == {0: [[0, 240]], 1: [[0, 240]]}
