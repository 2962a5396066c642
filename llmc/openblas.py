"""OpenBLAS, loaded before the core that is linked with it; on some CPUs with other kernels than its own choice.

It chooses its kernels once, when it is loaded, and looks at OPENBLAS_CORETYPE then.
"""

import ctypes
import os
from pathlib import Path

from llmc.machine import read_lines

CORETYPE = "OPENBLAS_CORETYPE"


def load() -> None:
    """Load the library. OPENBLAS_CORETYPE, where the user has set it, is the user's choice of kernels."""
    kernels = None if CORETYPE in os.environ else better_kernels(read_lines(Path("/proc/cpuinfo")))
    if kernels is not None:
        os.environ[CORETYPE] = kernels
    try:
        import scipy_openblas32  # some versions load the library themselves

        ctypes.CDLL(f"{scipy_openblas32.get_lib_dir()}/lib{scipy_openblas32.get_library()}.so")
    finally:
        if kernels is not None:
            del os.environ[CORETYPE]  # other copies of OpenBLAS, such as numpy's, keep their own choice


def better_kernels(cpuinfo: list[str]) -> str | None:
    """The kernels, by OpenBLAS's name, that are faster than those it chooses on the CPU of /proc/cpuinfo; else None.

    Zen 4 (AMD's family 25 with AVX-512) computes vectors of 512 bits in two halves. Measured there with OpenBLAS
    0.3.34, fp32, two threads at once, products of 256 to 1024 rows: 105 to 108 GFLOP/s each of 118 with the AVX2
    kernels "Zen", 98 to 103 with those for AVX-512 that OpenBLAS would choose.
    """
    first: dict[str, str] = {}  # of the fields of all processors
    for line in cpuinfo:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    zen4 = first.get("vendor_id") == "AuthenticAMD" and first.get("cpu family") == "25"
    return "Zen" if zen4 and "avx512f" in first.get("flags", "").split() else None
