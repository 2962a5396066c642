"""examples/gpt2.py: an nn.Module over llmc.ops follows the C++ step."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import devices
import pytest
import torch

from llmc import _C, ops
from llmc.errors import RunError, UsageError
from llmc.model_file import ModelShape

EXAMPLES = Path(__file__).parent.parent / "examples"

# Nothing a multiple of anything but C of 8: what CUDA demands.
SHAPE = ModelShape(max_seq_len=41, vocab_size=331, padded_vocab_size=384, num_layers=2, num_heads=3, channels=72)
B, T = 3, 37
# fp32: the same arithmetic up to the order of sums, 6e-8 each, times the growth over the depth and the steps of AdamW,
# which turns the sign of a tiny gradient into a step. bf16: gradients of wte are rounded at other places, parameters
# with another noise, 2^-8 each.
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import gpt2

        return gpt2


def check_losses(example: ModuleType, precision: str, steps: int, core=_C, device="cpu", compiled=False) -> None:
    theirs, ours = example.twins(SHAPE, B, T, precision, device, core)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(SHAPE.vocab_size, (B, T + 1), generator=generator)  # always the same: the loss falls fast
    pairs = list(example.losses(theirs, ours, iter(lambda: row, None), steps, compiled))
    assert len(pairs) == steps
    for expected, found in pairs:
        assert found == pytest.approx(expected, rel=TOLERANCES[precision])
    first, last = pairs[0][0], pairs[-1][0]
    assert last < first - 0.03 * steps, "so little was learned that nothing was compared"


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_follow_the_core(example: ModuleType, precision: str) -> None:
    check_losses(example, precision, steps=12)


def test_compiled_losses_follow_the_core(example: ModuleType) -> None:
    """In one graph, by the default compiler."""
    check_losses(example, "fp32", steps=3, compiled=True)


def test_one_graph_for_all_shapes(example: ModuleType) -> None:
    """Compiled for dynamic shapes; the operators alone decide what is computed, so that the bits are the same."""
    _, model = example.twins(SHAPE, B, T, "fp32", "cpu")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((2, 8), (3, 17), (1, 41)):
        tokens = torch.randint(SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows))
        results = []
        for forward in (compiled, model):
            model.zero_grad()
            loss = forward(tokens, tokens)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_on_cuda(example: ModuleType, cuda, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the simulator beside the step of the CPU, on a GPU beside that of the GPU."""
    if isinstance(cuda, devices.RealGPU):
        check_losses(example, precision, steps=12, device="cuda")
        return
    monkeypatch.setattr(devices.ops, "device", cuda)
    monkeypatch.setattr(ops, "kernels", devices.ops)
    check_losses(example, precision, steps=3)


def test_gradients_and_norm_equal_the_cores(example: ModuleType) -> None:
    theirs, ours = example.twins(SHAPE, B, T, "fp32", "cpu")
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(SHAPE.vocab_size, (B, T + 1), generator=generator)
    theirs.forward(row[:, :-1])
    theirs.backward(row[:, 1:])
    theirs.update(lr=0.0, weight_decay=0.0, step=1)
    optimizer = example.optimizer_of(ours)
    ours(row[:, :-1], row[:, 1:]).backward()
    parameters = example.parameters_of(ours)
    assert parameters.keys() == theirs.gradients().keys()
    for name, gradient in theirs.gradients().items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-7)
    optimizer.step()
    assert optimizer.norm.item() == pytest.approx(theirs.grad_norm(), rel=1e-5)
    assert {p.dim() for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.dim() for p in optimizer.param_groups[1]["params"]} == {1}


def test_the_program() -> None:
    arguments = ["--model", "custom:l=1,c=16,h=2,t=16", "--batch-size", "2", "--seq-len", "16", "--steps", "2"]
    result = subprocess.run([sys.executable, EXAMPLES / "gpt2.py", *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["step", "C++", "llmc.ops", "difference"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    (difference,) = re.findall(r"^largest relative difference of the losses: (\S+)$", result.stdout, re.M)
    assert float(difference) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--model custom:l=1,c=16,h=2,t=16,v=65", "--model custom:l=1,c=16,h=2,t=16,v=65: the text has"),
        ("--seq-len 65", "--seq-len 65 is more than the model's context, 64"),
        ("--steps 0", "argument --steps: '0' is not a whole number"),
        ("--model d13", "d13 is no model"),
    ],
)
def test_errors(example: ModuleType, arguments: str, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        example.main(arguments.split())


@pytest.mark.skipif(not _C.why_no_cuda_device(), reason="there is a GPU")
def test_no_gpu(example: ModuleType) -> None:
    with pytest.raises(RunError, match=r"--device cuda: .*; use --device cpu"):
        example.main(["--device", "cuda"])
