"""The common shape of all .bin files: a header of 256 little-endian int32, then raw arrays.

Every reader goes through `read_header`, so that a missing, short, foreign or newer file gets one clear line.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmc.errors import RunError

HEADER_SLOTS = 256
HEADER_BYTES = 4 * HEADER_SLOTS

MAGIC_MODEL = 20240326
MAGIC_DEBUG_STATE = 20240327
MAGIC_TOKENIZER = 20240328
MAGIC_TOKENS = 20240520
MAGIC_EVAL = 20240522
MAGIC_STATE = 20240527
MAGIC_TOKENS_32 = 20240801

KINDS = {
    MAGIC_MODEL: "model checkpoint",
    MAGIC_DEBUG_STATE: "debug state",
    MAGIC_TOKENIZER: "tokenizer",
    MAGIC_TOKENS: "token shard",
    MAGIC_EVAL: "multiple-choice evaluation file",
    MAGIC_STATE: "training state",
    MAGIC_TOKENS_32: "token shard (uint32)",
}


TEMPORARY = re.compile(r"\.(.+)\.[0-9]+\.tmp")  # what atomic_write writes to: .NAME.PID.tmp


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends well, and vanishes otherwise.

    File and name are on the disk when it returns.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Wait until names in the directory are on the disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no such thing
            raise
    finally:
        os.close(descriptor)


def name_of_temporary(path: Path) -> str | None:
    """The name of the file that atomic_write was to make with the temporary file `path`; None if it is no such file."""
    match = TEMPORARY.fullmatch(path.name)
    return match[1] if match else None


def header_bytes(slots: dict[int, int]) -> bytes:
    """The 1024 bytes of a header; slots not named are 0."""
    header = np.zeros(HEADER_SLOTS, dtype="<i4")
    for slot, value in slots.items():
        header[slot] = value
    return header.tobytes()


def header_slot(raw: bytes, slot: int) -> int:
    """One int32 of the bytes of a header; 0 beyond their end."""
    return int.from_bytes(raw[4 * slot : 4 * slot + 4], "little", signed=True)


def write_header(file: BinaryIO, slots: dict[int, int]) -> None:
    file.write(header_bytes(slots))


def read_header(path: str | os.PathLike[str], magic: int, versions: tuple[int, ...]) -> np.ndarray:
    """Return the 256 int32 of the header of `path` after checking its magic number and version."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise RunError(f"cannot read {KINDS[magic]} {path}: {error.strerror or error}") from error
    if len(raw) < HEADER_BYTES:
        short = f"it has {len(raw)} bytes, the header alone takes {HEADER_BYTES}"
        raise RunError(f"{path} is not a {KINDS[magic]}: {short}")
    header = np.frombuffer(raw, dtype="<i4")
    found = int(header[0])
    if found != magic:
        what = f"it is a {KINDS[found]}" if found in KINDS else f"its magic number is {found}, expected {magic}"
        raise RunError(f"{path} is not a {KINDS[magic]}: {what}")
    if int(header[1]) not in versions:
        known = " or ".join(str(version) for version in versions)
        raise RunError(f"{path}: {KINDS[magic]} of version {int(header[1])}, this program reads version {known}")
    return header


def check_size(path: str | os.PathLike[str], expected: int, contents: str) -> None:
    """Raise RunError unless the file has exactly `expected` bytes; `contents` says what the header promises."""
    actual = os.path.getsize(path)
    if actual != expected:
        state = "truncated" if actual < expected else "too long"
        raise RunError(f"{path} is {state}: it has {actual} bytes, its header promises {expected} ({contents})")
