"""Runs a command of llmc on a simulated GPU: python tests/run_in_simulator.py llmc-train --device cuda ..."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

SIMULATOR = Path(os.environ.get("LLMC_CUDASIM", Path(__file__).parent.parent / "build" / "cudasim"))


def load_core(variant: str, name: str) -> tuple[ModuleType, ctypes.CDLL]:
    """The core with simulated CUDA devices as module `name`, and the simulator. variant: "checked" or "fast"."""
    import torch  # noqa: F401  before the extension, which is linked to its libraries

    library = ctypes.CDLL(str(SIMULATOR / "libcudasim.so"), mode=ctypes.RTLD_GLOBAL)
    path = SIMULATOR / variant / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core, library


def main() -> None:
    command, *arguments = sys.argv[1:]
    import llmc

    core, library = load_core(os.environ.get("CUDASIM_VARIANT", "fast"), "llmc._C")
    sys.modules["llmc._C"] = llmc._C = core  # type: ignore[attr-defined]
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    sys.argv = [command, *arguments]
    try:
        entry.load()()
    finally:
        library.cudasim_report.restype = ctypes.c_char_p
        library.cudaDeviceSynchronize()
        if report := library.cudasim_report().decode():
            sys.exit(f"the simulator reports:\n{report}")


if __name__ == "__main__":
    main()
