"""llmc-info: plain `key: value` lines, with and without a working core."""

import sys

import numpy as np
import pytest

import llmc
from llmc import cli
from llmc.cli.info import info


def report(capsys):
    info([])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_report(capsys):
    from llmc import _C

    lines = report(capsys)
    assert lines["llmc"] == llmc.__version__
    assert lines["numpy"] == np.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    assert {"torch", "os", "cpu", "processors", "memory", "torch threads"} <= lines.keys()
    for key, value in _C.build_info().items():
        assert lines[f"core {key}"] == str(value)


def test_a_core_that_cannot_be_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmc._C", None)
    lines = report(capsys)
    assert lines["core"].startswith("cannot be imported: import of llmc._C halted")
    assert "cpu" in lines


def test_arguments(capsys):
    info(["--help"])
    assert capsys.readouterr().out.startswith("usage: llmc-info")
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-info", info, ["-x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "llmc-info: error: unknown argument -x: llmc-info takes none\n"
