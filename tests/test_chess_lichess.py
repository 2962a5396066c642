"""llmc-data lichess: from files and from a server of our own to shards."""

import functools
import gzip
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import data_testing
import pytest
from data_testing import names, shard

from llmc import _C
from llmc.data import lichess
from llmc.errors import RunError
from llmc.tokenizer import Tokenizer, chess_token_bytes

call = functools.partial(data_testing.call, "lichess")


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    return data_testing.refuse(capsys, status, "lichess", *arguments)


def random_games(count: int, seed: int = 0) -> list[list[str]]:
    """Moves in UCI."""
    generator = random.Random(seed)
    games = []
    for _ in range(count):
        moves: list[str] = []
        _, _, fen = _C.chess.replay([])
        for _ in range(generator.randrange(2, 40)):
            legal = _C.chess.legal_moves(fen)
            if not legal:
                break
            moves.append(generator.choice(legal))
            fen = _C.chess.make_move(fen, moves[-1])
        games.append(moves)
    return games


def pgn(games: list[list[str]]) -> bytes:
    """Long algebraic moves are PGN too, as far as readers go: from-square and to-square, "=" before a promotion."""
    texts = []
    for number, moves in enumerate(games):
        _, _, fen = _C.chess.replay([])
        words = []
        for move in moves:
            words.append(_san(fen, move))
            fen = _C.chess.make_move(fen, move)
        elo = 1000 + number % 1000
        tags = f'[Event "Rated Blitz game"]\n[WhiteElo "{elo}"]\n[BlackElo "{elo}"]\n[TimeControl "300+0"]\n'
        texts.append(f"{tags}\n{' '.join(words)} 1-0\n")
    return "\n".join(texts).encode()


def _san(fen: str, move: str) -> str:
    placement = {}
    for rank, row in zip("87654321", fen.split()[0].split("/"), strict=True):
        squares = "".join("." * int(c) if c.isdigit() else c for c in row)
        placement.update({file + rank: piece for file, piece in zip("abcdefgh", squares, strict=True)})
    piece = placement[move[:2]].upper()
    if piece == "K" and abs(ord(move[0]) - ord(move[2])) == 2:
        return "O-O" if move[2] == "g" else "O-O-O"
    return ("" if piece == "P" else piece) + move[:4] + ("=" + move[4].upper() if move[4:] else "")


def tokens_of(games: list[list[str]]) -> list[int]:
    ids = {token.decode(): id for id, token in enumerate(chess_token_bytes())}
    tokens = []
    for moves in games:
        tokens.append(2)
        for move in moves:
            tokens += [ids[move[:2]], ids[move[2:4]], *([ids[move[4].upper()]] if move[4:] else [])]
    return tokens


GAMES = random_games(60)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def all_tokens(directory: Path, name: str) -> list[int]:
    """Train, then val, as they were cut."""
    paths = [*sorted(directory.glob(f"{name}_train_*.bin")), *sorted(directory.glob(f"{name}_val_*.bin"))]
    return [token for path in paths for token in shard(path)]


def test_files(capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    Path("a.pgn").write_bytes(pgn(GAMES[:20]))
    Path("b.pgn.gz").write_bytes(gzip.compress(pgn(GAMES[20:30])))
    frames = pgn(GAMES[30:40])
    Path("c.pgn.zst").write_bytes(b"".join(map(zstandard.compress, (frames[:5000], frames[5000:]))))
    Path("d.uci").write_text("\n".join(" ".join(moves) for moves in GAMES[40:]))
    call("--pgn", "a.pgn", "b.pgn.gz", "c.pgn.zst", "--uci", "d.uci", "--workers", 1, "--val-fraction", 0.2)
    out = Path("dev/data/a")
    assert names(out) == ["a_train_000000.bin", "a_val_000000.bin", "tokenizer.bin"]
    tokens = tokens_of(GAMES)
    assert all_tokens(out, "a") == tokens
    assert len(shard(out / "a_val_000000.bin")) == round(0.2 * len(tokens))
    tokenizer = Tokenizer(out / "tokenizer.bin")
    assert (tokenizer.tokens, tokenizer.end_of_text) == (chess_token_bytes(), 2)
    report = capsys.readouterr().out.splitlines()
    assert report[0] == "60 of 60 games kept" and len(report) == 4


def test_filters_and_name(capsys: pytest.CaptureFixture[str]) -> None:
    broken = b'[Event "Rated Blitz game"]\n[WhiteElo "1005"]\n[BlackElo "1005"]\n[TimeControl "300+0"]\n\n1. e5 *\n\n'
    Path("a.pgn").write_bytes(broken + pgn(GAMES))
    filters = ["--rated", "--min-elo", 1003, "--max-elo", 1050, "--time-control", "blitz", "--min-plies", 10]
    call("--pgn", "a.pgn", "--name", "club", "--out", "o", "--workers", 1, "--val-fraction", 0.1, *filters)
    kept = [moves for moves in GAMES[3:51] if len(moves) >= 10]
    assert all_tokens(Path("o"), "club") == tokens_of(kept)
    short = 48 - len(kept)
    line = f"{len(kept)} of 61 games kept; dropped: too short {short}, Elo rating 12, illegal move 1"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_any_number_of_workers_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.pgn").write_bytes(pgn(GAMES))
    call("--pgn", "a.pgn", "--out", "one", "--workers", 1, "--shard-tokens", 1000)
    monkeypatch.setattr(lichess, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(lichess, "BLOCK_BYTES", 77)
    call("--pgn", "a.pgn", "--out", "two", "--workers", 2, "--shard-tokens", 1000)
    assert names(Path("one")) == names(Path("two")) and len(names(Path("one"))) > 3
    for name in names(Path("one")):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_blocks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    games = random_games(60)
    Path("games.uci").write_text("\n".join(" ".join(moves) for moves in games))
    monkeypatch.setattr(lichess, "CHUNK_BYTES", 3000)
    call("--uci", "games.uci", "--block", 32, "--shard-tokens", 500, "--val-fraction", 0.2, "--out", "one")
    call(
        "--uci",
        "games.uci",
        "--block",
        32,
        "--shard-tokens",
        500,
        "--workers",
        2,
        "--val-fraction",
        0.2,
        "--out",
        "two",
    )
    files = sorted(path.name for path in Path("one").glob("games_*.bin"))
    assert len(files) > 3
    starts = {tuple(tokens_of([moves])[:20]) for moves in games}
    for name in files:
        tokens = shard(Path("one") / name)
        assert tokens == shard(Path("two") / name)
        assert len(tokens) % 32 == 0 and 0 < len(tokens) <= 500
        for begin in range(0, len(tokens), 32):
            block = tokens[begin : begin + 32]
            assert block[0] == 2
            first = block[: block.index(2, 1)] if 2 in block[1:] else block
            assert any(tuple(first[:20]) == start[: len(first[:20])] for start in starts)
    capsys.readouterr()
    assert "--block 600" in refuse(capsys, 2, "--uci", "games.uci", "--block", 600, "--shard-tokens", 500)


def test_chunks_do_not_depend_on_how_the_text_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lichess, "CHUNK_BYTES", 100)
    text = b'[Event "%d"]\n1. e4 *\n\n' * 50
    for border in (b"\n[Event ", b"\n"):
        whole = list(lichess.cut([text], border, "x"))
        assert b"".join(whole) == text and len(whole) > 8
        assert all(100 < len(chunk) < 140 and chunk.endswith(b"\n") for chunk in whole[:-1])
        for size in (1, 7, 99, 250):
            portions = [text[at : at + size] for at in range(0, len(text), size)]
            assert list(lichess.cut(portions, border, "x")) == whole
    assert list(lichess.cut([], b"\n", "x")) == []


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed in the middle of a slow source, then begun again: the same files as of one run."""
    Path("a.pgn").write_bytes(pgn(GAMES * 20))
    call("--pgn", "a.pgn", "--out", "whole", "--workers", 1)
    slow = (
        "import time; from llmc.data import lichess, writer; from test_chess_lichess import call; "
        "lichess.CHUNK_BYTES = 20_000; writer.SAVE_SECONDS = 0; whole = lichess.cut; "
        "lichess.cut = lambda *a: (time.sleep({}) or chunk for chunk in whole(*a)); "
        "call('--pgn', 'a.pgn', '--out', 'parts', '--workers', 1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", slow.format(0.2)], env=environment)
    journal = Path("parts/.a.unfinished/journal.json")
    deadline = time.monotonic() + 30
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.exists() and not list(Path("parts").glob("*.bin"))
    again = subprocess.run(
        [sys.executable, "-c", slow.format(0)], env=environment, capture_output=True, text=True, check=True
    )
    assert "going on in parts/.a.unfinished" in again.stderr
    assert again.stdout.startswith("1,200 of 1,200 games kept")
    for name in names(Path("whole")):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()


# ---- the database, on a server of our own


class Server(http.server.ThreadingHTTPServer):
    content: bytes
    most = 1 << 30  # bytes that are sent before the connection breaks
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        if "2015-06" not in self.path:
            self.send_error(404)
            return
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.requests.append(f"{self.command} {begin}")
        body = self.server.content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            self.wfile.write(body[: self.server.most])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    zstandard = pytest.importorskip("zstandard")
    server = Server(("127.0.0.1", 0), Handler)
    text = pgn(GAMES)
    server.content, server.requests = b"".join(map(zstandard.compress, (text[:9999], text[9999:]))), []
    monkeypatch.setattr(lichess, "URL", f"http://127.0.0.1:{server.server_port}/{{month}}.pgn.zst")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_month(server: Server) -> None:
    call("2015-06", "--workers", 1)
    out = Path("dev/data/201506")
    assert names(out) == ["201506_train_000000.bin", "201506_val_000000.bin", "tokenizer.bin"]
    assert all_tokens(out, "201506") == tokens_of(GAMES)
    assert server.requests == ["HEAD 0", "GET 0"]


def test_connection_that_breaks(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.most = len(server.content) // 3
    call("2015-06", "--out", "o", "--workers", 1)
    assert all_tokens(Path("o"), "201506") == tokens_of(GAMES)
    assert server.requests[1:3] == ["GET 0", f"GET {server.most}"]
    server.most = 0
    error = refuse(capsys, 1, "2015-06", "--out", "p")
    assert error.startswith(f"cannot download {lichess.URL.format(month='2015-06')} (it ended after 0 of ")
    assert error.endswith("or get the file in another way and run: llmc-data lichess --pgn FILE")


def test_what_the_server_does_not_have(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    error = refuse(capsys, 1, "2015-06", "2040-01", "--out", "o")  # found out before the first is read
    assert error == f"lichess.org has no games of 2040-01: there is no {lichess.URL.format(month='2040-01')}"
    assert server.requests == ["HEAD 0"]
    whole = server.content
    for content, message in ((whole[:-9], "is truncated"), (b"x" + whole, "cannot decompress")):
        server.content = content
        assert message in refuse(capsys, 1, "2015-06", "--out", "o", "--workers", 1)
    server.shutdown()
    server.server_close()
    assert "cannot download" in refuse(capsys, 1, "2015-06", "--out", "o")


def test_without_zstandard(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    error = refuse(capsys, 1, "2015-06", "--out", "o", "--workers", 1)
    assert error.endswith("2015-06.pgn.zst needs the package zstandard: python -m pip install zstandard")


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do: give months such as 2015-06, or files with --pgn or --uci"),
        (["2015-13"], "'2015-13' is not a month of lichess.org's database"),
        (["2012-12"], "'2012-12' is not a month of lichess.org's database"),
        (["201506"], "'201506' is not a month"),
        (["2015-06", "--name", "x"], "--name 'x' is for files"),
        (["--pgn", "a.pgn", "--name", "x*"], "--name 'x*' cannot begin file names"),
        (["--pgn", "a.pgn", "--min-elo", "2000", "--max-elo", "1999"], "--max-elo 1999 is below --min-elo 2000"),
        (["--pgn", "a.pgn", "--min-elo", "0"], "argument --min-elo: '0' is not a positive number"),
        (["--pgn", "a.pgn", "--max-elo", "9999999999"], "argument --max-elo: '9999999999' is more than any game has"),
        (
            ["--pgn", "a.pgn", "--time-control", "fast"],
            "argument --time-control: 'fast' is no tag such as 600+0, and none of ultrabullet, ",
        ),
        (["--pgn", "a.pgn", "--time-control", ""], "argument --time-control: '' is no tag"),
        (["--uci", "a.pgn", "--min-elo", "1000"], "--min-elo needs the tags of PGN, the lines of --uci have none"),
        (["--uci", "a.pgn", "--time-control", "rapid"], "--time-control needs the tags of PGN"),
        (["--uci", "a.pgn", "--rated"], "--rated needs the tags of PGN"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    Path("a.pgn").write_bytes(pgn(GAMES[:1]))
    assert refuse(capsys, 2, *arguments).startswith(message)
    assert names(Path()) == ["a.pgn"]


def test_bad_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuse(capsys, 1, "--pgn", "absent.pgn") == "cannot read absent.pgn: No such file or directory"
    os.mkfifo("pipe.pgn")
    assert refuse(capsys, 1, "--pgn", "pipe.pgn").startswith("cannot read pipe.pgn: it is not a regular file")
    Path("a.pgn.gz").write_bytes(gzip.compress(pgn(GAMES))[:-20])
    assert refuse(capsys, 1, "--pgn", "a.pgn.gz", "--workers", 1).startswith("cannot read a.pgn.gz: ")
    Path("text.pgn").write_bytes(b"no games here\n" * 100)
    assert "split of text is empty" in refuse(capsys, 1, "--pgn", "text.pgn", "--workers", 1)
    monkeypatch.setattr(lichess, "LONGEST_GAME", 1000)
    monkeypatch.setattr(lichess, "CHUNK_BYTES", 100)
    assert refuse(capsys, 1, "--pgn", "text.pgn", "--workers", 1) == (
        "text.pgn: no game ends within 1,000 bytes, expected lines that begin with [Event"
    )
    assert not list(Path().rglob("*.bin"))


def test_fingerprint_of_the_filter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run left is of use only with the same filter."""
    assert lichess.Filter() != lichess.Filter(min_plies=2)
    seen = []

    def write(*_: object, fingerprint: dict[str, object], **__: object) -> None:
        seen.append(fingerprint)
        raise RunError("stop")

    monkeypatch.setattr(lichess, "write_dataset", write)
    Path("a.pgn").write_bytes(pgn(GAMES[:1]))
    for arguments in (["--pgn", "a.pgn"], ["--pgn", "a.pgn"], ["--pgn", "a.pgn", "--promotions"]):
        refuse(capsys, 1, *arguments)
    assert seen[0] == seen[1] != seen[2]
