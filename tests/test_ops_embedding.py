"""embedding_forward and embedding_backward against indexing and sums in PyTorch."""

import pytest
import torch
from devices import ops
from ops_testing import (
    DTYPES,
    DTYPES_X_G,
    F32,
    assert_same_for_all_thread_counts,
    assert_within,
    normal,
    round_stochastically,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("device")

# B, T, C, rows of wte, rows of wpe, ids drawn from: few ids give many repetitions; C = 300 needs two blocks of columns.
# On CUDA a token that occurs 32 times or more is shared by the warps of a block, which take 512 rows at a time.
CASES = [
    (1, 1, 8, 3, 1, 3),
    (1, 5, 24, 11, 9, 2),
    (3, 1, 33, 64, 1, 1),
    (4, 67, 300, 517, 100, 40),
    (2, 31, 97, 64, 31, 64),
    (8, 4, 8, 5, 4, 1),
    (3, 11, 16, 5, 11, 1),
    (3, 517, 264, 7, 520, 1),
    (5, 211, 520, 9, 300, 3),
]


def random_tokens(B: int, T: int, ids: int, seed: int) -> torch.Tensor:
    return torch.randint(0, ids, (B, T), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_forward(case: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, C, Vp, max_T, ids = case
    wte, wpe, tokens = normal((Vp, C), dtype, 1), normal((max_T, C), dtype, 2), random_tokens(B, T, ids, seed=3)
    out = torch.full((B, T, C), torch.nan, dtype=dtype)
    ops.embedding_forward(out, tokens, wte, wpe)
    assert same_bits(out, (wte.float()[tokens.long()] + wpe.float()[:T]).to(dtype))


def sum_in_order(rows: torch.Tensor, device: str) -> torch.Tensor:
    """The fp32 sum of rows (n,C) by additions in the documented order: one by one; on CUDA 16 warps share 32 rows or
    more, each takes every 16th chunk of 32, and their sums are added in turn."""
    total = torch.zeros(rows.shape[1])
    chunks = rows.split(32)
    alone = device == "cpu" or len(rows) < 32
    parts = [rows] if alone else [torch.cat(chunks[w::16]) for w in range(min(16, len(chunks)))]
    for part in parts:
        part_sum = torch.zeros(rows.shape[1])
        for row in part:
            part_sum += row
        total += part_sum
    return total


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
@pytest.mark.parametrize("case", CASES)
def test_backward(case: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype, device: str) -> None:
    B, T, C, Vp, max_T, ids = case
    dout, tokens = normal((B, T, C), dtype, 1), random_tokens(B, T, ids, seed=2)
    dwte, dwpe = normal((Vp, C), grad_dtype, 3), normal((max_T, C), grad_dtype, 4)
    wte_start, wpe_start = dwte.clone(), dwpe.clone()
    seed = 4294967295  # dwpe's seed + 1 wraps around
    ops.embedding_backward(dwte, dwpe, dout, tokens, seed)

    # The order of the additions is part of the contract: the same fp32 sums in the same order give the same bits.
    wte_sum, wpe_sum = torch.zeros(Vp, C), torch.zeros(max_T, C)
    for token in tokens.unique():
        wte_sum[token] = sum_in_order(dout[tokens == token].float(), device)
    for b in range(B):
        wpe_sum[:T] += dout[b].float()
    for actual, start, total, rows, noise_seed in (
        (dwte, wte_start, wte_sum, tokens.unique().long(), seed),
        (dwpe, wpe_start, wpe_sum, torch.arange(T), 0),
    ):
        new = start.float() + total
        if grad_dtype == torch.float32:
            assert same_bits(actual, new)
        else:
            expected = start.clone()
            rounded = round_stochastically(new, torch.arange(C)[None], torch.arange(len(new))[:, None], noise_seed)
            expected[rows] = rounded[rows]
            assert same_bits(actual, expected)
    # and the sums are those of float64, up to one rounding for each addition
    exact = torch.zeros(Vp, C, dtype=torch.float64).index_add_(0, tokens.flatten().long(), dout.double().view(-1, C))
    sizes = torch.zeros(Vp, C, dtype=torch.float64).index_add_(
        0, tokens.flatten().long(), dout.double().abs().view(-1, C)
    )
    assert_within(wte_sum, exact, B * T * F32 * sizes)


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES_X_G)
def test_thread_counts(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    B, T, C, Vp = 4, 80, 272, 100
    dout, tokens = normal((B, T, C), dtype, 1), random_tokens(B, T, 30, seed=2)

    def run() -> list[torch.Tensor]:
        dwte, dwpe = torch.zeros(Vp, C, dtype=grad_dtype), torch.zeros(T, C, dtype=grad_dtype)
        ops.embedding_backward(dwte, dwpe, dout, tokens, 5)
        return [dwte, dwpe]

    assert_same_for_all_thread_counts(run)
