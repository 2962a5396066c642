"""What the bindings promise around the operations: clear refusals, and one OpenMP runtime."""

import os
import re

import pytest
import torch

from llmc import _C

X = torch.ones(3, 8)
ROW = torch.ones(8)


def layernorm(**change):
    arguments = {
        "out": torch.empty(3, 8), "mean": torch.empty(3), "rstd": torch.empty(3), "x": X, "weight": ROW, "bias": ROW,
    }  # fmt: skip
    _C.ops.layernorm_forward(**{**arguments, **change})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.ones(3, 8, dtype=torch.float64)}, "x is Double, it must be fp32 or bf16"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, "x is Int, it must be fp32 or bf16"),
        ({"weight": ROW.bfloat16()}, "weight is BFloat16, it must be fp32 as the arguments before it"),
        ({"mean": torch.empty(3).bfloat16()}, "mean is BFloat16, it must be fp32"),
        ({"weight": torch.ones(9)}, r"weight has shape \(9\), it must be \(C\) with C=8, N=3"),
        ({"out": torch.empty(4, 8)}, r"out has shape \(4, 8\), it must be \(N C\) with C=8, N=3"),
        ({"x": torch.ones(8, 3).T}, "x is not contiguous"),
        ({"x": torch.ones(0, 8)}, "x is empty"),
        ({"x": torch.ones(8)}, r"x has shape \(8\)"),
        ({"x": torch.ones(3, 8, device="meta")}, "x is on meta, it must be on the CPU or on a CUDA device"),
        ({"out": X}, "out is written and overlaps x"),
        ({"out": torch.empty(3, 8, requires_grad=True)}, "out is written and must not require grad"),
    ],
)
def test_arguments_are_checked(change, message):
    with pytest.raises(_C.Error, match=f"layernorm_forward: {message}"):
        layernorm(**change)


def test_leading_dimensions_are_rows():
    x = torch.randn(2, 3, 8)
    out, mean, rstd = torch.empty(2, 3, 8), torch.empty(2, 3), torch.empty(2, 3)
    _C.ops.layernorm_forward(out, mean, rstd, x, ROW, ROW)
    # eps 1e-5 as everywhere; a few fp32 roundings
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (8,), ROW, ROW), rtol=1e-5, atol=1e-6)


def test_residual_may_be_one_of_its_terms():
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    expected = a + b
    _C.ops.residual_layernorm_forward(a, torch.empty(3, 8), torch.empty(3), torch.empty(3), a, b, ROW, ROW)
    assert torch.equal(a, expected)


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_are_checked(bad):
    tokens = torch.tensor([[0, bad]], dtype=torch.int32)
    with pytest.raises(_C.Error, match=rf"tokens holds {bad} at index 1, ids must be in \[0, 5\)"):
        _C.ops.embedding_forward(torch.empty(1, 2, 8), tokens, torch.ones(5, 8), torch.ones(4, 8))


def test_positions_are_checked():
    with pytest.raises(_C.Error, match="T=3 exceeds maxT=2"):
        tokens = torch.zeros(1, 3, dtype=torch.int32)
        _C.ops.embedding_forward(torch.empty(1, 3, 8), tokens, torch.ones(5, 8), torch.ones(2, 8))


@pytest.mark.parametrize("num_heads,channels", [(3, 16), (4, 16), (1, 136)])
def test_head_sizes_are_checked(num_heads, channels):
    out, lse, qkv = torch.empty(1, 2, channels), torch.empty(1, num_heads, 2), torch.ones(1, 2, 3 * channels)
    with pytest.raises(_C.Error, match="head sizes must be multiples of 8 up to 128"):
        _C.ops.attention_forward(out, lse, qkv, num_heads)


def test_targets_are_checked_against_the_vocabulary():
    logits, losses, targets = torch.zeros(1, 8), torch.zeros(1), torch.tensor([6], dtype=torch.int32)
    with pytest.raises(_C.Error, match="targets holds 6"):
        _C.ops.fused_classifier(logits, losses, targets, 6, 1.0, True)
    with pytest.raises(_C.Error, match="vocab_size=9 must be in"):
        _C.ops.fused_classifier(logits, losses, targets, 9, 1.0, True)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's list of mapped files")
def test_one_openmp_runtime():
    """torch.set_num_threads reaches our kernels, and the two do not start threads against each other."""
    with open("/proc/self/maps") as file:
        runtimes = {line.split()[-1] for line in file if re.search(r"/lib(g|i)?omp[^/]*\.so", line)}
    assert len(runtimes) == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert _C.build_info()["threads"] == threads + 1
    finally:
        torch.set_num_threads(threads)
