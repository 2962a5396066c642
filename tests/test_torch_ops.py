"""llmc.ops: the kernels as PyTorch operators, against PyTorch in float64, on the CPU, in the simulator and on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import devices
import pytest
import torch
import torch.nn.functional as F
from ops_testing import DTYPES, UNIT_ROUNDOFF, normal
from torch import Tensor

from llmc import _C, ops

NAMES = sorted(name for name in torch.ops.llmc if not name.startswith("_"))


@pytest.fixture(autouse=True)
def kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators run the kernels of the device: tensors of the CPU move to the simulator and back, call by call."""
    if device == "cudasim":
        monkeypatch.setattr(ops, "kernels", devices.ops)
    default = torch.get_default_device()
    torch.set_default_device("cuda" if device == "gpu" else "cpu")
    yield
    torch.set_default_device(default)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1, offset: float = 0) -> Tensor:
    return normal(shape, dtype, seed, scale, offset).to(torch.get_default_device())


def ids(*shape: int, below: int, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(below, shape, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


# --- values and gradients ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An operator, the formula it stands for, and its inputs for a dtype and a seed."""

    function: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: Callable[[torch.dtype, int], tuple[Any, ...]]


def embedding_case(B: int, T: int, C: int, V: int, maxT: int) -> Case:
    return Case(
        ops.embedding,
        lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe[: tokens.shape[1]],
        lambda dtype, seed: (
            ids(B, T, below=V, seed=seed),
            values(V, C, seed=seed, dtype=dtype),
            values(maxT, C, seed=seed + 1, dtype=dtype),
        ),
    )


def norm_inputs(count: int, *shape: int) -> Callable[[torch.dtype, int], tuple[Tensor, ...]]:
    """`count` tensors of the shape, weight and bias."""
    return lambda dtype, seed: (
        *(values(*shape, seed=seed + i, dtype=dtype, scale=2, offset=0.5) for i in range(count)),
        values(shape[-1], seed=seed + 8, dtype=dtype, offset=1),
        values(shape[-1], seed=seed + 9, dtype=dtype),
    )


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def residual_norm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return a + b, norm(a + b, weight, bias)


def product_inputs(bias: bool, *shape: int, OC: int) -> Callable[[torch.dtype, int], tuple[Tensor, ...]]:
    return lambda dtype, seed: (
        values(*shape, seed=seed, dtype=dtype),
        values(OC, shape[-1], seed=seed + 1, dtype=dtype, scale=shape[-1] ** -0.5),
        *([values(OC, seed=seed + 2, dtype=dtype)] if bias else []),
    )


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def linear_gelu(*inputs: Tensor) -> Tensor:
    return tanh_gelu(F.linear(*inputs))


def attention_case(B: int, T: int, NH: int, HS: int) -> Case:
    def formula(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(B, T, 3, NH, HS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / HS**0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, T, NH * HS)

    return Case(
        lambda qkv: ops.attention(qkv, NH),
        formula,
        lambda dtype, seed: (values(B, T, 3 * NH * HS, seed=seed, dtype=dtype),),
    )


def cross_entropy_case(*rows: int, C: int, V: int, Vp: int, chunk_rows: int | None) -> Case:
    return Case(
        lambda x, weight, targets: ops.cross_entropy(x, weight, targets, V, chunk_rows),
        lambda x, weight, targets: F.cross_entropy((x @ weight[:V].T).flatten(0, -2), targets.flatten()),
        lambda dtype, seed: (
            values(*rows, C, seed=seed, dtype=dtype),
            values(Vp, C, seed=seed + 1, dtype=dtype, scale=C**-0.5),
            ids(*rows, below=V, seed=seed + 2),
        ),
    )


CASES = {
    "embedding": embedding_case(3, 7, 24, 11, 9),
    "embedding-odd": embedding_case(2, 5, 13, 30, 5),
    "layernorm": Case(ops.layernorm, norm, norm_inputs(1, 67, 136)),
    "layernorm-odd": Case(ops.layernorm, norm, norm_inputs(1, 2, 3, 5, 33)),
    "layernorm-block": Case(ops.layernorm, norm, norm_inputs(1, 3, 2056)),
    "residual_layernorm": Case(ops.residual_layernorm, residual_norm, norm_inputs(2, 5, 13, 40)),
    "residual_layernorm-odd": Case(ops.residual_layernorm, residual_norm, norm_inputs(2, 17, 3)),
    "linear": Case(ops.linear, F.linear, product_inputs(True, 3, 11, 24, OC=40)),
    "linear-no-bias": Case(ops.linear, F.linear, product_inputs(False, 65, 72, OC=16)),
    "linear-odd": Case(ops.linear, F.linear, product_inputs(True, 7, 5, OC=3)),
    "linear_gelu": Case(ops.linear_gelu, linear_gelu, product_inputs(True, 3, 11, 24, OC=40)),
    "linear_gelu-no-bias": Case(ops.linear_gelu, linear_gelu, product_inputs(False, 33, 16, OC=8)),
    "gelu": Case(ops.gelu, tanh_gelu, lambda dtype, seed: (values(3, 5, 8, seed=seed, dtype=dtype, scale=2),)),
    "gelu-odd": Case(ops.gelu, tanh_gelu, lambda dtype, seed: (values(1031, seed=seed, dtype=dtype, scale=2),)),
    "attention": attention_case(2, 37, 3, 8),
    "attention-padded-heads": attention_case(1, 70, 2, 40),
    "cross_entropy": cross_entropy_case(3, 7, C=24, V=50, Vp=64, chunk_rows=None),
    "cross_entropy-chunks": cross_entropy_case(21, C=16, V=33, Vp=64, chunk_rows=8),
    "cross_entropy-rounded-chunks": cross_entropy_case(2, 13, C=40, V=64, Vp=64, chunk_rows=11),
    "cross_entropy-odd": cross_entropy_case(5, C=9, V=7, Vp=7, chunk_rows=None),
}


def run(case: Case, dtype: torch.dtype, seed: int, exact: bool) -> dict[str, Tensor]:
    """Outputs, and gradients of all floating inputs, from random gradients of the outputs; exact: by the formula."""
    inputs = case.inputs(dtype, seed)
    if exact:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    try:
        outputs = (case.formula if exact else case.function)(*inputs)
    except _C.Error as error:  # of a GPU; in the simulator `kernels` skips the test
        if "on CUDA it must be a multiple of 8" not in str(error):
            raise
        pytest.skip(str(error))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [values(*out.shape, seed=seed + 20 + i, dtype=dtype).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, douts)
    return {
        **{f"output {i}": out.detach() for i, out in enumerate(outputs)},
        **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, seed: int, dtype: torch.dtype) -> None:
    expected, found = (run(CASES[name], dtype, seed, exact) for exact in (True, False))
    assert found.keys() == expected.keys()
    for what, value in found.items():
        is_loss = name.startswith("cross_entropy") and what == "output 0"
        assert value.dtype == (torch.float32 if is_loss else dtype), what
        error = (value.double() - expected[what]).norm() / expected[what].norm()
        # fp32: sums of up to a thousand terms, with errors like the square root of their number at most. bf16: the
        # result's own rounding, and up to three of what it is made of (residual, logits, what goes into the GELU).
        bound = (4 if dtype == torch.bfloat16 else 32) * UNIT_ROUNDOFF[dtype]
        assert error <= bound, f"{what}: {error} > {bound}"


# --- what PyTorch demands of an operator ------------------------------------------------------------------------------


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.detach().mean(-1)
    return mean, (x.detach() - mean[..., None]).square().mean(-1).add(1e-5).rsqrt()


def operator_inputs(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Of every operator in torch.ops.llmc; those that can have gradients require them."""
    B, T, C, NH, V, Vp = 2, 9, 24, 3, 30, 32

    def leaf(*shape: int, seed: int) -> Tensor:
        return values(*shape, seed=seed, dtype=dtype).requires_grad_()

    def x(*shape: int, seed: int) -> Tensor:
        return values(*shape, seed=seed, dtype=dtype)

    def f32(*shape: int, seed: int) -> Tensor:
        return values(*shape, seed=seed)

    tokens = ids(B, T, below=V, seed=1)
    a, b = leaf(B, T, C, seed=2), leaf(B, T, C, seed=3)
    weight, bias = leaf(C, seed=4), leaf(C, seed=5)
    matrix, matrix_bias = leaf(Vp, C, seed=6), leaf(Vp, seed=7)
    dout, qkv = x(B, T, C, seed=8), leaf(B, T, 3 * C, seed=9)
    out, lse = (y.detach() for y in torch.ops.llmc.attention(qkv, NH))
    m, master = f32(Vp, C, seed=10), f32(Vp, C, seed=12)
    return {
        "embedding": (tokens, matrix, leaf(T + 1, C, seed=11)),
        "embedding_backward": (dout, tokens, Vp, T + 1),
        "layernorm": (a, weight, bias),
        "residual_layernorm": (a, b, weight, bias),
        "layernorm_backward": (dout, dout.clone(), a.detach(), weight.detach(), *statistics(a.float())),
        "linear": (a, matrix, matrix_bias),
        "linear_gelu": (a, matrix, matrix_bias),
        "linear_backward_input": (x(B, T, Vp, seed=13), matrix.detach()),
        "linear_backward_weight": (x(B, T, Vp, seed=13), a.detach()),
        "bias_backward": (dout,),
        "gelu": (a,),
        "gelu_backward": (dout, a.detach()),
        "attention": (qkv, NH),
        "attention_backward": (dout, out, lse, qkv.detach(), NH),
        "cross_entropy": (a, matrix, tokens, V, 8, True),
        "global_norm": ([a.detach(), weight.detach()],),
        "adamw": (matrix.detach(), x(Vp, C, seed=14), m, m.square(), master, 3, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 7),
    }


def test_every_operator_is_checked() -> None:
    assert sorted(operator_inputs(torch.float32)) == NAMES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema (nothing else is written, nothing returned is an input), FakeTensor's shapes, autograd, torch.compile."""
    torch.library.opcheck(getattr(torch.ops.llmc, name).default, operator_inputs(dtype)[name])


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_opcheck_without_bias(name: str) -> None:
    x, weight, _ = operator_inputs(torch.float32)[name]
    torch.library.opcheck(getattr(torch.ops.llmc, name).default, (x, weight, None))


def test_opcheck_without_gradients() -> None:
    *inputs, _ = operator_inputs(torch.float32)["cross_entropy"]
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    torch.library.opcheck(torch.ops.llmc.cross_entropy.default, (*inputs, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_any_layout(name: str, dtype: torch.dtype) -> None:
    """Inputs that are transposed, or begin at an odd place, give the same bits as contiguous ones."""
    if name == "adamw":
        pytest.skip("what is written must be contiguous")
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in operator_inputs(dtype)[name]]
    operator = getattr(torch.ops.llmc, name)
    expected = operator(*inputs)
    for layout in (transposed, moved):
        found = operator(*(layout(x) if isinstance(x, Tensor) else x for x in inputs))
        for ours, theirs in zip(as_tuple(found), as_tuple(expected), strict=True):
            assert torch.equal(ours, theirs)


def test_kernels_get_what_cuda_demands() -> None:
    """Neither the CPU nor the simulator would mind an address that is no multiple of 16."""
    x = values(3, 8, seed=1)
    for other in (moved(x), transposed(x), moved(transposed(x))):
        found = ops.ready(other)
        assert found.is_contiguous() and found.data_ptr() % 16 == 0 and torch.equal(found, other)
    assert ops.ready(x) is x


def transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() > 1 else x


def moved(x: Tensor) -> Tensor:
    there = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)
    return there.copy_(x)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_gradients_of_expanded_gradients() -> None:
    """sum() hands the same number back to all: a tensor with strides of 0."""
    x, weight = values(5, 24, seed=1).requires_grad_(), values(16, 24, seed=2)
    (gradient,) = torch.autograd.grad(ops.linear(x, weight).sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(5, 24))


def test_statistics_have_no_gradients() -> None:
    inputs = operator_inputs(torch.float32)
    for name in ("layernorm", "residual_layernorm", "linear_gelu", "attention", "cross_entropy"):
        outputs = getattr(torch.ops.llmc, name)(*inputs[name])
        differentiable = {"residual_layernorm": 2}.get(name, 1)
        assert [out.requires_grad for out in outputs] == [i < differentiable for i in range(len(outputs))], name


def test_second_derivatives_are_refused() -> None:
    x = values(3, 8, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.gelu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


def test_what_the_kernels_refuse() -> None:
    x, weight, bias = values(3, 8, seed=1), values(8, seed=2), values(8, seed=3)
    with pytest.raises(devices_error(), match="x is Double, it must be fp32 or bf16"):
        ops.layernorm(x.double(), weight, bias)
    with pytest.raises(devices_error(), match="weight is BFloat16, it must be fp32"):
        ops.layernorm(x, weight.bfloat16(), bias)
    with pytest.raises(devices_error(), match=r"bias has shape \(7\)"):
        ops.layernorm(x, weight, bias[1:])


def devices_error() -> type[Exception]:
    """What the core of the running test's device throws."""
    device = devices.ops.device
    return _C.Error if device is None else device.core.Error


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1, 2**32 + 3, -(2**40)])
def test_bad_tokens_are_refused(bad: int, dtype: torch.dtype) -> None:
    """Also those that would be good ones in their lower 32 bits."""
    if not -(2**31) <= bad < 2**31 and dtype == torch.int32:
        pytest.skip("no int32")
    wte, wpe = values(8, 16, seed=1), values(4, 16, seed=2)
    tokens = torch.tensor([[1, bad]], dtype=dtype)
    with pytest.raises(devices_error(), match="ids must be in"):
        ops.embedding(tokens, wte, wpe)
    with pytest.raises(devices_error(), match="ids must be in"):
        ops.cross_entropy(values(1, 2, 16, seed=3), wte, tokens)


# --- the loss head ----------------------------------------------------------------------------------------------------


class Recorder:
    """The kernels, and which were called with which first argument's shape."""

    def __init__(self) -> None:
        self.kernels = ops.kernels
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, tuple(arguments[0].shape)))
            return getattr(self.kernels, name)(*arguments, **keywords)

        return call

    def take(self, name: str) -> list[tuple[int, ...]]:
        return [shape for called, shape in self.calls if called == name]


@pytest.mark.parametrize("gradients", [True, False])
def test_logits_exist_in_chunks_only(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    recorder = Recorder()
    monkeypatch.setattr(ops, "kernels", recorder)
    x, weight = values(4, 7, 16, seed=1), values(40, 16, seed=2)
    x.requires_grad_(gradients)
    targets = ids(4, 7, below=40, seed=3)
    ops.cross_entropy(x, weight, targets, chunk_rows=9)  # rounded up, to 16
    assert recorder.take("fused_classifier") == [(16, 40), (12, 40)]
    assert recorder.take("matmul_backward_weight") == [(40, 16)] * (2 if gradients else 0)
    with torch.no_grad():
        recorder.calls.clear()
        ops.cross_entropy(x, weight, targets)
        assert recorder.take("fused_classifier") == [(28, 40)]
        assert recorder.take("matmul_backward_input") == []


def test_chunks_of_large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB or four times the hidden states, whichever is more."""
    recorder = Recorder()
    monkeypatch.setattr(ops, "kernels", recorder)
    x, weight, targets = values(3, 32, 8, seed=1), values(40, 8, seed=2), ids(3, 32, below=40, seed=3)
    monkeypatch.setattr(ops, "LOGITS_BYTES", 40 * 4 * 88)
    ops.cross_entropy(x, weight, targets)
    assert recorder.take("fused_classifier") == [(88, 40), (8, 40)]
    monkeypatch.setattr(ops, "LOGITS_BYTES", 0)  # 4 * 96 * 8 logits: 76 rows, rounded up to 80
    recorder.calls.clear()
    ops.cross_entropy(x, weight, targets)
    assert recorder.take("fused_classifier") == [(80, 40), (16, 40)]


def test_many_chunks_round_no_more_than_one() -> None:
    """bf16: what the chunks add to the gradient of the weights is added in fp32."""
    x, weight = values(256, 16, seed=1, dtype=torch.bfloat16), values(64, 16, seed=2, dtype=torch.bfloat16)
    targets = ids(256, below=64, seed=3)
    gradients = []
    for chunk_rows in (256, 8):
        leaf = weight.clone().requires_grad_()
        ops.cross_entropy(x, leaf, targets, chunk_rows=chunk_rows).backward()
        gradients.append(leaf.grad.double())
    exact = weight.double().requires_grad_()
    F.cross_entropy(x.double() @ exact.T, targets).backward()
    one, many = ((gradient - exact.grad).norm() for gradient in gradients)
    assert 0 < many <= 1.1 * one


def test_chunk_rows_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk_rows is 0, it must be 1 or more"):
        ops.cross_entropy(values(3, 8, seed=1), values(8, 8, seed=2), ids(3, below=8, seed=3), chunk_rows=0)


def test_no_gradients_where_none_were_formed() -> None:
    x = values(3, 8, seed=1).requires_grad_()
    inputs = (x, values(8, 8, seed=2), ids(3, below=8, seed=3), 8, 8)
    with pytest.raises(RuntimeError, match="gradients=False"):
        torch.ops.llmc.cross_entropy(*inputs, False)[0].backward()


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (1031,)])
def test_adamw(shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(values(*shape, seed=1))
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    exact = torch.nn.Parameter(param.detach().double())
    torch_adamw = torch.optim.AdamW([exact], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    for step in range(1, 6):
        gradient = values(*shape, seed=10 + step)
        exact.grad = gradient.double() * 0.5
        torch_adamw.step()
        how = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3, "grad_scale": 0.5}
        ops.adamw(param, gradient, m, v, step=step, **how)
    # A step changes a parameter by about lr = 1e-2, with a few roundings; the parameter itself is rounded each time.
    torch.testing.assert_close(param.double(), exact, rtol=5 * 2**-24, atol=1e-2 * 5 * 8 * 2**-24)
    state = torch_adamw.state[exact]
    torch.testing.assert_close(m.double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(v.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_adamw_in_bf16() -> None:
    """The master copy is updated as an fp32 parameter would be; the parameter is it, rounded up or down by the seed."""
    start = values(64, 64, seed=1, dtype=torch.bfloat16)
    gradient = values(64, 64, seed=2, dtype=torch.bfloat16)
    plain, plain_m, plain_v = start.float(), *(torch.zeros(64, 64) for _ in range(2))
    ops.adamw(plain, gradient.float(), plain_m, plain_v, step=1, lr=1e-2)
    rounded = []
    for seed in (1, 2, 2**40 + 2):  # seeds count modulo 2^32
        param, master = start.clone(), start.float()
        m, v = torch.zeros_like(master), torch.zeros_like(master)
        ops.adamw(param, gradient, m, v, master, step=1, lr=1e-2, seed=seed)
        assert torch.equal(master, plain)
        assert ((param.float() - master).abs() <= master.abs() * 2**-7).all()
        rounded.append(param)
    assert not torch.equal(rounded[0], rounded[1])
    assert torch.equal(rounded[1], rounded[2])


def test_adamw_of_a_parameter_with_gradients() -> None:
    """It stays what it is, a leaf, also where nobody has said torch.no_grad()."""
    param, gradient = torch.nn.Parameter(values(8, seed=1)), values(8, seed=2)
    before, version = param.detach().clone(), param._version
    ops.adamw(param, gradient, torch.zeros(8), torch.zeros(8), step=1, lr=1e-2)
    assert param.is_leaf and param.requires_grad
    assert param._version > version  # so that autograd notices if the graph still needs the old values
    torch.testing.assert_close(param.detach(), before - 1e-2 * gradient.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(dtype: torch.dtype) -> None:
    tensors = [values(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(24, 40), (7,), (3, 5, 8)])]
    norm = ops.global_norm(tensors)
    assert norm.dtype == torch.float32 and norm.shape == ()
    exact = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    torch.testing.assert_close(norm.double(), exact, rtol=8 * 2**-24, atol=0)
