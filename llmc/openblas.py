"""Which of its kernels OpenBLAS uses: on some CPUs others than its own choice.

It chooses once, when it is loaded, and looks at OPENBLAS_CORETYPE then.
"""

import os

from llmc.machine import this_processor

CORETYPE = "OPENBLAS_CORETYPE"


def choose_kernels() -> None:
    """For libraries loaded from now on, by this process and its children. What the user has set counts."""
    kernels = better_kernels(this_processor())
    if kernels is not None:
        os.environ.setdefault(CORETYPE, kernels)


def better_kernels(processor: dict[str, str]) -> str | None:
    """The kernels, by OpenBLAS's name, that are faster than those it chooses on such a processor; else None.

    Zen 4 (AMD's family 25 with AVX-512) computes vectors of 512 bits in two halves. Measured there with OpenBLAS
    0.3.34, fp32, two threads at once, products of 256 to 1024 rows: 105 to 108 GFLOP/s each of 118 with the AVX2
    kernels "Zen", 98 to 103 with those for AVX-512 that OpenBLAS would choose.
    """
    zen4 = processor.get("vendor_id") == "AuthenticAMD" and processor.get("cpu family") == "25"
    return "Zen" if zen4 and "avx512f" in processor.get("flags", "").split() else None
