"""Where a run is logged besides console and main.log, if asked for: a JSON log, TensorBoard, Weights & Biases."""

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llmc.binfile import atomic_write
from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.logger import LogFile
from llmc.main_log import JSON_LOG, complete_lines, read_json_log, read_record
from llmc.output_dir import CONFIG, LOG

WANDB_ID = "wandb_id"  # file in the output directory: the run that a resumed one goes on with

Values = Mapping[str, float | None]


class Tracker(Protocol):
    """One of them. A value that is not known is None."""

    def log(self, step: int, values: Values) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(config: TrainConfig) -> None:
    """Find out before the run whether its logs can be written. RunError names the flag and what to do."""
    path = json_log_path(config)
    if path is not None:
        check_place(f"--json-log {config.json_log}", path.parent, "another file")
        if path.resolve() in [(Path(config.output_dir) / name).resolve() for name in (LOG, CONFIG)]:
            raise RunError(f"--json-log {config.json_log} is where the run writes its {path.name}; choose another file")
        if path.exists():
            try:
                log = read_json_log(path)
            except RunError as error:
                raise RunError(f"--json-log {config.json_log}: {error}, or choose another file") from error
            if log.notes and not log.series:
                raise RunError(f"--json-log {config.json_log} is not the JSON log of a run; choose another file")
    if config.tensorboard:
        check_package("tensorboard", f"--tensorboard {config.tensorboard}")
        check_place(f"--tensorboard {config.tensorboard}", Path(config.tensorboard), "another directory")
    if config.wandb:
        check_package("wandb", f"--wandb {config.wandb}")


def check_package(package: str, flag: str) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a mere directory of that name, such as W&B's own for its runs
        raise RunError(f"{flag} needs a package that is not installed: pip install {package}")


def check_place(flag: str, directory: Path, other: str) -> None:
    """Nothing is made yet, so ask the directory that is there."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise RunError(f"{flag}: {existing} is not a directory; choose {other}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{flag}: {existing} cannot be written; choose {other}")


def json_log_path(config: TrainConfig) -> Path | None:
    if config.json_log == "1":
        return Path(config.output_dir) / JSON_LOG
    return Path(config.json_log) if config.json_log else None


@contextmanager
def open_trackers(config: TrainConfig, rank: int, start_step: int, tokens_per_step: int) -> Iterator[Tracker]:
    """All that `config` asks for as one, closed at the end; none but on rank 0. The output directory must be there.

    A resumed run, from `start_step` on, goes on in the old ones. Raises RunError.
    """
    trackers = Trackers(tokens_per_step)
    failed = True
    try:
        if rank == 0:
            trackers.open(config, start_step)
        yield trackers
        failed = False
    finally:
        trackers.close(failed)


class Trackers:
    """Some trackers as one. Adds "tokens", those trained on before the step, over all ranks, to the values."""

    def __init__(self, tokens_per_step: int) -> None:
        self.members: list[Tracker] = []
        self.tokens_per_step = tokens_per_step

    def open(self, config: TrainConfig, start_step: int) -> None:
        path = json_log_path(config)
        if path is not None:
            self.members.append(JsonLog(path, start_step))
        if config.tensorboard:
            self.members.append(TensorBoard(config.tensorboard, start_step))
        if config.wandb:
            self.members.append(WandB(config, start_step))

    def log(self, step: int, values: Values) -> None:
        for member in self.members:
            member.log(step, {"tokens": step * self.tokens_per_step, **values})

    def close(self, failed: bool) -> None:
        for member in self.members:
            member.close(failed)


class JsonLog:
    """One JSON object a line.

    What the file says of `start_step` and later ones goes, as these steps come again. A new run, which starts at 0,
    moves an old log aside.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.file = LogFile(path, "--json-log")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > 0:
                if start_step == 0:
                    move_aside(path)
                else:
                    forget_steps(path, start_step)
        except OSError as error:
            raise RunError(
                f"cannot write the JSON log {path}: {error.strerror or error}; choose another file"
            ) from error

    def log(self, step: int, values: Values) -> None:
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        self.file.append(json.dumps({"step": step, **finite}) + "\n")

    def close(self, failed: bool) -> None:
        if not failed:  # or there is a reason already
            self.file.close()


def move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"moved the JSON log of an earlier run to {aside}")


def forget_steps(path: Path, first: int) -> None:
    """Take the lines of step `first` and later ones out, and one that a crash has cut off."""
    lines, cut_off = complete_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if read_record(path, number, line)["step"] < first]
    if cut_off or len(kept) < len(lines):
        with atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())


class TensorBoard:
    """Event files in `directory`. TensorBoard hides what older ones there say of `start_step` and later ones."""

    def __init__(self, directory: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(directory, purge_step=start_step)
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"--tensorboard {directory} cannot be written: {reason}; choose another directory"
            ) from error

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()  # complete at any moment, however the run ends

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its environment variables hold, such as WANDB_MODE=offline."""

    def __init__(self, config: TrainConfig, start_step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        id_file = Path(config.output_dir) / WANDB_ID if config.output_dir else None
        known = id_file.read_text().strip() if id_file and start_step > 0 and id_file.exists() else None
        try:
            self.run = wandb.init(
                project=config.wandb,
                id=known,
                resume="allow" if known else None,
                name=Path(config.output_dir).resolve().name if config.output_dir else None,
                config=asdict(config),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise RunError(
                f"--wandb {config.wandb}: {reason}; run wandb login, or set WANDB_MODE=offline to log on this machine"
            ) from error
        if id_file and self.run.id != known:
            with atomic_write(id_file) as file:
                file.write(f"{self.run.id}\n".encode())
        self.first = self.run.step  # W&B takes no step twice, and a resumed run computes the same values again

    def log(self, step: int, values: Values) -> None:
        if step >= self.first:
            self.run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
