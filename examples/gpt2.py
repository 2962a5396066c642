"""GPT-2 as a plain nn.Module over llmc.ops, trained beside the C++ step: the same weights and batches, both losses.

The text is the repository's README, in characters.

Usage: python examples/gpt2.py [--model custom:l=4,c=128,h=4,t=64] [--batch-size 8] [--seq-len 64] [--steps 50]
                               [--precision bf16] [--device cuda] [--compile]
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc import _C, models, ops
from llmc.cli import Parser, run
from llmc.cli.numbers import whole
from llmc.errors import RunError, UsageError
from llmc.model_file import ModelShape

import torch  # isort: skip  after llmc, which chooses how libgomp waits
from torch import Tensor, nn

TEXT = Path(__file__).resolve().parent.parent / "README.md"
LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP = 1e-3, 0.1, 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- the model --------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Weight and bias of a layernorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class Linear(nn.Module):
    """Weight (OC,IC) and bias (OC) of a product."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        C = shape.channels
        self.num_heads = shape.num_heads
        self.ln1, self.qkv, self.attproj = Norm(C), Linear(C, 3 * C), Linear(C, C)
        self.ln2, self.fc, self.fcproj = Norm(C), Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, residual: Tensor, x: Tensor, next_norm: Norm) -> tuple[Tensor, Tensor]:
        """residual, x (B,T,C): x is its layernorm by ln1. Returns both as the next block wants them."""
        x = ops.attention(ops.linear(x, self.qkv.weight, self.qkv.bias), self.num_heads)
        x = ops.linear(x, self.attproj.weight, self.attproj.bias)
        residual, x = ops.residual_layernorm(residual, x, self.ln2.weight, self.ln2.bias)
        x = ops.linear_gelu(x, self.fc.weight, self.fc.bias)
        x = ops.linear(x, self.fcproj.weight, self.fcproj.bias)
        return ops.residual_layernorm(residual, x, next_norm.weight, next_norm.bias)


class GPT2(nn.Module):
    """Parameters have the sizes and, by parameters_of(), the names of llmc's; those of matrices are not initialised."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.vocab_size = shape.vocab_size
        self.wte = nn.Parameter(torch.empty(shape.padded_vocab_size, shape.channels))
        self.wpe = nn.Parameter(torch.empty(shape.max_seq_len, shape.channels))
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.lnf = Norm(shape.channels)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of tokens and targets, (B,T) each."""
        residual = ops.embedding(tokens, self.wte, self.wpe)
        norms = [*(block.ln1 for block in self.h), self.lnf]
        x = ops.layernorm(residual, norms[0].weight, norms[0].bias)
        for block, next_norm in zip(self.h, norms[1:], strict=True):
            residual, x = block(residual, x, next_norm)
        return ops.cross_entropy(x, self.wte, targets, self.vocab_size)


def parameters_of(model: GPT2) -> dict[str, nn.Parameter]:
    """By llmc's names: h.0.ln1.weight is h0.ln1w."""
    pattern = re.compile(r"^h\.(\d+)\.")
    return {
        re.sub(r"\.(w|b)(eight|ias)$", r"\1", pattern.sub(r"h\1.", name)): parameter
        for name, parameter in model.named_parameters()
    }


class AdamW(torch.optim.Optimizer):
    """AdamW by the kernel; bf16 parameters have a master copy. Gradients are clipped to a norm on the way."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float, grad_clip: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.grad_clip = grad_clip
        self.steps = 0
        self.norm = torch.tensor(0.0)  # of the gradients of the last step, before they were clipped

    def step(self) -> None:
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self.norm = ops.global_norm([parameter.grad for parameter, _ in pairs])
        scale = min(1.0, self.grad_clip / self.norm.item())
        self.steps += 1
        for number, (parameter, group) in enumerate(pairs):
            state = self.state[parameter]
            if not state:
                state["m"], state["v"] = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
                state["master"] = parameter.detach().float() if parameter.dtype == torch.bfloat16 else None
            ops.adamw(
                parameter,
                parameter.grad,
                state["m"],
                state["v"],
                state["master"],
                step=self.steps,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                grad_scale=scale,
                seed=self.steps * len(pairs) + number,
            )


def optimizer_of(model: GPT2) -> AdamW:
    """Matrices and embeddings decay, vectors do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP)


# --- beside the C++ step ----------------------------------------------------------------------------------------------


def twins(shape: ModelShape, B: int, T: int, precision: str, device: str, core: Any = _C) -> tuple[Any, GPT2]:
    """The C++ model with random weights, and the nn.Module with the same."""
    options = core.Options(batch_size=B, seq_len=T, precision=precision, device=device, tf32=False)
    theirs = core.GPT2(core.GPT2Config(**vars(shape)), options)
    theirs.init_random(seed=42)
    weights = theirs.parameters()
    ours = GPT2(shape).to(weights["wte"].device, DTYPES[precision])
    with torch.no_grad():
        for name, parameter in parameters_of(ours).items():
            parameter.copy_(weights[name])
    return theirs, ours


def losses(
    theirs: Any, ours: GPT2, batches: Iterator[Tensor], steps: int, compiled: bool
) -> Iterator[tuple[float, float]]:
    """The losses of both in each step. batches: tokens (B,T+1)."""
    device = ours.wte.device
    optimizer = optimizer_of(ours)
    forward = torch.compile(ours, fullgraph=True) if compiled else ours
    for step, batch in zip(range(1, steps + 1), batches):  # noqa: B905  they never end
        theirs.forward(batch[:, :-1])
        theirs.backward(batch[:, 1:])
        theirs.update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, step=step, grad_clip=GRAD_CLIP)

        optimizer.zero_grad()
        loss = forward(batch[:, :-1].to(device), batch[:, 1:].to(device))
        loss.backward()
        optimizer.step()
        yield theirs.loss(), loss.item()


def batches_of(tokens: Tensor, B: int, T: int) -> Iterator[Tensor]:
    """Random rows of T + 1 tokens, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(tokens) - T, (B,), generator=generator)
        yield torch.stack([tokens[start : start + T + 1] for start in starts])


def main(argv: list[str]) -> None:
    args = parse(argv)
    text = TEXT.read_text()
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([characters[character] for character in text])
    shape = models.resolve(args.model, len(characters))
    if shape.vocab_size < len(characters):
        raise UsageError(f"--model {args.model}: the text has {len(characters)} characters, give a larger v=")
    if args.seq_len > min(shape.max_seq_len, len(tokens) - 1):
        raise UsageError(f"--seq-len {args.seq_len} is more than the model's context, {shape.max_seq_len}")
    if args.device == "cuda" and (why_not := _C.why_no_cuda_device()):
        raise RunError(f"--device cuda: {why_not}; use --device cpu")
    theirs, ours = twins(shape, args.batch_size, args.seq_len, args.precision, args.device)
    batches = batches_of(tokens, args.batch_size, args.seq_len)
    largest = 0.0
    print(f"{'step':>4} {'C++':>9} {'llmc.ops':>9} {'difference':>10}")
    for step, (a, b) in enumerate(losses(theirs, ours, batches, args.steps, args.compile), 1):
        largest = max(largest, abs(a - b) / a)
        print(f"{step:4} {a:9.6f} {b:9.6f} {b - a:10.1e}", flush=True)
    print(f"largest relative difference of the losses: {largest:.1e}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="custom:l=4,c=128,h=4,t=64", help="a descriptor of llmc-train -e")
    parser.add_argument("--batch-size", type=whole(1, 8), default=8, metavar="B", help="default: 8")
    parser.add_argument("--seq-len", type=whole(1, 64), default=64, metavar="T", help="default: 64")
    parser.add_argument("--steps", type=whole(1, 50), default=50, help="default: 50")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--compile", action="store_true", help="the nn.Module by torch.compile, in one graph")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run("gpt2.py", main)
