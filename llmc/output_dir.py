"""The output directory -o: log, checkpoints and the settings of the run."""

import os
from pathlib import Path

from llmc.algorithms import NAME as ALGORITHMS
from llmc.binfile import name_of_temporary
from llmc.checkpoint import FILE, move_aside
from llmc.config import TrainConfig
from llmc.config_file import HEADER, write_config_file
from llmc.errors import RunError
from llmc.lock import Lock
from llmc.ranks import Ranks

LOG = "main.log"
CONFIG = "config.toml"


def check_output_dir(directory: str) -> None:
    """Find out before a large model is built, not after it, that nothing can be written; '' stands for no directory."""
    path = Path(directory)
    if not directory:
        return
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise RunError(f"-o {path}: {existing} is not a directory; choose another output directory")
    if not os.access(existing, os.W_OK | os.X_OK) or (path / LOG).is_dir():
        raise RunError(f"-o {path}: {path / LOG} cannot be written; choose another output directory")
    if (path / CONFIG).exists() and not is_ours(path / CONFIG):
        raise RunError(
            f"-o {path}: {path / CONFIG} is not a run's and would be replaced; choose another output directory"
        )


def is_ours(config_file: Path) -> bool:
    """True if a run has written it."""
    try:
        return config_file.read_bytes().startswith(HEADER.encode())
    except OSError:
        return False


def open_output_dir(config: TrainConfig, ranks: Ranks, lock: Lock) -> Path | None:
    """Make the directory ready for this run, with the lock. A new run moves the checkpoints of another one aside.

    RunError if not all ranks see the same directory, in which a checkpoint is complete only with the files of all.
    """
    if not config.output_dir:
        return None
    directory = Path(config.output_dir)
    ranks.barrier("the preparation")  # the others have looked for checkpoints
    if ranks.rank == 0:
        make_ready(directory, config, lock)
    ranks.barrier("the output directory")
    check_shared(directory, ranks)
    return directory


def make_ready(directory: Path, config: TrainConfig, lock: Lock) -> None:
    if not directory.is_dir():
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"cannot create the output directory {directory}: {reason}; choose another with -o"
            ) from error
        print(f"created directory: {directory}")
        lock.take()
    remove_leftovers(directory)
    if not config.resume and (aside := move_aside(directory, [LOG, CONFIG, ALGORITHMS])):
        print(f"moved the checkpoints and the log in {directory} to {aside} (-y 1 would have gone on from them)")
    write_config_file(directory / CONFIG, config)


def check_shared(directory: Path, ranks: Ranks) -> None:
    """The file that rank 0 has just written is the same one, not a twin, wherever the same directory is seen."""
    try:
        with open(directory / CONFIG, "rb") as file:
            identity = os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        identity = 0
    try:
        ranks.agree("the time of its settings", identity)
    except RunError as error:
        raise RunError(
            f"-o {directory}: not all processes see the same directory: give one that all machines share"
        ) from error


def remove_leftovers(directory: Path) -> None:
    """Delete what writes that were killed have left; no other run may be writing."""
    for path in directory.iterdir():
        name = name_of_temporary(path)
        if name in (CONFIG, ALGORITHMS) or (name and FILE.fullmatch(name)):
            path.unlink(missing_ok=True)
