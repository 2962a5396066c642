"""Checkpoints in the output directory: model_STEP.bin, state_STEP_RANK.bin of each rank and, last, the empty DONE_STEP.

A checkpoint exists if all of its files do. Whatever moment a run is killed at, those that existed still exist.
"""

import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc.binfile import sync_directory
from llmc.errors import RunError
from llmc.state_file import read_world_size

FILE = re.compile(r"(?:DONE_([0-9]{8,10})|(?:model_([0-9]{8,10})|state_([0-9]{8,10})_[0-9]{5,})\.bin)")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint, whether or not they are there."""

    directory: Path
    step: int

    @property
    def model(self) -> Path:
        return self.directory / f"model_{self.step:08d}.bin"

    def state(self, rank: int) -> Path:
        return self.directory / f"state_{self.step:08d}_{rank:05d}.bin"

    @property
    def done(self) -> Path:
        return self.directory / f"DONE_{self.step:08d}"

    @property
    def world_size(self) -> int:
        """Of the run that has written it, by the state file of rank 0; 1 if that is damaged: reading it will tell."""
        try:
            return max(1, read_world_size(self.state(0)))
        except RunError:
            return 1

    def missing(self) -> Iterator[Path]:
        """Those of its files that are not there."""
        ranks = range(self.world_size)  # maybe a damaged one: nothing may take memory or time in proportion
        paths = itertools.chain([self.done, self.model], map(self.state, ranks))
        return (path for path in paths if not path.exists())

    @property
    def complete(self) -> bool:
        return next(self.missing(), None) is None

    @property
    def half_deleted(self) -> bool:
        """What delete() leaves when it is killed. A model alone is not: people keep models without their states."""
        return not self.done.exists() and len(self.states()) > 0

    def states(self) -> list[Path]:
        """The state files that are there, of however many ranks."""
        names = f"state_{self.step:08d}_*.bin"
        return sorted(path for path in self.directory.glob(names) if FILE.fullmatch(path.name))

    def delete(self) -> None:
        """First the marker: a half-deleted checkpoint must not look like one. Missing files are ignored."""
        self.unmark()
        for path in (self.model, *self.states()):
            path.unlink(missing_ok=True)

    def unmark(self) -> None:
        """Delete the marker, if there is one, also on the disk: a power cut must not leave it without the files."""
        if self.done.exists():
            self.done.unlink()
            sync_directory(self.directory)

    def make_way(self, world_size: int) -> None:
        """Delete what an earlier, incomplete write of this step by more ranks would leave behind in the new one."""
        kept = set(map(self.state, range(world_size)))
        try:
            self.unmark()  # the files of the earlier one must not pass for these
            for path in self.states():
                if path not in kept:
                    path.unlink(missing_ok=True)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror or error}"
            raise RunError(f"cannot delete what is left of the checkpoint of step {self.step}: {reason}") from error


def find(directory: Path) -> list[Checkpoint]:
    """Every step of which at least one file is there, in ascending order."""
    return [Checkpoint(directory, step) for step in sorted({step_of(path) for path in files(directory)})]


def files(directory: Path) -> list[Path]:
    """All files of checkpoints, markers first."""
    try:
        return sorted(path for path in directory.iterdir() if FILE.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"-o {directory} cannot be read: {error.strerror or error}") from error


def step_of(path: Path) -> int:
    match = FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1] or match[2] or match[3])


def mark_done(checkpoint: Checkpoint) -> None:
    """The checkpoint exists from here on, also after a power cut."""
    try:
        sync_directory(checkpoint.directory)  # the marker must not survive one that its files do not
        checkpoint.done.touch()
        sync_directory(checkpoint.directory)
    except OSError as error:
        raise RunError(f"cannot write {checkpoint.done}: {error.strerror or error}") from error


def prune(directory: Path, current: int, keep: int, major_every: int, damaged: Container[int] = ()) -> list[int]:
    """Delete all but the `keep` newest checkpoints up to step `current`, and half-deleted older ones.

    Multiples of `major_every` are major: never deleted, and not counted; neither are those of the steps `damaged`, but
    they go. keep 0 keeps all. Returns the deleted steps.
    """
    if keep == 0:
        return []
    minor = [
        checkpoint
        for checkpoint in find(directory)
        if checkpoint.step <= current and (major_every == 0 or checkpoint.step % major_every != 0)
    ]
    kept = {checkpoint.step for checkpoint in [c for c in minor if c.complete and c.step not in damaged][-keep:]}
    deleted = [
        checkpoint
        for checkpoint in minor
        if checkpoint.step < current
        and checkpoint.step not in kept
        and (checkpoint.complete or checkpoint.half_deleted)
    ]
    for checkpoint in deleted:
        try:
            checkpoint.delete()
        except OSError as error:
            reason = f"{error.filename}: {error.strerror or error}"
            raise RunError(f"cannot delete the checkpoint of step {checkpoint.step}: {reason}") from error
    return [checkpoint.step for checkpoint in deleted]


def move_aside(directory: Path, others: list[str]) -> Path | None:
    """Move all checkpoint files, and those of the names `others`, to a new directory inside; None: no checkpoint.

    A later resume cannot then take an older, perhaps longer, run for this one.
    """
    found = files(directory)
    if not found:
        return None
    number = 1
    while (aside := directory / f"previous_{number}").exists():
        number += 1
    try:
        aside.mkdir()
        for path in [*found, *(directory / name for name in others)]:
            if path.exists():
                path.rename(aside / path.name)
        sync_directory(directory)
    except OSError as error:
        raise RunError(f"cannot move the checkpoints in {directory} aside: {error}; choose another -o") from error
    return aside
