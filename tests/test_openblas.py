"""Which of its kernels OpenBLAS uses: OpenBLAS itself says it in the name of the core's BLAS."""

import os
import subprocess
import sys

import pytest

from llmc.machine import processor, this_processor
from llmc.openblas import CORETYPE, better_kernels


def cpuinfo(vendor: str, family: int, flags: str) -> list[str]:
    cpu = [f"vendor_id\t: {vendor}", f"cpu family\t: {family}", "model name\t: A CPU", f"flags\t\t: fpu {flags}", ""]
    return ["processor\t: 0", *cpu, "processor\t: 1", *cpu]


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", 25, "avx2 avx512f avx512bw", "Zen"),  # Zen 4
        ("AuthenticAMD", 25, "avx2", None),  # Zen 3
        ("AuthenticAMD", 23, "avx2", None),  # Zen 2
        ("AuthenticAMD", 26, "avx2 avx512f", None),  # Zen 5: whole vectors of 512 bits
        ("GenuineIntel", 6, "avx2 avx512f", None),
        ("GenuineIntel", 25, "avx512f", None),
    ],
)
def test_rule(vendor: str, family: int, flags: str, expected: str | None) -> None:
    assert better_kernels(processor(cpuinfo(vendor, family, flags))) == expected


def test_no_rule_for_a_machine_that_says_nothing() -> None:
    assert better_kernels(processor([])) is None


def blas_of_a_new_process(statement: str = "from llmc import _C", **environment: str) -> str:
    rest = {name: value for name, value in os.environ.items() if name != CORETYPE}
    code = f"{statement}; print(_C.build_info()['blas'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**rest, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.parametrize("statement", ["from llmc import _C", "import llmc._C as _C", "import torch, llmc._C as _C"])
def test_the_library_has_the_kernels_of_the_rule(statement: str) -> None:
    """However the core is imported: processes that compute together must agree to the bit."""
    blas = blas_of_a_new_process(statement)
    if better_kernels(this_processor()) is None:
        pytest.skip("this CPU has the kernels that OpenBLAS chooses")
    # "Zen" is OpenBLAS's name for its Haswell kernels with other blocks.
    assert blas.endswith(("Haswell", "Zen"))


def test_the_users_choice_counts() -> None:
    if "OpenBLAS" not in blas_of_a_new_process():
        pytest.skip("MKL is used on this CPU")
    assert blas_of_a_new_process(**{CORETYPE: "Nehalem"}).endswith("Nehalem")
