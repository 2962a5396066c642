"""extend: a sequence that grows token by token, against the same model run on the whole of it."""

import pytest
import torch
from model_testing import batch, build, train_step

from llmc import _C
from llmc.sample import XorShift, generate, pick

# (maxT, V, L, NH, C, B, T): more than a block of queries, on a head size that is padded; several batch rows at most.
CASE = (150, 331, 2, 3, 72, 2, 149)
# The last bits of a product may depend on how many rows it has: differences of the logits relative to their size.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}  # some roundings of each type


def row(n, seed=5):
    return torch.randint(CASE[1], (1, n), generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, precision):
    assert (actual - expected).norm() <= TOLERANCE[precision] * expected.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("pieces", [[1] * 149, [64, 1, 1, 64, 19], [3, 130], [148, 1]], ids=["one by one", *"abc"])
def test_logits_are_those_of_the_whole(pieces, recompute, precision):
    model = build(CASE, precision=precision, recompute=recompute)
    tokens = row(sum(pieces))
    model.forward(tokens)
    expected = model.logits(0, sum(pieces))

    done = pieces[0]
    model.forward(tokens[:, :done])
    found = [model.logits(0, done)]
    for piece in pieces[1:]:
        model.extend(tokens[:, done : done + piece])
        found.append(model.logits(done, done + piece))
        done += piece
    assert_close(torch.cat(found), expected, precision)
    assert_close(model.logits(0, done), expected, precision)  # those before are still there


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda(cuda, precision):
    case = (70, 331, 2, 3, 72, 2, 70)
    model = build(case, core=cuda.core, device="cuda", tf32=False, precision=precision)
    tokens = row(70)
    model.forward(tokens)
    expected = model.logits(0, 70)
    model.forward(tokens[:, :62])
    found = [model.logits(0, 62)]
    for piece in (slice(62, 63), slice(63, 64), slice(64, 67), slice(67, 70)):
        model.extend(tokens[:, piece])
        found.append(model.logits(piece.start, piece.stop))
    cuda.check()
    assert_close(torch.cat(found), expected, precision)


def test_generated_tokens_are_those_of_the_whole():
    """As without extend: a forward of everything so far for each token."""
    model = build(CASE)
    text, coins = [0], XorShift(1337)
    while len(text) < 149:
        model.forward(torch.tensor([text]))
        text.append(pick(model.logits(len(text) - 1, len(text))[0].numpy(), coins.uniform()))
    assert list(generate(model, length=149, start_token=0)) == text[1:]


def test_training_goes_on_unharmed():
    disturbed, plain = build(CASE), build(CASE)
    for step in (1, 2, 3):
        list(generate(disturbed, length=20, start_token=step))
        assert train_step(disturbed, *batch(CASE, step), step=step) == train_step(plain, *batch(CASE, step), step=step)


def refuses(model, tokens, message):
    with pytest.raises(_C.Error, match=message):
        model.extend(tokens)


def test_refusals():
    model = build(CASE)
    refuses(model, row(1), "extend needs a forward of its own first")
    model.forward(batch(CASE)[0])
    refuses(model, row(1), "extend needs a forward of one row, the last one had 2")
    model.forward(row(100))
    refuses(model, row(50), "50 tokens after 100 do not fit the model's 149")
    refuses(model, torch.tensor([[331]]), r"id 331 at row 0, position 0 of tokens is outside the vocabulary \[0, 331\)")
    refuses(model, torch.zeros(2, 1, dtype=torch.int32), "tokens must have one row, it has 2")
    model.extend(row(1))
    with pytest.raises(_C.Error, match="backward needs a forward of its own first"):
        model.backward(row(101))
    # The keys and values of old parameters are of no use.
    model.forward(row(5))
    model.backward(row(5))
    model.update(lr=1e-3, weight_decay=0, step=1)
    refuses(model, row(1), "extend needs a forward of its own first")
