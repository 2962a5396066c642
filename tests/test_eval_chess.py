"""The measures of chess, and llmc-sample's games: models whose moves are known, positions worked out by hand."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from model_testing import build
from ranks_testing import run_ranks
from training_data import write_shard

from llmc import _C, chess_eval, cli
from llmc.chess_eval import END_OF_TEXT, Position, coins_of
from llmc.cli.eval import _main as evaluate
from llmc.cli.sample import _main as sample
from llmc.cli.sample import _report
from llmc.model_file import ModelShape, save_model
from llmc.prompt import encode_moves
from llmc.ranks import Ranks

if not hasattr(_C, "chess"):
    pytest.skip("the compiled core is older than chess: rebuild it", allow_module_level=True)

CONTEXT = 64
FOOLS_MATE = "f2f3 e7e5 g2g4 d8h4"
FOUR_PLIES = [FOOLS_MATE, "e2e4 e7e5 g1f3 b8c6", "d2d4 d7d5 c2c4 e7e6"]
PROMOTES = "a2a4 b7b5 a4b5 a7a6 b5a6 c8b7 a6b7 d7d6 b7a8q"


def moves(text):
    return encode_moves(text.split())


class Player:
    """A model that goes on by `plays`: from the tokens so far to the probabilities of the next ones."""

    def __init__(self, plays):
        self.plays, self.tokens = plays, []

    def forward(self, tokens):
        assert tokens.dtype == torch.int32 and len(tokens) == 1 and int(tokens[0, 0]) == END_OF_TEXT
        self.tokens = tokens[0].tolist()

    def extend(self, tokens):
        self.tokens += tokens[0].tolist()
        assert len(self.tokens) <= CONTEXT

    def logits(self, begin, end):
        assert (begin, end) == (len(self.tokens) - 1, len(self.tokens))
        logits = torch.full((1, 72), -100.0)
        for token, probability in self.plays(self.tokens[1:]).items():
            logits[0, token] = np.log(probability)
        return logits


class Book:
    """Plays along games, any of those that the tokens so far begin, by their probabilities; then ends the game."""

    def __init__(self, games):
        self.games = {(*moves(game), END_OF_TEXT): probability for game, probability in games.items()}

    def __call__(self, tokens):
        n, found = len(tokens), {}
        for game, probability in self.games.items():
            if game[:n] == tuple(tokens) and len(game) > n:
                found[game[n]] = found.get(game[n], 0) + probability
        return found or {END_OF_TEXT: 1.0}


class Always:
    """Plays one of several moves after so many plies, whatever was played."""

    def __init__(self, plies, choices):
        self.begins, self.book = 2 * plies, Book(choices)

    def __call__(self, tokens):
        return self.book(tokens[self.begins :])


def four_plies():
    return [Position(game, moves(game)[:6], moves(game)[6:]) for game in FOUR_PLIES]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# Positions


def test_games_of_shards(directory):
    """Without what comes before the first end-of-text, or is cut off by the end of a shard; the very last is whole."""
    write_shard(directory / "a.bin", [9, 9, END_OF_TEXT, *moves("e2e4"), END_OF_TEXT, *moves("d2d4")[:1]])
    write_shard(directory / "b.bin", [*moves("d2d4")[1:], END_OF_TEXT, *moves(PROMOTES)])
    found = list(chess_eval.games([Path("a.bin"), Path("b.bin")]))
    assert found == [("a.bin: game 0", moves("e2e4")), ("b.bin: game 0", moves(PROMOTES))]
    write_shard(directory / "c.bin", moves("e2e4"))
    assert list(chess_eval.games([Path("c.bin")])) == []
    with pytest.raises(chess_eval.RunError, match=r"^c\.bin: no game goes on after 0 plies"):
        chess_eval.held_out_positions([Path("c.bin")], 0, 9, CONTEXT)


def test_where_moves_begin():
    assert chess_eval.move_starts(moves(PROMOTES)) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert chess_eval.move_starts(moves(f"{PROMOTES} a1a2 b1b2")) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 19, 21]
    assert chess_eval.move_starts(moves("e2e4")[:1]) == chess_eval.move_starts([]) == []


def test_held_out_positions(directory):
    """Of each game that goes on after so many plies one, at a move; all such moves come up."""
    games = [moves(FOUR_PLIES[i % 3] if i % 2 else PROMOTES) for i in range(400)]
    write_shard(directory / "games.bin", [token for game in games for token in (END_OF_TEXT, *game)])
    positions = chess_eval.held_out_positions([Path("games.bin")], 3, 1000, CONTEXT)
    assert len(positions) == 400
    lengths = {"short": set(), "long": set()}
    for position, game in zip(positions, games, strict=True):
        n = len(position.tokens)
        assert position.tokens == game[:n] and n in chess_eval.move_starts(game)
        lengths["long" if len(game) > 8 else "short"].add(n // 2)
    assert lengths == {"short": {3}, "long": {3, 4, 5, 6, 7, 8}}
    positions = chess_eval.held_out_positions([Path("games.bin")], 4, 7, CONTEXT)
    assert len(positions) == 7 and all(position.tokens[:2] == moves("a2a4") for position in positions)
    # 1 for end-of-text, 3 for the move: of 14 tokens 10 are left for the position, five moves; of 13 only four.
    for context, plies in ((14, 5), (13, 4)):
        positions = chess_eval.held_out_positions([Path("games.bin")], plies, 9, context)
        assert [len(position.tokens) for position in positions] == [2 * plies] * 9


def test_positions_of_a_file():
    Path("p.txt").write_text(f"e2e4\n\n {FOOLS_MATE}\n{PROMOTES}\n")
    found = chess_eval.read_positions("p.txt", CONTEXT)
    assert [(tokens, best) for _, tokens, best in found] == [
        ([], moves("e2e4")),
        (moves(FOOLS_MATE)[:6], moves("d8h4")),
        (moves(PROMOTES)[:16], moves("b7a8q")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("e2e4\ne2e4 e2e4\n", "p.txt, line 2: e2e4 is not legal there: correct or remove the line"),
        ("e2e5 e7e5\n", "p.txt, line 1: e2e5 is not legal there: correct or remove the line"),
        (f"{PROMOTES[:-1]}\n", "p.txt, line 1: b7a8 is not legal there: "),
        ("1. e2e4\n", "p.txt, line 1: '1.' is no move: write moves such as e2e4"),
        ("\n", "p.txt holds no position: a line has moves such as e2e4 e7e5, and then the best move"),
        (("g1f3 g8f6 f3g1 f6g8 " * 8)[:-1] + "\n", "p.txt, line 1: 62 tokens, too many for the model's context of 64"),
        (None, "cannot read --chess-positions p.txt: No such file or directory"),
    ],
)
def test_bad_positions(content, message):
    if content is not None:
        Path("p.txt").write_text(content)
    with pytest.raises(chess_eval.RunError) as caught:
        chess_eval.read_positions("p.txt", CONTEXT)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Rates


@pytest.mark.parametrize(
    ("move", "rate"),
    [("b8c6", 1), ("d8h4", 2 / 3), ("e7e5", 1 / 3), ("a1a1", 0), ("e2e4", 0), ("", 0), ("e7e8q", 0)],
)
def test_legal_moves(move, rate):
    """d8h4: in the third game the pawn on e7 is in the way; it alone can play e7e5."""
    assert chess_eval.legal_rates(Player(Always(3, {move: 1})), four_plies(), Ranks()) == (rate, rate)


def drawn_rate():
    """Of a player of d8h4 by 70 %, of e7e5 by 30 %: a coin below 0.3 is e7's, which comes first in the vocabulary.

    It is the game's second coin: the first one has chosen the position.
    """
    legal = ["d8h4", "d8h4", "e7e5"]
    coins = [coins_of(i) for i in range(30)]
    first, second = ([game.uniform() for game in coins] for _ in range(2))
    rates = [
        sum(("e7e5" if coin < 0.3 else "d8h4") == legal[i % 3] for i, coin in enumerate(drawn)) / 30
        for drawn in (first, second)
    ]
    assert rates[0] != rates[1]
    return rates[1]


def rates_of_rank(ranks, plays):
    model = Player(plays)
    return [
        *chess_eval.legal_rates(model, four_plies() * 10, ranks),
        chess_eval.legal_game_rate(Player(TWO_GAMES), 20, CONTEXT, ranks),
        chess_eval.best_move_rate(Player(Book({game: 1 for game in FOUR_PLIES[:2]})), four_plies(), ranks),
    ]


TWO_GAMES = Book({"e2e4 e7e5": 0.5, "e2e4 e7e5 e4e5": 0.1, "d2d4 d7d5 d4d5": 0.4})


def test_drawn_moves_and_games_on_any_number_of_ranks():
    plays = Always(3, {"d8h4": 0.7, "e7e5": 0.3})
    found = rates_of_rank(Ranks(), plays)
    assert found[:2] == [2 / 3, drawn_rate()] and 0.2 < found[1] < 0.8
    # d2 comes before e2: below 0.4 the game is that of the illegal third move; then 1 of 6 ends so too.
    games = []
    for i in range(20):
        coins = coins_of(i)
        opening = coins.uniform()
        for _ in range(3):
            coins.uniform()
        games.append(opening >= 0.4 and coins.uniform() < 5 / 6)
    assert found[2] == sum(games) / 20 and 0.2 < found[2] < 0.9
    assert found[3] == 2 / 3
    assert run_ranks(3, rates_of_rank, plays) == [found] * 3


@pytest.mark.parametrize(("move", "right"), [("b7a8q", True), ("b7a8r", False), ("b7a8", False), ("b7b8q", False)])
def test_promotion_as_best_move(move, right):
    positions = [Position("", moves(PROMOTES)[:16], moves("b7a8q"))]
    assert chess_eval.best_move_rate(Player(Always(8, {move: 1})), positions, Ranks()) == right


def test_an_illegal_game_in_the_shards():
    with pytest.raises(chess_eval.RunError, match="here has the illegal move e2e5: give shards of chess games"):
        chess_eval.legal_rates(Player(Always(0, {"e2e4": 1})), [Position("here", moves("e2e5"), [])], Ranks())


@pytest.mark.parametrize(
    ("tokens", "game"),
    [
        ([*moves("e2e4 e7e5"), END_OF_TEXT, 5], (moves("e2e4 e7e5"), True)),
        ([*moves("e2e4"), 99, END_OF_TEXT], ([*moves("e2e4"), 99], True)),
        (moves("e2e4 e7e5"), (moves("e2e4 e7e5"), False)),
        (moves("e2e4 e7e5")[:3], (moves("e2e4"), False)),  # cut off in a move
        (moves(PROMOTES)[:-1], (moves(PROMOTES)[:16], False)),
        (moves("e2e4 e2e4")[:3], (moves("e2e4 e2e4")[:3], False)),  # no legal move begins so
        ([*moves("e2e4 e7e5")[:3], END_OF_TEXT], (moves("e2e4 e7e5")[:3], True)),
        ([], ([], False)),
    ],
)
def test_where_a_game_ends(tokens, game):
    assert chess_eval.read_game(iter(tokens)) == game


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def save_model_of_chess():
    model = build((CONTEXT, 72, 1, 1, 16, 1, CONTEXT))
    save_model("chess.bin", ModelShape(CONTEXT, 72, 128, 1, 1, 16), "fp32", model.parameters())


def test_llmc_eval(directory, capsys):
    """A model of random weights knows no rules."""
    save_model_of_chess()
    write_shard(directory / "g.bin", [token for game in FOUR_PLIES for token in (END_OF_TEXT, *moves(game))])
    Path("p.txt").write_text(f"{FOOLS_MATE}\n{PROMOTES}\n")
    flags = "--chess-shards g.bin --min-plies 3 --games 5 --chess-positions p.txt --json r.json"
    evaluate(["-e", "chess.bin", *flags.split()])
    result = json.loads(Path("r.json").read_text())
    rates = {"legal_moves_greedy": 0, "legal_moves_sampled": 0, "legal_games": 0, "best_moves": 0}
    assert result == {"model": "chess.bin", "chess": {"positions": 3, "games": 5, "best_move_positions": 2, **rates}}
    assert capsys.readouterr().out == (
        "legal moves, after 3 plies or more of 3 games: likeliest 0.000000 | sampled 0.000000\n"
        "legal games, of 5 sampled: 0.000000\n"
        "best moves, of 2 positions: 0.000000\n"
    )
    with pytest.raises(SystemExit):
        cli.run("llmc-eval", evaluate, ["-e", "chess.bin", "--chess-shards", "g.bin"])
    assert "g.bin: no game goes on after 10 plies within the model's context of 64" in capsys.readouterr().err


MATE = """\
1. f2f3 e7e5 2. g2g4 d8h4
4 moves, all legal; 0-1 checkmate
8  r  n  b  .  k  b  n  r
7  p  p  p  p  .  p  p  p
6  .  .  .  .  .  .  .  .
5  .  .  .  .  p  .  .  .
4  .  .  .  .  .  .  P  q
3  .  .  .  .  .  P  .  .
2  P  P  P  P  P  .  .  P
1  R  N  B  Q  K  B  N  R"""
ILLEGAL = """\
1. e2e4 e7e5
illegal: 2. e4e5, after 2 legal moves
8  r  n  b  q  k  b  n  r
7  p  p  p  p  .  p  p  p
6  .  .  .  .  .  .  .  .
5  .  .  .  . [p] .  .  .
4  .  .  .  . [P] .  .  .
3  .  .  .  .  .  .  .  .
2  P  P  P  P  .  P  P  P
1  R  N  B  Q  K  B  N  R"""


def test_report():
    assert _report(moves(FOOLS_MATE), True) == MATE
    assert _report(moves("e2e4 e7e5 e4e5 e8e7"), True) == ILLEGAL
    lines = _report(moves("e2e4 e7e6 d2d4 e6e4"), False).splitlines()
    assert lines[:2] == ["1. e2e4 e7e6 2. d2d4", "illegal: 2... e6e4, after 3 legal moves"]
    assert _report(moves("e2e4"), True).splitlines()[1] == "1 move, all legal; the game ends here"
    assert _report(moves("e2e4"), False).splitlines()[1] == "1 move, all legal; cut off here"


def test_llmc_sample(capsys):
    save_model_of_chess()
    for flags in ([], ["--board"]):
        sample(["-e", "chess.bin", "--prompt", "e2e4  e7e5", "--num-samples", "2", *flags])
        games = capsys.readouterr().out.split("---\n")
        assert len(games) == 2
        for game in games:
            assert game.startswith("1. e2e4 e7e5") and len(game.splitlines()) == 10
            assert re.search(r"^illegal: 2\.", game, re.M)
    for arguments, message in (
        (["--stop", "x"], "--stop and --ignore-eot are for text"),
        (["--prompt", "e4"], "'e4' is no move: write moves such as e2e4"),
    ):
        with pytest.raises(SystemExit):
            cli.run("llmc-sample", sample, ["-e", "chess.bin", *arguments])
        assert message in capsys.readouterr().err
