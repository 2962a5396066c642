"""What games that a model has written are worth: which moves are legal, how the game ends, how the board looks.

A game is tokens of the chess vocabulary: two squares a move, and the piece of a promotion; no end-of-text.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llmc import _C
from llmc.errors import RunError
from llmc.prompt import encode_moves
from llmc.tokenizer import chess_token_bytes

TOKENS = [token.decode() for token in chess_token_bytes()]
SQUARES = frozenset(TOKENS[4:68])
PROMOTIONS = frozenset(TOKENS[68:])
ENDS = ("checkmate", "stalemate", "insufficient material")


class Judged(NamedTuple):
    """A game up to its first illegal move; that move's index, counted from 0, is len(moves)."""

    moves: list[str]  # UCI, legal ones
    illegal: str | None  # the first tokens that are no legal move, as text; a move cut off in its middle counts
    result: str | None  # "1-0 checkmate", "1/2-1/2 stalemate", ... where the rules end the game after `moves`
    board: str  # after `moves`, FEN


def judge(tokens: Sequence[int]) -> Judged:
    """Judge one game's tokens."""
    ids = [int(token) for token in tokens]
    moves, used, fen = _C.chess.replay(ids)
    illegal = _first_move_as_text(ids[used:]) if used < len(ids) else None
    return Judged(moves, illegal, _result(fen), fen)


def legal_moves(tokens: Sequence[int]) -> list[list[int]]:
    """Return the tokens of each legal move after the game so far; none if that has an illegal move itself."""
    ids = [int(token) for token in tokens]
    _, used, fen = _C.chess.replay(ids)
    return [encode_moves([move]) for move in _C.chess.legal_moves(fen)] if used == len(ids) else []


def render(fen: str, illegal: str | None = None) -> str:
    """Return the board as 8 lines, White's pieces as capitals, brackets around the squares of an illegal move.

    RunError if the position is none.
    """
    try:
        _C.chess.state(fen)
    except _C.Error as error:
        raise RunError(str(error)) from None
    marked = {illegal[at : at + 2] for at in (0, 2)} if illegal else set()
    lines = []
    for rank, row in zip("87654321", fen.split()[0].split("/"), strict=True):
        pieces = "".join("." * int(character) if character.isdigit() else character for character in row)
        cells = [
            f"[{piece}]" if file + rank in marked else f" {piece} "
            for file, piece in zip("abcdefgh", pieces, strict=True)
        ]
        lines.append(f"{rank} {''.join(cells)}".rstrip())
    return "\n".join(lines)


def _result(fen: str) -> str | None:
    state = _C.chess.state(fen)
    if state not in ENDS:
        return None
    if state != "checkmate":
        return f"1/2-1/2 {state}"
    return f"{'0-1' if fen.split()[1] == 'w' else '1-0'} {state}"


def _first_move_as_text(ids: list[int]) -> str:
    """The tokens at the beginning that belong together: two squares, or what stands in the place of one."""
    names = [TOKENS[id] if 0 <= id < len(TOKENS) else f"<token {id}>" for id in ids[:3]]
    if names[0] not in SQUARES:
        return names[0]
    text = "".join(names[:2])
    if len(names) == 3 and names[1] in SQUARES and names[2] in PROMOTIONS:
        text += names[2].lower()
    return text
