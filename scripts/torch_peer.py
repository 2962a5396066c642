"""PyTorch's side of the comparisons: model, optimizer and one training step as people would write them."""

import torch
import train_gpt2

from llmc.model_file import ModelShape


def make_model(shape: ModelShape) -> train_gpt2.GPT:
    """A model of those sizes with flash attention."""
    sizes = (shape.max_seq_len, shape.vocab_size, shape.num_layers, shape.num_heads, shape.channels)
    return train_gpt2.GPT(train_gpt2.GPTConfig(*sizes), flash=True)


def make(shape: ModelShape, weight_decay: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Such a model, and fused AdamW."""
    model = make_model(shape)
    return model, train_gpt2.make_optimizer(model, weight_decay, fused=True, sharded=False)


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, rate: float
) -> float:
    """One step on tokens x and targets y (B, T), int64, gradients clipped at norm 1. Returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    _, loss = model(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())
