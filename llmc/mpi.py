"""MPI, as far as this package needs it: to tell all ranks one text at the start, and never again.

Any mpirun will do, as long as its own library can be loaded. `pip install` brings MPICH's. Open MPI's mpirun needs
`--bind-to none` (a rank would have one core), as root `--allow-run-as-root`, and with more ranks than cores
`--oversubscribe`.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

from llmc.errors import RunError

LIBRARY = "MPI4PY_LIBMPI"  # environment variable of mpi4py: paths of the library to load, in order
OPEN_MPI, MPICH = "Open MPI's mpirun", "mpirun"
VERSIONS = {OPEN_MPI: 40, MPICH: 12}  # of the shared library; 12 is Intel MPI's and others', which descend from MPICH


def broadcast(launcher: str, size: int, text: str) -> str:
    """`text` of rank 0, on all the `size` ranks that `launcher` has started. RunError if MPI does not work here."""
    os.environ.setdefault(LIBRARY, os.pathsep.join(libraries(VERSIONS[launcher])))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library that belongs to another mpirun: the error comes below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py, or the library
        reason = str(error).splitlines()[-1]
        raise RunError(
            f"{launcher} has started {size} processes, but mpi4py cannot load its library: {reason}; "
            f"give its path in the environment variable {LIBRARY}"
        ) from error
    if MPI.COMM_WORLD.size != size:
        name = MPI.Get_library_version().split(",")[0].split("\n")[0]
        raise RunError(
            f"{launcher} has started {size} processes, but the MPI library that mpi4py loads, {name}, sees "
            f"{MPI.COMM_WORLD.size}: it belongs to another mpirun; give the path of the right one in {LIBRARY}"
        )
    answer: str = MPI.COMM_WORLD.bcast(text)
    # Now, so that a rank may leave without waiting for the others: watch.py sees to that.
    MPI.Finalize()
    return answer


def libraries(version: int) -> list[str]:
    """Where the library may be: beside the mpirun that is found, beside this Python, where the system looks."""
    name = f"libmpi.{version}.dylib" if sys.platform == "darwin" else f"libmpi.so.{version}"
    mpirun = shutil.which("mpirun")
    folders = [Path(mpirun).parent.parent / "lib"] if mpirun else []
    return [*(str(folder / name) for folder in [*folders, Path(sys.prefix) / "lib"]), name]
