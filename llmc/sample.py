"""Generates text from a model, token by token, with llm.c's generator and its walk over the distribution."""

import codecs
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

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
    """The generator xorshift64*."""

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


def generate(model: Model, length: int, start_token: int) -> Iterator[int]:
    """Yield the length-1 tokens that follow `start_token`, each at the cost of one position.

    length: of the text, the start token included, at most what the model takes.
    """
    generator = XorShift(SEED)
    run, token = model.forward, start_token
    for t in range(1, length):
        run(torch.tensor([[token]], dtype=torch.int32))
        token = pick(model.logits(t - 1, t)[0].numpy(), generator.uniform())
        yield token
        run = model.extend


def print_sample(model: Model, length: int, start_token: int, tokenizer: Decoder | None) -> None:
    """Print a sample as it comes; without a tokenizer as numbers."""
    print("generating:\n---")
    # Tokens may hold parts of a character: the decoder keeps them until the rest is there.
    text = codecs.getincrementaldecoder("utf-8")("replace")
    for token in generate(model, length, start_token):
        print(text.decode(tokenizer.printable(token)) if tokenizer else f"{token} ", end="", flush=True)
    print(text.decode(b"", final=True) + "\n---", flush=True)
