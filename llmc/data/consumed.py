"""Which tokens an epoch has consumed, for runs that go on with another number of ranks or another batch.

Intervals are int64 (n, 2): [begin, end) in tokens of a shard, ascending, disjoint, not even adjacent. A batch is
consumed when its first token is.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmc.data.loader import LoaderState

# By epoch, then by shard (its number in the sorted list of files). Ranks need not be in the same epoch: those that
# have less left of one go on to the next.
Consumed = Mapping[int, Mapping[int, np.ndarray]]

NOTHING = np.zeros((0, 2), np.int64)


def merged(intervals: np.ndarray) -> np.ndarray:
    """The same tokens as the intervals (n, 2), which may overlap in any order, as intervals."""
    if len(intervals) == 0:
        return NOTHING
    begins, ends = intervals[np.argsort(intervals[:, 0], kind="stable")].T
    reached = np.maximum.accumulate(ends)
    first = np.flatnonzero(np.append(True, begins[1:] > reached[:-1]))
    return np.stack([begins[first], reached[np.append(first[1:], len(ends)) - 1]], axis=1)


def contains(intervals: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Which of the tokens (n,) are in the intervals: bool (n,)."""
    if len(intervals) == 0:
        return np.zeros(len(tokens), bool)
    i = np.searchsorted(intervals[:, 0], tokens, side="right") - 1
    inside: np.ndarray = (i >= 0) & (tokens < intervals[i, 1])
    return inside


def consumed_by(states: Sequence["LoaderState"], tokens_per_batch: int, samples: Sequence[int]) -> Consumed:
    """All that the ranks' loaders, in the order of ranks, have consumed, from the earliest epoch that one is in.

    samples: of each shard, world_size * tokens_per_batch tokens each.
    """
    earliest = min(state.epoch for state in states)
    carried = next(state.consumed for state in states if state.epoch == earliest)  # others may have dropped some of it
    result: dict[int, dict[int, np.ndarray]] = {}
    for epoch in range(earliest, max([*(state.epoch for state in states), *carried]) + 1):
        before = carried.get(epoch, {})
        pieces = {shard: [intervals] for shard, intervals in before.items()}
        for rank, state in enumerate(states):
            for shard, passed in passed_samples(state, epoch, samples):
                starts = (passed * len(states) + rank) * tokens_per_batch
                starts = starts[~contains(before.get(shard, NOTHING), starts)]  # the others were left out
                pieces.setdefault(shard, []).append(np.stack([starts, starts + tokens_per_batch], axis=1))
        shards = {shard: merged(np.concatenate(pieces[shard])) for shard in sorted(pieces)}
        result[epoch] = {shard: intervals for shard, intervals in shards.items() if len(intervals)}
    return {epoch: shards for epoch, shards in result.items() if shards}


def passed_samples(state: "LoaderState", epoch: int, samples: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The shards and samples that a shuffling loader has behind it in that epoch, consumed or left out."""
    if state.epoch > epoch:
        yield from ((shard, np.arange(n, dtype=np.int64)) for shard, n in enumerate(samples))
    elif state.epoch == epoch:
        for shard in state.shard_order[: state.shard_index].tolist():
            yield shard, np.arange(samples[shard], dtype=np.int64)
        yield int(state.shard_order[state.shard_index]), state.sample_order[: state.next_sample].astype(np.int64)
