"""`llmc-bench`: the speed of single kernels."""

import argparse
from pathlib import Path

from llmc.cli import Parser, run
from llmc.cli.numbers import real, whole

KERNELS = """\
Time operations of the training step against PyTorch's own, and against variants of your own, on the present device.
For each shape the table has the time of a call, its ratio to llmc's, GB/s (every tensor moved once), GFLOP/s, the share
of the roofline and the largest error against PyTorch in fp64, relative to the largest value. The roofline is the longer
of two times: bytes at the speed of a copy, flops at that of multiply-adds in registers, both measured now (a GPU's
flops are its data sheet's). Arguments change from call to call, so that they come from memory, if 256 sets of them are
more than the caches hold; smaller ones may be faster than the roofline.
"""
VARIANTS = """\
A variant is a .cpp, .cu or .py file with a function of the operation's name, which takes the arguments of --list in
their order and writes the results that csrc/ops/ops.h describes. C++ and CUDA are compiled by PyTorch
(torch.utils.cpp_extension.load: at::Tensor arguments, PYBIND11_MODULE) with -O3 -march=native -fopenmp.
examples/my_layernorm.cpp is one:

  llmc-bench kernels layernorm_forward --variant examples/my_layernorm.cpp
"""


def main() -> None:
    run("llmc-bench", _main)


def _main(argv: list[str]) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return
    from llmc.lab.kernels import Settings, describe_operations, run_kernels  # needs torch: not for --help

    if arguments.list:
        print(describe_operations())
        return
    settings = {name: value for name, value in vars(arguments).items() if name not in ("command", "list")}
    run_kernels(Settings(**settings), argv)


def _parser() -> Parser:
    parser = Parser(prog="llmc-bench", description="The speed of single kernels.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    kernels = commands.add_parser(
        "kernels",
        help="time operations against PyTorch's own and your variants",
        description=KERNELS,
        epilog=VARIANTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.add_argument("operations", nargs="*", metavar="OPERATION", help="one or more of --list (default: all)")
    kernels.add_argument("--list", action="store_true", help="print the operations, their arguments and sizes")
    kernels.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        default=[],
        metavar="SHAPE",
        help="N=1024,C=768 (the sizes of --list), or MODEL:BxT, those of a training step (default: d12:4x256, on a GPU "
        "d12:16x1024); may be repeated",
    )
    kernels.add_argument(
        "--precision",
        dest="precisions",
        action="append",
        choices=("fp32", "bf16"),
        default=[],
        help="of activations and parameters (default: fp32, on a GPU bf16); may be repeated",
    )
    kernels.add_argument(
        "--variant",
        dest="variants",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="your own kernels, see below; may be repeated",
    )
    kernels.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    kernels.add_argument("--threads", type=whole(1, 2), metavar="N", help="of the CPU (default: PyTorch's number)")
    kernels.add_argument(
        "--seconds",
        type=real(0, 3600, 0.5),
        default=0.5,
        help="of each contender and shape, at least three rounds (default: 0.5)",
    )
    kernels.add_argument("--csv", type=Path, metavar="FILE", help="append the results to this file")
    kernels.add_argument(
        "--chart", type=Path, metavar="FILE.png", help='draw the shares of the roofline (pip install -e ".[plot]")'
    )
    return parser
