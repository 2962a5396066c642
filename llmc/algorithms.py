"""Which of cuBLASLt's algorithms computes each product of a step: timed once on a kind of GPU, and kept.

What is chosen by time changes how sums are rounded. So all ranks take what rank 0 has chosen, and a run notes it in its
output directory: whoever resumes it on such a GPU computes the same bits. The user's cache saves other runs the timing.
"""

import json
import os
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.binfile import atomic_write
from llmc.errors import RunError
from llmc.json_text import parse

if TYPE_CHECKING:
    from llmc.prepare import Run

NAME = "cublaslt_algorithms.json"  # in the output directory and in the cache
FORMAT = 1
MAX_BYTES = 2**24  # of a file: more than 50,000 products
WORDS = 8  # of 64 bits in an algorithm

Algorithms = dict[str, list[int]]  # by description of the product: csrc/cuda/cublas_lt.cpp


def choose_algorithms(run: "Run", directory: Path | None) -> None:
    """For all products of the run's steps; before the first step, by all ranks. directory: the run's, if it has one."""
    config, ranks, model = run.config, run.ranks, run.model
    if not (run.device.is_cuda and config.autotune):
        return
    started = time.perf_counter()
    files = Files(run, directory) if ranks.rank == 0 else None
    known = files.known() if files else {}
    chosen = known
    if run.start_step < run.num_steps:
        model.choose_algorithms(known, timing=ranks.rank == 0)
        warm_up(run)
        chosen = model.algorithms()
    model.choose_algorithms(ranks.broadcast(chosen, "the algorithms of the products"), timing=False)
    if files and run.start_step < run.num_steps:
        timed = sum(known.get(name) != algorithm for name, algorithm in chosen.items())
        print(f"{len(chosen)} kinds of matrix products, {timed} timed, in {time.perf_counter() - started:.1f} s")
        files.keep(chosen)


def warm_up(run: "Run") -> None:
    """Forward and backward passes like those of a step, of which nothing stays."""
    random = run.model.rng_state
    inputs, targets = run.val_loader.next_batch()
    passes = min(run.accumulation_steps, 2)  # the first one overwrites gradients, the others add to them
    for micro_step in range(passes):
        run.model.forward(inputs)
        run.model.backward(targets, micro_step, passes + 1)  # never the last one, which all ranks average
    run.model.rng_state = random


class Files:
    """What rank 0 reads and writes: neither file is needed, so trouble with them is only told."""

    def __init__(self, run: "Run", directory: Path | None) -> None:
        self.resumes = run.resumed is not None
        self.device = name_of_device(run.device.index)
        self.own = directory / NAME if directory else None
        self.cache = cache_file()
        self.noted: dict[str, Algorithms] = {}  # in the output directory, of the run that goes on

    def known(self) -> Algorithms:
        """Of this device: what the run has used before, or else the cache has."""
        cached = read_or_warn(self.cache, "products are timed again") if self.cache else None
        if self.resumes and self.own:
            noted = read_or_warn(self.own, DIFFERS)
            if noted is not None and self.device not in noted:
                warn(f"{self.own} has no algorithms of this {self.device}: {DIFFERS}")
            self.noted = noted or {}
        return (cached or {}).get(self.device, {}) | self.noted.get(self.device, {})

    def keep(self, chosen: Algorithms) -> None:
        before = self.noted.get(self.device, {})
        if changed := [name for name, algorithm in chosen.items() if before.get(name, algorithm) != algorithm]:
            warn(f"cuBLASLt no longer has the algorithm of {self.own} for {changed[0]}: {DIFFERS}")
        if self.own:
            merge_or_warn(self.own, self.noted, self.device, chosen)
        if self.cache:
            # Another run may have written meanwhile. What is lost if two write at once is timed again.
            merge_or_warn(self.cache, read_or_warn(self.cache) or {}, self.device, chosen)


DIFFERS = "the run may differ in the last bits from one that was not interrupted"


def name_of_device(index: int) -> str:
    """All that an algorithm and its time depend on besides the product; drivers bring no kernels of cuBLASLt."""
    from llmc import _C

    gpu = _C.cuda_devices()[index]
    return f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, cuBLASLt {_C.build_info()['cublaslt']}"


def cache_file() -> Path | None:
    """The user's; None where there is no home directory."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "llmc" / NAME


def read_algorithms(path: Path) -> dict[str, Algorithms]:
    """By device; none if there is no such file. RunError if it cannot be read, or is not as it was written."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise RunError(f"{path} is damaged: it has more than {MAX_BYTES} bytes")
    try:
        content = parse(raw)
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is no JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or content.keys() != {"format", "checksum", "devices"}:
        raise RunError(f"{path} is damaged: it must hold format, checksum and devices")
    if content["format"] != FORMAT:
        raise RunError(f"{path} has another format than {FORMAT}, the one that this program reads")
    devices: dict[str, Algorithms] = content["devices"]
    if not (isinstance(devices, dict) and all(map(are_algorithms, devices.values()))):
        raise RunError(f"{path} is damaged: an algorithm is {WORDS} numbers of 64 bits")
    if content["checksum"] != checksum(devices):
        raise RunError(f"{path} is damaged: its checksum is wrong")
    return devices


def are_algorithms(value: Any) -> bool:
    def is_algorithm(words: Any) -> bool:
        return (
            isinstance(words, list)
            and len(words) == WORDS
            and all(type(word) is int and 0 <= word < 2**64 for word in words)
        )

    return isinstance(value, dict) and all(map(is_algorithm, value.values()))


def write_algorithms(path: Path, devices: dict[str, Algorithms]) -> None:
    """The file is replaced as a whole. RunError if it cannot be."""
    content = {"format": FORMAT, "checksum": checksum(devices), "devices": devices}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def checksum(devices: dict[str, Algorithms]) -> str:
    """CRC-32 of the devices as JSON with sorted keys."""
    return f"{zlib.crc32(json.dumps(devices, sort_keys=True).encode()):08x}"


def read_or_warn(path: Path, consequence: str = "") -> dict[str, Algorithms] | None:
    """None if the file is damaged; no warning without a consequence."""
    try:
        return read_algorithms(path)
    except RunError as error:
        if consequence:
            warn(f"{error}: {consequence}")
        return None


def merge_or_warn(path: Path, there: dict[str, Algorithms], device: str, chosen: Algorithms) -> None:
    before = there.get(device, {})
    if (after := before | chosen) == before:
        return
    try:
        write_algorithms(path, there | {device: after})
    except RunError as error:
        warn(str(error))


def warn(text: str) -> None:
    print(f"WARNING: {text}", flush=True)
