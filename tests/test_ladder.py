"""examples/layernorm: every rung against float64, without a report of the simulator; its README's numbers."""

import ctypes
import re
from pathlib import Path

import devices
import pytest
import torch
from cudasim_testing import DeviceTensor, load_library, take_reports
from ops_testing import normal, same_bits
from test_ops_layernorm import check_forward

LADDER = Path(__file__).parent.parent / "examples" / "layernorm"
FUSED = "4_fused"
RUNGS = ["1_naive", "2_warp_per_row", "3_vectorised", FUSED]
# One row; no multiple of four; whole warps; more rows than a block has threads; longer than what registers keep.
SHAPES = [(1, 1), (5, 33), (64, 97), (67, 128), (300, 40), (9, 768), (3, 1030), (2, 2052)]


def run(rung: str, x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    """(residual, out, mean, rstd), the residual that was normalised: x, or x + other of the fused rung."""
    load_library()
    N, C = x.shape
    kernels = ctypes.CDLL(str(devices.SIMULATOR / "ladder" / f"lib{ladder_library(rung)}.so"))
    inputs = [DeviceTensor(tensor) for tensor in ((x, other) if rung == FUSED else (x,))]
    vectors = [DeviceTensor(tensor) for tensor in (weight, bias)]
    rows = [torch.full_like(x, torch.nan) for _ in range(2 if rung == FUSED else 1)]
    outputs = [DeviceTensor(t, upload=False) for t in (*rows, torch.full((N,), torch.nan), torch.full((N,), torch.nan))]
    function = kernels.residual_layernorm_forward if rung == FUSED else kernels.layernorm_forward
    pointers = [ctypes.c_void_p(tensor.pointer) for tensor in (*outputs, *inputs, *vectors)]
    assert function(*pointers, ctypes.c_int64(N), C, None) == 0
    results = [tensor.download() for tensor in outputs]
    return results if rung == FUSED else [x, *results]


def ladder_library(rung: str) -> str:
    name = f"ladder_{rung}"
    if not (devices.SIMULATOR / "ladder" / f"lib{name}.so").exists():
        pytest.skip(f"there is no CUDA simulator in {devices.SIMULATOR}: scripts/test.sh builds it")
    return name


def inputs_of(N: int, C: int, seed: int, offset: float = 0) -> list[torch.Tensor]:
    fp32 = torch.float32
    rows = [normal((N, C), fp32, seed + i, scale=2, offset=offset) for i in range(2)]
    return [*rows, normal((C,), fp32, seed + 2, offset=1), normal((C,), fp32, seed + 3)]


@pytest.mark.parametrize("offset", [0, 1000])  # 1000: E[x²] - E[x]² in fp32 would lose the variance
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_results(rung: str, shape: tuple[int, int], offset: float) -> None:
    x, other, weight, bias = inputs_of(*shape, seed=shape[1], offset=offset)
    residual, out, mean, rstd = run(rung, x, other, weight, bias)
    assert take_reports() == []
    if rung == FUSED:
        assert same_bits(residual, x + other)
    check_forward(out, mean, rstd, residual, weight, bias)


@pytest.mark.parametrize("rung", RUNGS)
def test_the_order_of_threads_does_not_matter(rung: str) -> None:
    library, inputs = load_library(), inputs_of(67, 97, seed=1)
    results = []
    for schedule in ("forward", "reverse", "random:1"):
        assert library.cudasim_set_schedule(schedule.encode()) == 1
        results.append(run(rung, *inputs))
    library.cudasim_set_schedule(b"forward")
    assert take_reports() == []
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def traffic(rung: str, N: int, C: int) -> dict[str, tuple[int, int, int]]:
    """Requests, sectors and different sectors of what is read and written."""
    library = load_library()
    library.cudasim_traffic.restype = ctypes.c_char_p
    inputs = inputs_of(N, C, seed=1)
    library.cudasim_count_traffic(1)
    run(rung, *inputs)
    lines = library.cudasim_traffic().decode().splitlines()
    library.cudasim_count_traffic(0)
    return {name: tuple(map(int, numbers)) for name, *numbers in (line.split("\t") for line in lines)}


def test_traffic_by_hand() -> None:
    """Of 64 rows of 128 floats."""
    N, C = 64, 128
    x, vector, statistic = N * C // 8, C // 8, N // 8  # sectors: 32 bytes
    # Two warps, a row for each thread: 32 sectors at once of x, three times, and of out; one of weight and bias.
    found = traffic("1_naive", N, C)
    assert found["read"] == (2 * C * 5, 2 * C * (3 * 32 + 2), x + 2 * vector)
    assert found["written"] == (2 * C + 2 * 2, 2 * C * 32 + 2 * statistic, x + 2 * statistic)
    # A warp for each row, 32 neighbouring floats at once.
    found = traffic("2_warp_per_row", N, C)
    assert found["read"] == (N * 5 * C // 32, N * 5 * C // 8, x + 2 * vector)
    assert found["written"] == (N * (C // 32 + 2), N * (C // 8 + 2), x + 2 * statistic)
    # The whole row at once: of x, weight and bias.
    found = traffic("3_vectorised", N, C)
    assert found["read"] == (N * 3, N * 3 * C // 8, x + 2 * vector)
    assert found["written"] == (N * (1 + 2), N * (C // 8 + 2), x + 2 * statistic)
    # Of a, b, weight and bias; of residual and out.
    found = traffic("4_fused", N, C)
    assert found["read"] == (N * 4, N * 4 * C // 8, 2 * x + 2 * vector)
    assert found["written"] == (N * (2 + 2), N * (2 * C // 8 + 2), 2 * x + 2 * statistic)


@pytest.mark.parametrize("rung", RUNGS)
def test_the_numbers_of_the_readme(rung: str) -> None:
    N, C = 256, 768
    text = (LADDER / "README.md").read_text()
    assert f"N = {N}, C = {C}" in text
    (row,) = re.findall(rf"^\| \[{rung}\]\({rung}\.cu\) \| (.*) \|$", text, re.M)
    found = traffic(rung, N, C)
    requests, sectors, different = (found["read"][i] + found["written"][i] for i in range(3))
    numbers = [f"{requests:,}", f"{sectors:,}", f"{sectors / different:.1f}", f"{different * 32 / 1e6:.2f}"]
    assert [cell.strip() for cell in row.split("|")][: len(numbers)] == numbers
