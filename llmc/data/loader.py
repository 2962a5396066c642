"""Batches of tokens in the exact order of llm.c, over any number of shards and ranks.

A sample is a block of world_size*B*T consecutive tokens (plus one to look ahead) of one shard; rank r owns the r-th
B*T of it. Unshuffled, samples are read shard after shard. Shuffled, every epoch permutes the shards, and every opened
shard permutes its samples; each rank draws from its own generator, seeded `seed + rank`.

A shuffled run that goes on with another number of ranks, or another B or T, draws an order of its own and leaves out
the batches whose first token the run before it has consumed in this epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llmc.data.consumed import NOTHING, Consumed, consumed_by, contains
from llmc.data.shards import find_shards, read_shard
from llmc.errors import RunError

MAX_EPOCHS_APART = 1000  # of ranks that compute the same number of batches


class Position(NamedTuple):
    """Where a batch of one rank lies."""

    path: Path
    start: int  # its first token in that shard


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands: what a resumed run needs to read on from the next sample."""

    shuffle: bool
    shard_index: int  # of the open shard in shard_order
    next_sample: int  # in sample_order
    shard_order: np.ndarray  # (number of shards,) int32; empty unless shuffled, like the following two
    sample_order: np.ndarray  # (samples of the open shard,) int32
    generator: np.ndarray  # (624,) uint32, state of the Mersenne Twister
    position: int  # of the next number in that state, 624: a new state is due
    B: int | None = None  # None, like T: not known, in llm.c's files
    T: int | None = None
    epoch: int = 0  # how many came before; -a 1 begins one at every step
    consumed: Consumed = field(default_factory=dict)  # in this epoch and later ones, before this run began


class DataLoader:
    """Endless batches from the shards that match a glob pattern.

    B rows of T tokens per batch and rank. `vocab_size`, where given, is checked against every token that is read.
    `num_tokens` counts all tokens of all `num_shards` shards. `position` is that of the newest batch.
    RunError: no match, a bad shard, a shard too small for one sample.
    """

    def __init__(
        self,
        pattern: str,
        B: int,
        T: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 42,
        vocab_size: int | None = None,
    ) -> None:
        self.B, self.T = B, T
        self.rank, self.world_size = rank, world_size
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        self.paths = find_shards(pattern)
        self.num_shards = len(self.paths)
        self.shard_tokens = [self._check_size(shard) for shard in range(self.num_shards)]
        self.num_tokens = sum(self.shard_tokens)
        self.seed = seed
        self._begin()

    def _begin(self) -> None:
        """At the start of a run."""
        self.generator = torch_mt19937(self.seed + self.rank)
        self.shard_order = np.arange(self.num_shards)
        self.epoch = -1
        self.consumed: Consumed = {}
        self.reset()

    def reset(self) -> None:
        """Start an epoch: at sample 0 of shard 0, or, shuffled, with the shards permuted once more."""
        if self.shuffle:
            self.shard_order = self.shard_order[permutation(self.generator, self.num_shards)]
        self.epoch += 1
        self.consumed = {epoch: shards for epoch, shards in self.consumed.items() if epoch >= self.epoch}
        self._open(0)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int32 (B, T); the targets are the inputs one token further on."""
        while self.next_sample == self.num_samples or self.left_out[self.next_sample]:
            if self.next_sample < self.num_samples:
                self.next_sample += 1
            elif self.shard_index + 1 < self.num_shards:
                self._open(self.shard_index + 1)
            else:
                self.reset()
        self.position = Position(self.path, int(self.starts[self.next_sample]))
        self.next_sample += 1
        return self._read(self.tokens, self.position)

    def read(self, position: Position) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch that next_batch, here or on another rank, gave from there."""
        return self._read(read_shard(position.path), position)

    def _read(self, shard: np.ndarray, position: Position) -> tuple[torch.Tensor, torch.Tensor]:
        stored = shard[position.start : position.start + self.B * self.T + 1]
        self._check_vocabulary(stored, position)  # before uint32 becomes int32
        tokens = stored.astype(np.int32)
        # Targets get memory of their own: views into one buffer would alias.
        inputs, targets = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:].copy())
        return inputs.view(self.B, self.T), targets.view(self.B, self.T)

    def state(self) -> LoaderState:
        twister = self.generator.state["state"]
        end = None if self.shuffle else 0
        return LoaderState(
            shuffle=self.shuffle,
            shard_index=self.shard_index,
            next_sample=self.next_sample,
            shard_order=self.shard_order[:end].astype(np.int32),
            sample_order=self.sample_order[:end].astype(np.int32),
            generator=twister["key"].copy(),
            position=twister["pos"],
            B=self.B,
            T=self.T,
            epoch=self.epoch,
            consumed=self.consumed,
        )

    def load_states(self, states: Sequence[LoaderState], sources: Sequence[str]) -> None:
        """Go on where the loaders of `states`, one for each rank of an earlier run, stood together.

        To the bit if this run has as many ranks and the same B and T. RunError, naming one of `sources`, if they read
        other data.
        """
        B, T = states[0].B or self.B, states[0].T or self.T
        if (len(states), B, T) == (self.world_size, self.B, self.T):
            self.load_state(states[self.rank], sources[self.rank])
            return
        n = B * T
        samples = [(tokens - 1) // (len(states) * n) for tokens in self.shard_tokens]
        for state, source in zip(states, sources, strict=True):
            if (state.B, state.T) != (states[0].B, states[0].T):
                raise RunError(
                    f"{source} is of a run with -b {state.B} -t {state.T}, "
                    f"{sources[0]} with -b {states[0].B} -t {states[0].T}: put the right file back"
                )
            self._check_position(state, source, samples)
            epochs = {states[0].epoch, state.epoch, *state.consumed}
            if max(epochs) - min(epochs) > MAX_EPOCHS_APART:
                raise RunError(f"{source} is damaged: it knows of the epochs {min(epochs)} and {max(epochs)} at once")
        self._begin()
        if self.shuffle:
            self.epoch = min(state.epoch for state in states)
            self.consumed = consumed_by(states, n, samples)
            self._open(0, self.sample_order)

    def load_state(self, state: LoaderState, source: str) -> None:
        """Go on where the loader of `state`, of the same rank, number of ranks, B and T, stood."""
        samples = [self._samples(shard) for shard in range(self.num_shards)]
        self._check_position(state, source, samples)
        self.epoch, self.consumed = state.epoch, state.consumed
        if self.shuffle:
            self.shard_order = state.shard_order.astype(np.int64)
            self.generator.state = {
                "bit_generator": "MT19937",
                "state": {"key": state.generator, "pos": state.position},
            }
        self._open(state.shard_index, state.sample_order.astype(np.int64) if self.shuffle else None)
        self.next_sample = state.next_sample

    def _check_position(self, state: LoaderState, source: str, samples: Sequence[int]) -> None:
        """RunError if a loader of this data, with so many samples in each shard, cannot stand there."""
        if state.shuffle != self.shuffle:
            raise RunError(f"{source} is of a run with -a {int(not state.shuffle)}: resume it with that")
        if state.shuffle and sorted(state.shard_order) != list(range(self.num_shards)):
            raise RunError(
                f"{source} is of a run over {len(state.shard_order)} shards, now there are {self.num_shards}: "
                "resume it with the same data -i"
            )
        shards = [shard for consumed in state.consumed.values() for shard in consumed]
        for shard in (state.shard_index, *shards):
            if not 0 <= shard < self.num_shards:
                raise RunError(f"{source} is of a run over other data: it stands in shard {shard} of {self.num_shards}")
        shard = int(state.shard_order[state.shard_index]) if state.shuffle else state.shard_index
        path, capacity = self.paths[shard], samples[shard]
        if state.shuffle and sorted(state.sample_order) != list(range(capacity)):
            batch = ", -b and -t" if state.B is None else ""
            raise RunError(
                f"{source} is of a run that read {len(state.sample_order)} batches from {path}, now it has {capacity}: "
                f"resume it with the same data -i{batch}"
            )
        if not 0 <= state.next_sample <= capacity:
            raise RunError(f"{source} stands at batch {state.next_sample} of {path}, which has {capacity}")

    def _open(self, shard_index: int, sample_order: np.ndarray | None = None) -> None:
        """At the first sample of a shard, in the given order or one that is drawn."""
        self.shard_index = shard_index
        shard = int(self.shard_order[shard_index])
        self.path = self.paths[shard]
        self.tokens = read_shard(self.path)
        self.num_samples = self._samples(shard)
        if sample_order is not None:
            self.sample_order = sample_order
        elif self.shuffle:
            self.sample_order = permutation(self.generator, self.num_samples)
        else:
            self.sample_order = np.arange(self.num_samples)
        self.starts = (self.sample_order * self.world_size + self.rank) * (self.B * self.T)  # in tokens
        self.left_out = contains(self.consumed.get(self.epoch, {}).get(shard, NOTHING), self.starts)
        self.next_sample = 0

    def _samples(self, shard: int) -> int:
        return (self.shard_tokens[shard] - 1) // (self.world_size * self.B * self.T)

    def _check_size(self, shard: int) -> int:
        n = len(read_shard(self.paths[shard]))
        need = self.world_size * self.B * self.T + 1
        if n < need:
            ranks = f"{self.world_size} ranks * " if self.world_size > 1 else ""
            raise RunError(
                f"{self.paths[shard]} has {n} tokens, one batch needs {need} "
                f"({ranks}-b {self.B} * -t {self.T} + 1): use a smaller -b or -t"
            )
        return n

    def _check_vocabulary(self, tokens: np.ndarray, position: Position) -> None:
        if self.vocab_size is None or tokens.max() < self.vocab_size:
            return
        offset = int(np.argmax(tokens >= self.vocab_size))
        raise RunError(
            f"{position.path}: token {tokens[offset]} at offset {position.start + offset} is outside the model's "
            f"vocabulary of {self.vocab_size}: train on a data set made with the model's tokenizer"
        )


def torch_mt19937(seed: int) -> np.random.MT19937:
    """Return a Mersenne Twister that yields the very 32-bit numbers of `torch.manual_seed(seed)`."""
    generator = np.random.MT19937()
    np.random.RandomState(generator).seed(seed)  # MT19937(seed) would seed in numpy's newer way
    return generator


def permutation(generator: np.random.MT19937, n: int) -> np.ndarray:
    """Return a permutation of 0..n-1, drawn as llm.c draws it: for i = n-1 ... 1, swap i with u32 mod (i+1)."""
    order = list(range(n))
    if n > 1:
        picks = generator.random_raw(n - 1) % np.arange(n, 1, -1, dtype=np.uint64)
        for i, j in zip(range(n - 1, 0, -1), picks.tolist(), strict=True):
            order[i], order[j] = order[j], order[i]
    return np.array(order, dtype=np.int64)
