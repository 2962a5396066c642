"""Token shards: a 1024-byte header (magic 20240520, version 1, token count n), then n little-endian uint16 tokens."""

import glob
import os
from pathlib import Path

import numpy as np

from llmc import binfile
from llmc.errors import RunError

VERSION = 1
MAX_TOKENS = 2**31 - 1  # the count is stored as an int32
MAX_TOKEN = 2**16 - 1


def read_shard(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the tokens of a shard as a read-only, memory-mapped uint16 array (n,). RunError unless it is intact."""
    header = binfile.read_header(path, binfile.MAGIC_TOKENS, (VERSION,))
    n = int(header[2])
    if n <= 0:
        raise RunError(f"{path}: its header gives {n} tokens, expected at least 1")
    binfile.check_size(path, binfile.HEADER_BYTES + 2 * n, f"{n} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=binfile.HEADER_BYTES, shape=(n,))


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Write integer tokens (n,) as a shard, atomically. RunError unless 0 < n < 2^31 and every token fits in uint16."""
    n = tokens.size
    if not 0 < n <= MAX_TOKENS:
        raise RunError(f"cannot write {path}: {n} tokens, a shard holds 1 to {MAX_TOKENS}")
    if tokens.dtype != np.uint16:
        worst = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        if not 0 <= worst <= MAX_TOKEN:
            raise RunError(f"cannot write {path}: token {worst}, a shard holds tokens 0 to {MAX_TOKEN}")
    with binfile.atomic_write(path) as file:
        binfile.write_header(file, {0: binfile.MAGIC_TOKENS, 1: VERSION, 2: n})
        file.write(np.ascontiguousarray(tokens, dtype="<u2").data)


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
            "this, the default data, is chess, which llmc-data cannot make: give your own with -i and -j, or begin "
            "with llmc-data shakespeare and llmc-train -e custom:l=4,c=128,h=4,t=64 -t 64 "
            "-i 'dev/data/shakespeare/shakespeare_train_*.bin' -j 'dev/data/shakespeare/shakespeare_val_*.bin'"
        )
    if not name.startswith("shakespeare_"):
        return "check the pattern, or make a data set from text files with llmc-data text"
    out = "" if directory == "dev/data/shakespeare" else f" --out {directory or '.'}"
    return f"make them with llmc-data shakespeare{out}"
