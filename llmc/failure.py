"""What an exception means to the user: one line and an exit status."""

import sys
from pathlib import Path

from llmc.errors import RunError, UsageError


def describe(error: BaseException) -> tuple[int, str] | None:
    """Exit status and line of a failure that is no bug of ours; None for one that is: its traceback should be seen."""
    message = str(error) or type(error).__name__
    if isinstance(error, SystemExit):  # somebody has decided, and said what there was to say
        return (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, UsageError):
        return 2, message
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone: nothing left to tell it
        return 141, ""
    if isinstance(error, (RunError, OSError, MemoryError)) or is_core_error(error):
        return 1, message
    if isinstance(error, ImportError) and is_import_of_core(error):
        reason = " ".join(str(error).split())
        rebuild = "rebuild it with pip install --no-build-isolation -e ."
        return 1, f"the compiled core cannot be imported: {reason}; {rebuild}"
    return None


def is_core_error(error: BaseException) -> bool:
    """True for an exception thrown by the compiled core (`llmc._C.Error`)."""
    core = sys.modules.get("llmc._C")
    return core is not None and isinstance(error, core.Error)


def is_import_of_core(error: ImportError) -> bool:
    """True if `from llmc import _C` found no such file, or one that does not load (it fits one torch only)."""
    return error.name == "llmc._C" or Path(error.path or "").match("llmc/_C.*")
