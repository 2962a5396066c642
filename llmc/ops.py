"""The kernels as PyTorch operators: autograd, torch.compile and FakeTensor know them as torch.ops.llmc.*.

The functions of this module are what a model calls. They take tensors of the CPU or of a GPU, fp32 or bf16, alike in
all arguments of a call; csrc/ops/ops.h has the contracts. Gradients have the dtype of what they belong to, sums are
formed in fp32, and there are no second derivatives. What a kernel refuses, it refuses with `llmc._C.Error`.

Shapes: B batch, T sequence, C channels, IC and OC input and output channels, NH heads, V vocabulary, Vp padded
vocabulary, (..., C) any number of rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from llmc import _C

kernels = _C.ops  # a name of their own, so that the tests can run them on simulated devices

LOGITS_BYTES = 64 << 20  # of a chunk of logits that are always granted, as in csrc/gpt2/plan.cpp
ROWS = 8  # chunks of rows begin at multiples of it: on CUDA every tensor begins at a multiple of 16 bytes


# --- embedding --------------------------------------------------------------------------------------------------------


def embedding(tokens: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """wte[tokens] + wpe[:T]. tokens (B,T) int32 or int64; wte (Vp,C); wpe (maxT,C), maxT >= T. Returns (B,T,C)."""
    out: Tensor = torch.ops.llmc.embedding(tokens, wte, wpe)
    return out


def _embedding_out(tokens: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return wte.new_empty(*tokens.shape, wte.shape[1])


@custom_op("llmc::embedding", mutates_args=())
def _embedding(tokens: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    out = _embedding_out(tokens, wte, wpe)
    kernels.embedding_forward(out, ids(tokens), ready(wte), ready(wpe))
    return out


_embedding.register_fake(_embedding_out)


@custom_op("llmc::embedding_backward", mutates_args=())
def _embedding_backward(dout: Tensor, tokens: Tensor, wte_rows: int, wpe_rows: int) -> tuple[Tensor, Tensor]:
    """Rounded once to the dtype of dout, to nearest: the kernel would round at random, by a seed."""
    C = dout.shape[2]
    dwte, dwpe = (dout.new_zeros(rows, C, dtype=torch.float32) for rows in (wte_rows, wpe_rows))
    kernels.embedding_backward(dwte, dwpe, ready(dout), ids(tokens))
    return dwte.to(dout.dtype), dwpe.to(dout.dtype)


@_embedding_backward.register_fake
def _(dout: Tensor, tokens: Tensor, wte_rows: int, wpe_rows: int) -> tuple[Tensor, Tensor]:
    return dout.new_empty(wte_rows, dout.shape[2]), dout.new_empty(wpe_rows, dout.shape[2])


def _save_embedding(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens, wte, wpe = inputs
    ctx.save_for_backward(tokens)
    ctx.rows = wte.shape[0], wpe.shape[0]


def _differentiate_embedding(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    return None, *torch.ops.llmc.embedding_backward(dout, tokens, *ctx.rows)


_embedding.register_autograd(_differentiate_embedding, setup_context=_save_embedding)


# --- layernorm --------------------------------------------------------------------------------------------------------


def layernorm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias per row. x (..., C); weight, bias (C). Returns (..., C)."""
    out: Tensor = torch.ops.llmc.layernorm(x, weight, bias)[0]
    return out


def residual_layernorm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(a + b, layernorm(a + b)) in one pass over a and b. a, b, both results (..., C); weight, bias (C)."""
    residual, out, _, _ = torch.ops.llmc.residual_layernorm(a, b, weight, bias)
    return residual, out


def statistic(x: Tensor) -> Tensor:
    """Room for a number per row of x, fp32."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _layernorm_outputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), statistic(x), statistic(x)


@custom_op("llmc::layernorm", mutates_args=())
def _layernorm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd)"""
    out, mean, rstd = _layernorm_outputs(x, weight, bias)
    kernels.layernorm_forward(out, mean, rstd, ready(x), ready(weight), ready(bias))
    return out, mean, rstd


_layernorm.register_fake(_layernorm_outputs)


def _residual_layernorm_outputs(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(a), like(a), statistic(a), statistic(a)


@custom_op("llmc::residual_layernorm", mutates_args=())
def _residual_layernorm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a + b, its layernorm, mean, rstd)"""
    residual, out, mean, rstd = _residual_layernorm_outputs(a, b, weight, bias)
    kernels.residual_layernorm_forward(residual, out, mean, rstd, ready(a), ready(b), ready(weight), ready(bias))
    return residual, out, mean, rstd


_residual_layernorm.register_fake(_residual_layernorm_outputs)


@custom_op("llmc::layernorm_backward", mutates_args=())
def _layernorm_backward(
    dout: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); dx has dresidual added, if it is given."""
    dx = torch.zeros_like(ready(x)) if dresidual is None else dresidual.clone(memory_format=torch.contiguous_format)
    dweight, dbias = like(weight), like(weight)
    kernels.layernorm_backward(
        dx, dweight, dbias, ready(dout), ready(x), ready(weight), ready(mean), ready(rstd), accumulate=False
    )
    return dx, dweight, dbias


@_layernorm_backward.register_fake
def _(
    dout: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), like(weight), like(weight)


def _save_layernorm(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _differentiate_layernorm(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.llmc.layernorm_backward(dout, None, *ctx.saved_tensors))


def _save_residual_layernorm(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(residual, weight, mean, rstd)


def _differentiate_residual_layernorm(ctx: Any, dresidual: Tensor, dout: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    dx, dweight, dbias = torch.ops.llmc.layernorm_backward(dout, dresidual, *ctx.saved_tensors)
    return dx, dx, dweight, dbias


_layernorm.register_autograd(_differentiate_layernorm, setup_context=_save_layernorm)
_residual_layernorm.register_autograd(_differentiate_residual_layernorm, setup_context=_save_residual_layernorm)


# --- matrix products --------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. x (..., IC); weight (OC,IC); bias (OC). Returns (..., OC)."""
    out: Tensor = torch.ops.llmc.linear(x, weight, bias)
    return out


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x @ weight.T + bias), the GELU inside the product. x (..., IC); weight (OC,IC); bias (OC)."""
    out: Tensor = torch.ops.llmc.linear_gelu(x, weight, bias)[0]
    return out


def _linear_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op("llmc::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _linear_out(x, weight, bias)
    kernels.matmul_forward(out, ready(x), ready(weight), None if bias is None else ready(bias))
    return out


_linear.register_fake(_linear_out)


def _linear_gelu_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _linear_out(x, weight, bias), _linear_out(x, weight, bias)


@custom_op("llmc::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, pre): after and before the GELU"""
    out, pre = _linear_gelu_outputs(x, weight, bias)
    kernels.matmul_gelu_forward(out, pre, ready(x), ready(weight), None if bias is None else ready(bias))
    return out, pre


_linear_gelu.register_fake(_linear_gelu_outputs)


def _linear_dx(dout: Tensor, weight: Tensor) -> Tensor:
    return dout.new_empty(*dout.shape[:-1], weight.shape[1])


@custom_op("llmc::linear_backward_input", mutates_args=())
def _linear_backward_input(dout: Tensor, weight: Tensor) -> Tensor:
    dx = _linear_dx(dout, weight)
    kernels.matmul_backward_input(dx, ready(dout), ready(weight))
    return dx


_linear_backward_input.register_fake(_linear_dx)


def _linear_dweight(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(dout.shape[-1], x.shape[-1])


@custom_op("llmc::linear_backward_weight", mutates_args=())
def _linear_backward_weight(dout: Tensor, x: Tensor) -> Tensor:
    dweight = _linear_dweight(dout, x)
    kernels.matmul_backward_weight(dweight, ready(dout), ready(x), accumulate=False)
    return dweight


_linear_backward_weight.register_fake(_linear_dweight)


def _dbias(dout: Tensor) -> Tensor:
    return dout.new_empty(dout.shape[-1])


@custom_op("llmc::bias_backward", mutates_args=())
def _bias_backward(dout: Tensor) -> Tensor:
    dbias = _dbias(dout)
    kernels.bias_backward(dbias, ready(dout), accumulate=False)
    return dbias


_bias_backward.register_fake(_dbias)


def _gradients_of_product(ctx: Any, dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = ctx.needs_input_grad
    return (
        torch.ops.llmc.linear_backward_input(dout, weight) if of_x else None,
        torch.ops.llmc.linear_backward_weight(dout, x) if of_weight else None,
        torch.ops.llmc.bias_backward(dout) if of_bias else None,
    )


def _save_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_linear(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients_of_product(ctx, dout, *ctx.saved_tensors)


def _save_linear_gelu(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.save_for_backward(x, weight, pre)


def _differentiate_linear_gelu(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, pre = ctx.saved_tensors
    return _gradients_of_product(ctx, torch.ops.llmc.gelu_backward(dout, pre), x, weight)


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)
_linear_gelu.register_autograd(_differentiate_linear_gelu, setup_context=_save_linear_gelu)


# --- GELU -------------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of x of any shape."""
    out: Tensor = torch.ops.llmc.gelu(x)
    return out


@custom_op("llmc::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    out = like(x)
    kernels.gelu_forward(out, ready(x))
    return out


@custom_op("llmc::gelu_backward", mutates_args=())
def _gelu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = dout.clone(memory_format=torch.contiguous_format)
    kernels.gelu_backward(dx, ready(x))
    return dx


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return like(x)


@_gelu_backward.register_fake
def _(dout: Tensor, x: Tensor) -> Tensor:
    return like(x)


def _save_gelu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx: Any, dout: Tensor) -> Tensor:
    out: Tensor = torch.ops.llmc.gelu_backward(dout, *ctx.saved_tensors)
    return out


_gelu.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Causal self-attention without a (T,T) matrix in memory.

    qkv (B,T,3C): the channels of all q, then of all k, then of all v, head by head. Returns (B,T,C). The head size
    C / num_heads must be a multiple of 8 up to 128.
    """
    out: Tensor = torch.ops.llmc.attention(qkv, num_heads)[0]
    return out


def _attention_outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    return qkv.new_empty(B, T, C3 // 3), qkv.new_empty(B, num_heads, T, dtype=torch.float32)


@custom_op("llmc::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse); lse (B,NH,T): the logarithms of the sums of exponentials"""
    out, lse = _attention_outputs(qkv, num_heads)
    kernels.attention_forward(out, lse, ready(qkv), num_heads)
    return out, lse


_attention.register_fake(_attention_outputs)


@custom_op("llmc::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    dqkv = like(qkv)
    kernels.attention_backward(dqkv, ready(dout), ready(out), ready(lse), ready(qkv), num_heads)
    return dqkv


@_attention_backward.register_fake
def _(dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return like(qkv)


def _save_attention(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, qkv)


def _differentiate_attention(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return torch.ops.llmc.attention_backward(dout, *ctx.saved_tensors, ctx.num_heads), None


_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


# --- loss head --------------------------------------------------------------------------------------------------------


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Mean of -log softmax(x @ weight.T)[target] over all rows, without the logits of all rows in memory.

    x (..., C); weight (Vp,C); targets (...) int32 or int64, every one of them counts; vocab_size V: only the first V
    rows of weight take part, None: all. The result is a scalar in fp32.

    The rows go through in chunks of chunk_rows, None: as many as have room in 64 MiB or in four times x. Gradients are
    formed on the way forward, if they are wanted, while a chunk's logits are there; those of weight add up in fp32.
    """
    rows, Vp = targets.numel(), weight.shape[0]
    if chunk_rows is None:
        budget = max(LOGITS_BYTES // x.element_size(), 4 * x.numel())
        chunk_rows = min(max(budget // Vp, 1), rows)
    elif chunk_rows < 1:
        raise ValueError(f"cross_entropy: chunk_rows is {chunk_rows}, it must be 1 or more")
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    V = Vp if vocab_size is None else vocab_size
    out: Tensor = torch.ops.llmc.cross_entropy(x, weight, targets, V, chunk_rows, gradients)[0]
    return out


def _cross_entropy_outputs(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_rows: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    return (loss, like(x), like(weight)) if gradients else (loss, x.new_empty(0), weight.new_empty(0))


@custom_op("llmc::cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_rows: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dweight); the gradients are empty unless they are wanted."""
    loss, dx, dweight = _cross_entropy_outputs(x, weight, targets, vocab_size, chunk_rows, gradients)
    weight, targets = ready(weight), ids(targets).flatten()
    x = ready(x).flatten(0, -2)
    N, chunk = len(x), -(-chunk_rows // ROWS) * ROWS
    losses = x.new_zeros(N, dtype=torch.float32)
    sums = dweight.to(torch.float32) if gradients and chunk < N else dweight
    for begin in range(0, N, chunk):
        rows = slice(begin, begin + chunk)
        logits = x.new_empty(len(x[rows]), len(weight))
        kernels.matmul_forward(logits, x[rows], weight)
        kernels.fused_classifier(logits, losses[rows], targets[rows], vocab_size, 1 / N, gradients)
        if gradients:  # the logits are their gradients now
            kernels.matmul_backward_input(dx.view_as(x)[rows], logits, weight)
            kernels.matmul_backward_weight(sums, logits, x[rows], accumulate=begin > 0)
    if sums is not dweight:
        dweight.copy_(sums)
    loss.copy_(losses.mean())
    return loss, dx, dweight


_cross_entropy.register_fake(_cross_entropy_outputs)


def _save_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight)
    *_, ctx.gradients = inputs


def _differentiate_cross_entropy(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.gradients:
        raise RuntimeError("llmc::cross_entropy was called with gradients=False, so there are none")
    dx, dweight = ctx.saved_tensors
    return dx * dloss, dweight * dloss, None, None, None, None


_cross_entropy.register_autograd(_differentiate_cross_entropy, setup_context=_save_cross_entropy)


# --- optimizer --------------------------------------------------------------------------------------------------------


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Square root of the sum of all squares of one or more fp32 or bf16 tensors of a device, a scalar in fp32."""
    out: Tensor = torch.ops.llmc.global_norm(list(tensors))
    return out


@torch.no_grad()
def adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    master: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """One AdamW step in place: of param, its moments m and v, and, if it is given, its master copy.

    All of the same shape; param and grad fp32 or bf16, the others fp32. step counts from 1; grad_scale is multiplied to
    the gradient first. bf16 parameters are rounded stochastically: give every tensor and step another seed.
    """
    torch.ops.llmc.adamw(
        param, grad, m, v, master, step, lr, beta1, beta2, eps, weight_decay, grad_scale, seed & 0xFFFFFFFF
    )


@custom_op("llmc::global_norm", mutates_args=())
def _global_norm(tensors: list[Tensor]) -> Tensor:
    squares = kernels.sum_of_squares([ready(tensor) for tensor in tensors])
    return tensors[0].new_full((), squares, dtype=torch.float32).sqrt()


@_global_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float32)


@custom_op("llmc::adamw", mutates_args=("param", "m", "v", "master"))
def _adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    master: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    seed: int,
) -> None:
    # A parameter requires grad, and the kernels refuse to write such a tensor.
    kernels.adamw(
        param.detach(), ready(grad), m, v, master, lr, beta1, beta2, eps, weight_decay, step, grad_scale, seed
    )


@_adamw.register_fake
def _(*_: Any) -> None:
    return None


# --- tensors as the kernels want them ---------------------------------------------------------------------------------


def like(x: Tensor) -> Tensor:
    """Room for a tensor like x, contiguous whatever x is."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def ready(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def ids(tokens: Tensor) -> Tensor:
    """Tokens or targets as int32. What does not fit into it stays a number that is refused."""
    if tokens.dtype == torch.int64:
        tokens = tokens.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return ready(tokens)
