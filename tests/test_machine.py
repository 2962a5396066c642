"""Facts about the computer: the memory limit of a control group, from files written by hand."""

import os
from pathlib import Path

import pytest

from llmc import machine

UNLIMITED_V1 = "9223372036854771712"  # what Linux shows without a limit


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n"}, [1000]),
        (
            {  # a limit of the group around this one counts too, that of a neighbour does not
                "proc/self/cgroup": "0::/job:1/task\n",
                "sys/fs/cgroup/job:1/task/memory.max": "max\n",
                "sys/fs/cgroup/job:1/memory.max": "2000\n",
                "sys/fs/cgroup/job:2/memory.max": "1\n",
            },
            [2000],
        ),
        (
            {  # Docker with version 1: the container's mount is the group itself
                "proc/self/cgroup": "5:cpu:/docker/ab\n4:memory:/docker/ab\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000\n",
                "sys/fs/cgroup/cpu/memory.limit_in_bytes": "1\n",
            },
            [3000],
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            },
            [4000, int(UNLIMITED_V1)],
        ),
    ],
)
def test_control_group_limits(tmp_path: Path, files: dict[str, str], limits: list[int]) -> None:
    write(tmp_path, files)
    assert machine.control_group_limits(tmp_path) == limits


def test_the_lower_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limits, expected in (([], physical), ([int(UNLIMITED_V1)], physical), ([5000, 4000], 4000)):
        monkeypatch.setattr(machine, "control_group_limits", lambda limits=limits: limits)
        assert machine.memory_bytes() == expected


def test_side_by_side(tmp_path: Path) -> None:
    """Two sockets with two cores with two threads each, numbered as Linux does; the last one has no description."""
    for core in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{core // 2 % 2}\n")
        (topology / "core_id").write_text(f"{core % 2}\n")
    assert machine.side_by_side(range(8), tmp_path) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert machine.side_by_side((7, 3, 2), tmp_path) == [2, 3, 7]
    assert machine.side_by_side((11, 10), tmp_path) == [10, 11]
