"""How well a model of chess knows the rules, and finds the best move: by the moves that it goes on with.

A game is tokens: end-of-text, then two squares a move and a promotion if there is one. `llmc.chess` knows the rules.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from llmc.data.shards import read_shard
from llmc.errors import RunError
from llmc.models import CHESS_VOCAB_SIZE, END_OF_TEXT_IDS
from llmc.multiple_choice import turns
from llmc.prompt import encode_moves
from llmc.ranks import Ranks
from llmc.sample import MASK_64, Model, Sampling, XorShift, tokens_after

END_OF_TEXT = END_OF_TEXT_IDS[CHESS_VOCAB_SIZE]
PROMOTIONS = range(68, CHESS_VOCAB_SIZE)
MOVE_TOKENS = 3  # at most
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2**64: its multiples are far apart

Choose: TypeAlias = Callable[[np.ndarray], int]  # the next token, from its logits


class Position(NamedTuple):
    """What a model is asked to go on from."""

    where: str  # it comes from, for errors
    tokens: list[int]  # of the moves so far
    best: list[int]  # the move to find


def coins_of(number: int) -> XorShift:
    """Draws of their own for each game, so that they do not depend on who does which."""
    return XorShift((number + 1) * GOLDEN_RATIO & MASK_64)


def held_out_positions(paths: Sequence[Path], min_plies: int, count: int, context: int) -> list[Position]:
    """One position of each of the first `count` games that go on after `min_plies` moves, at a move that is drawn.

    context: of the model, which must hold the position and a move. RunError if there is no such game.
    """
    positions: list[Position] = []
    for where, game in games(paths):
        starts = [start for start in move_starts(game) if 1 + start + MOVE_TOKENS <= context]
        if len(starts) <= min_plies:
            continue
        coin = coins_of(len(positions)).uniform()
        ply = min_plies + int(coin * (len(starts) - min_plies))
        positions.append(Position(where, game[: starts[ply]], []))
        if len(positions) == count:
            break
    if not positions:
        raise RunError(
            f"{paths[0]}: no game goes on after {min_plies} plies within the model's context of {context} tokens: "
            "lower --min-plies, or give other shards"
        )
    return positions


def games(paths: Sequence[Path]) -> Iterator[tuple[str, list[int]]]:
    """The tokens of each game that is complete in a shard, and where it is."""
    for path in paths:
        tokens = np.asarray(read_shard(path))
        bounds = [*np.flatnonzero(tokens == END_OF_TEXT), len(tokens)]
        for number, (begin, end) in enumerate(pairwise(bounds)):
            if end < len(tokens) or path == paths[-1]:
                yield f"{path}: game {number}", tokens[begin + 1 : end].tolist()


def move_starts(game: Sequence[int]) -> list[int]:
    """Where each move begins."""
    starts, at = [], 0
    while at + 1 < len(game):
        starts.append(at)
        at += 3 if at + 2 < len(game) and game[at + 2] in PROMOTIONS else 2
    return starts


def read_positions(path: str, context: int) -> list[Position]:
    """The positions of a file: a line has the moves of a game so far, in UCI's notation, then the best move.

    RunError, with the line, for what is no legal move or does not fit into the model's context.
    """
    from llmc.chess.judge import judge, legal_moves

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read --chess-positions {path}: {getattr(error, 'strerror', None) or error}") from error
    positions = []
    for number, line in enumerate(lines, 1):
        where, moves = f"{path}, line {number}", line.split()
        if not moves:
            continue
        try:
            tokens, best = encode_moves(moves[:-1]), encode_moves(moves[-1:])
        except RunError as error:
            raise RunError(f"{where}: {error}") from None
        illegal = judge(tokens).illegal
        if illegal is not None or best not in legal_moves(tokens):
            raise RunError(f"{where}: {illegal or moves[-1]} is not legal there: correct or remove the line")
        if 1 + len(tokens) + MOVE_TOKENS > context:
            raise RunError(f"{where}: {len(tokens)} tokens, too many for the model's context of {context}: remove it")
        positions.append(Position(where, tokens, best))
    if not positions:
        raise RunError(f"{path} holds no position: a line has moves such as e2e4 e7e5, and then the best move")
    return positions


def legal_rates(model: Model, positions: Sequence[Position], ranks: Ranks) -> tuple[float, float]:
    """Of how many positions the model's likeliest move is legal, and of how many one drawn from its distribution."""
    from llmc.chess.judge import judge, legal_moves

    greedy = sampled = 0
    for number, counts in turns(len(positions), ranks, "legal moves"):
        where, tokens, _ = positions[number]
        if (illegal := judge(tokens).illegal) is not None:
            raise RunError(f"{where} has the illegal move {illegal}: give shards of chess games")
        legal = legal_moves(tokens)
        likeliest = next_move(model, tokens, legal, take_likeliest)
        coins = coins_of(number)
        coins.uniform()  # this one has chosen the position
        drawn = next_move(model, tokens, legal, draw(coins))
        if counts:
            greedy += likeliest in legal
            sampled += drawn in legal
    found = ranks.gather([greedy, sampled], "legal moves")
    return sum(g for g, _ in found) / len(positions), sum(s for _, s in found) / len(positions)


def best_move_rate(model: Model, positions: Sequence[Position], ranks: Ranks) -> float:
    """Of how many positions the model's likeliest move is the best one."""
    from llmc.chess.judge import legal_moves

    right = 0
    for number, counts in turns(len(positions), ranks, "best moves"):
        _, tokens, best = positions[number]
        move = next_move(model, tokens, legal_moves(tokens), take_likeliest)
        right += counts and move == best
    return float(sum(ranks.gather(right, "best moves"))) / len(positions)


def take_likeliest(logits: np.ndarray) -> int:
    return Sampling(temperature=0).choose(logits, 0)


def draw(coins: XorShift) -> Choose:
    return lambda logits: Sampling().choose(logits, coins.uniform())


def next_move(model: Model, tokens: Sequence[int], legal: list[list[int]], choose: Choose) -> list[int]:
    """The move that the model goes on with after `tokens`, token by token as `choose` says: legal or not."""
    following = tokens_after(model, [END_OF_TEXT, *tokens], choose)
    move = list(islice(following, 2))
    if any(len(other) > 2 and other[:2] == move for other in legal):
        move.append(next(following))
    return move


def legal_game_rate(model: Model, count: int, context: int, ranks: Ranks) -> float:
    """Of how many games, drawn from the model's distribution from the first move on, all moves are legal."""
    from llmc.chess.judge import judge

    right = 0
    for number, counts in turns(count, ranks, "legal games"):
        following = tokens_after(model, [END_OF_TEXT], draw(coins_of(number)))
        game, _ = read_game(islice(following, context - 1))
        judged = judge(game)
        right += counts and judged.illegal is None and len(judged.moves) > 0
    return float(sum(ranks.gather(right, "legal games"))) / count


def read_game(tokens: Iterator[int]) -> tuple[list[int], bool]:
    """The tokens of a game up to its end, and whether it has one; otherwise without a move that is not complete."""
    game: list[int] = []
    for token in tokens:
        if token == END_OF_TEXT:
            return game, True
        game.append(token)
    return complete(game), False


def complete(game: list[int]) -> list[int]:
    """A game that was cut off, without the beginning of a legal move at its end."""
    from llmc import _C
    from llmc.chess.judge import legal_moves

    _, used, _ = _C.chess.replay(game)
    before, rest = game[:used], game[used:]
    begins = any(len(move) > len(rest) and move[: len(rest)] == rest for move in legal_moves(before))
    return before if begins else game
