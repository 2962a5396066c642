"""The rules of chess: published node counts, positions by hand, and python-chess in random games."""

import random

import pytest

from llmc import _C

START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1"
CASTLING = "r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1"


@pytest.mark.parametrize(
    ("fen", "nodes"),
    [  # the six positions of the chess programming wiki
        (START, [20, 400, 8902, 197281, 4865609]),
        ("r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R w KQkq -", [48, 2039, 97862, 4085603]),
        ("8/2p5/3p4/KP5r/1R3p1k/8/4P1P1/8 w - -", [14, 191, 2812, 43238, 674624]),
        ("r3k2r/Pppp1ppp/1b3nbN/nP6/BBP1P3/q4N2/Pp1P2PP/R2Q1RK1 w kq - 0 1", [6, 264, 9467, 422333]),
        ("r2q1rk1/pP1p2pp/Q4n2/bbp1p3/Np6/1B3NBn/pPPP1PPP/R3K2R b KQ - 0 1", [6, 264, 9467, 422333]),
        ("rnbq1k1r/pp1Pbppp/2p5/8/2B5/8/PPP1NnPP/RNBQK2R w KQ - 1 8", [44, 1486, 62379, 2103487]),
        ("r4rk1/1pp1qppp/p1np1n2/2b1p1B1/2B1P1b1/P1NP1N2/1PP1QPPP/R4RK1 w - - 0 10", [46, 2079, 89890, 3894594]),
    ],
)
def test_perft(fen: str, nodes: list[int]) -> None:
    assert [_C.chess.perft(fen, depth) for depth in range(len(nodes) + 1)] == [1, *nodes]


def after(fen: str, *moves: str) -> str:
    for move in moves:
        fen = _C.chess.make_move(fen, move)
    return fen


@pytest.mark.parametrize(
    ("moves", "fen"),
    [
        ([], START),
        # en passant is told only where a pawn can take
        (["e2e4"], "rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"),
        (["e2e4", "a7a6", "e4e5", "d7d5"], "rnbqkbnr/1pp1pppp/p7/3pP3/8/8/PPPP1PPP/RNBQKBNR w KQkq d6 0 3"),
        (["e2e4", "a7a6", "e4e5", "d7d5", "e5d6"], "rnbqkbnr/1pp1pppp/p2P4/8/8/8/PPPP1PPP/RNBQKBNR b KQkq - 0 3"),
        (["g1f3", "b8c6", "h1g1"], "r1bqkbnr/pppppppp/2n5/8/8/5N2/PPPPPPPP/RNBQKBR1 b Qkq - 3 2"),
    ],
)
def test_positions(moves: list[str], fen: str) -> None:
    assert after(START, *moves) == fen


def test_counting_ends_before_it_overflows() -> None:
    fen = after("4k3/8/8/8/8/8/8/4K3 w - - 999999 1000000", "e1d1", "e8d8")
    assert fen == "3k4/8/8/8/8/8/8/3K4 w - - 1000000 1000000"
    assert after(fen, "d1e1") == "3k4/8/8/8/8/8/8/4K3 b - - 1000000 1000000"


@pytest.mark.parametrize(
    ("fen", "castling"),
    [
        (CASTLING, {"e1g1", "e1c1"}),
        (CASTLING.replace("w", "b"), {"e8g8", "e8c8"}),
        (CASTLING.replace("KQkq", "Qkq"), {"e1c1"}),
        (CASTLING.replace("KQkq", "-"), set()),
        ("r3k2r/8/8/4r3/8/8/8/R3K2R w KQkq - 0 1", set()),  # out of check
        ("r3k2r/8/8/5r2/8/8/8/R3K2R w KQkq - 0 1", {"e1c1"}),  # through f1
        ("r3k2r/8/8/6r1/8/8/8/R3K2R w KQkq - 0 1", {"e1c1"}),  # into g1
        ("r3k2r/8/8/1r5r/8/8/8/R3K2R w KQkq - 0 1", {"e1g1", "e1c1"}),  # the rooks may be attacked, and pass b1
        ("r3k2r/8/8/8/8/8/8/RN2K1NR w KQkq - 0 1", set()),
    ],
)
def test_castling(fen: str, castling: set[str]) -> None:
    king = "e1" if " w " in fen else "e8"
    assert {move for move in _C.chess.legal_moves(fen) if move[:2] == king and move[2] in "gc"} == castling


def test_castling_moves_the_rook_and_ends_the_right() -> None:
    assert after(CASTLING, "e1c1", "e8g8") == "r4rk1/8/8/8/8/8/8/2KR3R w - - 2 2"
    assert after(CASTLING, "h1h8", "e8e7") == "r6R/4k3/8/8/8/8/8/R3K3 w Q - 1 2"  # a rook that was taken cannot castle


@pytest.mark.parametrize(
    ("fen", "state"),
    [
        (START, "ongoing"),
        ("rnb1kbnr/pppp1ppp/8/4p3/6Pq/5P2/PPPPP2P/RNBQKBNR w KQkq - 1 3", "checkmate"),
        ("7k/5Q2/6K1/8/8/8/8/8 b - - 0 1", "stalemate"),
        ("8/8/4k3/8/8/3K4/8/8 w - - 0 1", "insufficient material"),
        ("8/8/4k3/8/8/3KN3/8/8 w - - 0 1", "insufficient material"),
        ("8/8/3bk3/8/8/3KB3/8/8 w - - 0 1", "insufficient material"),  # bishops on squares of one colour
        ("8/8/2b1k3/8/8/3KB3/8/8 w - - 0 1", "ongoing"),
        ("8/8/4k3/8/8/2NKN3/8/8 w - - 0 1", "ongoing"),
        ("8/8/4k3/8/8/3KP3/8/8 w - - 0 1", "ongoing"),
    ],
)
def test_state(fen: str, state: str) -> None:
    assert _C.chess.state(fen) == state


def test_pinned_en_passant() -> None:
    """Both pawns leave the fifth rank, and the rook gives check: the capture is illegal, and not told of."""
    fen = after("8/2p5/8/KP5r/8/8/8/4k3 b - - 0 1", "c7c5")
    assert fen == "8/8/8/KPp4r/8/8/8/4k3 w - - 0 2"
    assert "b5c6" not in _C.chess.legal_moves(fen)


@pytest.mark.parametrize(
    ("fen", "message"),
    [
        ("", "it needs 4 fields"),
        (START + " 7", "it needs 4 fields"),
        ("rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP w KQkq -", "8 ranks of 8 squares"),
        (START.replace("8/8/8/8", "8/8/8/9"), "8 ranks of 8 squares"),
        (START.replace("8/8/8/8", "8/8/8/7pp"), "8 ranks of 8 squares"),
        (START.replace("RNBQ", "XNBQ"), "8 ranks of 8 squares"),
        (START.replace(" w ", " x "), "the side to move must be w or b"),
        (START.replace("KQkq", "KQkx"), "castling must be - or some of KQkq"),
        (START.replace("RNBQKBNR w", "RNBQKBN1 w"), "castling with the rook on h1"),
        (START.replace("q - 0", "q e4 0"), "en passant must be - or a square of rank 6"),
        (START.replace("q - 0", "q e6 0"), "no pawn has passed over e6"),
        # A capture there would leave two pieces on one square, then a side without a king.
        ("4k3/8/3rp3/3pP3/8/8/8/4K3 w - d6 0 1", "no pawn has passed over d6"),
        ("4k3/3p4/8/3pP3/8/8/8/4K3 w - d6 0 1", "no pawn has passed over d6"),  # it comes from d7
        ("4k3/8/8/8/3Pp3/3K4/8/8 b - d3 0 1", "no pawn has passed over d3"),
        (START.replace("0 1", "1000001 1"), "the last two fields must be numbers from 0 to 1000000"),
        (START.replace("0 1", "0 2147483647"), "the last two fields must be numbers from 0 to 1000000"),
        (START.replace("0 1", "x 1"), "the last two fields must be numbers"),
        (START.replace("0 1", "0 -1"), "the last two fields must be numbers"),
        ("8/8/8/8/8/8/8/K7 w - -", "each side needs one king"),
        ("k6P/8/8/8/8/8/8/K7 w - -", "a pawn is on the first or last rank"),
        ("k7/8/8/8/8/8/8/R6K w - -", "the side that has moved is in check"),
    ],
)
def test_bad_position(fen: str, message: str) -> None:
    with pytest.raises(_C.Error, match=message):
        _C.chess.state(fen)


def test_bad_move() -> None:
    for move in ("", "e2", "e2e9", "e2e4qq", "e7e8k"):
        with pytest.raises(_C.Error, match=f"'{move}' is not the text of a move"):
            _C.chess.make_move(START, move)
    for move in ("e2e5", "e7e5", "e1e2", "e4e5", "e2e4q", "0000", "--"):
        with pytest.raises(_C.Error, match=f"the move {move} is illegal in rnbq"):
            _C.chess.make_move(START, move)


PROMOTING = "1n5k/P7/8/8/8/8/8/K7 w - - 0 1"
KNIGHTS = "7k/8/8/8/8/2N3N1/8/2N3NK w - - 0 1"
ROOKS = "4k3/R7/8/8/8/8/4K3/R7 w - - 0 1"


@pytest.mark.parametrize(
    ("fen", "san", "uci"),
    [
        (START, "e4", "e2e4"),
        (START, "Nf3!?", "g1f3"),
        (START, "Ng1-f3", "g1f3"),
        (START, "e2-e4", "e2e4"),
        (START, "Pe4", "e2e4"),
        (CASTLING, "O-O", "e1g1"),
        (CASTLING, "0-0-0", "e1c1"),
        (CASTLING, "Rxh8+", "h1h8"),
        (CASTLING, "Ke2", "e1e2"),
        (PROMOTING, "a8=Q", "a7a8q"),
        (PROMOTING, "a8N", "a7a8n"),
        (PROMOTING, "axb8=R+", "a7b8r"),
        (PROMOTING, "axb8b", "a7b8b"),
        (KNIGHTS, "Nce2", None),
        (KNIGHTS, "Nge2", None),
        (KNIGHTS, "N1e2", None),
        (KNIGHTS, "Nc1e2", "c1e2"),
        (KNIGHTS, "Ng3e2", "g3e2"),
        (ROOKS, "R1a5", "a1a5"),
        (ROOKS, "R7a5#", "a7a5"),
        (after(START, "e2e4", "a7a6", "e4e5", "d7d5"), "exd6 e.p.".replace(" ", ""), "e5d6"),
        # one of two knights is pinned: no need to say which moves
        ("4k3/4r3/8/8/8/8/2N1N3/4K3 w - - 0 1", "Nd4", "c2d4"),
    ],
)
def test_san(fen: str, san: str, uci: str | None) -> None:
    if uci is None:
        with pytest.raises(_C.Error, match=f"the move {san} is ambiguous in "):
            _C.chess.read_san(fen, san)
    else:
        assert _C.chess.read_san(fen, san) == uci


TAKING = after(START, "e2e4", "d7d5")


def test_bad_san() -> None:
    for san in ("", "e", "N", "e9", "Zf3", "Nf3x", "O-O-O-O", "e4e5e6", "e8=K", "=Q", "f3N+x", "Nxx3"):
        with pytest.raises(_C.Error, match="is not the text of a move"):
            _C.chess.read_san(START, san)
    for fen, san in (
        (START, "e5"),
        (START, "--"),
        (START, "0000"),
        (START, "Z0!?"),
        (START, "O-O"),
        (START, "Qd3"),
        (PROMOTING, "a8"),
        (START, "e4=Q"),
        (TAKING, "d5"),
    ):
        with pytest.raises(_C.Error, match="is illegal in "):
            _C.chess.read_san(fen, san)
    # A rook where the king would be, moving as if castling.
    with pytest.raises(_C.Error, match="is illegal in "):
        _C.chess.read_san("7k/8/8/8/8/8/8/K3R3 w - - 0 1", "O-O-O")


def test_random_games_against_python_chess() -> None:
    chess = pytest.importorskip("chess")
    generator = random.Random(1)
    states, moves_seen = set(), 0
    for _ in range(40):
        board = chess.Board()
        fen = START
        for _ in range(250):
            assert board.fen() == fen
            moves = list(board.legal_moves)
            assert sorted(_C.chess.legal_moves(fen)) == sorted(move.uci() for move in moves)
            state = (
                "checkmate" if board.is_checkmate()
                else "stalemate" if board.is_stalemate()
                else "insufficient material" if board.is_insufficient_material()
                else "ongoing"
            )  # fmt: skip
            assert _C.chess.state(fen) == state
            states.add(state)
            if state != "ongoing":
                break
            for move in generator.sample(moves, min(2, len(moves))):
                assert _C.chess.read_san(fen, board.san(move)) == move.uci()
            # Captures often, so that games reach their end.
            move = generator.choice([m for m in moves if board.is_capture(m) or m.promotion] or moves)
            fen = _C.chess.make_move(fen, move.uci())
            board.push(move)
            moves_seen += 1
    assert states >= {"ongoing", "checkmate", "insufficient material"} and moves_seen > 3000
