"""From the pieces of a source to a data set: train and validation shards and the tokenizer file, in one directory.

Tokens wait in `<out>/.NAME.unfinished/` until all are there; a run that was interrupted goes on from these.
"""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from llmc import json_text
from llmc.binfile import atomic_write
from llmc.data.shards import token_dtype, write_shard
from llmc.errors import RunError
from llmc.tokenizer import check_tokens, tokenizer_bytes

SHARD_TOKENS = 100_000_000
SAVE_SECONDS = 5.0  # of work that a killed run can lose
SPLITS = ("train", "val")

Item = TypeVar("Item")


class Encoded(NamedTuple):
    """What an item became."""

    tokens: np.ndarray  # (n,) uint16 or uint32, end-of-text among them
    counts: Counter[str]  # documents kept, or dropped by reason


class Vocabulary(NamedTuple):
    """The content of the tokenizer file."""

    token_bytes: list[bytes]
    end_of_text: int


class WrittenFile(NamedTuple):
    """One file of a data set: where it is, what it holds, and whether it took the place of an older one."""

    path: Path
    contents: str
    replaced: bool


def write_dataset(
    out: str | os.PathLike[str],
    name: str,
    vocabulary: Vocabulary,
    items: Iterable[Item],
    encode: Callable[[Item], Encoded],
    *,
    val: float | int | Iterable[Item],
    fingerprint: Mapping[str, object],
    workers: int,
    shard_tokens: int = SHARD_TOKENS,
    multiple: int = 1,
    total: int | None = None,
    unit: str = "char",
    size: Callable[[Item], int],
) -> tuple[list[WrittenFile], Counter[str]]:
    """Encode `items` into `<out>/<name>_{train,val}_%06d.bin`, with `<out>/tokenizer.bin`; return files and counts.

    Items are pieces of the source, in order, each encoded in one of `workers` processes (1: in this one); both items
    and `encode` can be pickled then. The bytes of the files do not depend on `workers`.

    val: a share (float) cut off the end of all tokens, a number (int) of tokens cut off their beginning, or items of
    its own. A split is cut into shards of equal size, at most `shard_tokens`. A share and shards are whole multiples of
    `multiple` tokens (at most `shard_tokens`), as the tokens of each item must be then. `size` of an item and their
    `total`, in `unit`, are for the progress bar (an estimate is enough).

    An interrupted run goes on where it stopped if `fingerprint` (JSON values: what the tokens depend on, such as sizes
    and times of the source's files, and options) is the same. No file gets its final name before all are complete, and
    none of another data set is touched.
    """
    out = Path(out)
    check_tokens(out / "tokenizer.bin", *vocabulary)
    content = tokenizer_bytes(*vocabulary)
    whole = {**fingerprint, "tokenizer": hashlib.sha256(content).hexdigest()}
    with _unfinished(out, name, token_dtype(len(vocabulary.token_bytes)), whole) as unfinished:
        with atomic_write(unfinished.directory / "tokenizer.bin") as tokenizer:
            tokenizer.write(content)
        _refuse_another_tokenizer(out, name, content)
        parts: dict[str, Iterable[Item]] = {"train": items, "val": () if isinstance(val, int | float) else val}
        with tqdm(total=total, unit=unit, unit_scale=True, disable=None) as progress:
            for split, part in parts.items():
                _encode_all(unfinished, split, part, encode, workers, size, progress)
            unfinished.complete()
        train_tokens, val_tokens = (unfinished.tokens(split) for split in SPLITS)
        if isinstance(val, int):
            val_tokens, train_tokens = train_tokens[:val], train_tokens[val:]
        elif isinstance(val, float):
            cut = len(train_tokens) - round(val * len(train_tokens) / multiple) * multiple
            train_tokens, val_tokens = train_tokens[:cut], train_tokens[cut:]
        contents = {}
        for split, tokens in zip(SPLITS, (train_tokens, val_tokens), strict=True):
            if len(tokens) == 0:
                all_tokens = len(train_tokens) + len(val_tokens)
                remedy = " or another --val-fraction" if isinstance(val, float) else ""
                if val == shard_tokens:  # the first shard's worth
                    remedy = " or fewer --shard-tokens"
                raise RunError(
                    f"the {split} split of {name} is empty ({all_tokens} tokens in all): give more text{remedy}"
                )
            for shard, shard_part in enumerate(_even_parts(tokens, shard_tokens, multiple)):
                file = f"{name}_{split}_{shard:06d}.bin"
                write_shard(unfinished.directory / file, shard_part)
                contents[file] = f"{len(shard_part):,} tokens"
        contents["tokenizer.bin"] = f"vocabulary of {len(vocabulary.token_bytes):,} tokens"
        _refuse_older_shards(out, name, set(contents))
        written = []
        for file, what in contents.items():
            written.append(WrittenFile(out / file, what, (out / file).exists()))
            os.replace(unfinished.directory / file, out / file)
        unfinished.remove()
        return written, unfinished.counts["train"] + unfinished.counts["val"]


# ---- the tokens of a run that is not yet complete


class _Unfinished:
    """The tokens of both splits, on disk, and a journal: how many items they are of."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], fingerprint: Mapping[str, object]) -> None:
        self.directory = directory
        self.dtype = dtype
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.items = dict.fromkeys(SPLITS, 0)
        self.num_tokens = dict.fromkeys(SPLITS, 0)
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.saved = False  # is there a journal: something to go on from
        self.next_save = time.monotonic() + SAVE_SECONDS
        with self._write_errors():
            self._load()
            self.files = {split: open(self._path(split), "ab") for split in SPLITS}  # noqa: SIM115

    def append(self, split: str, encoded: Encoded) -> None:
        """Take over the next item of that split."""
        with self._write_errors():
            self.files[split].write(encoded.tokens.astype(self.dtype, casting="safe", copy=False).data)
        with _interrupts_held():  # Ctrl-C saves them: they belong together
            self.items[split] += 1
            self.num_tokens[split] += len(encoded.tokens)
            self.counts[split] += encoded.counts
        if time.monotonic() >= self.next_save:
            self.save()
            self.next_save = time.monotonic() + SAVE_SECONDS

    def save(self) -> None:
        """Let a later run go on from here."""
        self._flush()
        journal = {
            "fingerprint": self.fingerprint,
            "items": self.items,
            "tokens": self.num_tokens,
            "counts": self.counts,
        }
        with atomic_write(self._journal) as temporary:
            temporary.write(json.dumps(journal).encode())
        self.saved = True

    def complete(self) -> None:
        """All is appended. A run too short to have been saved before is not worth it now."""
        if self.saved:
            self.save()
        else:
            self._flush()

    def _flush(self) -> None:
        with self._write_errors():
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())

    def tokens(self, split: str) -> np.ndarray:
        """All tokens of a split, memory-mapped (n,)."""
        n = self.num_tokens[split]
        return np.memmap(self._path(split), self.dtype, "r", shape=(n,)) if n else np.empty(0, self.dtype)

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                file.close()

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _load(self) -> None:
        """Take over what an earlier run with the same fingerprint has left, or clear it away."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # a damaged journal
            journal = json_text.parse(self._journal.read_bytes())
            items, tokens = (numbers_of(journal[name], SPLITS) for name in ("items", "tokens"))
            counts = {split: Counter(numbers_of(journal["counts"][split])) for split in SPLITS}
            sizes = {split: tokens[split] * self.dtype.itemsize for split in SPLITS}
            there = all(os.path.getsize(self._path(split)) >= sizes[split] for split in SPLITS)
            if there and journal["fingerprint"] == self.fingerprint:
                for split in SPLITS:
                    os.truncate(self._path(split), sizes[split])
                self.items, self.num_tokens, self.counts = items, tokens, counts
                self.saved = True
                say(f"going on in {self.directory}: {sum(self.num_tokens.values()):,} tokens are there")
                return
            say(f"starting over: what an interrupted run left in {self.directory} is of other input or options")
        for path in (self._journal, *map(self._path, SPLITS)):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _write_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write {self.directory}: {error.strerror or error}") from error

    def _path(self, split: str) -> Path:
        return self.directory / f"{split}.tokens"

    @property
    def _journal(self) -> Path:
        return self.directory / "journal.json"


def numbers_of(values: Any, names: Iterable[str] | None = None) -> dict[str, int]:
    """Whole numbers from 0 of these names, of any if None; ValueError and others if that is not what they are."""
    numbers = {name: values[name] for name in (values.keys() if names is None else names)}
    if not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise ValueError("not the numbers of a journal")
    return numbers


@contextlib.contextmanager
def _unfinished(
    out: Path, name: str, dtype: np.dtype[Any], fingerprint: Mapping[str, object]
) -> Generator[_Unfinished, None, None]:
    """`<out>/.NAME.unfinished/`, ours alone; after a failure it stays if there is something to go on from."""
    directory = out / f".{name}.unfinished"
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            directory.mkdir(exist_ok=True)
            lock = stack.enter_context(open(directory / "lock", "w"))
        except OSError as error:
            raise RunError(f"cannot write to directory {out}: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{directory} is in use: another run is making {name} there, wait for it") from None
        unfinished = _Unfinished(directory, dtype, fingerprint)
        stack.callback(unfinished.close)
        try:
            yield unfinished
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and any(unfinished.items.values()):
                unfinished.save()
            if not unfinished.saved:
                unfinished.remove()
            raise


def say(line: str) -> None:
    """A line to the user that is no result."""
    print(line, file=sys.stderr)


# ---- encoding, in this process or in several


def _encode_all(
    unfinished: _Unfinished,
    split: str,
    items: Iterable[Item],
    encode: Callable[[Item], Encoded],
    workers: int,
    size: Callable[[Item], int],
    progress: "tqdm[Any]",
) -> None:
    """Append the tokens of all items that are not there yet."""
    rest = iter(items)
    for item in itertools.islice(rest, unfinished.items[split]):
        progress.update(size(item))
    with contextlib.closing(_in_order(rest, encode, workers, size)) as results:
        for item_size, encoded in results:
            unfinished.append(split, encoded)
            progress.update(item_size)


def _in_order(
    items: Iterator[Item], encode: Callable[[Item], Encoded], workers: int, size: Callable[[Item], int]
) -> Generator[tuple[int, Encoded], None, None]:
    """Yield size and tokens of each item; at most two items of each worker are in memory."""
    if workers == 1:
        for item in items:
            yield size(item), encode(item)
        return
    # Not forked: a source that is streamed has threads, and a fork copies their locks as they happen to be.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (encode,))
    waiting: collections.deque[tuple[int, Future[Encoded]]] = collections.deque()
    try:
        for item in items:
            with _interrupts_held():
                waiting.append((size(item), pool.submit(_encode_item, item)))
            if len(waiting) == 2 * workers:
                item_size, future = waiting.popleft()
                yield item_size, future.result()
        while waiting:
            item_size, future = waiting.popleft()
            yield item_size, future.result()
    except BrokenProcessPool:
        raise RunError("a worker process was killed, perhaps for memory: use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Generator[None, None, None]:
    """Ctrl-C waits, and workers that start in the meantime never see it: the first process ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encode: Callable[[Any], Encoded]  # of a worker


def _begin_worker(encode: Callable[[Any], Encoded]) -> None:
    global _encode
    _encode = encode
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker would wait for ever for items of a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_item(item: Any) -> Encoded:
    return _encode(item)


# ---- shards


def _even_parts(tokens: np.ndarray, most: int, multiple: int) -> Iterator[np.ndarray]:
    """Cut tokens into equal shards: a short rest could be too small for a batch, and then no shard would load."""
    units = len(tokens) // multiple
    parts = -(-units // (most // multiple))
    for part in range(parts):
        yield tokens[part * units // parts * multiple : (part + 1) * units // parts * multiple]


def _refuse_another_tokenizer(out: Path, name: str, new: bytes) -> None:
    """RunError if `out` holds shards of another data set, which would lose their tokenizer to the `new` one."""
    old = out / "tokenizer.bin"
    others = {path.name for path in out.glob("*.bin")} - _shards(out, name) - {old.name}
    if others and old.exists() and old.read_bytes() != new:
        raise RunError(
            f"{out} holds another data set ({min(others)} ...), which needs its own tokenizer.bin: choose another --out"
        )


def _refuse_older_shards(out: Path, name: str, new: set[str]) -> None:
    """RunError if shards of an earlier run would stay in `out` and match the pattern of the new ones."""
    stale = _shards(out, name) - new
    if stale:
        raise RunError(
            f"{out} holds {len(stale)} more shards of an older {name} ({min(stale)} ...), which would mix with the "
            "new: delete them, or choose another --out"
        )


def _shards(out: Path, name: str) -> set[str]:
    return {path.name for path in out.glob("*.bin") if path.name.startswith((f"{name}_train_", f"{name}_val_"))}
