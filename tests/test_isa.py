"""Each instruction set's copy of the CPU kernels runs, is right, and stays apart from the others."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmc import _C

ROOT = Path(__file__).parents[1]
OBJECTS = sorted(ROOT.glob("build/**/llmc_cpu_*.dir/**/*.cpp.o"))

# Run in a process of its own, since the choice is made once. Exits with a traceback where a result is wrong.
PROGRAM = """
import torch
from ops_testing import F32, assert_within, normal
from llmc import _C

print(_C.build_info()["cpu"])
assert _C.peak_flops() > 1e9  # two SSE operations of four lanes a cycle are 24e9 at 3 GHz
for dtype in (torch.float32, torch.bfloat16):
    x, weight, bias = normal((37, 200), dtype, 1), normal((200,), dtype, 2), normal((200,), dtype, 3)
    x64, w64, b64 = x.double(), weight.double(), bias.double()

    out = torch.empty_like(x)
    _C.ops.gelu_forward(out, x)
    assert_within(out, torch.nn.functional.gelu(x64, approximate="tanh"), 1.3e-7 * x64.abs().clamp(min=1))

    mean, rstd = torch.empty(37), torch.empty(37)
    _C.ops.layernorm_forward(out, mean, rstd, x, weight, bias)
    # 32 roundings of terms of size max |xhat·w| + |b| < 20: more than the sums of 200 can lose
    assert_within(out, torch.nn.functional.layer_norm(x64, (200,), w64, b64, 1e-5), 32 * 20 * F32)

    matrix = normal((24, 200), dtype, 4)
    product = torch.empty(37, 24, dtype=dtype)
    _C.ops.matmul_forward(product, x, matrix, None)
    # 200 products: at most 200 roundings of the sum of their magnitudes
    assert_within(product, x64 @ matrix.double().T, 200 * F32 * (x64.abs() @ matrix.double().abs().T))

    param, grad, m, v = x[0].clone(), weight.clone(), torch.zeros(200), torch.zeros(200)
    _C.ops.adamw(param, grad, m, v, None, 0.5, 0.9, 0.95, 1e-8, 0.0, 1, 1.0)
    # The first step is lr·sign(grad); a stochastically rounded result is off by less than one unit in the last place.
    expected = x64[0] - 0.5 * w64.sign()
    assert_within(param, expected, 32 * F32 + (expected.abs() * 2.0**-7 if dtype == torch.bfloat16 else 0))

    assert abs(_C.ops.sum_of_squares([x]) / x64.square().sum() - 1) < 16 * F32
"""


def run(isa: str, program: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "LLMC_CPU_ISA": isa, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"].split())
def test_every_instruction_set(isa: str) -> None:
    result = run(isa, PROGRAM)
    assert result.returncode == 0, result.stderr
    assert f"({isa}," in result.stdout


def matmul_flops() -> float:
    """The best rate of torch's fp32 matrix product of 1024 x 1024."""
    a = torch.randn(1024, 1024)

    def seconds() -> float:
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start

    return 2 * 1024**3 / min(seconds() for _ in range(5))


def test_peak_flops_bounds_a_matrix_product() -> None:
    """No product is faster than multiply-adds in registers; 0.8 since other work on the machine slows either down."""
    peak, product = _C.peak_flops(), matmul_flops()
    assert 0.8 * product <= peak <= 100 * product


def test_the_widest_instruction_set_is_the_default() -> None:
    isas = _C.build_info()["cpu_isas"].split()
    assert isas[0] == "portable"
    result = run("", "from llmc import _C; print(_C.build_info()['cpu'])")  # empty is as if it were not set
    assert f"({isas[-1]}," in result.stdout, result.stderr


def test_unknown_instruction_set() -> None:
    isa = "avx1024"
    program = """
from llmc import _C
try:
    _C.build_info()
except _C.Error as error:
    print(error)
"""
    result = run(isa, program)
    message = f"LLMC_CPU_ISA={isa} cannot run here: unset it or use one of: portable"
    assert result.stdout.startswith(message), result.stderr


def test_every_kernel_object_is_found() -> None:
    """The next test depends on where CMake puts object files."""
    if not any(ROOT.glob("build/**/CMakeCache.txt")):
        pytest.skip("no development build in build/")
    assert OBJECTS


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parents[2].name}/{path.name}")
def test_kernels_define_weak_symbols_in_their_own_namespace_only(path: Path) -> None:
    """The linker keeps one copy of a weak symbol: it must not be one with instructions that only some CPUs have."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    command = [nm, "--demangle", "--defined-only", str(path)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    weak = re.findall(r"^[0-9a-f]+ [VWu] (.+)$", listing, re.MULTILINE)
    isa = re.search(r"llmc_cpu_(\w+)\.dir", str(path))
    assert isa
    # DW.ref is a pointer to the language's own exception handler: data, alike in all objects.
    allowed = rf"(vtable for |typeinfo for |typeinfo name for )?llmc::cpu::{isa[1]}::|DW\.ref\.__gxx_personality"
    assert [symbol for symbol in weak if not re.match(allowed, symbol)] == []
