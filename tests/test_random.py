"""The random numbers of the core against torch and against values of independent implementations."""

import json
from pathlib import Path

import pytest
import torch

from llmc import _C

VECTORS = Path(__file__).parent / "vectors"
NOISE = json.loads((VECTORS / "noise.json").read_text())
RANDOM = json.loads((VECTORS / "random.json").read_text())

# Both sides compute in fp32 from the same draws. The log, cos and sin of two libraries differ by a few units in the
# last place, of values up to 5.8 standard deviations: 0.12 at std 0.02, where one unit is 7.5e-9. Measured: 5.4e-8.
NORMAL_TOLERANCE_AT_002 = 6e-8


@pytest.mark.parametrize("n", [int(n) for n in RANDOM["normal"]])
def test_normal_against_stored_values(n: int) -> None:
    values, next_u32 = _C.random.normal(42, n, 0.0, 0.02)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(RANDOM["normal"][str(n)]), rtol=0, atol=NORMAL_TOLERANCE_AT_002)
    assert next_u32 == RANDOM["next_u32"][str(n)]


@pytest.mark.parametrize("seed", [0, 42, 1337, 2**32 - 1])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 1000, 123457])
def test_normal_against_torch(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.empty(n).normal_(0.0, 0.02, generator=generator)
    values, next_u32 = _C.random.normal(seed, n, 0.0, 0.02)
    torch.testing.assert_close(values, expected, rtol=0, atol=NORMAL_TOLERANCE_AT_002)
    # The next draw shows that both have used the same number of draws.
    assert next_u32 % 2**24 == torch.empty(1, dtype=torch.int64).random_(0, 2**24, generator=generator).item()


def test_normal_mean_and_std() -> None:
    generator = torch.Generator().manual_seed(3)
    expected = torch.empty(1000).normal_(5.0, 2.0, generator=generator)
    torch.testing.assert_close(_C.random.normal(3, 1000, 5.0, 2.0)[0], expected, rtol=0, atol=6e-6)  # 100 times the std


def test_squirrel5() -> None:
    assert len(NOISE["squirrel5"]) > 0
    for position, seed, value in NOISE["squirrel5"]:
        assert _C.random.squirrel5(position, seed) == value


def test_noise_2d() -> None:
    assert len(NOISE["noise_2d"]) > 0
    for x, y, seed, value in NOISE["noise_2d"]:
        assert _C.random.noise_2d(x, y, seed) == value


def test_stochastic_round_against_stored_values() -> None:
    assert len(NOISE["stochastic_round"]) > 0
    for x, column, row, seed, bits in NOISE["stochastic_round"]:
        assert _C.random.stochastic_round(x, _C.random.noise_2d(column, row, seed)) == bits


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_round_is_unbiased(sign: int) -> None:
    """Of the 65536 values of the noise, as many round away from zero as the discarded 16 bits say."""
    low, discarded = 0x3F80, 12345
    x = sign * torch.tensor((low << 16) + discarded, dtype=torch.int32).view(torch.float32).item()
    sign_bit = 0 if sign > 0 else 0x8000
    rounded = [_C.random.stochastic_round(x, noise) for noise in range(65536)]
    assert rounded.count(sign_bit | low + 1) == discarded
    assert rounded.count(sign_bit | low) == 65536 - discarded


@pytest.mark.parametrize("noise", [0, 0xFFFF, 0xFFFF0000, 0x12345678])
def test_stochastic_round_keeps_bf16_values(noise: int) -> None:
    for x in [0.0, 1.0, -2.5, 1e38, float("inf")]:
        value = torch.tensor(x, dtype=torch.bfloat16)
        assert _C.random.stochastic_round(value.item(), noise) == value.view(torch.int16).item() & 0xFFFF


def test_xorshift64() -> None:
    for vector in RANDOM["xorshift64"]:
        state, outputs = vector["seed"], []
        for _ in vector["outputs"]:
            value, state = _C.random.xorshift64(state)
            outputs.append(value)
        assert outputs == vector["outputs"]
        assert state == vector.get("state_after", state)
