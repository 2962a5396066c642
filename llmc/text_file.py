"""Text that anybody may have written, as a whole."""

import os


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """The UTF-8 text of the file. OSError; ValueError if it is no such text, or of more than `most` bytes."""
    with open(path, "rb") as file:
        raw = file.read(most + 1)  # not its size: a device has none, and never ends
    if len(raw) > most:
        raise ValueError(f"it has more than {most} bytes")
    return raw.decode("utf-8")
