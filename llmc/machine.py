"""Facts about this computer."""

import os
import platform
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path


def processor(cpuinfo: Iterable[str]) -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo."""
    fields = (line.partition(":") for line in takewhile(str.strip, cpuinfo))
    return {name.strip(): value.strip() for name, _, value in fields}


def this_processor() -> dict[str, str]:
    """Empty where there is no /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", errors="replace") as file:
            return processor(file)  # not read further: with hundreds of processors that takes a while
    except OSError:
        return {}


def cpu_name() -> str:
    """The processor's model name, or at least its architecture."""
    return this_processor().get("model name") or platform.processor() or platform.machine()


def cpu_count() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(cores: Iterable[int], root: Path = Path("/")) -> list[int]:
    """Logical processors, those of a socket and of a core next to each other (on Linux; elsewhere as numbered)."""

    def place(core: int) -> tuple[int, ...]:
        topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
        lines = [read_lines(topology / name) for name in ("physical_package_id", "core_id")]
        return *(int(line) for file in lines for line in file), core

    return sorted(cores, key=place)


def memory_bytes() -> int:
    """Main memory that this process may use: all of it, or what the limit of a container or job leaves."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *control_group_limits()])


def control_group_limits(root: Path = Path("/")) -> list[int]:
    """Memory limits in bytes of this process's Linux control groups, versions 1 and 2, and of those around them."""
    limits = []
    for line in read_lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif controllers == "memory":
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = mount / group.lstrip("/")  # inside a container the mount may already be that group
        for directory in (own, *own.parents):
            limits += [int(text) for text in read_lines(directory / name) if text.isdecimal()]  # or "max"
    return limits


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, none if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
