"""JSON that anybody may have written."""

import json
from typing import Any

MAX_BYTES = 2**28  # of a file: a vocabulary of a million tokens takes a tenth of it
SHOWN = 60  # characters of a value in a message


def parse(text: str | bytes) -> Any:
    """As json.loads; whatever is wrong with the text is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error


def shown(value: Any) -> str:
    """A parsed value as JSON, for a message: no longer than a line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "of too many brackets"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
