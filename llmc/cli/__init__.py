"""One thin module per console script; this one turns failures into a clear line and an exit status."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from llmc.errors import RunError, UsageError


def run(program: str, main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run `main(arguments)`. Usage errors exit with status 2, failures at run time with 1, Ctrl-C with 130."""
    if sys.stdout is None:  # closed by who started us, as daemons do
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample the terminal cannot show must not end a long run
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UsageError as error:
        fail(program, error, 2)
    except (RunError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone: nothing left to tell it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        fail(program, error, 1)
    except RuntimeError as error:
        if not is_core_error(error):
            raise
        fail(program, error, 1)
    except ImportError as error:
        if not is_import_of_core(error):
            raise
        reason = " ".join(str(error).split())
        rebuild = "rebuild it with pip install --no-build-isolation -e ."
        fail(program, f"the compiled core cannot be imported: {reason}; {rebuild}", 1)
    except KeyboardInterrupt:
        fail(program, "interrupted", 130)


def is_core_error(error: RuntimeError) -> bool:
    """True for an exception thrown by the compiled core (`llmc._C.Error`)."""
    core = sys.modules.get("llmc._C")
    return core is not None and isinstance(error, core.Error)


def is_import_of_core(error: ImportError) -> bool:
    """True if `from llmc import _C` found no such file, or one that does not load (it fits one torch only)."""
    return error.name == "llmc._C" or Path(error.path or "").match("llmc/_C.*")


def fail(program: str, message: object, status: int) -> None:
    sys.stdout.flush()
    print(f"{program}: error: {str(message) or type(message).__name__}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")
