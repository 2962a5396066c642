"""Breaks the CUDA kernels in every way of a list, one at a time, and looks whether the tests in the simulator see it.

    python tests/cudasim/mutate.py [--jobs 2] [--output tests/cudasim/mutations.csv] [files of csrc/cuda]

With files, the rows of the others stay in the output. A mutant drops a barrier or a wait, shifts a bound, or swaps a
layout. It is compiled with the checker, and the tests of the operations that it is part of run on it; it is caught when
one fails or the simulator reports something. Mutants whose machine code is the original's change nothing and do not
count, nor do those that change only what no result depends on; EQUIVALENT says why. Needs the build of
scripts/build_cudasim.sh.
"""

import argparse
import csv
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
EXTENSION = ROOT / "build" / "cudasim" / "checked"

ADAMW = ("test_ten_steps_follow_the_cpu", "test_updates_of_many_tensors")
# What tests a file.
TESTS = {
    "adamw": ["tests/test_ops_adamw.py", *(f"tests/test_model_cuda.py::{name}" for name in ADAMW)],
    "attention_backward": ["tests/test_ops_attention.py"],
    "attention_forward": ["tests/test_ops_attention.py"],
    "bias": ["tests/test_ops_matmul.py"],
    "cast": ["tests/test_ops_reduce.py"],
    "classifier": ["tests/test_ops_classifier.py", "tests/test_ops_fp8_classifier.py"],
    "cublas_lt": ["tests/test_ops_matmul.py", "tests/test_ops_fp8.py"],
    "embedding": ["tests/test_ops_embedding.py"],
    "fp8": ["tests/test_ops_fp8.py"],
    "gelu": ["tests/test_ops_gelu.py"],
    "layernorm": ["tests/test_ops_layernorm.py", "tests/test_ops_fp8.py::test_layernorm"],
    "matmul": ["tests/test_ops_matmul.py", "tests/test_ops_fp8.py"],
    "reduce": ["tests/test_ops_reduce.py"],
}
SLOWER, SAME, UNUSED, NEVER = (
    "the other way is as right, only slower",
    "both sides of the bound give the same value",
    "one round more, whose elements are all invalid: it adds zeros",
    "the sides are never equal: tiles and rows of warps start at multiples of 16",
)
EQUIVALENT = {  # (file, part of the line): why a mutant of that line that survives changes no result
    ("attention.cuh", "if (HS <= "): "a head size that is a tile's uses the next larger tile: as right, only slower",
    ("attention.cuh", "kLarge ="): SLOWER,
    ("attention_backward.cu", "kWarps ="): SLOWER,
    ("attention_backward.cu", "continue;"): NEVER,
    ("attention_backward.cu", "diagonal ="): NEVER,
    ("attention_backward.cu", "threadIdx.x < B::kOther &&"): "one thread more loads a value, which it does not store",
    ("attention_forward.cu", "continue;"): NEVER,
    ("attention_forward.cu", "kKeys - 1 > first_query"): NEVER,
    ("column_sums.cuh", "quad * 4 < C"): "four numbers of the workspace more are read, and not used",
    ("elements.cuh", "begin + N <= n"): SLOWER,
    ("embedding.cu", "first < count"): UNUSED,
    ("gelu.cuh", "10.0f"): SAME,
    ("layernorm.cu", "row_bytes <="): SLOWER,
    ("layernorm.cu", "threads <="): SLOWER,
    ("layernorm.cu", "first < end"): UNUSED,
    ("reduce.cu", "value > max_norm"): SAME,
    ("reduce.cu", "chunk < table.chunks"): "the chunk behind the last one has no elements",
}
TIMEOUT = 300  # seconds of processor time, which a busy machine does not lengthen; a mutant that hangs is caught

BARRIER = re.compile(
    r"(__syncthreads|__syncwarp|cp_async_wait<[^>]*>|cp_async_commit|__threadfence|after_previous_kernel)\([^)]*\);"
)
# Relations with a space on both sides: clang-format writes template brackets without.
RELATION = re.compile(r" (<|<=|>|>=) ")
SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
# Quotient and remainder of a thread's index say which part of a tile it has.
QUOTIENT = re.compile(r"\b(threadIdx\.[xyz]|thread|lane|index|i) ([/%]) ")
TRANSPOSED = re.compile(r"(ldmatrix<[^;]*?|transpose_[ab] = )\b(true|false)\b")


@dataclass(frozen=True)
class Mutant:
    """A file of csrc/cuda with one change."""

    file: str
    line: int
    kind: str  # barrier, bound or layout
    change: str
    text: str  # of the whole file

    def reason(self) -> str:
        """Why it changes no result, if that is known."""
        line = (KERNELS / self.file).read_text().splitlines()[self.line - 1]
        found = (why for (file, part), why in EQUIVALENT.items() if file == self.file and part in line)
        return next(found, "")


def code_lines(text: str) -> Iterator[tuple[int, int, str]]:
    """(number, offset, line) of the lines that hold code which can be mutated."""
    offset = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.split("//")[0]
        if not code.lstrip().startswith(("#", "static_assert", "template")):
            yield number, offset, code
        offset += len(line)


def mutants_of(path: Path) -> Iterator[Mutant]:
    text = path.read_text()

    def mutant(number: int, kind: str, begin: int, end: int, new: str) -> Mutant:
        change = f"{text[begin:end].strip()} -> {new.strip() or 'nothing'}"
        return Mutant(path.name, number, kind, change, text[:begin] + new + text[end:])

    for number, offset, line in code_lines(text):
        for found in BARRIER.finditer(line):
            yield mutant(number, "barrier", offset + found.start(), offset + found.end(), ";")
        for found in RELATION.finditer(line):
            yield mutant(number, "bound", offset + found.start(1), offset + found.end(1), SHIFTED[found[1]])
        for found in QUOTIENT.finditer(line):
            other = "%" if found[2] == "/" else "/"
            yield mutant(number, "layout", offset + found.start(2), offset + found.end(2), other)
        for found in TRANSPOSED.finditer(line):
            other = "false" if found[2] == "true" else "true"
            yield mutant(number, "layout", offset + found.start(2), offset + found.end(2), other)


class Build:
    """The commands that make the extension, as ninja knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        commands = subprocess.run(
            ["ninja", "-C", folder, "-t", "commands", "cudasim_checked"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        kernels = re.compile(r" -c \S*/csrc/cuda/(\w+)\.(?:cu|cpp)$")
        self.compile = {
            found[1]: line
            for line in commands
            if "cudasim_kernels_fast" not in line and (found := kernels.search(line))
        }
        (self.link,) = (
            line for line in commands if f"-o {EXTENSION.relative_to(ROOT)}" in line or f"-o {EXTENSION}" in line
        )
        self.includes = {
            path.name: re.findall(r'#include "cuda/(\S+)"', path.read_text()) for path in KERNELS.iterdir()
        }

    def dependents(self, file: str) -> list[str]:
        """Stems of the compiled files that are, or include, `file`."""

        def reaches(name: str) -> bool:
            return name == file or any(reaches(other) for other in self.includes.get(name, []))

        sources = sorted(path for path in KERNELS.iterdir() if path.suffix in (".cu", ".cpp"))
        return [path.stem for path in sources if path.stem in TESTS and reaches(path.name)]

    def objects(self, source: Path, stems: list[str], output: Path) -> dict[str, Path]:
        """Compiles those files of the tree `source` (a copy of csrc). CalledProcessError if one does not compile."""
        result = {}
        for stem in stems:
            command = shlex.split(self.compile[stem])
            old = Path(command[command.index("-c") + 1])
            result[stem] = output / f"{stem}.o"
            command[command.index("-c") + 1] = str(source / "cuda" / old.name)
            command[command.index("-o") + 1] = str(result[stem])
            command = [f"-I{source}" if word == f"-I{ROOT / 'csrc'}" else word for word in command]
            subprocess.run(command, cwd=self.folder, check=True, capture_output=True)
        return result

    def extension(self, objects: dict[str, Path], output: Path) -> None:
        """Links the original extension with these objects instead of its own."""
        command = self.link
        for stem, path in objects.items():
            command = re.sub(
                rf"\S*(kernels_checked|cudasim_host)\.dir/\S*csrc/cuda/{stem}\.(cu|cpp)\.o", str(path), command
            )
        (old,) = re.findall(r"-o (\S+_C\S*\.so)", command)
        command = command.replace(f"-o {old}", f"-o {output / Path(old).name}")
        subprocess.run(command, shell=True, cwd=self.folder, check=True, capture_output=True)


def machine_code(path: Path) -> str:
    """A digest of the code and data of an object file, without debug information."""
    with tempfile.NamedTemporaryFile(suffix=".o") as stripped:
        subprocess.run(["strip", "-g", "-o", stripped.name, path], check=True)
        return hashlib.sha256(Path(stripped.name).read_bytes()).hexdigest()


def run_tests(stem: str, folder: Path) -> str:
    """survived, or what caught the mutant whose extension is in the folder."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cudasim", *TESTS[stem]]
    environment = {**os.environ, "LLMC_CUDASIM": str(folder), "OMP_NUM_THREADS": "1"}
    command = ["prlimit", f"--cpu={TIMEOUT}:{TIMEOUT + 9}", *pytest]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return "survived"
    if result.returncode == -signal.SIGXCPU:
        return "caught: hangs"
    kinds = re.findall(r"^cudasim: ([\w-]+):", result.stdout + result.stderr, re.MULTILINE)
    if kinds:
        return f"caught: {kinds[0]}"
    return "caught: wrong result" if result.returncode == 1 else "caught: crash"


def verdict(build: Build, mutant: Mutant, originals: dict[str, str]) -> str:
    """unchanged, does not compile, survived, or what caught it: one file that is, or includes, it after the other."""
    result = "unchanged"
    for stem in build.dependents(mutant.file):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            (folder / "csrc" / "cuda" / mutant.file).write_text(mutant.text)
            try:
                objects = build.objects(folder / "csrc", [stem], folder)
            except subprocess.CalledProcessError:
                return "does not compile"
            if machine_code(objects[stem]) == originals[stem]:
                continue
            (folder / "checked").mkdir()
            (folder / "libcudasim.so").symlink_to(EXTENSION.parent / "libcudasim.so")
            build.extension(objects, folder / "checked")
            result = run_tests(stem, folder)
            if result != "survived":
                return result
    return result


def read_rows(path: Path) -> list[list[str]]:
    """Those of an earlier run, without the heading."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names in csrc/cuda; all kernels and headers without")
    parser.add_argument("--build", type=Path, default=None, help="the CMake build folder")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "mutations.csv")
    arguments = parser.parse_args()
    build = Build(arguments.build or next((ROOT / "build").glob("cpython-*")))
    kernels = sorted(path.name for path in KERNELS.iterdir() if path.suffix in (".cu", ".cuh"))
    names = arguments.files or [*kernels, "matmul.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        stems = sorted({stem for name in names for stem in build.dependents(name)})
        objects = build.objects(ROOT / "csrc", stems, Path(folder))
        originals = {stem: machine_code(path) for stem, path in objects.items()}
    mutants = [mutant for name in names for mutant in mutants_of(KERNELS / name)]
    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, result in zip(mutants, pool.map(lambda m: verdict(build, m, originals), mutants), strict=True):
            reason = mutant.reason() if result == "survived" else ""
            rows.append([mutant.file, str(mutant.line), mutant.kind, mutant.change, result, reason])
            print(*rows[-1], sep=", ", flush=True)
    rows += [row for row in read_rows(arguments.output) if row[0] not in names]
    rows.sort(key=lambda row: row[0])  # of a file they stay in their order
    with arguments.output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["file", "line", "kind", "change", "result", "reason"], *rows])
    caught = sum(row[4].startswith("caught") for row in rows)
    equivalent = sum(row[5] != "" for row in rows)
    survived = sum(row[4] == "survived" for row in rows) - equivalent
    print(f"{caught} caught, {survived} survived of {caught + survived} that change a result")
    print(f"{equivalent} change code but no result, {len(rows) - caught - survived - equivalent} no code")


if __name__ == "__main__":
    main()
