"""Sampling against llm.c's values, torch's softmax and a model whose next token is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.sample import XorShift, generate, pick, print_sample

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
