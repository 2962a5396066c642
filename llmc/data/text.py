"""From documents to a data set: train and validation shards and the tokenizer file, in one directory.

`write_dataset` is the one writer; `prepare_text` is the data set made of text files (`llmc-data text`).
"""

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llmc.data.shards import write_shard
from llmc.errors import RunError
from llmc.tokenizer import CharTokenizer, Encoder, gpt2, write_tokenizer

ENCODINGS = ("gpt2", "chars")
SHARD_TOKENS = 100_000_000
PIECE_CHARACTERS = 1_000_000


class WrittenFile(NamedTuple):
    """One file of a data set: where it is, what it holds, and whether it took the place of an older one."""

    path: Path
    contents: str
    replaced: bool


def make_encoder(encoding: str, texts: Iterable[str]) -> Encoder:
    """Return the encoder of that name (one of ENCODINGS); characters are those of `texts`."""
    return gpt2() if encoding == "gpt2" else CharTokenizer(texts)


def write_dataset(
    out: str | os.PathLike[str],
    name: str,
    encoder: Encoder,
    train: Iterable[str],
    val: Iterable[str] | float,
    shard_tokens: int = SHARD_TOKENS,
    total_characters: int | None = None,
) -> list[WrittenFile]:
    """Encode documents, end-of-text before each, into `<out>/<name>_{train,val}_%06d.bin` and `<out>/tokenizer.bin`.

    `train` and `val` are documents; a number for `val` instead cuts that share off the end of the train tokens. A split
    is cut into shards of equal size, at most `shard_tokens`. Memory holds one document at a time; the tokens wait on
    disk. No file gets its final name before all are complete, and none of another data set is touched.
    `total_characters` (an estimate is enough) lets the progress bar tell the time left.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.")
    except OSError as error:
        raise RunError(f"cannot write to directory {out}: {error.strerror or error}") from error
    with staging as directory, tqdm(total=total_characters, unit="char", unit_scale=True, disable=None) as progress:
        stage = Path(directory)
        write_tokenizer(stage / "tokenizer.bin", encoder.token_bytes(), encoder.end_of_text)
        _refuse_another_tokenizer(out, name, stage / "tokenizer.bin")
        train_tokens = _spool(train, encoder, stage / "train.tokens", progress)
        if isinstance(val, int | float):
            cut = len(train_tokens) - round(val * len(train_tokens))
            train_tokens, val_tokens = train_tokens[:cut], train_tokens[cut:]
        else:
            val_tokens = _spool(val, encoder, stage / "val.tokens", progress)
        contents = {}
        for split, tokens in (("train", train_tokens), ("val", val_tokens)):
            if len(tokens) == 0:
                total = len(train_tokens) + len(val_tokens)
                raise RunError(
                    f"the {split} split of {name} is empty ({total} tokens in all): "
                    "give more text or another --val-fraction"
                )
            for shard, part in enumerate(_even_parts(tokens, shard_tokens)):
                file = f"{name}_{split}_{shard:06d}.bin"
                write_shard(stage / file, part)
                contents[file] = f"{len(part):,} tokens"
        contents["tokenizer.bin"] = f"vocabulary of {encoder.vocab_size:,} tokens"
        _refuse_older_shards(out, name, set(contents))
        written = []
        for file, what in contents.items():
            written.append(WrittenFile(out / file, what, (out / file).exists()))
            os.replace(stage / file, out / file)
    return written


def prepare_text(
    files: Sequence[str | os.PathLike[str]],
    encoding: str,
    out: str | os.PathLike[str],
    name: str,
    val_fraction: float,
) -> list[WrittenFile]:
    """Make a data set of text files, each one document, the last `val_fraction` of all tokens for validation."""
    total = sum(_size(file) for file in files)
    encoder = make_encoder(encoding, map(read_document, files))
    return write_dataset(out, name, encoder, map(read_document, files), val_fraction, total_characters=total)


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file. Others are refused: the text is read twice, which a pipe does not allow."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"cannot read {path}: it is not a regular file; save the text to one and give that")
    return status.st_size


def read_document(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark, line ends as they are."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}; convert it"
        ) from error
    text = text.removeprefix("\ufeff")
    if not text:
        raise RunError(f"{path} is empty")
    return text


def _spool(documents: Iterable[str], encoder: Encoder, path: Path, progress: tqdm) -> np.ndarray:
    """Append the tokens of all documents to `path`; return them memory-mapped, uint16 (n,)."""
    end_of_text = np.array([encoder.end_of_text], dtype="<u2").tobytes()
    try:
        with open(path, "wb") as file:
            for document in documents:
                file.write(end_of_text)
                for piece in _pieces(document):
                    file.write(encoder.encode(piece).astype("<u2").tobytes())
                    progress.update(len(piece))
            n = file.tell() // 2
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return np.memmap(path, dtype="<u2", mode="r", shape=(n,)) if n else np.empty(0, dtype="<u2")


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text so that the tokens of the pieces are the tokens of the whole.

    Byte pairs never cross from one word to the next, and a newline after a non-space always begins a new word
    (inside white space that is not so: GPT-2's pattern looks ahead there).
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = text.find("\n", start + PIECE_CHARACTERS)
        while cut != -1 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _even_parts(tokens: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Cut tokens into equal shards: a short rest could be too small for a batch, and then no shard would load."""
    parts = -(-len(tokens) // most)
    for part in range(parts):
        yield tokens[part * len(tokens) // parts : (part + 1) * len(tokens) // parts]


def _refuse_another_tokenizer(out: Path, name: str, new: Path) -> None:
    """RunError if `out` holds shards of another data set, which would lose their tokenizer to the `new` one."""
    old = out / "tokenizer.bin"
    others = {path.name for path in out.glob("*.bin")} - _shards(out, name) - {old.name}
    if others and old.exists() and old.read_bytes() != new.read_bytes():
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
