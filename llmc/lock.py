"""One run at a time in an output directory: two would overwrite each other's checkpoints and log.

The lock is flock's, on a file that tells who holds it: the kernel releases it when the process ends, however that is.
On NFS, Linux makes it a lock of the server, which all machines see, unless the mount says nolock or local_lock.
"""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from llmc.errors import RunError

LOCK = ".lock"
CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)  # what check_output_dir has an answer for


class Lock:
    """Of the directory of one run, '' for none. Released at the end of the `with` block; its file goes, too."""

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / LOCK if directory else None
        self._descriptor: int | None = None

    def take(self) -> None:
        """For rank 0. Nothing if the directory is not there yet, or this run has the lock; RunError if another has."""
        if self.path is None or self._descriptor is not None or not self.path.parent.is_dir():
            return
        try:
            self._descriptor = open_locked(self.path)
        except BlockingIOError:
            raise RunError(
                f"-o {self.path.parent} is in use by another run, {holder(self.path)}: "
                "choose another -o, or wait until it has ended"
            ) from None
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                reason = error.strerror or error
                print(f"WARNING: {self.path} cannot be locked ({reason}): see to it that no other run uses -o")
            return
        if before := os.pread(self._descriptor, 200, 0):
            print(f"the run before in {self.path.parent}, {before.decode(errors='replace')}, was killed")
        with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not say whose it is
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None and self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while nobody else can have it
            os.close(self._descriptor)
            self._descriptor = None


def open_locked(path: Path) -> int:
    """The file, made if need be, with the lock. BlockingIOError if another process has it, OSError if it is a link.

    It is going to be overwritten: a link would lead to a file that is none of the run's.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before may have deleted the file since it was opened here: then others lock another one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def holder(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(200) or "which does not say more"
    except OSError:
        return "which has ended just now"
