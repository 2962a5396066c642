"""Token shards: a 1024-byte header (magic, version, token count n), then n little-endian unsigned tokens.

GPT-2's are uint16 (magic 20240520, version 1); vocabularies of more than 65,536 tokens take uint32 (20240801, 7).
"""

import glob
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc import binfile
from llmc.errors import RunError

MAX_TOKENS = 2**31 - 1  # the count is stored as an int32
MAX_TOKEN = 2**16 - 1  # of uint16


class Format(NamedTuple):
    magic: int
    version: int
    dtype: np.dtype[Any]


MAKERS = {  # of the data sets by the names of their files: the command, and the directory it writes to by default
    "shakespeare": ("shakespeare", "dev/data/shakespeare"),
    "tiny_shakespeare": ("tinyshakespeare", "dev/data/tinyshakespeare"),
    "TinyStories": ("tinystories", "dev/data/tinystories"),
    "fineweb": ("fineweb", "dev/data/fineweb10B"),
    "edu_fineweb": ("fineweb --type edu", "dev/data/edu_fineweb10B"),
}

UINT16 = Format(binfile.MAGIC_TOKENS, 1, np.dtype("<u2"))
UINT32 = Format(binfile.MAGIC_TOKENS_32, 7, np.dtype("<u4"))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of the tokens of that vocabulary: uint16 if it suffices, else uint32."""
    return (UINT16 if vocab_size <= MAX_TOKEN + 1 else UINT32).dtype


def shard_format(path: str | os.PathLike[str]) -> Format:
    """The format that the shard `path` says it has; UINT16 if it is no shard at all."""
    try:
        with open(path, "rb") as file:
            magic = int.from_bytes(file.read(4), "little")
    except OSError as error:
        raise RunError(f"cannot read token shard {path}: {error.strerror or error}") from error
    return UINT32 if magic == UINT32.magic else UINT16


def read_shard(path: str | os.PathLike[str]) -> np.ndarray:
    """Return a shard as a read-only, memory-mapped array (n,), uint16 or uint32. RunError unless it is intact."""
    format = shard_format(path)
    header = binfile.read_header(path, format.magic, (format.version,))
    n = int(header[2])
    if n <= 0:
        raise RunError(f"{path}: its header gives {n} tokens, expected at least 1")
    binfile.check_size(path, binfile.HEADER_BYTES + format.dtype.itemsize * n, f"{n} tokens")
    # Not a Path, which numpy would resolve.
    return np.memmap(os.fspath(path), dtype=format.dtype, mode="r", offset=binfile.HEADER_BYTES, shape=(n,))


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Write integer tokens (n,) as a shard, atomically: uint32 if they are, else uint16.

    RunError unless 0 < n < 2^31 and every token fits.
    """
    format = UINT32 if tokens.dtype == np.uint32 else UINT16
    n = tokens.size
    if not 0 < n <= MAX_TOKENS:
        raise RunError(f"cannot write {path}: {n} tokens, a shard holds 1 to {MAX_TOKENS}")
    if tokens.dtype not in (np.uint16, np.uint32):
        worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        if not 0 <= worst <= MAX_TOKEN:
            raise RunError(f"cannot write {path}: token {worst}, a shard holds tokens 0 to {MAX_TOKEN}")
    with binfile.atomic_write(path) as file:
        binfile.write_header(file, {0: format.magic, 1: format.version, 2: n})
        file.write(np.ascontiguousarray(tokens, dtype=format.dtype).data)


def find_shards(pattern: str) -> list[Path]:
    """Return the files that match a glob pattern, in byte order of their names. RunError if there is none."""
    paths = sorted(glob.glob(pattern), key=os.fsencode)
    if not paths:
        raise RunError(f"no token shards match {pattern} (working directory {os.getcwd()}): {_advice(pattern)}")
    return [Path(path) for path in paths]


def _advice(pattern: str) -> str:
    directory, name = os.path.split(pattern)
    if directory == "dev/data/201506":
        return (
            "these, the default data, are games of chess: make them with llmc-data lichess 2015-06; or give your own "
            "with -i and -j, or begin with llmc-data shakespeare and llmc-train -e custom:l=4,c=128,h=4,t=64 -t 64 "
            "-i 'dev/data/shakespeare/shakespeare_train_*.bin' -j 'dev/data/shakespeare/shakespeare_val_*.bin'"
        )
    data_set = re.match(r"(\w+?)_(?:train|val)", name)
    if data_set is None or data_set[1] not in MAKERS:
        return "check the pattern, or make a data set from text files with llmc-data text"
    command, usual = MAKERS[data_set[1]]
    if directory == usual.replace("10B", "100B") != usual:
        command, usual = f"{command} --size 100B", directory
    out = "" if directory == usual else f" --out {directory or '.'}"
    return f"make them with llmc-data {command}{out}"
