"""Batches of tokens in the exact order of llm.c, over any number of shards and ranks.

A sample is a block of world_size*B*T consecutive tokens (plus one to look ahead) of one shard; rank r owns the r-th
B*T of it. Unshuffled, samples are read shard after shard. Shuffled, every epoch permutes the shards, and every opened
shard permutes its samples; each rank draws from its own generator, seeded `seed + rank`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from llmc.data.shards import find_shards, read_shard
from llmc.errors import RunError


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


class DataLoader:
    """Endless batches from the shards that match a glob pattern.

    B rows of T tokens per batch and rank. `vocab_size`, where given, is checked against every token that is read.
    `num_tokens` counts all tokens of all `num_shards` shards.
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
        self.num_tokens = sum(self._check_size(shard) for shard in range(self.num_shards))
        self.generator = torch_mt19937(seed + rank)
        self.shard_order = np.arange(self.num_shards)
        self.reset()

    def reset(self) -> None:
        """Start an epoch: at sample 0 of shard 0, or, shuffled, with the shards permuted once more."""
        if self.shuffle:
            self.shard_order = self.shard_order[permutation(self.generator, self.num_shards)]
        self._open(0)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int32 (B, T); the targets are the inputs one token further on."""
        if self.next_sample == self.num_samples:
            if self.shard_index + 1 == self.num_shards:
                self.reset()
            else:
                self._open(self.shard_index + 1)
        n = self.B * self.T
        start = (int(self.sample_order[self.next_sample]) * self.world_size + self.rank) * n
        tokens = self.tokens[start : start + n + 1].astype(np.int32)
        self._check_vocabulary(tokens, start)
        self.next_sample += 1
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
        )

    def load_state(self, state: LoaderState, source: str) -> None:
        """Go on where the loader of `state` stood. RunError, naming `source`, if it read other data or batches."""
        if state.shuffle != self.shuffle:
            raise RunError(f"{source} is of a run with -a {int(not state.shuffle)}: resume it with that")
        if state.shuffle and sorted(state.shard_order) != list(range(self.num_shards)):
            raise RunError(
                f"{source} is of a run over {len(state.shard_order)} shards, now there are {self.num_shards}: "
                "resume it with the same data -i"
            )
        if not 0 <= state.shard_index < self.num_shards:
            raise RunError(
                f"{source} is of a run over other data: it stands in shard {state.shard_index} of {self.num_shards}"
            )
        if state.shuffle:
            self.shard_order = state.shard_order.astype(np.int64)
        self._open(state.shard_index)  # the permutation it draws is replaced below
        path, capacity = self.path, self.num_samples
        if state.shuffle and sorted(state.sample_order) != list(range(capacity)):
            raise RunError(
                f"{source} is of a run that read {len(state.sample_order)} batches from {path}, now it has {capacity}: "
                "resume it with the same data -i, -b and -t"
            )
        if not 0 <= state.next_sample <= capacity:
            raise RunError(f"{source} stands at batch {state.next_sample} of {path}, which has {capacity}")
        if state.shuffle:
            self.sample_order = state.sample_order.astype(np.int64)
            self.generator.state = {
                "bit_generator": "MT19937",
                "state": {"key": state.generator, "pos": state.position},
            }
        self.next_sample = state.next_sample

    def _open(self, shard_index: int) -> None:
        self.shard_index = shard_index
        self.path = self.paths[self.shard_order[shard_index]]
        self.tokens = read_shard(self.path)
        self.num_samples = (len(self.tokens) - 1) // (self.world_size * self.B * self.T)
        self.sample_order = (
            permutation(self.generator, self.num_samples) if self.shuffle else np.arange(self.num_samples)
        )
        self.next_sample = 0

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

    def _check_vocabulary(self, tokens: np.ndarray, start: int) -> None:
        if self.vocab_size is None or tokens.max() < self.vocab_size:
            return
        offset = int(np.argmax(tokens >= self.vocab_size))
        raise RunError(
            f"{self.path}: token {tokens[offset]} at offset {start + offset} is outside the model's vocabulary of "
            f"{self.vocab_size}: train on a data set made with the model's tokenizer"
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
