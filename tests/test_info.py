"""llmc-info: plain `key: value` lines, with and without a working core."""

import importlib.metadata
import sys

import numpy as np
import pytest

import llmc
from llmc import cli
from llmc.cli import info
from llmc.cli.info import _main


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report(capsys):
    _main([])
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_report(capsys):
    from llmc import _C

    lines = report(capsys)
    assert lines["llmc"] == llmc.__version__
    assert lines["numpy"] == np.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    for package in ("torch", "scipy-openblas32", "tiktoken", "pybind11"):
        assert lines[package] == installed(package)
    assert {"os", "cpu", "processors", "memory", "torch threads"} <= lines.keys()
    for key, value in _C.build_info().items():
        assert lines[f"core {key}"] == str(value)


def test_a_core_that_cannot_be_imported_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmc._C", None)
    monkeypatch.delattr(llmc, "_C", raising=False)
    lines = report(capsys)
    assert lines["core"].startswith("ModuleNotFoundError: import of llmc._C halted")
    assert {"cpu", "torch threads"} <= lines.keys()


@pytest.mark.parametrize("error", [ImportError("no\nsymbol"), OSError(2, "no libgomp.so"), RuntimeError("bad driver")])
@pytest.mark.parametrize("part", ["software", "machine", "environment", "devices", "core"])
def test_a_part_that_fails_loses_no_other(capsys, monkeypatch, part, error):
    def fail():
        raise error

    fail.__name__ = part
    whole = report(capsys)
    monkeypatch.setattr(info, part, fail)
    lines = report(capsys)
    assert lines.pop(part) == f"{type(error).__name__}: {' '.join(str(error).split())}"
    assert lines.items() < whole.items()


def test_environment(capsys, monkeypatch):
    names = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LLMC_CPU_ISA", "OMP_PROC_BIND")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not set(names) & report(capsys).keys()
    for name in names:
        monkeypatch.setenv(name, f"value of {name}")
    lines = report(capsys)
    assert {name: lines[name] for name in names} == {name: f"value of {name}" for name in names}


def test_arguments(capsys):
    _main(["--help"])
    assert capsys.readouterr().out.startswith("usage: llmc-info")
    with pytest.raises(SystemExit) as caught:
        cli.run("llmc-info", _main, ["-x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "llmc-info: error: unknown argument -x: llmc-info takes none\n"


def test_gpus_come_with_their_peaks():
    assert info.gpu("NVIDIA A100-SXM4-80GB") == "NVIDIA A100-SXM4-80GB (peak bf16 311.9 TFLOP/s, TF32 155.9 TFLOP/s)"
    assert info.gpu("Voodoo 2") == "Voodoo 2 (peak bf16 n/a, TF32 n/a)"
