"""llmc-train: train a model."""

import errno
import io
import os
import stat
import sys
from typing import Any

from llmc.cli import run
from llmc.command_line import parse_args


def main() -> None:
    outlast_full_disk()
    run("llmc-train", _main)


class Lossy(io.FileIO):
    """A file on a disk that may be full for a while: what does not fit is lost."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            return memoryview(data).nbytes


def outlast_full_disk() -> None:
    """Where stdout is a file, a line that cannot be written is no reason to end a long run."""
    if isinstance(sys.stdout, io.TextIOWrapper) and stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode):
        raw = io.BufferedWriter(Lossy(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(raw, encoding=sys.stdout.encoding, errors="replace")


def _main(argv: list[str]) -> None:
    command = parse_args(argv)
    # Only now: --help and a wrong flag are answered without waiting for torch.
    if command.dry_run:
        from llmc.dry_run import dry_run

        dry_run(command.config, command.memory_gib, command.roofline)
    else:
        from llmc.launch import launch
        from llmc.stop import STOPPED
        from llmc.train import train

        with launch(command.config) as ranks:
            complete = train(command.config, ranks)
        if not complete:
            sys.exit(STOPPED)
