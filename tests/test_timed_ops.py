"""A model that times its operations: the same bits, and calls, flops and bytes that follow from the shapes."""

import time

import pytest
from model_testing import assert_same_bits, batch, bits, build, sizes, train_step

from llmc import _C

CASE = (20, 100, 2, 4, 32, 3, 17)
N, C, L, PARAMETERS = 3 * 17, 32, 2, 20 * 32 + 128 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32


def timed_model():
    """The model of the case with its operations timed."""
    shape, B, T = sizes(CASE)
    config = _C.GPT2Config(**shape, padded_vocab_size=128)
    model = _C.GPT2(config, _C.Options(batch_size=B, seq_len=T, gelu_fusion=2), timed=True)
    for name, tensor in build(CASE, gelu_fusion=2).parameters().items():
        model.parameters()[name].copy_(tensor)
    return model


def test_same_bits():
    timed, plain = timed_model(), build(CASE, gelu_fusion=2)
    for step in (1, 2):
        assert train_step(timed, *batch(CASE, step), step=step) == train_step(plain, *batch(CASE, step), step=step)
    assert_same_bits(bits(timed), bits(plain))


def test_what_is_counted():
    model = timed_model()
    model.operation_times()
    started = time.perf_counter()
    train_step(model, *batch(CASE))
    passed = time.perf_counter() - started
    times = model.operation_times()
    assert model.operation_times() == {}

    calls, seconds, flops, moved = zip(*times.values(), strict=True)
    assert all(count > 0 for count in calls) and all(second >= 0 for second in seconds)
    assert 0 < sum(seconds) <= passed

    forward = f"matmul_forward {N}x{3 * C}x{C}"
    assert times[forward][0] == L
    assert times[forward][2:] == (L * 2 * N * 3 * C * C, L * 4 * (N * 3 * C + N * C + 3 * C * C + 3 * C))
    # The products of the blocks and of the loss head: 6 flops per token and weight of a matrix.
    products = sum(time[2] for name, time in times.items() if name.startswith("matmul"))
    assert products == 6 * N * (L * 12 * C * C + 128 * C)
    # q·k and p·v over the causal half of 17 x 17, per batch row; the backward pass has five products.
    pairs = 3 * 17 * 18 // 2
    assert times["attention_forward"][2] == L * 2 * 2 * pairs * C
    assert times["attention_backward"][2] == L * 5 * 2 * pairs * C
    # p, m and v are read and written, the gradient is read.
    assert times["adamw"][3] == 7 * 4 * PARAMETERS
    assert sum(flops) == products + 7 * L * 2 * pairs * C
    assert all(byte > 0 for byte in moved)


def test_refusals():
    with pytest.raises(_C.Error, match="does not time its operations: make it with timed=True"):
        build(CASE).operation_times()
    shape, B, T = sizes(CASE)
    with pytest.raises(_C.Error, match="operations on a GPU have not finished when they return"):
        _C.GPT2(
            _C.GPT2Config(**shape, padded_vocab_size=128),
            _C.Options(batch_size=B, seq_len=T, device="cuda:0"),
            timed=True,
        )
