"""HellaSwag while a model trains: how often does it find the right one of four completions the likeliest?

A completion is as likely as the mean loss over its tokens is low, so that short ones have no advantage (acc_norm).
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from llmc.data.eval_file import NUM_COMPLETIONS, Example, read_eval
from llmc.errors import RunError, UsageError
from llmc.ranks import Ranks

PROGRESS_EVERY = 10  # batches
ERASE_LINE = "\x1b[K"  # from the cursor on


class Model(Protocol):
    """What the evaluation needs of `llmc._C.GPT2`."""

    def evaluate(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...


def load_examples(path: str, seq_len: int, vocab_size: int) -> list[Example]:
    """The examples of an evaluation file, shortest first: batches of alike ones have little padding.

    RunError or UsageError if it is no such file, or has a token or a row that the model cannot take.
    """
    try:
        examples = read_eval(path)
    except RunError as error:
        raise RunError(
            f"{error}; llm.c's dev/data/hellaswag.py makes it: name it with --hellaswag-data, or use -h 0"
        ) from error
    for example in examples:
        largest = int(max(tokens.max() for tokens in (example.context, *example.completions)))
        if largest >= vocab_size:
            raise RunError(
                f"{path}: token {largest} of example {example.index} is outside the model's vocabulary of "
                f"{vocab_size}: name a file made with the model's tokenizer with --hellaswag-data, or use -h 0"
            )
    examples.sort(key=row_length)
    longest = row_length(examples[-1])
    if longest > seq_len:
        raise UsageError(
            f"-t {seq_len} is too short for -h 1: example {examples[-1].index} of {path} has a row of {longest} "
            f"tokens: use -t {longest} or more, or -h 0"
        )
    return examples


def row_length(example: Example) -> int:
    """Of its longest row: context and completion, but for the last token, which only is a target."""
    return len(example.context) + max(map(len, example.completions)) - 1


def count_correct(model: Model, examples: Sequence[Example], batch_size: int, ranks: Ranks) -> int:
    """How many examples the model gets right, over all ranks, which share them; batch_size: rows, at least 4.

    All ranks call the model equally often, as they must where each has a part of the weights only.
    """
    step = batch_size // NUM_COMPLETIONS
    batches = [examples[first : first + step] for first in range(0, len(examples), step)]
    rounds = -(-len(batches) // ranks.size)
    on_terminal = sys.stdout.isatty()
    correct = 0
    for i in range(rounds):
        if on_terminal and i % PROGRESS_EVERY == 0:
            print(f"evaluating HellaSwag: {i}/{rounds}", end="\r", flush=True)
        own = i * ranks.size + ranks.rank
        found = count_correct_in_batch(model, batches[own % len(batches)])
        if own < len(batches):  # the last round may not have a batch for everyone
            correct += found
    if on_terminal:
        print(ERASE_LINE, end="")
    return sum(ranks.gather(correct, "HellaSwag"))


def count_correct_in_batch(model: Model, examples: Sequence[Example]) -> int:
    inputs, targets, mask = make_batch(examples)
    losses = model.evaluate(torch.from_numpy(inputs), torch.from_numpy(targets)).numpy()
    means = losses.mean(axis=1, where=mask, dtype=np.float64)
    choices = means.reshape(-1, NUM_COMPLETIONS).argmin(axis=1)  # of equal ones the first, as in llm.c
    return int((choices == [example.label for example in examples]).sum())


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
