"""Games of chess: months of lichess.org's open database, or local files of PGN or UCI moves, streamed to tokens.

The text is cut between games as it arrives. Every move is checked against the rules (`llmc._C.chess`); a game that
breaks them is dropped.
"""

import argparse
import functools
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmc.data.blocks import into_blocks
from llmc.data.command import Commands, add_shard_tokens, add_workers, check_name, fraction, positive, report
from llmc.data.source import find_sources, fingerprint_of, open_source
from llmc.data.writer import Encoded, Vocabulary, WrittenFile, write_dataset
from llmc.errors import RunError, UsageError
from llmc.models import CHESS_VOCAB_SIZE, END_OF_TEXT_IDS
from llmc.tokenizer import chess_token_bytes

URL = "https://database.lichess.org/standard/lichess_db_standard_rated_{month}.pgn.zst"
TIME_CLASSES = ("ultrabullet", "bullet", "blitz", "rapid", "classical", "correspondence")
BORDERS = {"pgn": b"\n[Event ", "uci": b"\n"}  # the next game begins after the newline
BLOCK_BYTES = 2**18  # read at once
CHUNK_BYTES = 2**21  # of games, encoded at once
LONGEST_GAME = 2**26
TIMEOUT = 60  # seconds without a byte
TRIES = 6  # of a connection, before it counts as lost


class Filter(NamedTuple):
    """Which games to keep; csrc/chess/games.h says how the tags are read."""

    rated: bool = False
    min_elo: int = 0  # 0: any
    max_elo: int = 0
    time_control: str = ""  # the tag or one of TIME_CLASSES; "": any
    min_plies: int = 1
    promotions: bool = False


class Source(NamedTuple):
    """A file of games."""

    name: str  # path or URL
    format: str  # a key of BORDERS
    size: int  # bytes as stored
    is_remote: bool


class Chunk(NamedTuple):
    """Whole games of a source."""

    text: bytes
    format: str
    stored: int  # bytes of the source that were read for it


def prepare_games(
    sources: Sequence[Source],
    name: str,
    filter: Filter,
    out: str | os.PathLike[str],
    *,
    val_fraction: float,
    workers: int,
    shard_tokens: int,
    block: int | None = None,
) -> tuple[list[WrittenFile], Counter[str]]:
    """Make a data set of the games of all sources; return its files, and how many games were kept or dropped why.

    block: if given, each so many tokens begin with a game.
    """
    return write_dataset(
        out,
        name,
        Vocabulary(chess_token_bytes(), END_OF_TEXT_IDS[CHESS_VOCAB_SIZE]),
        (chunk for source in sources for chunk in chunks(source)),
        functools.partial(encode_chunk, filter, block),
        val=val_fraction,
        fingerprint={
            "sources": sources,
            "files": fingerprint_of(source.name for source in sources if not source.is_remote),
            "filter": filter,
            "block": block,
        },
        workers=workers,
        shard_tokens=shard_tokens,
        multiple=block or 1,
        total=sum(source.size for source in sources),
        unit="B",
        size=lambda chunk: chunk.stored,
    )


def encode_chunk(filter: Filter, block: int | None, chunk: Chunk) -> Encoded:
    """Return the uint16 tokens of the games that are kept, end-of-text before each; in blocks if a length is given."""
    from llmc import _C

    if chunk.format == "pgn":
        tokens, counts = _C.chess.encode_pgn(chunk.text, **filter._asdict())
    else:
        tokens, counts = _C.chess.encode_uci(chunk.text, min_plies=filter.min_plies, promotions=filter.promotions)
    if block:
        tokens = into_blocks(tokens, END_OF_TEXT_IDS[CHESS_VOCAB_SIZE], block)
    return Encoded(tokens, Counter(counts))


# ---- sources


def local_sources(paths: Sequence[str], format: str) -> list[Source]:
    """Return the files, and those in directories. RunError for others."""
    return [Source(str(source.path), format, source.size, False) for source in find_sources(paths)]


def month_source(month: str) -> Source:
    """Return the file of a month, such as 2015-06, on lichess.org. RunError if it is not to be had."""
    url = URL.format(month=month)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            size = response.headers["Content-Length"]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise RunError(f"lichess.org has no games of {month}: there is no {url}") from error
        raise _cannot_download(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        raise _cannot_download(url, error) from error
    if size is None:
        raise RunError(f"cannot download {url}: its server does not tell the size")
    return Source(url, "pgn", int(size), True)


def chunks(source: Source) -> Iterator[Chunk]:
    """Cut the text of a source between games."""
    position = reported = 0  # in the source as stored

    def texts() -> Iterator[bytes]:
        nonlocal position
        for text, end in read_month(source) if source.is_remote else read_file(source.name):
            position = end
            yield text

    for text in cut(texts(), BORDERS[source.format], source.name):
        yield Chunk(text, source.format, position - reported)
        reported = position


def cut(texts: Iterable[bytes], border: bytes, name: str) -> Iterator[bytes]:
    """Cut at the first border after every CHUNK_BYTES, in whatever portions the text comes.

    So the chunks are always the same: a run that goes on after an interruption counts them.
    """
    rest = b""
    for text in texts:
        begin = max(CHUNK_BYTES, len(rest) - len(border))
        rest += text
        while (end := rest.find(border, begin)) >= 0:
            yield rest[: end + 1]
            rest = rest[end + 1 :]
            begin = CHUNK_BYTES
        if len(rest) > CHUNK_BYTES + LONGEST_GAME:
            start = border.decode().strip()
            expected = f"lines that begin with {start}" if start else "a line for each game"
            raise RunError(f"{name}: no game ends within {LONGEST_GAME:,} bytes, expected {expected}")
    if rest:
        yield rest


def read_file(path: str) -> Iterator[tuple[bytes, int]]:
    """Yield a file's text, decompressed, and the position in the file. RunError for a bad one."""
    with open_source(Path(path)) as (file, content):
        while text := content.read(BLOCK_BYTES):
            yield text, file.tell()


def read_month(source: Source) -> Iterator[tuple[bytes, int]]:
    """Yield the text of a Zstandard file on a server as it arrives, and the position in the file."""
    try:
        import zstandard
    except ImportError:
        raise RunError(f"{source.name} needs the package zstandard: python -m pip install zstandard") from None
    position = 0
    new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    frame = new_frame()
    for block in download(source.name, source.size):
        position += len(block)
        while block:
            if frame.eof:
                frame = new_frame()
            try:
                yield frame.decompress(block), position
            except zstandard.ZstdError as error:
                raise RunError(f"cannot decompress {source.name}: {error}") from error
            block = frame.unused_data
    if not frame.eof:
        raise RunError(f"{source.name} is truncated")


def download(url: str, size: int) -> Iterator[bytes]:
    """Yield the `size` bytes of a file as they arrive; a connection that breaks is made anew from there."""
    position = failures = 0
    while position < size:
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={position}-"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                if position and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    raise RunError(
                        f"cannot go on with {url} after {position:,} bytes: its server sends whole files only"
                    )
                while block := response.read(BLOCK_BYTES):
                    position, failures = position + len(block), 0
                    yield block
            if position < size:
                raise EOFError(f"it ended after {position:,} of {size:,} bytes")
        except urllib.error.HTTPError as error:
            raise _cannot_download(url, error) from error
        except (OSError, EOFError, http.client.HTTPException) as error:
            failures += 1
            if failures == TRIES:
                raise _cannot_download(url, error) from error
            time.sleep(2.0**failures)


def _cannot_download(url: str, error: Exception) -> RunError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return RunError(
        f"cannot download {url} ({reason}): begin again later to go on, or get the file in another way and run: "
        "llmc-data lichess --pgn FILE"
    )


# ---- the command


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "lichess",
        help="data set: games of chess, from lichess.org's database or files",
        description="Make data sets of chess games in the 72 tokens of the chess models: of months of lichess.org's "
        "database of rated games (public domain, CC0), a data set YYYYMM each, and of files. Every move is checked; "
        "games that are broken or that the options rule out are dropped and counted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sources: dict[str, Any] = {"default": argparse.SUPPRESS, "metavar": "FILE", "nargs": "+"}
    months = {**sources, "metavar": "YYYY-MM", "nargs": "*"}
    parser.add_argument("months", help="months of lichess.org's database, from 2013-01", **months)
    parser.add_argument("--pgn", help="games in PGN, also compressed (.zst, .gz)", **sources)
    parser.add_argument("--uci", help="a game a line, moves such as e2e4 e7e8q, also compressed", **sources)
    parser.add_argument(
        "--name",
        help="of the data set of all files (default: the first FILE's name without its endings)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--rated", action="store_true", help="only rated games: their tag Event says so", default=argparse.SUPPRESS
    )
    for bound, word in (("--min-elo", "lowest"), ("--max-elo", "highest")):
        parser.add_argument(
            bound, type=_number, metavar="N", help=f"{word} rating of both players", default=argparse.SUPPRESS
        )
    parser.add_argument(
        "--time-control",
        type=_time_control,
        default=argparse.SUPPRESS,
        metavar="TIME",
        help=f"the tag, such as 600+0, or one of lichess.org's words: {', '.join(TIME_CLASSES)}",
    )
    parser.add_argument(
        "--min-plies", type=_number, default=1, metavar="N", help="fewest moves, of both players together"
    )
    parser.add_argument(
        "--promotions", action="store_true", help="only games in which a pawn is promoted", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--block",
        type=_number,
        metavar="N",
        help="let each N tokens begin with a game, so that with -t N every row does; a game that does not fit into the "
        "rest of a block is cut there and begins the next one, what a game has beyond N tokens is left out",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--out", metavar="DIR", help="output directory (default: dev/data/NAME)", default=argparse.SUPPRESS
    )
    parser.add_argument("--val-fraction", type=fraction, default=0.01, metavar="F", help="share of the tokens held out")
    add_shard_tokens(parser)
    add_workers(parser)
    parser.set_defaults(command=_lichess)


def _number(value: str) -> int:
    number = positive(value)
    if number > 1_000_000:
        raise argparse.ArgumentTypeError(f"{value!r} is more than any game has")
    return number


def _time_control(value: str) -> str:
    if not re.fullmatch(rf"-|\d+(\+\d+)?|{'|'.join(TIME_CLASSES)}", value, re.ASCII):
        raise argparse.ArgumentTypeError(f"{value!r} is no tag such as 600+0, and none of {', '.join(TIME_CLASSES)}")
    return value


def _lichess(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    months, pgn, uci = (given.get(name, []) for name in ("months", "pgn", "uci"))
    filter = Filter(**{field: value for field, value in given.items() if field in Filter._fields})
    _check(months, pgn, uci, given.get("name"), filter)
    block = given.get("block")
    if block and block > arguments.shard_tokens:
        raise UsageError(f"--block {block} is more than --shard-tokens {arguments.shard_tokens}: lower it")
    files = [*local_sources(pgn, "pgn"), *local_sources(uci, "uci")]
    datasets = [(month.replace("-", ""), [month_source(month)]) for month in dict.fromkeys(months)]
    if files:
        name = given.get("name", Path(files[0].name).name.split(".")[0])
        check_name(name)
        datasets.append((name, files))
    for name, sources in datasets:
        written, counts = prepare_games(
            sources,
            name,
            filter,
            given.get("out", f"dev/data/{name}"),
            val_fraction=arguments.val_fraction,
            workers=arguments.workers,
            shard_tokens=arguments.shard_tokens,
            block=block,
        )
        print(describe(counts))
        report(written)


def _check(months: list[str], pgn: list[str], uci: list[str], name: str | None, filter: Filter) -> None:
    if not (months or pgn or uci):
        raise UsageError("nothing to do: give months such as 2015-06, or files with --pgn or --uci")
    for month in months:
        if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", month) or month < "2013":
            raise UsageError(f"{month!r} is not a month of lichess.org's database: give one such as 2013-01, the first")
    if name is not None and not (pgn or uci):
        raise UsageError(f"--name {name!r} is for files, with --pgn or --uci; a month is called YYYYMM: drop it")
    if 0 < filter.max_elo < filter.min_elo:
        raise UsageError(f"--max-elo {filter.max_elo} is below --min-elo {filter.min_elo}: no game can be kept")
    for field in ("rated", "min_elo", "max_elo", "time_control"):
        if uci and getattr(filter, field):
            flag = "--" + field.replace("_", "-")
            raise UsageError(f"{flag} needs the tags of PGN, the lines of --uci have none: drop one of the two")


def describe(counts: Counter[str]) -> str:
    """What became of the games, in one line."""
    dropped = [f"{reason} {n:,}" for reason, n in counts.most_common() if reason != "kept"]
    total = counts.total()
    return f"{counts['kept']:,} of {total:,} games kept" + (f"; dropped: {', '.join(dropped)}" if dropped else "")
