"""What the tests of the operations share: inputs, rounding errors and runs with other numbers of threads."""

from collections.abc import Callable, Sequence

import torch

# Half the distance between 1 and the next number: the relative error of one rounding.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
F32 = UNIT_ROUNDOFF[torch.float32]

DTYPES = [torch.float32, torch.bfloat16]
# (dtype of the activations, dtype of the gradients of parameters)
DTYPES_X_G = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1, offset: float = 0) -> torch.Tensor:
    """Normal values, rounded to dtype: both sides of a comparison start from the rounded values."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator) * scale + offset).to(dtype)


def assert_within(actual: torch.Tensor, expected: torch.Tensor, error: torch.Tensor | float) -> None:
    """actual equals the float64 tensor expected to within error (of the arithmetic), plus one rounding to its dtype."""
    bound = error + (expected.abs() + error) * UNIT_ROUNDOFF[actual.dtype]
    difference = (actual.double() - expected).abs()
    bad = ~(difference <= bound)  # catches NaN
    if bad.any():
        worst = int((difference / bound).nan_to_num(torch.inf).argmax())
        got, want = actual.flatten()[worst].item(), expected.flatten()[worst].item()
        limit = bound.broadcast_to(actual.shape).flatten()[worst].item()
        raise AssertionError(f"{int(bad.sum())} of {bad.numel()} differ; at {worst}: {got}, not {want} +- {limit}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def assert_same_for_all_thread_counts(run: Callable[[], Sequence[torch.Tensor]]) -> None:
    """run() starts from the same inputs each time and returns its results."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


def round_stochastically(x: torch.Tensor, column: torch.Tensor, row: torch.Tensor, seed: int) -> torch.Tensor:
    """The bf16 tensor that stochastic rounding with noise_2d(column, row, seed) makes of fp32 x."""
    mask = 0xFFFFFFFF
    p = ((column + 198491317 * row) & mask) * 0xD2A80A3F & mask
    p = (p + seed) & mask
    p ^= p >> 9
    p = (p + 0xA884F197) & mask
    p ^= p >> 11
    p = p * 0x6C736F4B & mask
    p ^= p >> 13
    p = (p + 0xB79F3ABB) & mask
    p ^= p >> 15
    p = p * 0x1B56C4F5 & mask
    p ^= p >> 17
    bits = x.view(torch.int32).long() & mask
    up = (bits & 0xFFFF) > (p & 0xFFFF)
    high = (bits >> 16) + up.long()  # away from zero, or truncation
    return high.to(torch.int32).to(torch.int16).view(torch.bfloat16)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.double(), approximate="tanh")


def gelu_grad(x: torch.Tensor) -> torch.Tensor:
    x = x.double().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.gelu(x, approximate="tanh").sum(), x)[0]
