"""What ends a program: one line and a status, or the traceback that a defect deserves."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llmc import cli

REBUILD = "; rebuild it with pip install --no-build-isolation -e .\n"


def package(directory: Path) -> Path:
    """A copy of the package without its compiled core."""
    target = directory / "llmc"
    target.mkdir()
    for path in Path(cli.__file__).parents[1].iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (target / path.name).symlink_to(path)
    return target


@pytest.mark.parametrize("built", [False, True])
def test_a_core_that_cannot_be_imported(tmp_path: Path, built: bool) -> None:
    """Not built, and built but not loadable (a text file that calls itself a library)."""
    target = package(tmp_path)
    if built:
        (target / "_C.abi3.so").write_text("no ELF header")
    # -S and the packages by path: an editable installation would find the core of the working tree.
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom llmc.cli import run\n"
    code += "def main(argv):\n    from llmc import _C\nrun('llmc-train', main, [])"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path), sysconfig.get_path("purelib")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("llmc-train: error: the compiled core cannot be imported: ")
    assert result.stderr.endswith(REBUILD) and result.stderr.count("\n") == 1
    assert ("_C.abi3.so" in result.stderr) == built


@pytest.mark.parametrize("statement", ["import llmc.no_such_module", "from llmc import no_such_name", "import no_such"])
def test_other_imports_keep_their_traceback(statement: str) -> None:
    with pytest.raises(ImportError, match="no_such"):
        cli.run("llmc-train", lambda argv: exec(statement), [])


def test_a_closed_standard_output(tmp_path: Path) -> None:
    """As under a daemon: nothing to print to is no reason to fail."""
    code = "from llmc.cli import run; run('llmc-train', lambda argv: print('lost'), [])"
    result = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_importing_the_package_loads_nothing_slow() -> None:
    code = "import sys, llmc; sys.exit(bool({'torch', 'numpy', 'llmc._C', 'llmc.ops'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
