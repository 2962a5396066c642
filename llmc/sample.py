"""Generates text from a model, token by token, with llm.c's generator and its walk over the distribution."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from llmc.errors import RunError

SEED = 1337  # every pass starts from it, so that samples of different steps differ by the model alone

MASK_64 = 2**64 - 1


class Model(Protocol):
    """What sampling needs of `llmc._C.GPT2`."""

    def forward(self, tokens: torch.Tensor) -> None: ...

    def extend(self, tokens: torch.Tensor) -> None: ...

    def logits(self, begin: int, end: int) -> torch.Tensor: ...


class Decoder(Protocol):
    """What sampling needs of `llmc.tokenizer.Tokenizer`."""

    def printable(self, token: int) -> bytes: ...


class XorShift:
    """The generator xorshift64*. The seed, 1 to 2**64 - 1, is its first state: 0 would never change."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def uniform(self) -> float:
        """The next number in [0, 1), a multiple of 2**-24."""
        s = self.state
        s ^= s >> 12
        s ^= (s << 25) & MASK_64
        s ^= s >> 27
        self.state = s
        bits = ((s * 0x2545F4914F6CDD1D) & MASK_64) >> 32
        return (bits >> 8) / 2**24


def pick(logits: np.ndarray, coin: float) -> int:
    """The index whose share of softmax(logits) covers `coin`, a number in [0, 1). logits: fp32 (V,)."""
    weights = np.exp(logits - logits.max())
    threshold = np.float32(coin * float(weights.sum(dtype=np.float64)))
    running_sum = np.cumsum(weights)
    # Rounding can leave the last sum at or below the threshold.
    return min(int(np.searchsorted(running_sum, threshold, side="right")), len(logits) - 1)


@dataclass(frozen=True)
class Sampling:
    """Which of the logits are drawn from, and how. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # divides the logits; 0: the largest of them, no draw
    top_k: int = 0  # only the k largest, and those equal to the last of them; 0: all
    top_p: float = 1.0  # of these the fewest, largest first, that have this share of the probability

    def choose(self, logits: np.ndarray, coin: float) -> int:
        """The next token. logits: fp32 (V,); coin: a number in [0, 1). RunError if there is no largest one."""
        largest = logits.max()
        if not np.isfinite(largest):
            raise RunError(f"the model's largest logit is {largest}: its weights are of no use")
        if self.temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # far below the largest they may become -inf
            scaled = ((logits - largest) / np.float64(self.temperature)).astype(np.float32)
        kept = self.candidates(scaled)
        return int(kept[pick(scaled[kept], coin)])

    def candidates(self, logits: np.ndarray) -> np.ndarray:
        """The tokens that may be drawn, in rising order; at least one."""
        kept = np.arange(len(logits))
        if 0 < self.top_k < len(logits):
            kept = kept[logits >= np.partition(logits, -self.top_k)[-self.top_k]]
        if self.top_p < 1:
            by_size = kept[np.argsort(-logits[kept], kind="stable")]
            shares = np.cumsum(np.exp(logits[by_size].astype(np.float64) - logits.max()))
            kept = np.sort(by_size[: np.searchsorted(shares, self.top_p * shares[-1]) + 1])
        return kept


def tokens_after(model: Model, prompt: Sequence[int], choose: Callable[[np.ndarray], int]) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, without an end, each at the cost of one position.

    choose: makes a token of the logits, fp32 (V,). prompt and tokens must not be longer than the model takes.
    """
    run, new, end = model.forward, list(prompt), 0
    while True:
        run(torch.tensor([new], dtype=torch.int32))
        end += len(new)
        new = [choose(model.logits(end - 1, end)[0].numpy())]
        yield new[0]
        run = model.extend


def generate(model: Model, length: int, start_token: int) -> Iterator[int]:
    """Yield the length-1 tokens that follow `start_token`, drawn from the model's distribution.

    length: of the text, the start token included, at most what the model takes.
    """
    generator = XorShift(SEED)
    tokens = tokens_after(model, [start_token], lambda logits: pick(logits, generator.uniform()))
    return islice(tokens, length - 1)


def print_sample(model: Model, length: int, start_token: int, tokenizer: Decoder | None) -> None:
    """Print a sample as it comes; without a tokenizer as numbers."""
    print("generating:\n---")
    for piece in text_of(generate(model, length, start_token), tokenizer):
        print(piece, end="", flush=True)
    print("\n---", flush=True)


def text_of(tokens: Iterable[int], tokenizer: Decoder | None) -> Iterator[str]:
    """What is printed for each token, and at the end; without a tokenizer numbers."""
    # Tokens may hold parts of a character: the decoder keeps them until the rest is there.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield text.decode(tokenizer.printable(token)) if tokenizer else f"{token} "
    yield text.decode(b"", final=True)


def until(stops: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """The text of `pieces` up to the first of `stops` that is complete in it.

    What could be the beginning of one is held back until more is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        begun = max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held
