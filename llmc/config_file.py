"""Configuration files: the flags by their long names, as TOML or YAML; the trainer writes its own as TOML."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from llmc.binfile import atomic_write
from llmc.config import TABLE, TrainConfig, flag_fields, flag_of, read_value, show
from llmc.errors import RunError, UsageError
from llmc.text_file import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 2**16  # many times those of all settings; the parsers can take time in the square of it
MAX_DEPTH = 8  # of YAML's brackets, of which settings need none; the time grows with the depth, too
HEADER = "# Settings of a run of llmc-train; llmc-train --config FILE repeats it."


def parse_yaml(text: str) -> Any:
    """Without references: a list of settings needs none, and a few lines of them can stand for more than the memory."""
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it refers to another place with *, write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError("its brackets are nested too deeply")
    return yaml.safe_load(text)


PARSERS = {".toml": tomllib.loads, ".yaml": parse_yaml, ".yml": parse_yaml}


def read_config_file(path: str) -> dict[str, Any]:
    """The values of the file by field of TrainConfig. RunError if it cannot be read, UsageError for what it says."""
    suffix = Path(path).suffix
    if suffix not in PARSERS:
        raise UsageError(f"--config {show(path)}: the name must end in {', '.join(PARSERS)}")
    try:
        content = PARSERS[suffix](read_text(path, MAX_BYTES))
    except OSError as error:
        raise RunError(f"--config {show(path)} cannot be read: {error.strerror or error}") from error
    # TOML's errors are ValueErrors, and so is what is not UTF-8.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {show(path)} is not valid {suffix[1:].upper()}: {reason}") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"--config {show(path)}: it must hold one setting per line, such as batch-size = 4")
    return dict(read_setting(path, key, value) for key, value in (content or {}).items())


def read_setting(path: str, key: object, value: object) -> tuple[str, Any]:
    entry = TABLE.get("--" + text_of(key).replace("_", "-"))
    if entry is None:
        raise UsageError(
            f"--config {show(path)}: unknown setting {text_of(key)!r}; they are the long flags of --help without dashes"
        )
    if not isinstance(value, str | int | float):
        raise UsageError(f"--config {show(path)}: {key} must be one value, not a {type(value).__name__}")
    if isinstance(value, bool) and not isinstance(entry.default, bool):
        kind = f"{show(entry.default)} or the like, not {str(value).lower()}"
        raise UsageError(f"--config {show(path)}: {key} must be {kind}")
    try:
        return entry.name, read_value(entry, str(int(value)) if isinstance(value, bool) else text_of(value))
    except UsageError as error:
        raise UsageError(f"--config {show(path)}: {error}") from None


def text_of(value: object) -> str:
    """As on the command line. A number of more digits than Python writes, which hexadecimal ones may have, stays so."""
    return f"{value:#x}" if isinstance(value, int) and value.bit_length() > 64 else str(value)


def write_config_file(path: str | os.PathLike[str], config: TrainConfig) -> None:
    """Write every setting, so that `--config` with this file repeats the run."""
    lines, group = [HEADER], ""
    for entry in flag_fields():
        spec = flag_of(entry)
        if spec.group != group:
            group = spec.group
            lines.append(f"\n# {group}")
        # JSON's strings, numbers and truth values are TOML's, but for its escapes of characters beyond 16 bits.
        value = json.dumps(getattr(config, entry.name), ensure_ascii=False)
        lines.append(f"{entry.name.replace('_', '-')} = {value}")
    with atomic_write(path) as file:
        file.write("\n".join([*lines, ""]).encode())
