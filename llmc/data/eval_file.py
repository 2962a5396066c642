"""Multiple-choice evaluation files such as hellaswag_val.bin: a context and four ways to go on, one of them right.

After the header (magic 20240522, version 1, number of examples, bytes of the longest) each example is a run of uint16:
65535, its bytes in all, its index, label, number of completions, then the context and each completion, a count first.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmc import binfile
from llmc.errors import RunError

VERSION = 1
START_OF_EXAMPLE = 65535  # so no token
START_WORDS = 3
NUM_COMPLETIONS = 4
LIMIT = 2**16  # of examples, and of the bytes of one: both are counted in a uint16


@dataclass(frozen=True)
class Example:
    """Tokens are uint16, none of the arrays is empty."""

    index: int
    label: int  # of the right completion
    context: np.ndarray  # (n,)
    completions: list[np.ndarray]  # 4 of (n_i,)


def read_eval(path: str | os.PathLike[str]) -> list[Example]:
    """Return the examples of an evaluation file. RunError, naming file and example, unless all of it is well formed."""
    path = Path(path)
    header = binfile.read_header(path, binfile.MAGIC_EVAL, (VERSION,))
    count, longest = int(header[2]), int(header[3])
    if count <= 0:
        raise RunError(f"{path}: its header gives {count} examples, expected at least 1")
    data = np.fromfile(path, dtype=np.uint8, offset=binfile.HEADER_BYTES)
    words = data[: len(data) // 2 * 2].view("<u2")
    examples, sizes = [], []
    position = 0
    for index in range(count):
        if position == len(words):
            raise RunError(f"{path} is truncated: it ends after {index} of {count} examples")
        where = f"{path}: example {index} of {count}"
        left = words[position:]
        size = _example_bytes(left[:START_WORDS], index, where)
        if size > 2 * len(left):
            raise RunError(f"{where} is truncated: it says it has {size} bytes, the file ends after {2 * len(left)}")
        examples.append(_Fields(left[START_WORDS : size // 2], size, where).example(index))
        sizes.append(size)
        position += size // 2
    if 2 * position != len(data):
        raise RunError(f"{path} is too long: {len(data) - 2 * position} bytes follow the last of {count} examples")
    if max(sizes) != longest:
        raise RunError(
            f"{path} is damaged: its header gives the longest example {longest} bytes, "
            f"it is example {sizes.index(max(sizes))} with {max(sizes)}"
        )
    return examples


def write_eval(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Write an evaluation file, atomically. Examples count from 0. RunError for what the format cannot hold."""
    if not 0 < len(examples) < LIMIT:
        raise RunError(f"cannot write {path}: {len(examples)} examples, the format takes 1 to {LIMIT - 1}")
    records = [_record(path, example) for example in examples]
    longest = max(record.nbytes for record in records)
    with binfile.atomic_write(path) as file:
        binfile.write_header(file, {0: binfile.MAGIC_EVAL, 1: VERSION, 2: len(examples), 3: longest})
        for record in records:
            file.write(record.data)


def _record(path: str | os.PathLike[str], example: Example) -> np.ndarray:
    """The words of an example."""
    parts: list[np.ndarray] = []
    for tokens in (example.context, *example.completions):
        parts += [np.array([len(tokens)]), tokens]
    body = np.concatenate(parts)
    size = 2 * (START_WORDS + 2 + len(body))
    if size >= LIMIT:
        raise RunError(
            f"cannot write {path}: example {example.index} takes {size} bytes, the format allows less than {LIMIT}: "
            "shorten or leave out that example"
        )
    start = [START_OF_EXAMPLE, size, example.index, example.label, len(example.completions)]
    return np.concatenate([start, body]).astype("<u2")


def _example_bytes(start: np.ndarray, index: int, where: str) -> int:
    """The size of the example that begins with the words `start`, these included."""
    if len(start) < START_WORDS:
        raise RunError(f"{where} is truncated: the file ends in its first words")
    marker, size, stated = map(int, start)
    if marker != START_OF_EXAMPLE:
        raise RunError(f"{where} is damaged: it begins with {marker}, expected {START_OF_EXAMPLE}")
    if size % 2 != 0 or size < 2 * START_WORDS:
        raise RunError(f"{where} is damaged: it says it has {size} bytes, an example takes an even number from 6")
    if stated != index:
        raise RunError(f"{where} is damaged: it says it is example {stated}")
    return size


class _Fields:
    """Reads the words of one example after the first three, never more than it says it has."""

    def __init__(self, words: np.ndarray, size: int, where: str) -> None:
        self.words, self.size, self.where = words, size, where
        self.position = 0

    def example(self, index: int) -> Example:
        label, num_completions = self._number("the label"), self._number("the number of completions")
        if num_completions != NUM_COMPLETIONS:
            self._damaged(f"it has {num_completions} completions, expected {NUM_COMPLETIONS}")
        if label >= NUM_COMPLETIONS:
            self._damaged(f"its label is {label}, expected 0 to {NUM_COMPLETIONS - 1}")
        context = self._tokens("the context")
        completions = [self._tokens(f"completion {i}") for i in range(NUM_COMPLETIONS)]
        if self.position != len(self.words):
            used = self.size - 2 * (len(self.words) - self.position)
            self._damaged(f"it says it has {self.size} bytes, its fields take {used}")
        return Example(index, label, context, completions)

    def _number(self, what: str) -> int:
        return int(self._take(1, what)[0])

    def _tokens(self, what: str) -> np.ndarray:
        count = self._number(f"the length of {what}")
        if count == 0:
            self._damaged(f"{what} is empty")
        tokens = self._take(count, what)
        if tokens.max() == START_OF_EXAMPLE:
            self._damaged(f"{what} contains {START_OF_EXAMPLE}, which is no token but begins an example")
        return tokens

    def _take(self, count: int, what: str) -> np.ndarray:
        if count > len(self.words) - self.position:
            self._damaged(f"it says it has {self.size} bytes, too few for {what}")
        taken = self.words[self.position : self.position + count]
        self.position += count
        return taken

    def _damaged(self, reason: str) -> NoReturn:
        raise RunError(f"{self.where} is damaged: {reason}")
