"""Which number was the first that is not finite: the expensive search, once loss or gradient norm tell of one.

All ranks call it together. The model's gradients are others afterwards; parameters and random numbers stay.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.data.loader import Position

if TYPE_CHECKING:
    import torch

    from llmc.data.loader import DataLoader
    from llmc.prepare import Run

CHUNK = 1 << 22  # elements looked at at a time: a GPU may have little memory left
LARGEST_NORM = 1.8e19  # the root of fp32's largest number


def broken_parameter(run: "Run") -> str:
    """The first parameter that is not finite, on any rank; '' if all are."""
    names = {name: i for i, name in enumerate(run.model.parameters())}
    found = first_of(run.model.parameters().items())
    everywhere = [name for name in run.ranks.gather(found, "the search for a broken parameter") if name]
    return f"parameter {min(everywhere, key=lambda name: names[name])} is not finite" if everywhere else ""


def broken_step(run: "Run", batches: Sequence[Position]) -> str:
    """Why loss or gradient norm of a step are not finite, whose micro-batches on this rank were `batches`."""
    model, ranks = run.model, run.ranks
    random = model.rng_state
    try:
        cause = broken_parameter(run)
        if cause:
            return cause
        gradient = broken_gradient(run)
        for micro_step, batch in enumerate(batches):
            if gradients_finite(run, batch):
                continue
            everywhere = ranks.gather([str(batch.path), batch.start], "the search for a broken batch")
            for rank, (path, start) in enumerate(everywhere):  # all ranks compute the same one
                if cause := broken_batch(run, run.train_loader, Position(Path(path), start)):
                    return cause + place(run, rank, micro_step)
        found = f"{gradient}, but each" if gradient else "each"
        first = batches[0]
        return f"{found} batch, computed again by itself, is finite ({first.path}, token {first.start})"
    finally:
        model.rng_state = random


def broken_validation(run: "Run") -> str:
    """Why the validation loss is not finite."""
    random = run.model.rng_state
    try:
        cause = broken_parameter(run)
        run.val_loader.reset()
        for _ in range(0 if cause else run.val_batches):
            inputs, targets = run.val_loader.next_batch()
            broken = not run.model.evaluate(inputs, targets).isfinite().all()
            batch = run.val_loader.position
            everywhere = run.ranks.gather([broken, str(batch.path), batch.start], "the search for a broken batch")
            for rank, (suspect, path, start) in enumerate(everywhere):
                if suspect and (cause := broken_batch(run, run.val_loader, Position(Path(path), start))):
                    return cause + place(run, rank, 0)
        return cause or "each batch, computed again, is finite"
    finally:
        run.model.rng_state = random


def place(run: "Run", rank: int, micro_step: int) -> str:
    """Where in the step a batch was, as far as there is a choice."""
    parts = [f"rank {rank}"] if run.ranks.size > 1 else []
    if run.accumulation_steps > 1:
        parts.append(f"micro-step {micro_step + 1} of {run.accumulation_steps}")
    return f" ({', '.join(parts)})" if parts else ""


def gradients_finite(run: "Run", batch: Position) -> bool:
    """Whether loss and gradients of a batch, or of those that the ranks are given, are finite."""
    inputs, targets = run.train_loader.read(batch)
    run.model.forward(inputs)
    run.model.backward(targets)
    return math.isfinite(run.model.loss()) and math.isfinite(run.model.grad_norm())


def broken_batch(run: "Run", loader: "DataLoader", batch: Position) -> str:
    """The first activation, in the order of the forward pass, or gradient, in that of the backward pass.

    '' if all of this batch, the same on all ranks, is finite.
    """
    model = run.model
    inputs, targets = loader.read(batch)
    model.forward(inputs)
    activation = run.ranks.first_problem(broken_activation(run, batch), "the search for a broken activation")
    if activation:
        return activation
    model.backward(targets)
    tokens = f"tokens {batch.start} to {batch.start + inputs.numel() - 1} of {batch.path}"
    if not math.isfinite(model.loss()):
        return f"the logits for {tokens} are not finite"
    gradient = broken_gradient(run)
    return f"{gradient} for {tokens}" if gradient else ""


def broken_activation(run: "Run", batch: Position) -> str:
    T = run.config.seq_len
    for buffer in run.buffers:
        if buffer.name == "losses":  # behind the forward pass
            break
        # Log-sum-exps are (B,NH,T), and what they break is before them.
        if buffer.lifetime != "activations" or buffer.dtype == "int32" or buffer.name.endswith(".lse"):
            continue
        view = run.model.buffer(buffer.name)
        index = first_non_finite(view)
        if index is not None:
            token = batch.start + index // (view.numel() // (run.config.batch_size * T))
            return f"activation {buffer.name} is not finite at token {token} of {batch.path}"
    return ""


def broken_gradient(run: "Run") -> str:
    """The first gradient, in the order of the backward pass, on any rank; '' if all and their norm are finite."""
    gradients = run.model.gradients()
    names = list(gradients)
    pairs = [names[i : i + 2] for i in range(0, len(names), 2)]  # weight and bias
    order = [name for pair in reversed(pairs) for name in pair]
    found = first_of((name, gradients[name]) for name in order)
    everywhere = [name for name in run.ranks.gather(found, "the search for a broken gradient") if name]
    if everywhere:
        return f"the gradient of {min(everywhere, key=order.index)} is not finite"
    if math.isfinite(run.model.grad_norm()):
        return ""
    # A sum of squares beyond fp32, of finite gradients.
    sizes = [(float(chunk.abs().max()), name) for name in order for chunk in chunks(gradients[name])]
    size, name = max(map(tuple, run.ranks.gather(max(sizes), "the search for the largest gradient")))
    return f"the largest gradient, {size:.2g} in {name}, makes a norm beyond fp32 ({LARGEST_NORM:g})"


def chunks(tensor: "torch.Tensor") -> "Iterator[torch.Tensor]":
    flat = tensor.view(-1)
    return (flat[begin : begin + CHUNK] for begin in range(0, flat.numel(), CHUNK))


def first_of(tensors: "Iterable[tuple[str, torch.Tensor]]") -> str:
    return next((name for name, tensor in tensors if first_non_finite(tensor) is not None), "")


def first_non_finite(tensor: "torch.Tensor") -> int | None:
    """The flat index of the first value that is not finite."""
    for i, chunk in enumerate(chunks(tensor)):
        finite = chunk.isfinite()
        if not finite.all():
            return i * CHUNK + int(finite.int().argmin())
    return None
