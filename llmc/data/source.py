"""Text from files: which files, their content without compression, and pieces of it that workers can encode.

Documents come as pieces, so that a long one need not be in memory as a whole.
"""

import codecs
import gzip
import io
import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple, cast

from llmc.errors import RunError

CHUNK_BYTES = 1_000_000
ZSTD_BYTES = 4096  # decompressed at once: they can stand for 32,768 times as many
MAX_BYTES = 2**28  # of all files that are read as a whole: more is no text of ours
MAX_DOCUMENT = 2**30  # characters of a text, or bytes of a line: a small compressed file can hold any number
MAX_HEADER = 2**20  # bytes of a name in an archive, or of what else is said of a file
# What tarfile raises for a damaged archive, by far not always as a TarError.
ARCHIVE_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError),
    *(tarfile.TarError, zlib.error, lzma.LZMAError),
)


class Source(NamedTuple):
    """A file with text."""

    path: Path
    size: int  # bytes on disk
    listed: bool  # by the user; otherwise found in a directory


class Piece(NamedTuple):
    begins: bool  # a document; otherwise it goes on with one
    text: str
    size: int  # of the file, in bytes


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Return the files, and those of the directories in order of their paths, hidden ones left out.

    RunError for what is neither: the text may be read twice, which a pipe does not allow.
    """
    sources = []
    for path in map(Path, paths):
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            found = sorted(inner for inner in path.rglob("*") if inner.is_file() and not _hidden(inner, path))
            if not found:
                raise RunError(f"{path} holds no files")
            sources += [Source(inner, _status(inner).st_size, False) for inner in found]
        elif stat.S_ISREG(status.st_mode):
            sources.append(Source(path, status.st_size, True))
        else:
            raise RunError(f"cannot read {path}: it is not a regular file; save the text to one and give that")
    return sources


def fingerprint_of(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: what an interrupted run checks before it goes on."""
    return [(os.fspath(path), _status(path).st_size, _status(path).st_mtime_ns) for path in paths]


def _status(path: str | os.PathLike[str]) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)


# ---- content


@contextmanager
def open_source(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it is, and its content: decompressed if its name ends in .gz or .zst. RunError for a bad one."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with open(path, "rb") as file:
            if path.suffix == ".zst":
                zstandard = _zstandard(path)
                errors += (zstandard.ZstdError,)
                yield file, cast(BinaryIO, io.BufferedReader(_Zstd(file, zstandard), CHUNK_BYTES))
            else:
                yield file, cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
    except errors as error:
        # Not the error itself: with this frame, which it refers to, it would keep the buffers until Python collects.
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        raise RunError(f"cannot read {path}: {reason}") from error


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise RunError(f"{path} needs the package zstandard: python -m pip install zstandard") from None
    return zstandard


class _Zstd(io.RawIOBase):
    """The content of all frames of a file. EOFError where it is cut off: the package's reader would not say so."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file = file
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame = self._new_frame()
        self._inside = False  # a frame
        self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            raw = self._frame.unused_data if self._frame.eof else b""
            raw = raw or self._file.read(ZSTD_BYTES)
            if self._frame.eof:
                self._frame, self._inside = self._new_frame(), False
            if not raw:
                if self._inside:
                    raise EOFError("it is truncated")
                return 0
            self._inside = True
            self._content = self._frame.decompress(raw)
        n = min(len(buffer), len(self._content))
        buffer[:n], self._content = self._content[:n], self._content[n:]
        return n


def read_files(source: Path, pattern: str, expected: str) -> dict[str, bytes]:
    """The content of the files whose paths match, by their names: of a directory, or of a tar archive.

    Nothing is extracted to the disk. RunError, which says what was `expected`, if they cannot be read.
    """
    contents: dict[str, bytes] = {}
    left = MAX_BYTES

    def read(path: PurePath, size: int, file: IO[bytes]) -> None:
        nonlocal left
        if size > left:
            raise RunError(f"{source}: {path} has {size} bytes, expected {expected}")
        left -= size
        contents[path.name] = file.read()

    try:
        if source.is_dir():
            for path in source.rglob(PurePosixPath(pattern).name):
                if path.is_file():  # a pipe would wait for ever
                    with open(path, "rb") as file:
                        read(path, os.fstat(file.fileno()).st_size, file)
            return contents
        with open_archive(source) as archive:
            for member, size, content in regular_members(archive):
                if member.match(pattern):
                    read(member, size, content)
        return contents
    except ARCHIVE_ERRORS as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise RunError(f"cannot read {source}, expected {expected}: {reason}") from error


class _Member(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        """Where tarfile lets subclasses look at a header, before it reads all of what it says to belong to it."""
        if not self.isfile() and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def open_archive(path: Path, file: IO[bytes] | None = None) -> tarfile.TarFile:
    """A tar archive, compressed or not, as a stream: nothing is allocated for what is not there."""
    return tarfile.open(path, "r|*", fileobj=file, tarinfo=_Member)


def regular_members(archive: tarfile.TarFile) -> Iterator[tuple[PurePosixPath, int, IO[bytes]]]:
    """Path, bytes and content of each, but for links, directories and devices."""
    for member in archive:
        if member.size < 0:  # or the next one would be sought before this one, for ever
            raise tarfile.ReadError("a member has a negative size")
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None:
            yield PurePosixPath(member.name), member.size, file


# ---- documents


def read_pieces(source: Source, divide: bool) -> Iterator[Piece]:
    """Yield a UTF-8 file, one document, without a byte-order mark, line ends as they are; whole unless `divide`.

    The tokens of the pieces are those of the document for encoders that say `divides`.
    RunError for what is no UTF-8, and for an empty file that the user has listed.
    """
    begins = True
    position = 0
    waiting: list[str] = []  # the piece to come
    held = 0  # characters of it
    with open_source(source.path) as (file, content):
        for chunk in _decode(content, source.path):
            cut = _cut(chunk) if divide else 0
            held += len(chunk)
            if held > MAX_DOCUMENT and not cut:
                raise RunError(f"{source.path} has more than {MAX_DOCUMENT:,} characters in one piece: divide it")
            if cut:
                held = len(chunk) - cut
                yield Piece(begins, "".join([*waiting, chunk[:cut]]), file.tell() - position)
                begins, position = False, file.tell()
                waiting.clear()
            waiting.append(chunk[cut:])
        text = "".join(waiting)
        if begins and not text and source.listed:
            raise RunError(f"{source.path} is empty")
        yield Piece(begins, text, file.tell() - position)


def _cut(text: str) -> int:
    """The last newline after a letter or a digit, where encoders that say `divides` can begin anew; 0 if none."""
    cut = text.rfind("\n")
    while cut > 0 and not text[cut - 1].isalnum():
        cut = text.rfind("\n", 0, cut)
    return max(cut, 0)


def _decode(content: BinaryIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin = 0  # of what the decoder sees, in bytes of the content
    first = True
    while True:
        raw = content.read(CHUNK_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = begin - pending + error.start
            raise RunError(
                f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {at}; convert it"
            ) from error
        begin += len(raw)
        if first and text:
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not raw:
            return
