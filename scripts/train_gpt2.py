#!/usr/bin/env python3
"""The PyTorch reference: a plain GPT-2 and its training loop, with the flags of llm.c's train_gpt2.py.

It is the independent truth that llmc's own step is compared with: model, data order and the reading of files are its
own. From llmc it takes only how files are written, GPT-2's vocabulary, and how errors end the program.

    python scripts/train_gpt2.py --model d12 --input_bin 'data/*_train_*.bin'                  # train, write test files
    torchrun --nproc_per_node 4 scripts/train_gpt2.py --write_tensors 0 --input_bin 'data/*_train_*.bin'
"""

import argparse
import gc
import glob
import itertools
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from llmc import debug_state, model_file
from llmc.cli import run
from llmc.errors import RunError, UsageError
from llmc.tokenizer import gpt2, write_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2. padded_vocab_size only concerns files; 0 stands for vocab_size rounded up to 128."""

    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int = 0

    def __post_init__(self) -> None:
        if self.padded_vocab_size == 0:
            object.__setattr__(self, "padded_vocab_size", -(-self.vocab_size // 128) * 128)


class Block(nn.Module):
    """One pre-LN transformer layer. Weights are (out, in); qkv holds all query channels, then key, then value."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.channels
        self.num_heads = config.num_heads
        self.ln1 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.attproj = nn.Linear(C, C)
        self.ln2 = nn.LayerNorm(C)
        self.fc = nn.Linear(C, 4 * C)
        self.fcproj = nn.Linear(4 * C, C)

    def forward(self, x: Tensor, future: Tensor | None) -> Tensor:
        """x: (B, T, C). future: (T, T) mask of what a position must not see; None for PyTorch's fused attention."""
        x = x + self.attproj(self.attention(self.qkv(self.ln1(x)), future))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    def attention(self, qkv: Tensor, future: Tensor | None) -> Tensor:
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, NH, T, HS)
        if future is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            y = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return y.transpose(1, 2).reshape(B, T, C3 // 3)


class GPT(nn.Module):
    """GPT-2: tied output head, tanh GELU, no dropout. New models have the weights of seed 42."""

    def __init__(self, config: GPTConfig, flash: bool = False):
        super().__init__()
        self.config = config
        self.flash = flash
        with torch.device("meta"):  # no storage yet: `initialise` draws every value once, in the order of the file
            self.wte = nn.Embedding(config.vocab_size, config.channels)
            self.wpe = nn.Embedding(config.max_seq_len, config.channels)
            self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.lnf = nn.LayerNorm(config.channels)
        self.to_empty(device="cpu")
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights in the order wte, wpe, then layer by layer; zero biases. Projections back are scaled down."""
        for name, parameter in self.named_parameters():
            parameter.fill_(1.0 if re.search(r"ln\w\.weight$", name) else 0.0)
        generator = torch.Generator().manual_seed(42)
        scaled = 0.02 / math.sqrt(2 * self.config.num_layers)
        self.wte.weight.normal_(0.0, 0.02, generator=generator)
        self.wpe.weight.normal_(0.0, 0.02, generator=generator)
        for block in self.h:
            block.qkv.weight.normal_(0.0, 0.02, generator=generator)
            block.attproj.weight.normal_(0.0, scaled, generator=generator)
            block.fc.weight.normal_(0.0, 0.02, generator=generator)
            block.fcproj.weight.normal_(0.0, scaled, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens, targets: (B, T) int64. Returns logits (B, T, V) and the mean loss.

        Without targets only the logits of the last position, (B, 1, V), and None: all that sampling needs.
        """
        T = tokens.size(1)
        future = None if self.flash else torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.wte(tokens) + self.wpe.weight[:T]
        for block in self.h:
            x = block(x, future)
        if targets is None:
            return F.linear(self.lnf(x[:, -1:]), self.wte.weight), None
        logits = F.linear(self.lnf(x), self.wte.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, start: int, count: int, top_k: int | None, generator: torch.Generator) -> list[int]:
        """Sample `count` tokens after `start` at temperature 1, from the `top_k` likeliest or from all."""
        tokens = torch.tensor([[start]], device=self.wte.weight.device)
        for _ in range(count):
            logits = self(tokens[:, -self.config.max_seq_len :])[0][0, -1].float()
            if top_k is not None:
                lowest = logits.topk(min(top_k, self.config.vocab_size)).values[-1]
                logits = logits.masked_fill(logits < lowest, -math.inf)
            choice = torch.multinomial(logits.softmax(0), 1, generator=generator)
            tokens = torch.cat([tokens, choice[None]], dim=1)
        return tokens[0, 1:].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Which model: the values of --model

GPT2_DEPTHS = {  # depth: (channels, heads)
    6: (384, 6),
    12: (768, 12),
    24: (1024, 16),
    36: (1280, 20),
    48: (1600, 25),
    60: (1920, 30),
    72: (2880, 30),
    84: (3456, 36),
}
CHESS_DEPTHS = {8: (512, 8), **GPT2_DEPTHS}
PRETRAINED = {"gpt2": ("124M", 12), "gpt2-medium": ("355M", 24), "gpt2-large": ("774M", 36), "gpt2-xl": ("1558M", 48)}
GPT2_VOCAB, CHESS_VOCAB, CONTEXT = 50257, 72, 1024
GPT2_END_OF_TEXT, CHESS_END_OF_TEXT = 50256, 2
MODEL_HELP = (
    "gpt2, gpt2-medium, gpt2-large, gpt2-xl: OpenAI's weights through the transformers package; "
    "dN: new GPT-2 of depth N (6, 12, 24, 36, 48, 60, 72, 84); chess:dN: the same with the 72 tokens of chess, and d8; "
    "custom:l=4,c=128,h=4,t=64,v=65: new model of any layers, channels, heads, context, vocabulary; "
    "PATH.bin: the weights in a model file"
)


def make_model(name: str, flash: bool) -> tuple[GPT, str]:
    """The model that `--model name` describes, on the CPU, and the prefix of its files."""
    if name.endswith(".bin"):
        return load_model_file(name, flash), Path(name).stem
    if name in PRETRAINED:
        size, depth = PRETRAINED[name]
        pretrained = fetch_pretrained(name)
        model = GPT(config_of_depth(depth, GPT2_DEPTHS, GPT2_VOCAB), flash)
        copy_pretrained(model, pretrained)
        return model, f"gpt2_{size}"
    if match := re.fullmatch(r"(chess:)?d(\d+)", name):
        chess, depth = match[1], int(match[2])
        depths, vocab_size = (CHESS_DEPTHS, CHESS_VOCAB) if chess else (GPT2_DEPTHS, GPT2_VOCAB)
        if depth not in depths:
            raise UsageError(f"--model {name}: the depth must be one of {', '.join(map(str, sorted(depths)))}")
        return GPT(config_of_depth(depth, depths, vocab_size), flash), f"{'chess' if chess else 'gpt2'}_d{depth}"
    if name.startswith("custom:"):
        return GPT(custom_config(name), flash), "custom"
    raise UsageError(f"--model {name}: unknown model; use {MODEL_HELP}")


def config_of_depth(depth: int, depths: dict[int, tuple[int, int]], vocab_size: int) -> GPTConfig:
    channels, num_heads = depths[depth]
    return GPTConfig(CONTEXT, vocab_size, depth, num_heads, channels)


def custom_config(name: str) -> GPTConfig:
    parts = name.removeprefix("custom:").split(",")
    if not all(re.fullmatch(r"[lchtv]=[1-9]\d{0,6}", part) for part in parts) or sorted(p[0] for p in parts) != sorted(
        "lchtv"
    ):
        raise UsageError(f"--model {name}: give each of l, c, h, t, v once, as in custom:l=4,c=128,h=4,t=64,v=65")
    size = {part[0]: int(part[2:]) for part in parts}
    if size["c"] % size["h"] != 0:
        raise UsageError(f"--model {name}: {size['h']} heads do not divide {size['c']} channels")
    return GPTConfig(size["t"], size["v"], size["l"], size["h"], size["c"])


def fetch_pretrained(name: str) -> dict[str, Tensor]:
    """OpenAI's weights of that name, from Hugging Face."""
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise RunError(f"--model {name} needs the transformers package: pip install transformers") from None
    try:
        return GPT2LMHeadModel.from_pretrained(name).state_dict()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"--model {name}: cannot fetch the weights from Hugging Face: {reason}") from error


def copy_pretrained(model: GPT, pretrained: dict[str, Tensor]) -> None:
    """Copy Hugging Face's weights, whose matrices are transposed."""
    modules = {
        **{"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj"},
        **{"ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj", "lnf": "ln_f"},
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            *path, module, kind = name.split(".")
            values = pretrained[".".join(["transformer", *path, modules.get(module, module), kind])]
            transposed = module in ("qkv", "attproj", "fc", "fcproj") and kind == "weight"
            parameter.copy_(values.T if transposed else values)


# ----------------------------------------------------------------------------------------------------------------------
# Files: model and debug state


def named_tensors(model: GPT) -> dict[str, Tensor]:
    """The parameters by llmc's names: "wte", "wpe", "h0.ln1w", ..., "lnfb". They share the model's memory."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        *path, module, kind = name.split(".")  # "h", "0", "qkv", "weight"
        suffix = "" if module in ("wte", "wpe") else kind[0]
        tensors["".join([*path, "." if path else "", module, suffix])] = parameter
    return tensors


def padded(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The same tensors with zero rows after the vocabulary in "wte", as the files have them."""
    return {**tensors, "wte": F.pad(tensors["wte"], (0, 0, 0, config.padded_vocab_size - config.vocab_size))}


def shape_of(config: GPTConfig) -> model_file.ModelShape:
    return model_file.ModelShape(
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.padded_vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        channels=config.channels,
    )


def read_header(path: str) -> np.ndarray:
    """The 256 int32 at the beginning of a file, zeros where it is shorter."""
    try:
        with open(path, "rb") as file:
            return np.frombuffer(file.read(1024).ljust(1024, b"\0"), dtype="<i4")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def load_model_file(path: str, flash: bool = False) -> GPT:
    """The model in a file: fp32 (version 3) or bf16 (version 5), each kind of tensor for all layers together."""
    header = read_header(path)
    magic, version, T, V, L, NH, C, Vp = (int(slot) for slot in header[:8])
    if magic != 20240326 or version not in (3, 5):
        raise RunError(f"{path} is not a model file of version 3 or 5: it begins with {magic}, {version}")
    if min(T, V, L, NH, C) < 1 or Vp < V or C % NH != 0:
        raise RunError(f"{path} is damaged: its header says T={T} V={V} L={L} NH={NH} C={C} Vp={Vp}")
    count, dtype = Vp * C + T * C + L * (12 * C * C + 13 * C) + 2 * C, "<f4" if version == 3 else "<u2"
    expected, size = 1024 + count * np.dtype(dtype).itemsize, os.path.getsize(path)
    if size != expected:
        raise RunError(f"{path} is damaged: its header promises {expected} bytes, but it has {size}")
    values = np.fromfile(path, dtype, offset=1024)
    if version == 5:
        values = (values.astype(np.uint32) << 16).view(np.float32)  # bf16 is the upper half of fp32

    model = GPT(GPTConfig(T, V, L, NH, C, Vp), flash)
    blocks = zip(*(block.parameters() for block in model.h), strict=True)
    wte, wpe, lnf = model.wte.weight, model.wpe.weight, model.lnf.parameters()
    with torch.no_grad():
        for parameter in (wte, wpe, *itertools.chain(*blocks), *lnf):
            parameter.copy_(torch.from_numpy(values[: parameter.numel()]).view_as(parameter))
            values = values[Vp * C if parameter is wte else parameter.numel() :]
    return model


def write_model(path: str | Path, model: GPT, dtype: model_file.FileDtype) -> None:
    """Write a model file with fp32 or bf16 values."""
    tensors = padded(named_tensors(model), model.config)
    model_file.save_model(path, shape_of(model.config), dtype, tensors)


def write_debug_state(path: str | Path, model: GPT, x: Tensor, y: Tensor) -> None:
    """Run one forward and backward pass on tokens x and targets y (B, T); write its logits, loss and gradients."""
    model.zero_grad()
    logits, loss = model(x, y)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in named_tensors(model).items()}
    debug_state.write_debug_state(path, x, y, logits, loss.item(), padded(gradients, model.config))
    model.zero_grad()


def write_test_files(directory: Path, prefix: str, model: GPT, x: Tensor, y: Tensor, new_model: bool) -> None:
    """What --write_tensors 1 promises. A model that came from a file is not written again."""
    if model.config.vocab_size == GPT2_VOCAB:
        write_tokenizer(directory / "gpt2_tokenizer.bin", gpt2().token_bytes(), GPT2_END_OF_TEXT)
    if new_model:
        write_model(directory / f"{prefix}.bin", model, "fp32")
        write_model(directory / f"{prefix}_bf16.bin", model, "bf16")
    write_debug_state(directory / f"{prefix}_debug_state.bin", model, x, y)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world_size: int
    device: torch.device

    def mean(self, value: Tensor) -> float:
        """The average over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value.item() / self.world_size

    def of_first(self, value: float) -> float:
        """The first process's value, so that all decide alike."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, src=0)
        return shared.item()

    def print(self, message: str) -> None:
        if self.rank == 0:
            print(message, flush=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_device(name: str) -> torch.device:
    available = [type for type in ("cuda", "mps") if getattr(torch, type).is_available()] + ["cpu"]
    try:
        device = torch.device(name or available[0])
    except RuntimeError:
        raise UsageError(f"--device {name}: unknown device; use one of {', '.join(available)}") from None
    if device.type not in available:
        raise UsageError(f"--device {name}: not available here; use one of {', '.join(available)}")
    return device


def join_ranks(device_name: str) -> Ranks:
    """Meet the other processes when torchrun started this one: NCCL for one GPU each, Gloo for CPUs."""
    if "RANK" not in os.environ:
        return Ranks(0, 1, choose_device(device_name))
    device = choose_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


class TokenLoader:
    """Consecutive batches from all shards that match a pattern, in order, for one of the ranks.

    A sample has B·T tokens for each of the ranks; rank r takes the r-th B·T of them. What does not fill a sample at the
    end of a shard is skipped; after the last shard comes the first again.
    """

    def __init__(self, flag: str, pattern: str, B: int, T: int, ranks: Ranks, vocab_size: int):
        self.paths = sorted(glob.glob(pattern))
        if not self.paths:
            raise RunError(f"{flag} {pattern}: no such file; give a token shard or a pattern in quotes")
        self.B, self.T, self.rank, self.vocab_size = B, T, ranks.rank, vocab_size
        self.sample = ranks.world_size * B * T
        self.num_tokens = 0
        for path in self.paths:
            n = len(read_shard(path))
            if n < self.sample + 1:
                raise RunError(f"{path} has {n} tokens, one batch of all processes needs {self.sample + 1}")
            self.num_tokens += n
        self.reset()

    def reset(self) -> None:
        self.open(0)

    def open(self, shard: int) -> None:
        self.shard, self.position = shard, 0
        self.tokens = read_shard(self.paths[shard])

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (B, T) int64 each; the targets are the tokens one further."""
        # All ranks ask for the whole sample, not their part of it, so that they change to the next shard together.
        if self.position + self.sample + 1 > len(self.tokens):
            self.open((self.shard + 1) % len(self.paths))
        begin = self.position + self.rank * self.B * self.T
        span = torch.from_numpy(self.tokens[begin : begin + self.B * self.T + 1].astype(np.int64))
        self.position += self.sample
        if span.max() >= self.vocab_size:
            path = self.paths[self.shard]
            raise RunError(f"{path} has token {span.max()}, but the model's vocabulary has {self.vocab_size} tokens")
        return span[:-1].view(self.B, self.T), span[1:].view(self.B, self.T)


def read_shard(path: str) -> np.ndarray:
    """Map the uint16 tokens of a shard after checking its header: magic, version, count, and the file size."""
    magic, version, n = (int(slot) for slot in read_header(path)[:3])
    if (magic, version) != (20240520, 1):
        raise RunError(f"{path} is not a token shard of version 1: it begins with {magic}, {version}")
    size = os.path.getsize(path)
    if n <= 0 or size != 1024 + 2 * n:
        raise RunError(f"{path} is damaged: its header says {n} tokens, {1024 + 2 * n} bytes, but it has {size}")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(n,))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, num_iterations: int, peak: float, warmup_iters: int, decay_frac: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to peak·decay_frac at num_iterations. `step` counts from 0."""
    if step < warmup_iters:
        return peak * (step + 1) / warmup_iters
    done = (step - warmup_iters) / (num_iterations - warmup_iters)
    lowest = peak * decay_frac
    return lowest + 0.5 * (1 + math.cos(math.pi * done)) * (peak - lowest)


def make_optimizer(model: GPT, weight_decay: float, fused: bool, sharded: bool) -> torch.optim.Optimizer:
    """AdamW that decays matrices and embeddings, not biases and layernorms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "fused": fused}
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it compiles TorchScript: only if used

        return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def validate(
    model: Callable, loader: TokenLoader, batches: int, ranks: Ranks, autocast: AbstractContextManager
) -> float:
    """Mean loss over the first `batches` batches."""
    loader.reset()
    total = torch.zeros((), device=ranks.device)
    with torch.no_grad(), autocast:
        for _ in range(batches):
            x, y = loader.next_batch()
            total += model(x.to(ranks.device), y.to(ranks.device))[1]
    return ranks.mean(total) / batches


def accumulate(
    model: Any, loader: TokenLoader, steps: int, backward: bool, ranks: Ranks, autocast: AbstractContextManager
) -> float:
    """Mean loss over `steps` micro-batches and all ranks; with `backward` also its gradient, left in the parameters."""
    total = torch.zeros((), device=ranks.device)
    for step in range(steps):
        x, y = loader.next_batch()
        if ranks.world_size > 1:
            model.require_backward_grad_sync = step == steps - 1
        with torch.set_grad_enabled(backward), autocast:
            loss = model(x.to(ranks.device), y.to(ranks.device))[1] / steps
        if backward:
            loss.backward()
        total += loss.detach()
    return ranks.mean(total)


def sample(model: GPT, generator: torch.Generator) -> str:
    """32 tokens after the end-of-text token, as text for GPT-2's vocabulary and as numbers for others."""
    vocab_size = model.config.vocab_size
    start = {GPT2_VOCAB: GPT2_END_OF_TEXT, CHESS_VOCAB: CHESS_END_OF_TEXT}.get(vocab_size, 0)
    tokens = model.generate(start, count=32, top_k=40, generator=generator)
    if vocab_size != GPT2_VOCAB:
        return " ".join(map(str, tokens))
    vocabulary = gpt2().token_bytes()
    return b"".join(vocabulary[token] for token in tokens).decode("utf-8", errors="replace")


def train(arguments: list[str]) -> None:
    args = parse(arguments)
    ranks = join_ranks(args.device)
    try:
        run_training(args, ranks)
    finally:
        if ranks.world_size > 1:
            gc.collect()  # DDP is in a reference cycle; its threads must end before the group and the interpreter do
            dist.destroy_process_group()


def run_training(args: argparse.Namespace, ranks: Ranks) -> None:
    B, T, N = args.batch_size, args.sequence_length, args.num_iterations
    tokens_per_pass = B * T * ranks.world_size
    if args.total_batch_size % tokens_per_pass != 0:
        raise UsageError(
            f"--total_batch_size {args.total_batch_size} must be a multiple of {tokens_per_pass} "
            f"(--batch_size {B} x --sequence_length {T} x {ranks.world_size} processes)"
        )
    accumulation_steps = args.total_batch_size // tokens_per_pass
    say = ranks.print
    cuda = ranks.device.type == "cuda"
    autocast: AbstractContextManager = nullcontext()
    if args.dtype != "float32" and cuda:
        autocast = torch.autocast("cuda", getattr(torch, args.dtype))
    elif args.dtype != "float32":
        say(f"--dtype {args.dtype} works on CUDA only: computing in float32")
    if args.tensorcores:
        torch.set_float32_matmul_precision("high")

    model, prefix = make_model(args.model, bool(args.flash))
    config = model.config
    if config.max_seq_len < T:
        raise UsageError(f"--sequence_length {T} is longer than the model's context of {config.max_seq_len}")
    model.to(ranks.device)
    train_loader = TokenLoader("--input_bin", args.input_bin, B, T, ranks, config.vocab_size)
    if args.val_loss_every > 0:
        val_loader = TokenLoader("--input_val_bin", args.input_val_bin, B, T, ranks, config.vocab_size)

    say(f"PyTorch {torch.__version__} on {ranks.device}, {ranks.world_size} process(es)")
    say(f"model {args.model}: {config}, {sum(p.numel() for p in model.parameters())} parameters")
    say(f"{train_loader.num_tokens} training tokens in {len(train_loader.paths)} file(s)")
    say(f"total batch size {args.total_batch_size} => {accumulation_steps} gradient accumulation step(s)")
    log = open_log(args.output_dir, ranks)

    # Written from the plain model: torch.compile and DDP below wrap it and hook into its backward pass.
    if args.write_tensors and not args.inference_only and ranks.rank == 0:
        x, y = train_loader.next_batch()
        new_model = not args.model.endswith(".bin")
        write_test_files(Path(args.output_dir), prefix, model, x.to(ranks.device), y.to(ranks.device), new_model)
        train_loader.reset()

    wrapped = torch.compile(model) if args.compile else model
    if ranks.world_size > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=[ranks.device] if cuda else None)
    optimizer = make_optimizer(model, args.weight_decay, cuda, args.zero_stage == 1 and ranks.world_size > 1)
    sampling = torch.Generator(ranks.device).manual_seed(42)
    durations: list[float] = []
    seconds = 0.0  # sum of the durations

    for step in range(N + 1):
        out_of_time = args.max_seconds > 0 and ranks.of_first(seconds) >= args.max_seconds
        last = step == N or out_of_time
        if args.val_loss_every > 0 and (step % args.val_loss_every == 0 or last):
            val_loss = validate(wrapped, val_loader, args.val_max_steps, ranks, autocast)
            say(f"val loss {val_loss:f}")
            log(f"s:{step} tel:{val_loss:f}")
        if args.sample_every > 0 and (step % args.sample_every == 0 or last) and ranks.rank == 0:
            say(f"---------------\n{sample(model, sampling)}\n---------------")
        if last:
            break

        start = time.perf_counter()
        if args.overfit_single_batch:
            train_loader.reset()
        optimizer.zero_grad()
        loss = accumulate(wrapped, train_loader, accumulation_steps, not args.inference_only, ranks, autocast)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
        lr = learning_rate(step, N, args.learning_rate, args.warmup_iters, args.learning_rate_decay_frac)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not args.inference_only:
            optimizer.step()
        ranks.synchronize()
        durations.append(time.perf_counter() - start)
        seconds += durations[-1]

        speed = args.total_batch_size / durations[-1]
        say(
            f"step {step + 1:4d}/{N} | train loss {loss:.6f} | norm {norm:.4f} | lr {lr:.2e} "
            f"| ({1000 * durations[-1]:.2f} ms | {speed:.0f} tok/s)"
        )
        log(f"s:{step} trl:{loss:f}")

    if steady := durations[1:][-20:]:
        say(f"final {len(steady)} iters avg: {1000 * sum(steady) / len(steady):.3f}ms")
    say(f"peak memory consumption: {torch.cuda.max_memory_allocated() // 2**20 if cuda else 0} MiB")


def open_log(output_dir: str, ranks: Ranks) -> Callable[[str], None]:
    """A function that appends a line to an empty main.log, and nothing without an output directory."""
    if not output_dir or ranks.rank != 0:
        return lambda line: None
    path = Path(output_dir, "main.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")

    def log(line: str) -> None:
        with open(path, "a") as file:
            file.write(line + "\n")

    return log


# ----------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def number(kind: type, lowest: float, highest: float = math.inf, open_below: bool = False) -> Callable[[str], float]:
    """A parser for an int or float in [lowest, highest], or (lowest, highest] when `open_below`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not lowest <= value <= highest or (open_below and value == lowest) or value == math.inf:
            least = f"{'more than' if open_below else 'at least'} {lowest}"
            raise argparse.ArgumentTypeError(
                f"{text} must be {least}{f' and at most {highest}' * (highest < math.inf)}"
            )
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value" with this name
    return convert


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="train_gpt2.py",
        usage="train_gpt2.py [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(group: argparse._ArgumentGroup, name: str, default: object, help: str, **kwargs: Any) -> None:
        shown = "none" if default == "" else default
        if "choices" not in kwargs:
            kwargs["metavar"] = kwargs.get("type", str).__name__
        group.add_argument(f"--{name}", default=default, help=f"{help} (default: {shown})".replace("%", "%%"), **kwargs)

    count, positive, switch = number(int, 0), number(int, 1), number(int, 0, 1)
    group = parser.add_argument_group("files")
    shard = "dev/data/tinyshakespeare/tiny_shakespeare_val.bin"
    add(group, "input_bin", shard, "token shards to train on: a path or a pattern")
    add(group, "input_val_bin", "", "token shards to validate on")
    add(group, "output_dir", "", "directory for main.log, and for the files of --write_tensors")
    add(
        group,
        "write_tensors",
        1,
        "1: write PREFIX.bin, PREFIX_bf16.bin, PREFIX_debug_state.bin (and gpt2_tokenizer.bin for GPT-2's vocabulary) "
        "to the output or working directory; PREFIX is gpt2_124M, gpt2_355M, gpt2_774M, gpt2_1558M, gpt2_dN, chess_dN, "
        "custom; for PATH.bin only the debug state",
        type=switch,
    )
    group = parser.add_argument_group("model")
    add(group, "model", "gpt2", MODEL_HELP)

    group = parser.add_argument_group("batch")
    add(group, "batch_size", 4, "rows of a micro-batch", type=positive)
    add(group, "sequence_length", 64, "tokens in a row, at most the model's context", type=positive)
    add(
        group,
        "total_batch_size",
        256,
        "tokens of an optimizer step over all micro-batches and processes",
        type=positive,
    )
    add(group, "overfit_single_batch", 1, "1: train on the first batch again and again", type=switch)

    group = parser.add_argument_group("optimization: AdamW, cosine schedule")
    add(group, "num_iterations", 10, "optimizer steps", type=count)
    add(
        group,
        "max_seconds",
        0,
        "stop after the step that reaches so many seconds spent in steps; 0: never",
        type=number(float, 0),
    )
    add(group, "inference_only", 0, "1: forward passes only", type=switch)
    add(group, "learning_rate", 1e-4, "highest learning rate", type=number(float, 0))
    add(group, "warmup_iters", 0, "steps of linear warm-up", type=count)
    add(group, "learning_rate_decay_frac", 1.0, "final learning rate / highest learning rate", type=number(float, 0, 1))
    add(group, "weight_decay", 0.0, "of tensors with two dimensions", type=number(float, 0))
    add(group, "grad_clip", 1.0, "highest norm of the gradient", type=number(float, 0, open_below=True))

    group = parser.add_argument_group("evaluation")
    add(group, "val_loss_every", 0, "steps between validations; 0: off", type=count)
    add(group, "val_max_steps", 20, "batches of a validation", type=positive)
    add(group, "sample_every", 0, "steps between samples of 32 tokens; 0: off", type=count)

    group = parser.add_argument_group("execution")
    add(group, "device", "", "cuda, mps or cpu; none: the first of them that is there")
    add(group, "dtype", "float32", "autocast type, on CUDA only", choices=("float32", "float16", "bfloat16"))
    add(group, "tensorcores", 0, "1: float32 products in TF32", type=switch)
    add(group, "compile", 0, "1: torch.compile", type=switch)
    add(group, "flash", 0, "1: PyTorch's fused attention", type=switch)
    add(group, "zero_stage", 0, "1: optimizer state sharded over the processes of torchrun", type=switch)

    args = parser.parse_args(arguments)
    if args.val_loss_every > 0 and not args.input_val_bin:
        raise UsageError(f"--val_loss_every {args.val_loss_every} needs --input_val_bin")
    return args


def main() -> None:
    run("train_gpt2.py", train)


if __name__ == "__main__":
    main()
