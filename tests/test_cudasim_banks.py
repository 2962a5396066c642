"""Bank conflicts: the simulator's count of them, on kernels of known ones; and that the core's kernels have none.

Expected numbers are those of the rule in the CUDA C++ Programming Guide: 32 banks of 4 bytes; a warp's access in phases
of 32, 16 or 8 lanes with 4, 8 or 16 bytes each.
"""

import ctypes
from collections import defaultdict

import devices
import numpy as np
import pytest
import torch
from devices import SharedAccess, ops
from test_cudasim import SCHEDULES, Simulator


@pytest.fixture
def sim():
    """The sample kernels of cudasim/core_tests/banks.cu, with the checker."""
    sim = Simulator("checked")
    sim.reset()
    sim.runtime.cudasim_bank_conflicts.restype = ctypes.c_char_p
    yield sim
    sim.cudasim_count_bank_conflicts(0)
    assert sim.reports() == []
    sim.reset()


def counted(sim, launcher, *arguments):
    """Results of a launch, and (requests, wavefronts, least) of its (kind, bytes)."""
    sim.cudasim_count_bank_conflicts(1)
    results = sim.run(launcher, *arguments)
    sim.cudasim_count_bank_conflicts(0)
    counts = defaultdict(list)
    for line in sim.runtime.cudasim_bank_conflicts().decode().splitlines():
        access = SharedAccess.parse(line)
        assert access.place.startswith("banks.cu:")
        counts[access.kind, access.bytes].append((access.requests, access.wavefronts, access.least))
    return results, counts


# (bytes, stride, lanes): wavefronts, and those without conflicts
STRIDES = {
    (2, 1, 32): (1, 1),  # two lanes share a word
    (2, 2, 32): (1, 1),
    (2, 4, 32): (2, 1),
    (4, 0, 32): (1, 1),  # all lanes want the same word
    (4, 1, 32): (1, 1),
    (4, 2, 32): (2, 1),
    (4, 3, 32): (1, 1),  # odd: all banks
    (4, 32, 32): (32, 1),
    (4, 33, 32): (1, 1),
    (4, 32, 5): (5, 1),
    (8, 1, 32): (2, 2),
    (8, 2, 32): (4, 2),
    (8, 16, 32): (32, 2),
    (8, 17, 32): (2, 2),
    (8, 16, 10): (10, 1),  # the second half of the warp has no lane
    (16, 0, 32): (4, 4),
    (16, 1, 32): (4, 4),
    (16, 2, 32): (8, 4),
    (16, 8, 32): (32, 4),
    (16, 9, 32): (4, 4),
    (16, 8, 11): (11, 2),
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("case", STRIDES, ids=str)
def test_strides(sim, case, writes):
    size, stride, lanes = case
    if writes and stride == 0:
        pytest.skip("all lanes would write one element")
    _, counts = counted(sim, "strided", np.arange(32 * size // 2, dtype=np.uint16), size, stride, int(writes), lanes)
    assert counts["write" if writes else "read", size] == [(1, *STRIDES[case])]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize(("swizzled", "wavefronts"), [(False, 32), (True, 4)])
def test_columns_and_their_swizzled_twin(sim, swizzled, matrices, wavefronts, schedule):
    """cp.async writes rows, a 16-byte load or an ldmatrix reads columns: eight lanes in the same banks, or in all."""
    assert sim.cudasim_set_schedule(schedule.encode()) == 1
    units = np.arange(64 * 4, dtype=np.uint32)
    zeros = np.zeros(32 * 4, np.uint32)
    (out, _), counts = counted(sim, "columns", zeros, units, int(swizzled), int(matrices))
    if not matrices:
        expected = units.reshape(8, 8, 4).transpose(1, 0, 2)[:4]
        np.testing.assert_array_equal(out, expected.ravel())
    assert counts == {("write", 16): [(2, 8, 8)], ("read", 16): [(1, wavefronts, 4)]}


def test_nothing_is_counted_unless_asked_for(sim):
    before = sim.runtime.cudasim_bank_conflicts()
    sim.run("strided", np.zeros(64, np.uint16), 4, 1, 0, 32)
    assert sim.runtime.cudasim_bank_conflicts() == before


# --- the core's kernels -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator():
    simulator = devices.simulator()
    ops.device = simulator
    yield simulator
    ops.device = None


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def attention(dtype, head_size):
    """More than one tile of queries and of keys."""
    B, T, NH = 1, 80, 1
    qkv, dout = normal(B, T, 3 * NH * head_size, dtype=dtype), normal(B, T, NH * head_size, dtype=dtype)
    out, dqkv, lse = torch.empty_like(dout), torch.empty_like(qkv), torch.empty(B, NH, T)
    ops.attention_forward(out, lse, qkv, NH)
    ops.attention_backward(dqkv, dout, out, lse, qkv, NH)


def layernorm(dtype, C):
    """Row lengths for each of the kernels: rows of a warp, of a block, and too long to be kept."""
    x, dout, weight = normal(5, C, dtype=dtype), normal(5, C, dtype=dtype), normal(C, dtype=dtype)
    out, dx, mean, rstd = torch.empty_like(x), torch.zeros_like(x), torch.empty(5), torch.empty(5)
    dweight, dbias = torch.zeros(C, dtype=dtype), torch.zeros(C, dtype=dtype)
    ops.layernorm_forward(out, mean, rstd, x, weight, weight)
    ops.residual_layernorm_forward(torch.empty_like(x), out, mean, rstd, x, dout, weight, weight)
    ops.layernorm_backward(dx, dweight, dbias, dout, x, weight, mean, rstd)


def classifier(dtype, V):
    logits, losses = normal(3, V, dtype=dtype), torch.zeros(3)
    ops.fused_classifier(logits, losses, torch.tensor([0, 1, 2], dtype=torch.int32), V, 1.0, True)


def embedding(dtype, C):
    """A token that a block shares, and others."""
    tokens = torch.tensor([[7] * 40 + [1, 2, 3]], dtype=torch.int32)
    dwte, dwpe = torch.zeros(8, C, dtype=dtype), torch.zeros(43, C, dtype=dtype)
    ops.embedding_backward(dwte, dwpe, normal(1, 43, C, dtype=dtype), tokens, 1)


def sums(dtype, C):
    ops.bias_backward(torch.zeros(C, dtype=dtype), normal(70, C, dtype=dtype))
    ops.sum_of_squares([normal(10000, dtype=dtype)])


KERNELS = {
    attention: [32, 64, 96, 128],
    layernorm: [72, 2056, 8200, 24584],
    classifier: [50, 8200],
    embedding: [72, 264],
    sums: [72],
}


@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize(("run", "size"), [(run, size) for run, sizes in KERNELS.items() for size in sizes])
def test_kernels_have_no_bank_conflicts(simulator, run, size, arithmetic):
    if arithmetic == "tf32" and run is not attention:
        pytest.skip("only attention computes in TF32 itself")
    ops.allow_tf32(arithmetic == "tf32")
    try:
        with simulator.shared_accesses() as accesses:
            run(torch.bfloat16 if arithmetic == "bf16" else torch.float32, size)
    finally:
        ops.allow_tf32(False)
    assert sum(access.requests for access in accesses) > 0
    assert [access for access in accesses if access.wavefronts > access.least] == []
