"""Multiple choice: which of four completions of a context does a model find the likeliest?

By the sum of the losses of a completion's tokens (acc), and by their mean, so that short ones have no advantage
(acc_norm).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from llmc.data.eval_file import NUM_COMPLETIONS, Example, read_eval
from llmc.errors import RunError, UsageError
from llmc.ranks import Ranks

PROGRESS_EVERY = 10  # turns
ERASE_LINE = "\x1b[K"  # from the cursor on


class Model(Protocol):
    """What an evaluation by losses needs of `llmc._C.GPT2`."""

    def evaluate(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...


class Source(NamedTuple):
    """What the user has to know about an evaluation file when it does not do."""

    asked_by: str  # the flag that asks for the evaluation,
    flag: str  # and the one that names the file
    maker: str  # the command that makes it
    or_else: str = ""  # ends the advice


@dataclass(frozen=True)
class Score:
    """How many of the examples the model gets right."""

    examples: int
    by_sum: int
    by_mean: int

    @property
    def acc(self) -> float:
        return self.by_sum / self.examples

    @property
    def acc_norm(self) -> float:
        return self.by_mean / self.examples


def load_examples(path: str, seq_len: int, context: int, vocab_size: int, source: Source) -> list[Example]:
    """The examples of an evaluation file, shortest first: batches of alike ones have little padding.

    seq_len: length of a row now; context: the longest that the model can take.
    RunError or UsageError if it is no such file, or has a token or a row that the model cannot take.
    """
    or_else = f" with {source.flag}{source.or_else}"
    try:
        examples = read_eval(path)
    except RunError as error:
        raise RunError(f"{error}; {source.maker} makes it: name it{or_else}") from error
    for example in examples:
        largest = int(max(tokens.max() for tokens in (example.context, *example.completions)))
        if largest >= vocab_size:
            raise RunError(
                f"{path}: token {largest} of example {example.index} is outside the model's vocabulary of "
                f"{vocab_size}: name a file made with the model's tokenizer{or_else}"
            )
    examples.sort(key=row_length)
    longest = row_length(examples[-1])
    if longest > context:
        raise RunError(
            f"{path}: example {examples[-1].index} has a row of {longest} tokens, the model a context of {context}: "
            f"leave that example out{source.or_else}"
        )
    if longest > seq_len:
        raise UsageError(
            f"-t {seq_len} is too short for {source.asked_by}: example {examples[-1].index} of {path} has a row of "
            f"{longest} tokens: use -t {longest} or more{source.or_else}"
        )
    return examples


def row_length(example: Example) -> int:
    """Of its longest row: context and completion, but for the last token, which only is a target."""
    return len(example.context) + max(map(len, example.completions)) - 1


def score(model: Model, examples: Sequence[Example], batch_size: int, ranks: Ranks, name: str) -> Score:
    """The model's score, over all ranks, which share the examples; batch_size: rows, at least 4.

    All ranks call the model equally often, as they must where each has a part of the weights only.
    """
    step = batch_size // NUM_COMPLETIONS
    batches = [examples[first : first + step] for first in range(0, len(examples), step)]
    by_sum = by_mean = 0
    for number, counts in turns(len(batches), ranks, name):
        found = score_batch(model, batches[number], name)
        if counts:
            by_sum += found.by_sum
            by_mean += found.by_mean
    gathered = ranks.gather([by_sum, by_mean], name)
    return Score(len(examples), sum(sums for sums, _ in gathered), sum(means for _, means in gathered))


def turns(batches: int, ranks: Ranks, name: str) -> Iterator[tuple[int, bool]]:
    """The numbers of the batches that this rank does, and whether each counts.

    All ranks have equally many turns: the last one may not have a batch for everyone. Shows them on a terminal.
    """
    rounds = -(-batches // ranks.size)
    on_terminal = sys.stdout.isatty()
    for i in range(rounds):
        if on_terminal and i % PROGRESS_EVERY == 0:
            print(f"evaluating {name}: {i}/{rounds}", end="\r", flush=True)
        own = i * ranks.size + ranks.rank
        yield own % batches, own < batches
    if on_terminal:
        print(ERASE_LINE, end="")


def score_batch(model: Model, examples: Sequence[Example], name: str) -> Score:
    inputs, targets, mask = make_batch(examples)
    losses = model.evaluate(torch.from_numpy(inputs), torch.from_numpy(targets)).numpy()
    sums = losses.sum(axis=1, where=mask, dtype=np.float64)
    means = sums / mask.sum(axis=1)
    if not np.isfinite(sums).all():
        index = examples[int(np.argmin(np.isfinite(sums))) // NUM_COMPLETIONS].index
        raise RunError(f"{name}: the model's loss of example {index} is not finite: its weights are of no use")
    labels = np.array([example.label for example in examples])
    right = [  # of equal losses the first, as in llm.c
        int((losses_of_rows.reshape(-1, NUM_COMPLETIONS).argmin(axis=1) == labels).sum())
        for losses_of_rows in (sums, means)
    ]
    return Score(len(examples), *right)


def make_batch(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets, int32, and a mask that is true where a completion's token is the target.

    Each is (4 * examples, longest row). Zeros fill the rows up: what comes later changes no loss.
    """
    shape = (NUM_COMPLETIONS * len(examples), max(map(row_length, examples)))
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    rows = ((example.context, completion) for example in examples for completion in example.completions)
    for row, (context, completion) in enumerate(rows):
        tokens = np.concatenate([context, completion])
        end = len(tokens) - 1
        inputs[row, :end], targets[row, :end] = tokens[:-1], tokens[1:]
        mask[row, len(context) - 1 : end] = True
    return inputs, targets, mask
