"""llmc: pretraining of GPT-2 and GPT-3 class language models with a compiled C++/CUDA core.

`from llmc import _C` gives the kernels and the GPT2 model of the compiled core.
"""

import os

__version__ = "0.1.0"

# By default libgomp's threads spin for milliseconds at every barrier. On a busy machine, where the thread they wait for
# has no processor, that slows small models a hundredfold; a short spin is as fast on an idle one. libgomp reads this once,
# when torch loads it: in a program that imports torch before llmc it has no effect. Who sets OMP_WAIT_POLICY has chosen
# how long to spin, and GOMP_SPINCOUNT would override that choice.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
