"""Many hours of mishaps in minutes: runs that are killed, signalled, short of disk, damaged and changed, then compared.

python tests/soak.py --faults 500 --seed 1

Three small runs are each started again after every fault until they are complete, and begun anew until there were
enough: one process, three ranks with ZeRO, and a run whose number of ranks changes with every start. After every fault
each checkpoint must be, bit by bit, the one that an undisturbed run has at that step, and the next start must go on
from the newest of them. As root the disk is a real one of a few MiB, which is filled; else files are limited in size.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ranks_testing import Processes
from training_data import V, text, write_shard, write_tokenizer

from llmc import cli
from llmc.checksum import verify
from llmc.cli.train import _main as command

MODEL = "-e custom:l=1,c=32,h=2,t=16 -i data/t_train_*.bin -j data/t_val_*.bin -t 16 -g 8 -s 0 -m 1 -c 0.1"
# Of one run in several orders of summation: fp32 losses of about 4, printed with 4 decimals, after up to 60 updates.
LOSS_TOLERANCE = 1e-3


def run_rank(folder: str, arguments: list[str], limit: int | None) -> None:
    os.chdir(folder)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cli.run("llmc-train", command, arguments)


class Run:
    """One run in the folder that all share, and how it is started."""

    def __init__(self, name: str, folder: Path, disk: Path, flags: str, ranks: int, steps: int, every: int) -> None:
        self.name, self.folder, self.disk, self.flags, self.ranks = name, folder, disk, flags, ranks
        self.steps, self.every = steps, every
        self.output = disk / name
        self.completed = 0

    def start(self, output: Path, flags: str = "", ranks: int = 0, limit: int | None = None) -> Processes:
        ranks = ranks or self.ranks
        several = f"-pm fs -pp {self.folder} -pn {ranks}" if ranks > 1 else ""
        own = f"{MODEL} {self.flags} -x {self.steps} -n {self.every} -y 1 -o {output} {several} {flags}".split()
        arguments = [[*own, *(["-pr", str(rank)] if ranks > 1 else [])] for rank in range(ranks)]
        return Processes(self.folder, run_rank, [(str(self.folder), each, limit) for each in arguments], {})

    def straight(self) -> None:
        """What an undisturbed run leaves: hashes of all files of checkpoints, and the log."""
        output = self.folder / f"straight_{self.name}"
        statuses, errors = self.start(output).wait(120)
        assert statuses == [0] * self.ranks, errors
        self.expected = {path.name: digest(path) for path in output.glob("*.bin")}
        self.expected_log = merged_log(output)
        shutil.rmtree(output)

    def done(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.output.glob("DONE_*"))

    def files(self, step: int) -> list[Path]:
        return [self.output / f"model_{step:08d}.bin", *sorted(self.output.glob(f"state_{step:08d}_*.bin"))]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def merged_log(output: Path) -> dict[tuple[str, str], str]:
    """The last line of each step and kind: what a resumed run computes again is there twice."""
    lines = re.findall(r"^s:(\d+) (tel|trl):(.+)$", (output / "main.log").read_text(), re.M)
    return {(step, kind): value for step, kind, value in lines}


class Soak:
    """Faults at random, by one seed. Counts them; AssertionError at the first that lost something."""

    def __init__(self, folder: Path, disk: Path, real_disk: bool, seed: int) -> None:
        self.folder, self.disk, self.real_disk = folder, disk, real_disk
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.resumes = 0
        self.damaged: set[Path] = set()
        self.runs = [
            Run("one", folder, disk, "-b 2 -v 50 -l 1e-3 -nk 3", 1, 1200, 20),
            Run("three", folder, disk, "-b 1 -v 50 -l 1e-3 -z 2 -nk 3 --precision bf16", 3, 400, 20),
            Run("changing", folder, disk, "-a 1 -d 96 -b 2 -v 0 -m -1 -l 1e-4 -k constant -nk 3", 1, 60, 5),
        ]
        for run in self.runs:
            kept, run.flags = run.flags, run.flags.replace("-nk 3", "-nk 0")
            run.straight()
            run.flags = kept

    def faults(self) -> int:
        return sum(self.counts.values())

    def go(self, faults: int) -> None:
        while self.faults() < faults or not all(run.completed for run in self.runs):
            run = self.random.choices(self.runs, (6, 2, 1))[0]
            if self.faults() >= faults:  # the rest is for those that have not reached their end
                run = next(run for run in self.runs if not run.completed)
                self.finish(run)
            else:
                self.life(run)

    # ------------------------------------------------------------------------------------------------------------------

    def life(self, run: Run) -> None:
        """From one start of a run to its end, which is rarely its own."""
        if len(run.done()) >= 2 and self.random.random() < 0.4:
            self.damage(run)
        good = self.good(run)
        ranks, flags = run.ranks, f"--async-checkpoint {self.random.randrange(2)}"
        if run.name == "changing":
            ranks = self.random.choice([1, 2, 3])
            flags += f" -b {6 // ranks} -z {self.random.randrange(4)}"
            self.counts["other number of ranks"] += 1
        limit = None
        if not self.real_disk and self.random.random() < 0.2:
            limit = 20_000  # no model fits
        started = run.start(run.output, flags, ranks, limit)
        lost = ["rank lost"] * 4 if ranks > 1 else []
        fault = self.random.choice(["kill -9", "SIGTERM", "SIGUSR1", "SIGINT", *lost])
        self.pause(0.15, 0.9 if ranks == 1 else 1.8)
        if self.real_disk and self.random.random() < 0.5:
            self.fill_disk()
        victim = self.random.choice(started.processes)
        if fault == "kill -9":
            for process in started.processes:
                process.kill()
        elif fault == "rank lost":
            victim.kill()
        elif victim.is_alive():
            os.kill(victim.pid, getattr(signal, fault))
        statuses, errors = started.wait(60)
        self.count(fault, statuses, started.read("out"), errors)
        assert "Traceback" not in errors, errors
        self.check(run, good, started.read("out"))
        if statuses == [0] * ranks:
            self.complete(run)

    def count(self, fault: str, statuses: list[int | None], out: str, errors: str) -> None:
        full = ("No space left", "File too large")
        if any(reason in out + errors for reason in full):
            self.counts["disk full"] += 1
        if any(reason in errors for reason in full):
            return  # at the start, or for the last checkpoint: the run ended before the other fault
        if set(statuses) == {0}:
            return  # the run was over before
        if fault in ("kill -9", "rank lost"):
            assert -signal.SIGKILL in statuses and set(statuses) <= {-signal.SIGKILL, 1}, statuses
        elif set(statuses) != {75}:  # a start is no step: there was nothing to save
            assert {-getattr(signal, fault), 130} & set(statuses) or 1 in statuses, statuses
            fault += " before the first step"
        self.counts[fault] += 1

    def good(self, run: Run) -> list[int]:
        """Steps of the checkpoints that nothing was done to."""
        bad = {int(path.name.split("_")[1].removesuffix(".bin")) for path in self.damaged if path.parent == run.output}
        return [step for step in run.done() if step not in bad]

    def damage(self, run: Run) -> None:
        """The newest checkpoint."""
        path = self.random.choice(run.files(run.done()[-1]))
        if path in self.damaged or not path.exists():
            return
        kind = self.random.choice(["truncated file", "flipped bit", "file gone"])
        if kind == "file gone":
            path.unlink()
        else:
            raw = bytearray(path.read_bytes())
            if kind == "flipped bit":
                bit = self.random.randrange(8 * len(raw))
                raw[bit // 8] ^= 1 << bit % 8
            else:
                del raw[self.random.randrange(len(raw)) :]
            path.write_bytes(raw)
        self.damaged.add(path)
        self.counts[kind] += 1

    def pause(self, shortest: float, longest: float) -> None:
        time.sleep(self.random.uniform(shortest, longest))

    def fill_disk(self) -> None:
        filler = self.disk / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(65536)):
                pass
        self.pause(0.05, 0.2)
        filler.unlink()

    # ------------------------------------------------------------------------------------------------------------------

    def check(self, run: Run, good: list[int], out: str) -> None:
        """It went on from the newest good checkpoint, and all that are there are those of the undisturbed run."""
        if found := re.search(r"^(?:resuming at step (\d+)|no checkpoint in .*: a new run)$", out, re.M):
            assert int(found[1] or 0) == max(good, default=0), (found[0], good)
            self.resumes += 1
        rewritten = {path for path in self.damaged if path.exists() and intact(path)}
        self.damaged -= rewritten | {path for path in self.damaged if not run_has_marker(path)}
        there = self.good(run)
        assert max(there, default=0) >= max(good, default=0), (there, good)
        for step in there:
            for path in run.files(step):
                assert verify(path), path
                known = run.expected.get(path.name)
                assert run.name == "changing" or known in (None, digest(path)), path

    def complete(self, run: Run) -> None:
        """The end of a run is that of the undisturbed one, parameters, optimizer, data and log."""
        log = merged_log(run.output)
        if run.name == "changing":
            assert log.keys() == run.expected_log.keys()
            for (step, kind), value in log.items():
                loss, expected = float(value.split()[0]), float(run.expected_log[step, kind].split()[0])
                assert abs(loss - expected) <= LOSS_TOLERANCE, (step, kind, loss, expected)
        else:
            assert log == run.expected_log
            for path in run.files(run.steps):
                assert digest(path) == run.expected[path.name], path
        run.completed += 1
        shutil.rmtree(run.output)
        self.damaged = {path for path in self.damaged if path.parent != run.output}

    def finish(self, run: Run) -> None:
        statuses, errors = run.start(run.output).wait(120)
        assert statuses == [0] * run.ranks, errors
        self.complete(run)


def intact(path: Path) -> bool:
    try:
        return verify(path)
    except Exception:
        return False


def run_has_marker(path: Path) -> bool:
    step = path.name.split("_")[1].removesuffix(".bin")
    return (path.parent / f"DONE_{step}").exists()


def steady(folder: Path, disk: Path, steps: int) -> tuple[list[int], list[int]]:
    """Memory in KiB and open files of one process that writes a checkpoint every other step, by a thread."""
    run = Run("steady", folder, disk, "-b 2 -v 50 -nk 2 --async-checkpoint 1", 1, steps, 2)
    started = run.start(run.output)
    (process,) = started.processes
    memory, descriptors = [], []
    while process.is_alive():
        with contextlib.suppress(OSError, TypeError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]
            descriptors.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        time.sleep(0.02)
    assert started.wait(1)[0] == [0]
    return memory, descriptors


def check_steady(memory: list[int], descriptors: list[int]) -> str:
    """Of the last three quarters, compared with each other: RuntimeError-free growth is none."""
    quarter = len(memory) // 4
    early, late = memory[quarter : 2 * quarter], memory[-quarter - 1 : -1]
    growth = sorted(late)[len(late) // 2] - sorted(early)[len(early) // 2]
    files = max(descriptors[quarter : 2 * quarter]), max(descriptors[-quarter - 1 : -1])
    assert growth < 4096, f"{growth} KiB more memory in the last quarter than in the second"
    assert files[1] <= files[0] + 2, files  # a file that is being written, and its directory
    return f"memory grew by {growth} KiB, open files at most {files[0]} and {files[1]}"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[tuple[Path, bool]]:
    """A file system of that size, if this process may mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    try:
        yield disk, mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", disk], check=True)


def soak(folder: Path, faults: int, seed: int, steady_steps: int) -> Soak:
    (folder / "data").mkdir()
    write_shard(folder / "data" / "t_train_0.bin", text(0, 3000))
    write_shard(folder / "data" / "t_train_1.bin", text(1, 1700))
    write_shard(folder / "data" / "t_val_0.bin", text(9, 300))
    write_tokenizer(folder / "data" / "tokenizer.bin", V)
    began = time.monotonic()
    with small_disk(folder, "12m") as (disk, real):
        where = "a disk of 12 MiB" if real else "limits on the size of files"
        print(f"seed {seed}, {faults} faults, {where}", flush=True)
        soak = Soak(folder, disk, real, seed)
        soak.go(faults)
        for fault, count in sorted(soak.counts.items()):
            print(f"{fault}: {count}")
        ends = ", ".join(f"{run.completed} times {run.name}" for run in soak.runs)
        print(f"{soak.faults()} faults, {soak.resumes} starts that went on, {time.monotonic() - began:.0f} s")
        print(f"complete, with the same bits: {ends}")
        print(check_steady(*steady(folder, disk, steady_steps)), flush=True)
    return soak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Break runs at random and compare them with undisturbed ones.")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak(Path(temporary), arguments.faults, arguments.seed, steady_steps=4000)
