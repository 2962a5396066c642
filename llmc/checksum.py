"""The checksum that models and states carry in slots of the header that llm.c leaves free.

CRC-32 of the CRC-32s (zlib's, little-endian) of the file's blocks of 4 MiB, the slot of the checksum itself taken as 0.
Blocks, so that all cores can work on a large file. Files of llm.c and of llmc's first versions have no checksum.
"""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from llmc.binfile import HEADER_BYTES, header_slot
from llmc.errors import RunError
from llmc.machine import cpu_count

KIND_SLOT, VALUE_SLOT = 40, 41
KIND = 20261129  # in KIND_SLOT: there is a checksum. A number of many bits, which no damaged bit makes of 0 or 0 of it
BLOCK = 2**22  # bytes
MAX_THREADS = 8


def seal(file: BinaryIO) -> None:
    """Put the checksum of all that has been written into the header of `file`, which must be open for reading, too."""
    file.seek(4 * KIND_SLOT)
    file.write(struct.pack("<ii", KIND, 0))
    file.flush()
    file.seek(4 * VALUE_SLOT)
    file.write(struct.pack("<I", checksum(file.fileno())))


def verify(path: str | os.PathLike[str], past_cache: bool = False) -> bool:
    """RunError if the file is not what was once written; False if it has no checksum to tell.

    past_cache: read what the disk has, as far as the system allows it, not what is in memory of a file just written.
    """
    try:
        with open(path, "rb") as file:
            if past_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            header = file.read(HEADER_BYTES)
            kind, stored = header_slot(header, KIND_SLOT), header_slot(header, VALUE_SLOT)
            if kind == 0:
                return False
            if kind != KIND:
                raise RunError(f"{path} is damaged: its header names a checksum of kind {kind}, expected {KIND}")
            found = checksum(file.fileno())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    if found != stored & 0xFFFFFFFF:
        raise RunError(
            f"{path} is damaged: its checksum is {found:08x}, it was {stored & 0xFFFFFFFF:08x} when it was written"
        )
    return True


def checksum(descriptor: int) -> int:
    """Of an open file, as it would be stored in it."""
    size = os.fstat(descriptor).st_size

    def of_block(offset: int) -> bytes:
        block = os.pread(descriptor, BLOCK, offset)
        if len(block) != min(BLOCK, size - offset):
            raise OSError("it has become shorter while it was read")
        if offset == 0:
            block = block[: 4 * VALUE_SLOT] + bytes(4) + block[4 * VALUE_SLOT + 4 :]
        return struct.pack("<I", zlib.crc32(block))

    offsets = range(0, size, BLOCK)
    threads = min(MAX_THREADS, len(offsets), cpu_count())
    if threads < 2:
        return zlib.crc32(b"".join(map(of_block, offsets)))
    with ThreadPoolExecutor(threads) as pool:
        return zlib.crc32(b"".join(pool.map(of_block, offsets)))
