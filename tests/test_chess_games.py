"""From PGN and UCI text to tokens: hand-written games, every reason to drop one, and python-chess's own PGN."""

import io
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from llmc import _C

END_OF_TEXT = 2

CASTLING = """[Event "Rated Rapid game"]
[Site "https://lichess.org/abcdefgh"]
[White "A \\"quoted\\" name]"]
[Result "1/2-1/2"]
[WhiteElo "1500"]
[BlackElo "1620"]
[TimeControl "600+0"]

1. e4 { [%clk 0:10:00] } 1... e5 $1 2. Nf3 Nc6
(2... Nf6 {Petrov ) ;} (2... d6 3. d4 (3. Bc4 ; to the end of the line ) {
Be7) exd4) 3. Nxe5) 3.Bc4 Bc5 4. 0-0 Nf6 $14 5.d3 O-O!? 1/2-1/2
"""
EN_PASSANT = """[Event "Casual Blitz game"]
[WhiteElo "900"]
[BlackElo "?"]
[TimeControl "180+5"]

% an escaped line { (
1. e4 a6 2. e5 d5 3. exd6 e.p. h6 4. dxc7 h5?? 5. cxd8=Q+ ! Kxd8 1-0
"""
UNDERPROMOTION = """[Event "rated by nobody"]
[TimeControl "-"]

1.Nf3 h5 2.Nd4 h4 3.Nb3 h3 4.Na5 hxg2 5.Nb3 gxh1n {done} 0-1 {a comment after the result}
"""
FOOLS_MATE = """[Event "Rated Bullet game"]
[TimeControl "60+1"]
[WhiteElo "1200"]
[BlackElo "1300"]

1. f3 e5 2. g4 Qh4# 0-1
"""
MOVES = {
    CASTLING: "e2e4 e7e5 g1f3 b8c6 f1c4 f8c5 e1g1 g8f6 d2d3 e8g8",
    EN_PASSANT: "e2e4 a7a6 e4e5 d7d5 e5d6 h7h6 d6c7 h6h5 c7d8q e8d8",
    UNDERPROMOTION: "g1f3 h7h5 f3d4 h5h4 d4b3 h4h3 b3a5 h3g2 a5b3 g2h1n",
    FOOLS_MATE: "f2f3 e7e5 g2g4 d8h4",
}
GAMES = list(MOVES)


def tokens_of(game: str) -> list[int]:
    """By the description of the vocabulary: 4 + file + 8 * rank, then Q B R N."""
    tokens = [END_OF_TEXT]
    for move in game.split():
        for file, rank in (move[:2], move[2:4]):
            tokens.append(4 + "abcdefgh".index(file) + 8 * (int(rank) - 1))
        tokens += [68 + "qbrn".index(letter) for letter in move[4:].lower()]
    return tokens


def check(
    result: tuple[np.ndarray, dict[str, int]], games: Sequence[str], dropped: dict[str, int] | None = None
) -> None:
    tokens, counts = result
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [token for game in games for token in tokens_of(game)]
    assert counts == {**({"kept": len(games)} if games else {}), **(dropped or {})}


def test_pgn() -> None:
    for game in GAMES:
        check(_C.chess.encode_pgn(game.encode()), [MOVES[game]])
    check(_C.chess.encode_pgn("\n".join(GAMES).encode()), list(MOVES.values()))
    check(_C.chess.encode_pgn(b"\xef\xbb\xbf" + "\n".join(GAMES).replace("\n", "\r\n").encode()), list(MOVES.values()))
    check(_C.chess.encode_pgn(b""), [])
    check(_C.chess.encode_pgn(b" \n\n% nothing\n; here\n"), [])
    # Neither tags nor lines, and names in whatever encoding
    check(_C.chess.encode_pgn(b"1.e4 *1.d4 d5 *"), ["e2e4", "d2d4 d7d5"])
    check(_C.chess.encode_pgn(b'[White "a"]\n1. e4 e5\n\n[White "b"]\n1. d4 *'), ["d2d4"], {"no result": 1})
    check(_C.chess.encode_pgn(b'[White "M\xfcller"]\n1.e4 *'), ["e2e4"])


def test_tokens_by_hand() -> None:
    tokens, _ = _C.chess.encode_pgn(EN_PASSANT.encode())
    # <eot> e2 e4 a7 a6 e4 e5 d7 d5 e5 d6 h7 h6 d6 c7 h6 h5 c7 d8 Q e8 d8
    assert tokens.tolist() == [2, 16, 32, 52, 44, 32, 40, 55, 39, 40, 47, 59, 51, 47, 54, 51, 43, 54, 63, 68, 64, 63]


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        ("1. e4 e5 2. Ke3 1-0", "illegal move"),
        ("1. e4 e5 2. Qh5 Ke7 3. Qxe5 1-0", None),  # the same is fine where it is legal
        ("1. f3 e5 2. g4 Qh4 3. a3 0-1", "illegal move"),  # after checkmate
        ("1. Nf3 a6 2. d3 a5 3. Nd2 *", "ambiguous move"),
        ("1. e4 e5 2. Nf3?x 1-0", "unreadable"),
        ("1. e4 -- 2. d4 1-0", "illegal move"),  # a null move
        ("1. e4 0000 d5 1-0", "illegal move"),
        ("1. e4 e5 2. Z0 d5 1-0", "illegal move"),
        ("1. e4 {an open comment 1-0", "unreadable"),
        ("1. e4 (1. d4 1-0", "unreadable"),
        ("1. e4 ) e5 1-0", "unreadable"),
        ("1. e4 } e5 1-0", "unreadable"),
        ("12e4 1-0", "unreadable"),
        ("1. e4 [%clk 1:0] e5 1-0", "unreadable"),
        ("1. e4 e5", "no result"),
        ("", "no result"),
        ("1-0", "too short"),
        ("{nobody came} *", "too short"),
    ],
)
def test_broken_game(moves: str, reason: str | None) -> None:
    """It is counted, and does no harm to the games around it."""
    text = f'{CASTLING}\n[Event "broken"]\n\n{moves}\n\n{FOOLS_MATE}'
    result = _C.chess.encode_pgn(text.encode())
    if reason is None:
        assert result[1] == {"kept": 3}
    else:
        check(result, [MOVES[CASTLING], MOVES[FOOLS_MATE]], {reason: 1})


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ('[Variant "Chess960"]', "not standard chess"),
        ('[Variant "Standard"]', None),
        ('[FEN "8/8/4k3/8/8/3KN3/8/8 w - - 0 1"]', "not standard chess"),
        ('[FEN "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"]', None),
        ('[Opening "no end]', "unreadable"),
        ('[Opening "no bracket"\n[Variant "Atomic"]', "not standard chess"),
        ('[Opening "a"] [Variant "Atomic"]', "not standard chess"),
        ('[Opening "\\"]\n[Variant "Atomic"]', "unreadable"),
    ],
)
def test_tags(tags: str, reason: str | None) -> None:
    text = f'[Event "x"]\n{tags}\n\n1. e4 *\n\n{FOOLS_MATE}'
    kept = [MOVES[FOOLS_MATE]] if reason else ["e2e4", MOVES[FOOLS_MATE]]
    check(_C.chess.encode_pgn(text.encode()), kept, {reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("filter", "kept", "reason"),
    [
        ({"rated": True}, [CASTLING, FOOLS_MATE], "not rated"),
        ({"min_elo": 1500}, [CASTLING], "Elo rating"),
        ({"min_elo": 1501}, [], "Elo rating"),
        ({"max_elo": 1620}, [CASTLING, FOOLS_MATE], "Elo rating"),
        ({"max_elo": 1619}, [FOOLS_MATE], "Elo rating"),
        ({"time_control": "600+0"}, [CASTLING], "time control"),
        ({"time_control": "600"}, [], "time control"),
        ({"time_control": "rapid"}, [CASTLING], "time control"),
        ({"time_control": "blitz"}, [EN_PASSANT], "time control"),  # 180 + 40 * 5 = 380 seconds
        ({"time_control": "bullet"}, [FOOLS_MATE], "time control"),
        ({"time_control": "correspondence"}, [UNDERPROMOTION], "time control"),
        ({"min_plies": 5}, [CASTLING, EN_PASSANT, UNDERPROMOTION], "too short"),
        ({"min_plies": 11}, [], "too short"),
        ({"promotions": True}, [EN_PASSANT, UNDERPROMOTION], "no promotion"),
    ],
)
def test_filters(filter: dict[str, object], kept: list[str], reason: str) -> None:
    result = _C.chess.encode_pgn("\n".join(GAMES).encode(), **filter)
    check(result, [MOVES[game] for game in kept], {reason: len(GAMES) - len(kept)})


@pytest.mark.parametrize(
    ("control", "time"),
    [  # Lichess: ultrabullet < 30 s <= bullet < 180 s <= blitz < 480 s <= rapid < 1500 s <= classical
        ("29+0", "ultrabullet"),
        ("30+0", "bullet"),
        ("0+4", "bullet"),
        ("179+0", "bullet"),
        ("180+0", "blitz"),
        ("60+3", "blitz"),
        ("479+0", "blitz"),
        ("480+0", "rapid"),
        ("1499", "rapid"),
        ("1500+0", "classical"),
        ("900+15", "classical"),
        ("40/7200:3600", None),
        ("?", None),
    ],
)
def test_time_classes(control: str, time: str | None) -> None:
    game = f'[TimeControl "{control}"]\n\n1. e4 *'.encode()
    for name in ("ultrabullet", "bullet", "blitz", "rapid", "classical", "correspondence"):
        check(
            _C.chess.encode_pgn(game, time_control=name),
            ["e2e4"] if name == time else [],
            {} if name == time else {"time control": 1},
        )


@pytest.mark.parametrize("tag", ["[A\n", "[A \n", '[A "b"\n'])
def test_tags_that_do_not_end_take_linear_time(tag: str) -> None:
    """Hundredths of a second; a search to the end of the text from each line takes seconds or minutes."""
    text = tag.encode() * 500_000
    begin = time.process_time()
    _, counts = _C.chess.encode_pgn(text)
    assert time.process_time() - begin < 1
    assert sum(counts.values()) == 1 and "kept" not in counts


def test_uci() -> None:
    lines = list(MOVES.values())
    check(_C.chess.encode_uci("\n".join(lines).encode()), lines)
    check(_C.chess.encode_uci(b"\r\n e2e4\te7e5 \r\n\n\nd2d4\n"), ["e2e4 e7e5", "d2d4"])
    check(_C.chess.encode_uci(b""), [])
    upper = MOVES[UNDERPROMOTION].replace("g2h1n", "g2h1N")
    check(_C.chess.encode_uci(upper.encode()), [MOVES[UNDERPROMOTION]])
    text = "e2e4 e7e5\ne2e4 e2e4\ne2e4 e9\ne1h1\n" + MOVES[EN_PASSANT] + "\ne2e4 e7e5 g1f3\n"
    check(_C.chess.encode_uci(text.encode(), min_plies=3), [MOVES[EN_PASSANT], "e2e4 e7e5 g1f3"],
          {"illegal move": 2, "unreadable": 1, "too short": 1})  # fmt: skip
    check(_C.chess.encode_uci("\n".join(lines).encode(), promotions=True), lines[1:3], {"no promotion": 2})


def test_replay_gives_the_same_moves() -> None:
    for game in MOVES.values():
        tokens = tokens_of(game)[1:]
        moves, used, fen = _C.chess.replay(tokens)
        assert (moves, used) == (game.split(), len(tokens))
        _, _, position = _C.chess.replay([])
        for move in moves:
            position = _C.chess.make_move(position, move)
        assert position == fen


def random_game(chess, generator: random.Random):
    """A game with comments and variations, as python-chess writes it."""
    game = chess.pgn.Game()
    node, board = game, chess.Board()
    for _ in range(generator.randrange(1, 200)):
        moves = list(board.legal_moves)
        if not moves:
            break
        move = generator.choice([m for m in moves if board.is_capture(m) or m.promotion] or moves)
        if generator.random() < 0.1:
            node.add_variation(generator.choice(moves), comment="(so to speak")
        node = node.add_main_variation(move)
        if generator.random() < 0.1:
            node.comment, node.nags = "1. e4 [%eval 0.1] 1-0", {generator.randrange(1, 140)}
        board.push(move)
    game.headers["Result"] = board.result()
    return game


def test_python_chess_pgn() -> None:
    chess = pytest.importorskip("chess")
    pytest.importorskip("chess.pgn")
    generator = random.Random(2)
    games = [random_game(chess, generator) for _ in range(60)]
    expected = [" ".join(move.uci() for move in game.mainline_moves()) for game in games]
    assert {letter for game in expected for move in game.split() for letter in move[4:]} >= set("qn")
    text = "\n\n".join(str(game) for game in games)
    check(_C.chess.encode_pgn(text.encode()), expected)
    check(_C.chess.encode_uci("\n".join(expected).encode()), expected)
    # and what it reads of our own text
    for text, moves in MOVES.items():
        game = chess.pgn.read_game(io.StringIO(text))
        if "%" not in text or text == CASTLING:
            assert " ".join(move.uci() for move in game.mainline_moves()) == moves and not game.errors
