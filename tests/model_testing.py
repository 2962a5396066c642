"""What the tests of the C++ GPT2 share: models of given sizes, PyTorch's twin of them, batches and comparisons.

A case is (maxT, V, L, NH, C, B, T).
"""

import torch

from llmc import _C
from llmc.resharding import own_parts


def sizes(case):
    max_seq_len, vocab_size, num_layers, num_heads, channels, B, T = case
    shape = dict(
        max_seq_len=max_seq_len, vocab_size=vocab_size, num_layers=num_layers, num_heads=num_heads, channels=channels
    )
    return shape, B, T


def build(case, core=_C, comm=None, **options):
    """An llmc model of the case's sizes with random parameters (biases and layernorms too), of a rank of `comm`."""
    shape, B, T = sizes(case)
    config = core.GPT2Config(**shape, padded_vocab_size=-(-shape["vocab_size"] // 128) * 128)
    model = core.GPT2(config, core.Options(**{"batch_size": B, "seq_len": T, **options}), comm)
    model.init_random(seed=42)
    generator = torch.Generator().manual_seed(7)
    parameters, units = model.parameters(), core.parameter_units(config, model.world_size)
    parts = own_parts(units, model.rank, model.world_size) if model.options.zero_stage == 3 else None
    for _, _, tensors in units:
        for name, _, numel in tensors:
            if name.endswith("b") or "ln" in name:  # init_random leaves vectors at 0 and 1, where many errors hide
                values = torch.randn(numel, generator=generator) * 0.1 + (1 if name.endswith("w") else 0)
                parameters[name].copy_(values[slice(*parts[name])] if parts else values)
    return model


def reference_model(reference, model, dtype=torch.float32):
    """The PyTorch model with the same parameters."""
    config = model.config
    torch_model = reference.GPT(
        reference.GPTConfig(
            config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads, config.channels,
            config.padded_vocab_size,
        )
    ).to(dtype)  # fmt: skip
    parameters = model.parameters()
    with torch.no_grad():
        for name, tensor in reference.named_tensors(torch_model).items():
            tensor.copy_(parameters[name][: tensor.shape[0]])
    return torch_model


def batch(case, seed=0):
    shape, B, T = sizes(case)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(shape["vocab_size"], (B, T), generator=generator) for _ in range(2)]


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / (expected.norm() + 1e-30))


def gradients_of(reference, torch_model, x, y):
    torch_model.zero_grad()
    _, loss = torch_model(x, y)
    loss.backward()
    return {name: tensor.grad for name, tensor in reference.named_tensors(torch_model).items()}


def train_step(model, x, y, step=1, lr=1e-3, **kwargs):
    model.forward(x)
    model.backward(y)
    model.update(lr=lr, weight_decay=0.1, step=step, **kwargs)
    return model.loss()


def bits(model):
    """A copy of all parameters and gradients."""
    return {
        kind: {name: tensor.clone() for name, tensor in getattr(model, kind)().items()}
        for kind in ("parameters", "gradients")
    }


def assert_same_bits(a, b):
    for kind in a:
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), f"{kind} of {name} differ"
