"""Figures of one or more runs, made from their logs: losses, HellaSwag, gradient norm, learning rate and speed."""

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmc import models
from llmc.binfile import atomic_write
from llmc.checkpoint import find
from llmc.config import TrainConfig
from llmc.config_file import read_config_file
from llmc.errors import RunError, UsageError
from llmc.main_log import JSON_LOG, Log, read_json_log, read_main_log
from llmc.model_file import ModelShape, read_model_header
from llmc.output_dir import CONFIG, LOG
from llmc.references import OF_SIZE, REFERENCES, Reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
PANEL_INCHES = (7, 4.5)
DPI = 100
PANELS = {  # key of the series: title; validation losses are drawn with those of training
    "loss": "loss",
    "hellaswag": "HellaSwag accuracy",
    "norm": "gradient norm",
    "lr": "learning rate",
    "tokens_per_s": "tokens/s",
}
DRAWN = {*PANELS, "val_loss"}
NOISY = ("loss", "norm")  # drawn faintly, behind their running mean
RAW_ALPHA = 0.25
MANY_POINTS = 100  # from where on markers would hide the line, and the first losses all others
FIRST = 0.05  # of the steps, in which the loss falls so far that later differences would not be seen


@dataclass(frozen=True)
class PlottedRun:
    """A run's log, and what is known of its settings."""

    name: str
    log: Log
    config: TrainConfig | None  # None: it has no config.toml, as llm.c's runs
    notes: list[str]  # what was passed over

    @property
    def shape(self) -> ModelShape | None:
        """Of its model, if a checkpoint is there or -e names it."""
        try:
            for checkpoint in find(self.log.path.parent):
                if checkpoint.model.exists():
                    return read_model_header(checkpoint.model)[0]
            if self.config is None:
                return None
            if self.config.model.endswith(".bin"):
                return read_model_header(self.config.model)[0]
            return models.resolve(self.config.model, None)
        except (RunError, UsageError):
            return None

    @property
    def tokens_per_step(self) -> tuple[float, str]:
        """And a note if it is a guess. UsageError if nothing tells it."""
        if self.log.tokens_per_step is not None:
            return self.log.tokens_per_step, ""
        if self.config is None:
            raise UsageError(
                f"--x tokens: nothing says how many tokens a step of {self.log.path} has: there is no {CONFIG} "
                "beside it; use --x steps"
            )
        if self.config.total_batch_size != -1:
            return self.config.total_batch_size, ""
        P = self.config.num_processes
        tokens = self.config.batch_size * self.config.seq_len * P
        return tokens, f"{self.name}: {tokens} tokens a step, if it had {P} process(es): its log does not say it"


def plot(paths: Sequence[Path], out: Path, title: str, x: str, references: Sequence[str]) -> list[str]:
    """Draw the runs into the file `out`; returns lines that say what was passed over and written.

    paths: output directories, main.logs or JSON logs. x: "steps" or "tokens". references: names of REFERENCES; none:
    those of the runs' sizes, as far as they compare; ["none"]: none at all. Raises UsageError or RunError.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("llmc-plot needs a package that is not installed: pip install matplotlib")
    if out.suffix[1:] not in FORMATS:
        raise UsageError(f"--out {out}: the name must end in .{', .'.join(FORMATS)}")
    if "none" in references and len(references) > 1:
        raise UsageError("--reference none contradicts the others: drop it, or them")
    runs = named([read_run(path) for path in paths])
    notes = [note for run in runs for note in run.notes]
    scales = [1.0] * len(runs)
    if x == "tokens":
        found = [run.tokens_per_step for run in runs]
        scales = [tokens for tokens, _ in found]
        notes += [note for _, note in found if note]
    lines = {name: True for name in references if name != "none"} if references else references_of(runs)
    figure = draw(runs, scales, title, x, lines)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix[1:])
    return [*(f"note: {note}" for note in notes), f"wrote {out}"]


def read_run(path: Path) -> PlottedRun:
    """RunError if there is no log, it is damaged, or nothing is in it."""
    is_directory = path.is_dir()
    file = path / LOG if is_directory else path
    if not file.exists():
        raise RunError(f"{file} does not exist: give the output directory of a run (-o), a main.log or a JSON log")
    log = read_json_log(file) if file.suffix == ".jsonl" else read_main_log(file)
    notes = list(log.notes)
    if not log.series:
        raise RunError(f"{file} has no line yet: wait until the run has logged something")
    if not DRAWN & log.series.keys():
        raise RunError(f"{file} has nothing to draw: none of {', '.join(sorted(DRAWN))}")
    json_log = path / JSON_LOG
    if is_directory and json_log.exists():  # it knows more
        more = read_json_log(json_log)
        notes += more.notes
        log.tokens_per_step = more.tokens_per_step
        if "tokens_per_s" in more.series:
            log.series["tokens_per_s"] = more.series["tokens_per_s"]
    config = None
    config_file = file.parent / CONFIG
    if config_file.exists():
        try:
            config = TrainConfig(**read_config_file(str(config_file)))
        except (RunError, UsageError) as error:
            notes.append(f"{config_file} is passed over: {error}")
    full = file.resolve()
    name = full.parent.name if file.name in (LOG, JSON_LOG) else file.stem
    return PlottedRun(name, log, config, notes)


def named(runs: Sequence[PlottedRun]) -> list[PlottedRun]:
    """Runs of the same name are called by the paths of their logs."""
    names = [run.name for run in runs]
    return [
        PlottedRun(str(run.log.path), run.log, run.config, run.notes) if names.count(run.name) > 1 else run
        for run in runs
    ]


def references_of(runs: Sequence[PlottedRun]) -> dict[str, bool]:
    """The references of the runs' sizes, and whether their validation loss compares: only on the same text."""
    found: dict[str, bool] = {}
    for run in runs:
        shape = run.shape
        if shape is not None and shape.vocab_size == models.GPT2_VOCAB_SIZE:
            dataset = dataset_of(run.config.val_data) if run.config else None
            for name in OF_SIZE.get((shape.num_layers, shape.channels), ()):
                found[name] = found.get(name, False) or REFERENCES[name].dataset == dataset
    return found


def dataset_of(pattern: str) -> str | None:
    """The data set that validation shards are of, by its name in `REFERENCES`; None: none of these."""
    if "fineweb" not in pattern.lower():
        return None
    return "FineWeb-Edu" if re.search("edu[-_]?fineweb|fineweb[-_]?edu", pattern.lower()) else "FineWeb"


def draw(
    runs: Sequence[PlottedRun], scales: Sequence[float], title: str, x: str, references: dict[str, bool]
) -> "Figure":
    """A panel for every kind of value that a run has. scales: of each run, from steps to x."""
    from matplotlib.figure import Figure

    keys = {key for run in runs for key in run.log.series}
    if "val_loss" in keys:
        keys.add("loss")
    panels = [key for key in PANELS if key in keys]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title)
    for number, key in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set(title=PANELS[key], xlabel=x)
        axes.grid(alpha=0.3)
        for i, (run, scale) in enumerate(zip(runs, scales, strict=True)):
            draw_series(axes, run, key, scale, f"C{i}")
        if key == "loss":
            show_later_losses(axes, runs)
        for i, (name, loss_compares) in enumerate(references.items()):
            draw_reference(axes, key, REFERENCES[name], loss_compares, (":", "-.", "--")[i % 3])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def draw_series(axes: "Axes", run: PlottedRun, key: str, scale: float, color: str) -> None:
    series = run.log.series
    label = f"{run.name}, training" if key == "loss" else run.name
    if key in series:
        xs, ys = points(series[key], scale)
        if key in NOISY:
            axes.plot(xs, ys, color=color, linewidth=0.5, alpha=RAW_ALPHA)
            axes.plot(xs, running_mean(ys), color=color, linewidth=1.2, label=label)
        else:
            axes.plot(xs, ys, color=color, linewidth=1, marker=marker(xs), label=label)
    if key == "loss" and "val_loss" in series:
        xs, ys = points(series["val_loss"], scale)
        axes.plot(xs, ys, "--", color=color, linewidth=1.5, marker=marker(xs), label=f"{run.name}, validation")


def show_later_losses(axes: "Axes", runs: Sequence[PlottedRun]) -> None:
    """Let the first losses of long runs leave the panel at its upper edge."""
    if any(len(run.log.series.get("loss", ())) < MANY_POINTS for run in runs):
        return
    later: list[float] = []
    for run in runs:
        for name in ("loss", "val_loss"):
            series = run.log.series.get(name, {})
            first = FIRST * max(run.log.series["loss"])
            later += [value for step, value in series.items() if step >= first and math.isfinite(value)]
    if later:
        axes.set_ylim(min(later) - 0.05 * (max(later) - min(later)), max(later))


def draw_reference(axes: "Axes", key: str, reference: Reference, loss_compares: bool, style: str) -> None:
    if key == "hellaswag":
        axes.axhline(reference.hellaswag, color="grey", linestyle=style, linewidth=1, label=reference.label)
    elif key == "loss" and loss_compares and reference.val_loss is not None:
        label = f"{reference.label} on {reference.dataset}"
        axes.axhline(reference.val_loss, color="grey", linestyle=style, linewidth=1, label=label)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, reference.val_loss - 0.05), max(high, reference.val_loss + 0.05))


def points(series: dict[int, float], scale: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(series)) * scale, np.array(list(series.values()), dtype=np.float64)


def marker(xs: np.ndarray) -> str:
    return "." if len(xs) < MANY_POINTS else ""


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of 2% of the values around each, cut off at the ends. What is not finite does not count."""
    reach = len(values) // 100
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    with np.errstate(invalid="ignore"):  # 0/0 where no value is finite
        mean: np.ndarray = (sums[end] - sums[first]) / (counts[end] - counts[first])
    return mean
