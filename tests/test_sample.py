"""Sampling against llm.c's values, torch's softmax and a model whose next token is known."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from model_testing import build

from llmc.errors import RunError
from llmc.sample import Sampling, XorShift, generate, pick, print_sample, tokens_after, until

VECTORS = json.loads((Path(__file__).parent / "vectors" / "schedule.json").read_text())


def test_generator():
    generator = XorShift(1337)
    numbers = [generator.uniform() for _ in range(8)]
    assert numbers == [(number >> 8) / 2**24 for number in VECTORS["xorshift_seed1337_u32"]]
    # The file has nine digits, enough to identify an fp32 number.
    assert numbers == [np.float32(number) for number in VECTORS["xorshift_seed1337_f32"]]
    assert generator.state == int(VECTORS["xorshift_seed1337_state_after8"])


def test_picked_tokens():
    generator = XorShift(1337)
    logits = np.array(VECTORS["sampler_logits_2sin_i"], dtype=np.float32)
    picked = [pick(logits, generator.uniform()) for _ in VECTORS["sampler_tokens_seed1337"]]
    assert picked == VECTORS["sampler_tokens_seed1337"]


@pytest.mark.parametrize(("V", "seed", "shift"), [(2, 0, 0), (65, 1, 0), (72, 2, 500), (501, 3, -500)])
def test_frequencies_are_the_softmax(V, seed, shift):
    """A fine comb of coins picks each token as often as softmax says; a shift of all logits changes nothing."""
    logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed)) + shift
    coins = [(tooth + 0.5) / 2**16 for tooth in range(2**16)]
    counts = np.bincount([pick(logits.numpy(), coin) for coin in coins], minlength=V)
    expected = torch.softmax(logits.double(), dim=0).numpy()
    # A token's interval holds its probability's share of the comb, give or take one tooth at either end;
    # 1e-4 for fp32: the logits' own rounding at 500 is 3e-5.
    assert np.abs(counts / 2**16 - expected).max() <= 2 * 2**-16 + 1e-4


def test_edges_of_the_walk():
    logits = np.log(np.array([0.25, 0.5, 0.25], dtype=np.float32))
    assert pick(logits, 0) == 0
    assert pick(logits, 0.2499) == 0
    assert pick(logits, 0.2501) == 1
    assert pick(logits, 0.7501) == 2
    assert pick(logits, 1 - 2**-24) == 2
    # "Exceeds" is strict: a coin on the border belongs to the next token.
    assert [pick(np.zeros(4, dtype=np.float32), coin) for coin in (0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]
    # A sum that stays below the threshold through rounding still gives the last token.
    assert pick(np.zeros(1000, dtype=np.float32), 1 - 2**-24) == 999


class Successor:
    """A model that is sure of the next token: the token before it plus one. Each of its tokens may come once."""

    def __init__(self, vocab_size):
        self.vocab_size, self.row = vocab_size, torch.empty(0)

    def forward(self, tokens):
        assert tokens.dtype == torch.int32 and tokens.shape[0] == 1
        self.row = tokens[0]

    def extend(self, tokens):
        assert tokens.dtype == torch.int32 and tokens.shape[0] == 1 and len(self.row) > 0
        self.row = torch.cat([self.row, tokens[0]])

    def logits(self, begin, end):
        assert end == len(self.row)
        rows = torch.full((end - begin, self.vocab_size), -100.0)
        for row, token in zip(rows, self.row[begin:end], strict=True):
            row[(int(token) + 1) % self.vocab_size] = 100.0
        return rows


def test_generate_feeds_back_its_own_tokens():
    model = Successor(50)
    assert list(generate(model, length=16, start_token=7)) == list(range(8, 23))
    assert model.row.tolist() == list(range(7, 22))
    assert list(generate(model, length=1, start_token=7)) == []


class Letters:
    def printable(self, token):
        return {1: b"\n", 2: b"\xc3", 3: b"\xa9", 4: b""}.get(token, bytes([96 + token % 26]))


def test_printed_text(capsys):
    print_sample(Successor(50), length=8, start_token=0, tokenizer=Letters())
    # Token 1 is a line feed, 2 and 3 are the halves of é, 4 prints nothing.
    assert capsys.readouterr().out == "generating:\n---\n\néefg\n---\n"


def test_printed_numbers(capsys):
    print_sample(Successor(50), length=5, start_token=0, tokenizer=None)
    assert capsys.readouterr().out == "generating:\n---\n1 2 3 4 \n---\n"


# ----------------------------------------------------------------------------------------------------------------------
# Temperature, top-k, top-p

LOGITS = 2 * torch.randn(65, generator=torch.Generator().manual_seed(4))


def nucleus(probabilities, share):
    """The tokens of top-p, by its definition."""
    kept, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        kept.add(token)
        total += probabilities[token]
        if total >= share:
            break
    return kept


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.01])
def test_drawn_tokens(temperature, top_k, top_p):
    """A fine comb of coins draws exactly the tokens of the definition, each in its share."""
    probabilities = torch.softmax(LOGITS.double() / temperature, dim=0)
    if top_k:
        probabilities[torch.argsort(-probabilities)[top_k:]] = 0
        probabilities /= probabilities.sum()
    kept = nucleus(probabilities.tolist(), top_p) if top_p < 1 else set(torch.nonzero(probabilities)[:, 0].tolist())
    expected = np.array([float(p) if token in kept else 0.0 for token, p in enumerate(probabilities)])
    expected /= expected.sum()
    sampling = Sampling(temperature, top_k, top_p)
    assert set(sampling.candidates((LOGITS / temperature).numpy()).tolist()) == kept
    counts = np.bincount([sampling.choose(LOGITS.numpy(), (i + 0.5) / 2**11) for i in range(2**11)], minlength=65)
    # Each token's share of the comb, give or take one tooth at either end; none at all for those that are out.
    assert np.abs(counts / 2**11 - expected).max() <= 2 * 2**-11 + 1e-5
    assert not counts[sorted(set(range(65)) - kept)].any()


def test_many_draws_of_the_generator():
    """Pearson's statistic of 20,000 draws: chi-squared with 6 degrees of freedom exceeds 33.1 once in 100,000 times."""
    sampling, coins, n = Sampling(0.8, top_k=7), XorShift(7), 20_000
    counts = np.bincount([sampling.choose(LOGITS.numpy(), coins.uniform()) for _ in range(n)], minlength=65)
    top = torch.topk(LOGITS.double() / 0.8, 7)
    expected = n * torch.softmax(top.values, dim=0).numpy()
    assert counts.sum() == counts[top.indices].sum() == n
    assert (((counts[top.indices] - expected) ** 2) / expected).sum() < 33.1


def test_equal_logits():
    """Of equals the first is the likeliest; those equal to the last of top-k belong to it."""
    logits = np.array([0, 2, 1, 2, 1, 0], dtype=np.float32)
    assert Sampling(temperature=0).choose(logits, 0.99) == 1
    assert Sampling(top_k=3).candidates(logits).tolist() == [1, 2, 3, 4]
    assert Sampling(top_p=0.1).candidates(logits).tolist() == [1]


def test_the_defaults_draw_as_the_trainer_does():
    coins = [(i + 0.5) / 1000 for i in range(1000)]
    assert [Sampling().choose(LOGITS.numpy(), c) for c in coins] == [pick(LOGITS.numpy(), c) for c in coins]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
def test_cold(temperature):
    assert Sampling(temperature).choose(LOGITS.numpy(), 0.999) == int(LOGITS.argmax())


def test_logits_that_are_none():
    for bad in (np.nan, np.inf):
        with pytest.raises(RunError, match=f"the model's largest logit is {bad}: its weights are of no use"):
            Sampling(top_k=2).choose(np.array([0, bad, 1], dtype=np.float32), 0.5)


@pytest.mark.parametrize("prompt", [[3], [5, 9, 1, 64, 2]])
def test_greedy_tokens_are_those_of_the_whole(prompt):
    """The argmax of a forward of everything so far, at each step."""
    model = build((40, 65, 2, 2, 32, 1, 40))
    model.parameters()["wpe"].mul_(50)  # or the likeliest token would always be the same
    text = list(prompt)
    while len(text) < 40:
        model.forward(torch.tensor([text]))
        text.append(int(model.logits(len(text) - 1, len(text))[0].argmax()))
    assert len(set(text)) > 5
    following = tokens_after(model, prompt, lambda logits: Sampling(temperature=0).choose(logits, 0))
    assert list(islice(following, 40 - len(prompt))) == text[len(prompt) :]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["ab", "c"], ["ab", "c", ""]),
        (["X"], ["abX", "c"], ["ab"]),
        (["XY"], ["aX", "bX", "Y", "c"], ["a", "Xb", ""]),
        (["XY"], ["aX"], ["a", "X"]),
        (["XXY"], ["XX", "XY"], ["", "X"]),
        (["long", "on"], ["al", "on", "g"], ["a", "l"]),
        (["b", "a"], ["cab"], ["c"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
    ],
)
def test_stop_texts(stops, pieces, expected):
    """What may become a stop text waits, all else comes at once."""
    assert list(until(stops, pieces)) == expected
