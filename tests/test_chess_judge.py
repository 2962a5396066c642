"""Judging games that a model has written."""

import numpy as np
import pytest

from llmc.chess.judge import Judged, judge, legal_moves, render
from llmc.errors import RunError

PAD, START_OF_TEXT, END_OF_TEXT = 0, 1, 2
Q, B, R, N = 68, 69, 70, 71
START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"


def squares(text: str) -> list[int]:
    """Tokens of squares that follow each other: 4 + file + 8 * rank."""
    return [4 + "abcdefgh".index(f) + 8 * (int(r) - 1) for f, r in zip(text[::2], text[1::2], strict=True)]


FOOLS_MATE = squares("f2f3e7e5g2g4d8h4")
BEFORE_PROMOTION = squares("e2e4a7a6e4e5d7d5e5d6h7h6d6c7h6h5")
AFTER_E4 = "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"


@pytest.mark.parametrize(
    ("tokens", "moves", "illegal"),
    [
        ([], [], None),
        (squares("e2e4"), ["e2e4"], None),
        (squares("e2e4e2e4"), ["e2e4"], "e2e4"),
        (squares("e2e4e7"), ["e2e4"], "e7"),
        ([*squares("e2e4"), Q], ["e2e4"], "Q"),
        ([*squares("e2e4e7e5"), N, *squares("g1f3")], ["e2e4", "e7e5"], "N"),
        ([*squares("e2e4e7"), Q], ["e2e4"], "e7Q"),
        ([*squares("e2e4e7e4"), Q], ["e2e4"], "e7e4q"),
        (squares("e2e4e7e4e5"), ["e2e4"], "e7e4"),
        ([*squares("e2e4"), END_OF_TEXT, *squares("e2e4")], ["e2e4"], "<|endoftext|>"),
        ([*squares("e2e4e7"), PAD], ["e2e4"], "e7<|pad|>"),
        ([START_OF_TEXT], [], "<|startoftext|>"),
        ([72], [], "<token 72>"),
        ([-1], [], "<token -1>"),
    ],
)
def test_judge(tokens: list[int], moves: list[str], illegal: str | None) -> None:
    judged = judge(tokens)
    assert (judged.moves, judged.illegal, judged.result) == (moves, illegal, None)
    if moves == ["e2e4"]:
        assert judged.board == AFTER_E4
    assert judge(np.array(tokens, dtype=np.int32)) == judged


def test_promotion() -> None:
    moves = ["e2e4", "a7a6", "e4e5", "d7d5", "e5d6", "h7h6", "d6c7", "h6h5"]
    assert judge(BEFORE_PROMOTION)[:2] == (moves, None)
    for piece, letter in ((Q, "q"), (B, "b"), (R, "r"), (N, "n")):
        assert judge([*BEFORE_PROMOTION, *squares("c7d8"), piece])[:2] == ([*moves, f"c7d8{letter}"], None)
    assert judge([*BEFORE_PROMOTION, *squares("c7d8")])[:2] == (moves, "c7d8")  # to what?
    assert judge([*BEFORE_PROMOTION, *squares("c7d8a1")])[:2] == (moves, "c7d8")
    assert judge([*BEFORE_PROMOTION, *squares("c7c8"), Q])[:2] == (moves, "c7c8q")


def test_results() -> None:
    moves = ["f2f3", "e7e5", "g2g4", "d8h4"]
    board = "rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3"
    assert judge(FOOLS_MATE) == Judged(moves, None, "0-1 checkmate", board)
    assert judge([*FOOLS_MATE, *squares("a2a3")]) == Judged(moves, "a2a3", "0-1 checkmate", board)
    scholars_mate = squares("e2e4e7e5f1c4b8c6d1h5g8f6h5f7")
    assert judge(scholars_mate).result == "1-0 checkmate"
    # the shortest known stalemate
    stalemate = squares("e2e3a7a5d1h5a8a6h5a5h7h5h2h4a6h6a5c7f7f6c7d7e8f7d7b7d8d3b7b8d3h7b8c8f7g6c8e6")
    assert judge(stalemate)[1:3] == (None, "1/2-1/2 stalemate")


def test_legal_moves() -> None:
    first = legal_moves([])
    assert len(first) == 20 and squares("e2e4") in first and squares("g1f3") in first
    assert legal_moves(FOOLS_MATE) == []
    promoting = legal_moves(BEFORE_PROMOTION)
    assert {tuple(move) for move in promoting if len(move) == 3} == {
        (*squares("c7" + to), piece) for to in ("b8", "d8") for piece in (Q, B, R, N)
    }
    assert all(judge([*BEFORE_PROMOTION, *move]).illegal is None for move in promoting)
    assert legal_moves(squares("e2e5")) == legal_moves(squares("e2")) == []


BOARD = """\
8  r  n  b  q  k  b  n  r
7  p  p  p  p  p  p  p  p
6  .  .  .  .  .  .  .  .
5  .  .  .  .  .  .  .  .
4  .  .  .  .  P  .  .  .
3  .  .  .  .  .  .  .  .
2  P  P  P  P  .  P  P  P
1  R  N  B  Q  K  B  N  R"""


def test_render() -> None:
    assert render(AFTER_E4) == BOARD
    marked = BOARD.replace("7  p  p  p  p  p ", "7  p  p  p  p [p]").replace("4  .  .  .  .  P ", "4  .  .  .  . [P]")
    assert render(AFTER_E4, "e7e4") == render(AFTER_E4, "e7e4q") == marked
    assert render(AFTER_E4, "<|endoftext|>") == render(AFTER_E4, "Q") == BOARD
    with pytest.raises(RunError, match="FEN 'x': it needs 4 fields"):
        render("x")
