"""One thin module per console script; this one turns failures into a clear line and an exit status."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llmc.errors import UsageError
from llmc.failure import describe


def run(program: str, main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run `main(arguments)`. Usage errors exit with status 2, failures at run time with 1, Ctrl-C with 130."""
    if sys.stdout is None:  # closed by who started us, as daemons do
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample the terminal cannot show must not end a long run
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        failure = describe(error)
        if failure is None:
            raise
        if isinstance(error, BrokenPipeError):  # what is still to be flushed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(program, *failure)


def fail(program: str, status: int, line: str) -> NoReturn:
    sys.stdout.flush()
    if line:
        print(f"{program}: error: {line}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")
