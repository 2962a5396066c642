"""What nvcc made of the kernels: registers, shared memory, occupancy, and the machine code's memory accesses.

    LLMC_CUDA=ON pip install --no-build-isolation -e .     (any build with CUDA)
    python scripts/kernel_report.py                        prints the table
    python scripts/kernel_report.py --csv docs/kernels.csv writes it

Reads the objects of a build (--objects, default: the newest under build/) with cuobjdump and nvdisasm
(scripts/cuda_wheels.txt), and docs/launches.csv for the threads and the dynamic shared memory of the launches.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = ROOT / "docs" / "launches.csv"
WHEEL_TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Sizes in bytes, counts are of instructions."""

    kernel: str  # name and template arguments
    file: str
    arch: str
    registers: int  # of a thread
    stack: int  # of a thread: local arrays and spilled registers; 0 in a good kernel
    local_accesses: int  # to the stack
    static_shared: int  # of a block
    dynamic_shared: int | None  # of a block as launched, None for kernels that docs/launches.csv has not
    threads: int | None  # of a block
    occupancy: float | None  # per cent of the warps an SM can hold
    wide_loads: int  # of global memory, 128 bits or more for each thread
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    matrix: int  # tensor-core products


# --- occupancy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an SM: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    registers: int
    shared_memory: int  # bytes


SMS = {
    "sm_80": Multiprocessor(warps=64, blocks=32, registers=65536, shared_memory=164 << 10),
    "sm_90": Multiprocessor(warps=64, blocks=32, registers=65536, shared_memory=228 << 10),
    "sm_100": Multiprocessor(warps=64, blocks=32, registers=65536, shared_memory=228 << 10),
}
WARP = 32
# The rest is in NVIDIA's cuda_occupancy.h: how registers and shared memory are handed out.
PARTITIONS = 4  # of an SM; a warp has its registers in one
REGISTER_UNIT = 256  # of a warp
SHARED_UNIT = 128  # bytes of a block
SHARED_RESERVED = 1024  # bytes of a block for the system


def blocks_per_sm(arch: str, threads: int, registers: int, shared_memory: int) -> int:
    """How many blocks an SM holds at a time. registers: of a thread; shared_memory: bytes of a block, both kinds."""
    sm = SMS[arch]
    warps = -(-threads // WARP)
    warp_registers = round_up(registers * WARP, REGISTER_UNIT)
    warps_by_registers = PARTITIONS * (sm.registers // PARTITIONS // warp_registers)
    block_shared = round_up(shared_memory + SHARED_RESERVED, SHARED_UNIT)
    return min(sm.blocks, sm.warps // warps, warps_by_registers // warps, sm.shared_memory // block_shared)


def occupancy(arch: str, threads: int, registers: int, shared_memory: int) -> float:
    """Part of the warps that an SM can hold."""
    warps = -(-threads // WARP)
    return blocks_per_sm(arch, threads, registers, shared_memory) * warps / SMS[arch].warps


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# --- machine code -----------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][\w.]*)", re.MULTILINE)
KINDS = {  # how an instruction begins: what it is. LDGSTS copies from global to shared memory.
    "LDG.": "loads",
    "LDGSTS.": "loads",
    "LD.": "loads",
    "STG.": "stores",
    "ST.": "stores",
    "LDL": "local",
    "STL": "local",
    "HMMA.": "matrix",
}


def count_instructions(code: str) -> Counter[str]:
    """Of the disassembly of a function: wide and narrow loads and stores, local accesses, matrix products."""
    counts: Counter[str] = Counter()
    for instruction in INSTRUCTION.findall(code):
        for prefix, kind in KINDS.items():
            if f"{instruction}.".startswith(prefix):
                if kind in ("loads", "stores"):
                    wide = "128" in instruction.split(".") or "256" in instruction.split(".")
                    kind = f"{'wide' if wide else 'narrow'}_{kind}"
                counts[kind] += 1
                break
    return counts


def short_name(demangled: str) -> str:
    """Name and template arguments of a kernel, without namespaces, result and parameters."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.replace("llmc::cuda::", "").replace("llmc::", "")


def tool_path(tool: str) -> str | None:
    """Of the wheels, or in the PATH, or of a toolkit; None if it is nowhere."""
    return shutil.which(tool, path=f"{WHEEL_TOOLS}:{os.environ['PATH']}:/usr/local/cuda/bin")


def run(tool: str, *arguments: str, stdin: str | None = None) -> str:
    path = tool_path(tool)
    if path is None:
        sys.exit(f"{tool} was not found: pip install -r scripts/cuda_wheels.txt")
    environment = os.environ | {"PATH": f"{WHEEL_TOOLS}:{os.environ['PATH']}"}  # cuobjdump looks for nvdisasm there
    result = subprocess.run([path, *arguments], input=stdin, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        sys.exit(f"{tool} failed on {arguments[-1]}: {result.stderr.strip()}")
    return result.stdout


def functions(dump: str, heading: str) -> Iterable[tuple[str, str, str]]:
    """Architecture, mangled name and text of every function in an output of cuobjdump."""
    for part in re.split(r"^arch = ", dump, flags=re.MULTILINE)[1:]:
        arch = part.split(maxsplit=1)[0]
        for function in re.split(heading, part)[1:]:
            name, text = re.split(r":?\n", function, maxsplit=1)
            yield arch, name.strip(), text


@dataclass(frozen=True)
class Launch:
    threads: int
    dynamic_shared: int


def known_launches(path: Path = LAUNCHES) -> dict[str, Launch]:
    """The first launch of every kernel that the file knows."""
    launches: dict[str, Launch] = {}
    if path.is_file():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["threads"] == "":  # not a kernel of ours
                    continue
                launches.setdefault(row["kernel"], Launch(int(row["threads"]), int(row["dynamic_shared"])))
    return launches


def report(objects: Iterable[Path], launches: dict[str, Launch]) -> list[Kernel]:
    """All kernels of the objects, sorted by file and name; those of headers once, with the first file."""
    kernels: dict[tuple[str, str], Kernel] = {}
    for path in sorted(objects):
        code = {
            (arch, name): count_instructions(text)
            for arch, name, text in functions(run("cuobjdump", "--dump-sass", str(path)), r"(?m)^\s*Function : ")
        }
        found = list(functions(run("cuobjdump", "--dump-resource-usage", str(path)), r"(?m)^ Function "))
        demangled = run("c++filt", stdin="\n".join(name for _, name, _ in found)).splitlines()
        for (arch, mangled, text), full_name in zip(found, demangled, strict=True):
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
            kernel = short_name(full_name)
            launch = launches.get(kernel)
            # From sm_90 on the number includes the system's part of the shared memory of a block, if there is any.
            shared = usage["SHARED"] if arch == "sm_80" else max(0, usage["SHARED"] - SHARED_RESERVED)
            counts = code[arch, mangled]
            kernels.setdefault(
                (kernel, arch),
                Kernel(
                    kernel=kernel,
                    file=path.name.removesuffix(".o"),
                    arch=arch,
                    registers=usage["REG"],
                    stack=usage["STACK"] + usage["LOCAL"],
                    local_accesses=counts["local"],
                    static_shared=shared,
                    dynamic_shared=launch and launch.dynamic_shared,
                    threads=launch and launch.threads,
                    occupancy=launch
                    and round(100 * occupancy(arch, launch.threads, usage["REG"], shared + launch.dynamic_shared), 1),
                    wide_loads=counts["wide_loads"],
                    narrow_loads=counts["narrow_loads"],
                    wide_stores=counts["wide_stores"],
                    narrow_stores=counts["narrow_stores"],
                    matrix=counts["matrix"],
                ),
            )
    return sorted(
        kernels.values(), key=lambda kernel: (kernel.file, kernel.kernel, int(kernel.arch.removeprefix("sm_")))
    )


# --- output -----------------------------------------------------------------------------------------------------------


def built_objects() -> list[Path]:
    """Those of the newest build with CUDA, or none."""
    folders = [path for path in ROOT.glob("build/*/CMakeFiles/llmc_cuda.dir/csrc/cuda") if any(path.glob("*.cu.o"))]
    newest = max(folders, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("*.cu.o")), default=None)
    return sorted(newest.glob("*.cu.o")) if newest else []


def rows(kernels: list[Kernel]) -> list[list[str]]:
    cells = [["" if value is None else str(value) for value in asdict(kernel).values()] for kernel in kernels]
    return [[field.name for field in fields(Kernel)], *cells]


def print_table(kernels: list[Kernel]) -> None:
    table = rows(kernels)
    table[0] = [name.replace("_", " ") for name in table[0]]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, help="folder with the objects (*.cu.o) of a build")
    parser.add_argument("--csv", type=Path, help="write the table to this file instead of printing it")
    arguments = parser.parse_args()
    objects = sorted(arguments.objects.glob("*.cu.o")) if arguments.objects else built_objects()
    if not objects:
        sys.exit("no objects of a build with CUDA were found: build with LLMC_CUDA=ON, or give --objects")
    kernels = report(objects, known_launches())
    if arguments.csv is None:
        print_table(kernels)
        return
    with open(arguments.csv, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows(kernels))


if __name__ == "__main__":
    main()
