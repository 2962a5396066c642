"""Feeds readers with damaged files, guided by the code that these run: `python tests/fuzz/run.py --reader model`.

What makes a reader fail is kept in build/fuzz/found; what leads on in build/fuzz/READER, where the next run begins.
"""

import argparse
import atexit
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
SECONDS = 5  # that a reader may take
MEMORY = 2**29  # bytes that it may take, of files of some thousand
GROUPS = ("files", "games")  # all readers in Python, all in C++

with atheris.instrument_imports(include=["llmc", "yaml", "tarfile"]):
    import mutator
    import native
    from targets import TARGETS, Target, accepted


def main() -> None:
    arguments = parser().parse_args()
    names = readers_of(arguments.reader)
    if set(names) <= set(native.SEEDS):
        native.under_sanitizer()
        targets = native.targets(arguments.keep / "compiled")
    else:
        targets = TARGETS
    (found := arguments.keep / "found").mkdir(parents=True, exist_ok=True)
    (corpus := arguments.keep / arguments.reader).mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None))
    if child := os.fork():  # the fuzzer ends its process in ways of its own
        try:
            _, status = os.waitpid(child, 0)
        finally:
            shutil.rmtree(directory)
        sys.exit(os.waitstatus_to_exitcode(status))
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # its alarm must not end Python before
    write_seeds({name: targets[name] for name in names}, directory / "seeds")
    words = write_words({word for name in names for word in targets[name].words}, directory / "words")
    reader = Reader([targets[name] for name in names], directory / "work")
    warnings.simplefilter("ignore")
    options = [
        *(f"-runs={arguments.inputs}", f"-max_total_time={arguments.seconds}", f"-seed={arguments.seed}"),
        *(f"-timeout={SECONDS}", "-rss_limit_mb=0", f"-artifact_prefix={found}/", f"-dict={words}"),
        *(f"-max_len={arguments.max_bytes}", "-print_final_stats=1"),
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(directory / "seeds")], reader, custom_mutator=mutate)
    atheris.Fuzz()  # ends the process


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--reader", required=True, choices=[*TARGETS, *native.SEEDS, *GROUPS], help="what to feed")
    result.add_argument("--inputs", type=int, default=1_000_000, help="end after so many files; -1: never")
    result.add_argument("--seconds", type=int, default=0, help="end after so many seconds; 0: never")
    result.add_argument("--seed", type=int, default=1, help="of the mutations")
    result.add_argument("--max-bytes", type=int, default=8192, help="largest file")
    result.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", help="directory for what is found")
    return result


def readers_of(name: str) -> list[str]:
    return {"files": list(TARGETS), "games": list(native.SEEDS)}.get(name, [name])


def write_seeds(targets: Mapping[str, Target], directory: Path) -> None:
    """The intact files of the readers, after a byte that chooses one if there are more."""
    directory.mkdir()
    for number, (name, target) in enumerate(targets.items()):
        (own := directory / name).mkdir()
        target.seeds(own)
        if len(targets) > 1:
            for path in own.iterdir():
                path.write_bytes(bytes([number]) + path.read_bytes())


def write_words(words: set[str], path: Path) -> Path:
    """A dictionary for the fuzzer, which must not be empty."""
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in sorted(words) or ["\0"])
    path.write_text("".join(f'"{word}"\n' for word in escaped))
    return path


class Reader:
    """Gives the content of a file to one of `targets`: to the one that its first byte chooses if there are more."""

    def __init__(self, targets: list[Target], directory: Path) -> None:
        self.places = []
        for number, target in enumerate(targets):
            (own := directory / str(number)).mkdir(parents=True)
            target.beside(own)
            self.places.append((target.read, own / target.file))
        self.limited = "LD_PRELOAD" in os.environ  # the sanitizer limits allocations itself, and maps terabytes

    def __call__(self, content: bytes) -> None:
        if not self.limited:
            limit_memory()
            self.limited = True
        choice = 0
        if len(self.places) > 1:
            choice, content = (content[0] % len(self.places) if content else 0), content[1:]
        read, path = self.places[choice]
        path.unlink(missing_ok=True)  # not overwritten: it may still be mapped
        path.write_bytes(content)
        accepted(read, path)


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Every other time, of what is JSON, something that still is."""
    changed = mutator.mutate(content, seed) if seed % 2 else None
    return atheris.Mutate(content, most) if changed is None or len(changed) > most else changed


def limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
