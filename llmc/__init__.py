"""llmc: pretraining of GPT-2 and GPT-3 class language models with a compiled C++/CUDA core.

`from llmc import _C` gives the kernels and the GPT2 model of the compiled core.
"""

import importlib
import os
from types import ModuleType

from llmc.openblas import choose_kernels

__version__ = "0.1.0"

# By default libgomp's threads spin for milliseconds at every barrier. On a busy machine, where the thread they wait for
# has no processor, that slowed small models fiftyfold; a short spin is as fast on an idle one. libgomp reads this
# once, when torch loads it, so llmc must be imported before torch. OMP_WAIT_POLICY is the user's own choice of how long
# to wait: GOMP_SPINCOUNT would override it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
choose_kernels()


def __getattr__(name: str) -> ModuleType:
    """`from llmc import _C`: first the libraries the core is linked with, wherever they are installed."""
    if name != "_C":
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")
    import ctypes

    import scipy_openblas32
    import torch  # noqa: F401

    ctypes.CDLL(f"{scipy_openblas32.get_lib_dir()}/lib{scipy_openblas32.get_library()}.so")
    return importlib.import_module("llmc._C")
