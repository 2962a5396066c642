"""Every operation of llmc._C.ops with PyTorch's own way to do it.

The same PyTorch code in fp64 is the truth that results are compared with.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmc.lab import fp8
from llmc.lab.operation import EPS, Arguments, Draw, Operation, Step, bytes_of

LR, BETA1, BETA2, ADAM_EPS, WEIGHT_DECAY, STEP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 10
VOCAB_MULTIPLE = 128  # that the vocabulary is padded to


def padded(V: int) -> int:
    return -(-V // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def fp32_or_more(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- embedding --------------------------------------------------------------------------------------------------------


class EmbeddingForward(Operation):
    sizes = ("B", "T", "C", "V")
    written = ("out",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        B, T, C, V = sizes
        wte, wpe = draw.normal(padded(V), C), draw.normal(T, C)
        return {"out": draw.room(B, T, C), "tokens": draw.ids(B, T, below=V), "wte": wte, "wpe": wpe}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (F.embedding(a["tokens"], a["wte"]) + a["wpe"],)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.B, step.T, step.C, step.shape.vocab_size)]

    def bytes(self, a: Arguments) -> float:
        """Of wte the rows of the tokens; wpe stays in the cache."""
        return 2 * bytes_of(a["out"]) + bytes_of(a["tokens"])


class EmbeddingBackward(Operation):
    sizes = ("B", "T", "C", "V")
    updated = ("dwte", "dwpe")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        B, T, C, V = sizes
        dwte, dwpe = draw.zeros(padded(V), C), draw.zeros(T, C)
        return {"dwte": dwte, "dwpe": dwpe, "dout": draw.normal(B, T, C), "tokens": draw.ids(B, T, below=V)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        """Into fresh gradients, as autograd's."""
        rows, dout = len(a["dwte"]), a["dout"]
        dense = torch.ops.aten.embedding_dense_backward
        return lambda: (dense(dout, a["tokens"], rows, -1, False), dout.sum(0))

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.B, step.T, step.C, step.shape.vocab_size)]

    def bytes(self, a: Arguments) -> float:
        """dout, and the rows of its tokens in dwte; the tokens once more as their order."""
        return 3 * bytes_of(a["dout"]) + 2 * bytes_of(a["tokens"])


# --- layernorm --------------------------------------------------------------------------------------------------------


class OfRows(Operation):
    """On x (N,C)."""

    sizes = ("N", "C")

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, step.C)]


class LayernormForward(OfRows):
    written = ("out", "mean", "rstd")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        return {
            **{"out": draw.room(N, C), "mean": draw.room32(N), "rstd": draw.room32(N)},
            **{"x": draw.normal(N, C), "weight": draw.normal(C, offset=1), "bias": draw.normal(C)},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        x, weight, bias = a["x"], a["weight"], a["bias"]
        return lambda: torch.native_layer_norm(x, x.shape[-1:], weight, bias, EPS)


class ResidualLayernormForward(OfRows):
    written = ("residual", "out", "mean", "rstd")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        return {
            **{"residual": draw.room(N, C), "out": draw.room(N, C), "mean": draw.room32(N), "rstd": draw.room32(N)},
            **{"a": draw.normal(N, C), "b": draw.normal(N, C), "weight": draw.normal(C, offset=1)},
            "bias": draw.normal(C),
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            residual = a["a"] + a["b"]
            return residual, *torch.native_layer_norm(residual, residual.shape[-1:], a["weight"], a["bias"], EPS)

        return run


class LayernormBackward(OfRows):
    written = ("dweight", "dbias")
    updated = ("dx",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, C = sizes
        x = draw.normal(N, C)
        mean = fp32_or_more(x).mean(-1)
        rstd = (fp32_or_more(x).var(-1, correction=0) + EPS).rsqrt()
        return {
            **{"dx": draw.normal(N, C), "dweight": draw.room(C), "dbias": draw.room(C)},
            **{"dout": draw.normal(N, C), "x": x, "weight": draw.normal(C, offset=1), "mean": mean, "rstd": rstd},
            "accumulate": False,
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        """With the sum of the residual stream's gradients."""
        x, statistics = a["x"], [a[name].to(a["x"].dtype)[:, None] for name in ("mean", "rstd")]
        inputs = (a["dout"], x, x.shape[-1:], *statistics, a["weight"], torch.zeros_like(a["weight"]), [True] * 3)

        def run() -> tuple[Tensor, ...]:
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(*inputs)
            return a["dx"] + dx, dweight, dbias

        return run


# --- matrix products --------------------------------------------------------------------------------------------------


class Product(Operation):
    """x (N,IC), weight (OC,IC)."""

    sizes = ("N", "IC", "OC")

    def flops(self, *sizes: int) -> float:
        N, IC, OC = sizes
        return 2.0 * N * IC * OC

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return step.products


class MatmulForward(Product):
    written = ("out",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        weight = draw.normal(OC, IC, scale=IC**-0.5)
        return {"out": draw.room(N, OC), "x": draw.normal(N, IC), "weight": weight, "bias": draw.normal(OC)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (F.linear(a["x"], a["weight"], a["bias"]),)


class MatmulGeluForward(Product):
    written = ("out", "pre")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        return {
            **{"out": draw.room(N, OC), "pre": draw.room(N, OC), "x": draw.normal(N, IC)},
            **{"weight": draw.normal(OC, IC, scale=IC**-0.5), "bias": draw.normal(OC)},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        def run() -> tuple[Tensor, Tensor]:
            pre = F.linear(a["x"], a["weight"], a["bias"])
            return F.gelu(pre, approximate="tanh"), pre

        return run

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, step.C, 4 * step.C)]


class MatmulBackwardInput(Product):
    written = ("dx",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        return {"dx": draw.room(N, IC), "dout": draw.normal(N, OC), "weight": draw.normal(OC, IC, scale=OC**-0.5)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["dout"] @ a["weight"],)


class MatmulGeluBackwardInput(Product):
    written = ("dpre",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        weight = draw.normal(OC, IC, scale=OC**-0.5)
        return {"dpre": draw.room(N, IC), "dout": draw.normal(N, OC), "weight": weight, "pre": draw.normal(N, IC)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        gelu_backward = torch.ops.aten.gelu_backward
        return lambda: (gelu_backward(a["dout"] @ a["weight"], a["pre"], approximate="tanh"),)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, 4 * step.C, step.C)]


class MatmulBackwardWeight(Product):
    written = ("dweight",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        dout, x = draw.normal(N, OC), draw.normal(N, IC)
        return {"dweight": draw.room(OC, IC), "dout": dout, "x": x, "accumulate": False}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["dout"].T @ a["x"],)


class BiasBackward(Operation):
    sizes = ("N", "OC")
    written = ("dbias",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, OC = sizes
        return {"dbias": draw.room(OC), "dout": draw.normal(N, OC), "accumulate": False}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["dout"].sum(0),)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N, factor * step.C) for factor in (1, 3, 4)]


class MatmulBiasBackwardWeight(Product):
    written = ("dweight", "dbias")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, IC, OC = sizes
        dout, x = draw.normal(N, OC), draw.normal(N, IC)
        return {"dweight": draw.room(OC, IC), "dbias": draw.room(OC), "dout": dout, "x": x, "accumulate": False}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["dout"].T @ a["x"], a["dout"].sum(0))


# --- GELU -------------------------------------------------------------------------------------------------------------


class Elementwise(Operation):
    """On any number of elements, N."""

    sizes = ("N",)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(4 * step.N * step.C,)]


class GeluForward(Elementwise):
    written = ("out",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"out": draw.room(*sizes), "x": draw.normal(*sizes)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (F.gelu(a["x"], approximate="tanh"),)


class GeluBackward(Elementwise):
    updated = ("dx",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"dx": draw.normal(*sizes), "x": draw.normal(*sizes)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (torch.ops.aten.gelu_backward(a["dx"], a["x"], approximate="tanh"),)


# --- attention --------------------------------------------------------------------------------------------------------


class Attention(Operation):
    sizes = ("B", "T", "C", "NH")

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.B, step.T, step.C, step.shape.num_heads)]

    def flops(self, *sizes: int) -> float:
        """Of q·kᵀ and p·v over the causal half."""
        B, T, C, _ = sizes
        return 2.0 * B * T * (T + 1) * C

    @staticmethod
    def of_torch(qkv: Tensor, num_heads: int) -> Tensor:
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C3 // 3)


class AttentionForward(Attention):
    written = ("out", "lse")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        B, T, C, NH = sizes
        out, lse = draw.room(B, T, C), draw.room32(B, NH, T)
        return {"out": out, "lse": lse, "qkv": draw.normal(B, T, 3 * C), "num_heads": NH}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (self.of_torch(a["qkv"], a["num_heads"]), None)


class AttentionBackward(Attention):
    written = ("dqkv",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        B, T, C, NH = sizes
        dqkv, dout, qkv = draw.room(B, T, 3 * C), draw.normal(B, T, C), draw.normal(B, T, 3 * C)
        out, lse = draw.room(B, T, C), draw.room32(B, NH, T)
        if draw.device != "meta":
            AttentionForward().core(out, lse, qkv, NH)
        return {"dqkv": dqkv, "dout": dout, "out": out, "lse": lse, "qkv": qkv, "num_heads": NH}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        """Of a forward pass that is there."""
        qkv = a["qkv"].detach().requires_grad_()
        out = self.of_torch(qkv, a["num_heads"])
        return lambda: torch.autograd.grad(out, qkv, a["dout"], retain_graph=True)

    def flops(self, *sizes: int) -> float:
        """The scores are computed once more."""
        return 2.5 * super().flops(*sizes)


# --- loss head --------------------------------------------------------------------------------------------------------


class FusedClassifier(Operation):
    sizes = ("N", "V")
    updated: ClassVar[tuple[str, ...]] = ("logits", "losses")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, V = sizes
        logits, targets = draw.normal(N, padded(V), scale=4), draw.ids(N, below=V)
        return {
            **{"logits": logits, "losses": torch.zeros(N, device=draw.device), "targets": targets},
            **{"vocab_size": V, "dloss": 1 / N, "write_dlogits": True},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        """Forward and backward."""
        logits, targets, V = a["logits"].detach().requires_grad_(), a["targets"].long(), a["vocab_size"]
        dloss = torch.full_like(fp32_or_more(a["losses"]), a["dloss"])

        def run() -> tuple[Tensor, Tensor]:
            losses = F.cross_entropy(fp32_or_more(logits[:, :V]), targets, reduction="none")
            return *torch.autograd.grad(losses, logits, dloss), losses.detach()

        return run

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.logits_rows(), step.shape.vocab_size)]


class Fp8Classifier(FusedClassifier):
    """With gradients in E5M2, whose scale is the largest power of two by which dloss is finite there."""

    written = ("dlogits", "unscale")
    updated = ("losses",)
    fp8 = True

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        N, V = sizes
        logits, targets = draw.normal(N, padded(V), scale=4), draw.ids(N, below=V)
        return {
            **{"dlogits": draw.room(N, padded(V), dtype=fp8.E5M2), "unscale": draw.room32(1)},
            **{"losses": torch.zeros(N, device=draw.device), "logits": logits, "targets": targets},
            **{"vocab_size": V, "dloss": 1 / N},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        scale = 2.0 ** math.floor(math.log2(torch.finfo(fp8.E5M2).max / a["dloss"]))
        scales = torch.tensor([scale, 1 / scale], device=a["logits"].device)
        backward = super().torch(a)

        def run() -> tuple[Tensor, ...]:
            gradient, losses = backward()
            return losses, fp8.converted(gradient, scales, fp8.E5M2), scales[1:]

        return run

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.logits_rows(device="cuda", precision="bf16", fp8=2), step.shape.vocab_size)]


# --- optimizer --------------------------------------------------------------------------------------------------------


class OfBlock(Operation):
    """On the N parameters of a block."""

    sizes = ("N",)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.block_parameters,)]


class Adamw(OfBlock):
    """bf16 parameters have a master copy."""

    updated = ("m", "v")
    written = ("param", "master")

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        bf16 = draw.dtype == torch.bfloat16
        param = draw.normal(*sizes)
        return {
            **{"param": param, "grad": draw.normal(*sizes), "m": draw.normal32(*sizes)},
            **{"v": draw.normal32(*sizes).square(), "master": param.float() if bf16 else None},
            **{"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY},
            **{"t": STEP, "grad_scale": 1.0},
        }

    def torch(self, a: Arguments) -> Callable[[], Any]:
        """The fused optimizer; with a master copy it updates that one, and the parameters are rounded from it."""
        param, master = a["param"], a["master"]
        leaf = torch.nn.Parameter(param if master is None else master)
        settings: dict[str, Any] = {"lr": LR, "betas": (BETA1, BETA2), "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY}
        optimizer = torch.optim.AdamW([leaf], **settings, fused=True)
        state = optimizer.state[leaf] = {"exp_avg": a["m"], "exp_avg_sq": a["v"]}

        def run() -> tuple[Tensor | None, ...]:
            state["step"] = torch.tensor(float(a["t"] - 1), device=leaf.device)
            leaf.grad = a["grad"].to(leaf.dtype)
            optimizer.step()
            if master is not None:
                param.copy_(master)
            return a["m"], a["v"], param, master

        return run

    def bytes(self, a: Arguments) -> float:
        """The value that is updated is read, too."""
        return super().bytes(a) + bytes_of(a["param"] if a["master"] is None else a["master"])


class RoundParameters(OfBlock):
    written = ("param",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"param": draw.room(*sizes), "master": draw.normal32(*sizes)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["param"].copy_(a["master"]),)


class SumOfSquares(OfBlock):
    returns = True

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"tensors": [draw.normal(*sizes)]}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        (x,) = a["tensors"]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return lambda: (torch.linalg.vector_norm(x, dtype=dtype).square().cpu(),)


class Cast(OfBlock):
    """From X to the other precision."""

    written = ("out",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        other = torch.float32 if draw.dtype == torch.bfloat16 else torch.bfloat16
        return {"out": draw.room(*sizes, dtype=other), "x": draw.normal(*sizes)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["x"].to(a["out"].dtype),)


class Accumulate(OfBlock):
    """X into fp32."""

    updated = ("out",)

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"out": draw.normal32(*sizes), "x": draw.normal(*sizes)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["out"] + a["x"],)


class Sum(Operation):
    """Of the fp32 losses of all N rows."""

    sizes = ("N",)
    returns = True

    def arguments(self, draw: Draw, *sizes: int) -> Arguments:
        return {"x": draw.normal32(*sizes, offset=4)}

    def torch(self, a: Arguments) -> Callable[[], Any]:
        return lambda: (a["x"].sum().cpu(),)

    def of_step(self, step: Step) -> Sequence[tuple[int, ...]]:
        return [(step.N,)]


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        EmbeddingForward(),
        EmbeddingBackward(),
        LayernormForward(),
        ResidualLayernormForward(),
        LayernormBackward(),
        MatmulForward(),
        MatmulGeluForward(),
        MatmulBackwardInput(),
        MatmulGeluBackwardInput(),
        MatmulBackwardWeight(),
        BiasBackward(),
        MatmulBiasBackwardWeight(),
        GeluForward(),
        GeluBackward(),
        AttentionForward(),
        AttentionBackward(),
        FusedClassifier(),
        Fp8Classifier(),
        Adamw(),
        RoundParameters(),
        SumOfSquares(),
        Cast(),
        Accumulate(),
        Sum(),
        *fp8.OPERATIONS,
    )
}
