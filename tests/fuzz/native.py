"""The readers of games, which are C++: compiled with sanitizers, and their coverage shown to the fuzzer."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import atheris
from targets import SQUARE, Target

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "csrc" / "chess").glob("*.cpp")),
    ROOT / "csrc" / "core" / "check.cpp",
    ROOT / "tests" / "fuzz" / "chess.cpp",
]
HEADERS = [*(ROOT / "csrc" / "chess").glob("*.h"), *(ROOT / "csrc" / "core").glob("*.h")]
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
FLAGS += ["-fno-sanitize-recover=all"]
COVERAGE = "-fsanitize-coverage=trace-pc,trace-cmp"
RUNTIME = Path(atheris.path()) / "asan_with_fuzzer.so"  # of the address sanitizer, and the fuzzer itself
OPTIONS = "detect_leaks=0:max_allocation_size_mb=512:allocator_may_return_null=0:handle_abort=1"

PGN = '[Event "Rated"]\n[Result "*"]\n\n1. e4 {a} e5 (1... d5) 2. Nf3!? $1 O-O *\n\n'
PROMOTES = "a2a4 b7b5 a4b5 a7a6 b5a6 c8b7 a6b7 d7d6 b7a8q\n"
START = "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1\n"
PASSANT = "rnbqkbnr/1pp1pppp/p7/3pP3/8/8/PPPP1PPP/R3K2R w KQkq d6 0 3\n"
SAN = ("O-O", "O-O-O", "=Q", "e.p.", "--", "0000", "1/2-1/2", "1-0", "Nf3", "exd6", '[Event "', '[FEN "', "{", "}", "(")
SEEDS = {  # in the order of read_games' formats
    "pgn": [PGN, PGN * 2, "1. a4 b5 2. axb5 a6 3. bxa6 Bb7 4. axb7 d6 5. bxa8=Q 1-0\n"],
    "uci": [PROMOTES, "e2e4 e7e5\n\ng1f3\n" + PROMOTES],
    "fen": [START + "Nf3", PASSANT + "exd6", PASSANT + "O-O-O", "4k3/8/4p3/3pP3/8/8/8/4K3 w - d6 0 1"],
    "moves": ["".join(map(chr, [16, 32, 52, 44, 32, 40, 55, 39, 40, 47, 59, 51, 47, 54, 51, 43, 54, 63, 68]))],
}


def targets(directory: Path) -> dict[str, Target]:
    """directory: for what is compiled."""
    library = load(directory)
    return {name: target(library, name) for name in SEEDS}


def target(library: ctypes.CDLL, name: str) -> Target:
    format = list(SEEDS).index(name)

    def read(path: Path) -> None:
        content = path.read_bytes()
        library.read_games(content, ctypes.c_size_t(len(content)), format)

    def seeds(directory: Path) -> None:
        for number, seed in enumerate(SEEDS[name]):
            (directory / str(number)).write_text(seed)

    return Target("x", read, seeds, words=(*SQUARE, *SAN))


def under_sanitizer() -> None:
    """Begin this program anew with the sanitizer's library before all others, where it must be."""
    if "LD_PRELOAD" not in os.environ:
        environment = {**os.environ, "LD_PRELOAD": str(RUNTIME), "ASAN_OPTIONS": OPTIONS}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def load(directory: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled(directory)))
    library.counters_begin.restype = library.counters_end.restype = ctypes.c_void_p
    begin, end = (ctypes.c_void_p(end()) for end in (library.counters_begin, library.counters_end))
    ctypes.CDLL(str(RUNTIME)).__sanitizer_cov_8bit_counters_init(begin, end)
    return library


def compiled(directory: Path) -> Path:
    """The library, made if a source is younger."""
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "chess.so"
    newest = max(path.stat().st_mtime for path in (*SOURCES, *HEADERS, Path(__file__)))
    if library.exists() and library.stat().st_mtime > newest:
        return library
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    compiler = os.environ.get("CXX", "g++")
    objects = [directory / f"{source.stem}.o" for source in SOURCES]
    jobs = []
    for source, object in zip(SOURCES, objects, strict=True):
        # What counts does not count itself.
        coverage = [] if source.parent == Path(__file__).parent else [COVERAGE]
        command = [compiler, *FLAGS, *coverage, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(object)]
        jobs.append(subprocess.Popen(command, env=environment))
    if any([job.wait() != 0 for job in jobs]):
        raise SystemExit("the readers of games do not compile")
    # Without the sanitizers' libraries: theirs is loaded before.
    link = [compiler, "-shared", *map(str, objects), "-Wl,-Bsymbolic", "-o", str(library)]
    subprocess.run(link, env=environment, check=True)
    return library
