"""llmc: pretraining of GPT-2 and GPT-3 class language models with a compiled C++/CUDA core.

`from llmc import _C` gives the kernels and the GPT2 model of the compiled core.
"""

__version__ = "0.1.0"
