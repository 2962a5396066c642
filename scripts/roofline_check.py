"""The step-time model of llmc/roofline.py against the step times that llm.c's authors published.

    python scripts/roofline_check.py                            prints the table
    python scripts/roofline_check.py --csv docs/roofline.csv    writes it

llm.c launches other kernels than this package, so its list is described here. Two constants are fitted: what cuBLASLt
reaches of the peak at best, on Ampere to the step of 350M and on Hopper to that of 1558M; the model must predict the
other steps. The last lines are this package's own steps, which nobody has measured.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmc import _C, models, roofline
from llmc.build import core_config, memory_plan, total_bytes
from llmc.kernels import CUDNN, Event, Kernel, Step, memset
from llmc.roofline import CAPABILITY_9, GPUS, Machine, Prediction, predict


class LlmcStep(Step):
    """llm.c at commit f1e2ace with cuDNN, where it differs: all logits at once, attention backward in one operation,
    gradients that are cleared first and then always added to. Its update is the same in bytes, tensor by tensor."""

    def __init__(
        self, config: "_C.GPT2Config", options: "_C.Options", world_size: int, accumulation_steps: int
    ) -> None:
        super().__init__(config, options, world_size, accumulation_steps)
        self.chunk_rows, self.sums_dwte_apart = self.N, False

    def accumulates(self, micro_step: int) -> bool:
        return True

    def backward(self, micro_step: int) -> Iterator[Event]:
        if micro_step == 0:
            yield memset("gradients", self.g * sum(self.unit_sizes))
        yield from super().backward(micro_step)

    def attention_forward(self) -> Kernel:
        return self.attention("forward", "", CUDNN, 4, 1, products=2, useful=2)

    def attention_backward(self) -> list[Kernel]:
        return [self.attention("backward", "", CUDNN, 8, 1, products=5, useful=4)]


@dataclass(frozen=True)
class Published:
    """A step that llm.c's authors timed, on eight GPUs with -z 1 -r 0."""

    model: str
    descriptor: str
    gpu: str
    B: int
    T: int
    tokens: int  # per step
    gelu_fusion: int
    milliseconds: float
    fitted: bool


PUBLISHED = [
    Published("124M", "d12", "A100", 64, 1024, 524288, 0, 300, fitted=False),
    Published("350M", "d24", "A100", 64, 1024, 524288, 0, 820, fitted=True),
    Published("774M", "d36", "A100", 32, 1024, 524288, 0, 1700, fitted=False),
    Published("1558M", "d48", "H100", 16, 1024, 1048576, 1, 2750, fitted=True),  # "2.7 to 2.8 s"
    Published("GPT-3 125M", "gpt3:c768", "H100", 32, 2048, 524288, 1, 150, fitted=False),
]  # its scripts' notes, where they are rounded: 150 ms may be 5 ms off
RANKS = 8


def llmc_step(run: Published) -> LlmcStep:
    options = _C.Options(
        batch_size=run.B,
        seq_len=run.T,
        precision="bf16",
        recompute=0,
        gelu_fusion=run.gelu_fusion,
        zero_stage=1,
        device="cuda",
    )
    config = core_config(run.descriptor, models.resolve(run.descriptor, None))
    return LlmcStep(config, options, RANKS, run.tokens // (run.B * run.T * RANKS))


def machine(run: Published) -> Machine:
    return Machine(GPUS[run.gpu], "bf16")


def fitted_share(run: Published) -> float:
    """The share of the peak with which the model gives the published time: a larger one makes every step faster."""
    step, low, high = llmc_step(run), 0.3, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        predicted = predict(step, replace(machine(run), product_share=middle)).seconds
        low, high = (middle, high) if predicted > run.milliseconds / 1e3 else (low, middle)
    return low


@dataclass(frozen=True)
class Own:
    """A step of this package in bf16 with the trainer's defaults but -r 0, -z 1 on several GPUs, and, where it says so,
    cuDNN's attention and FP8 products of that level."""

    model: str
    descriptor: str
    gpu: str
    ranks: int
    B: int
    tokens: int
    cudnn: bool
    fp8: int
    T: int = 1024

    @property
    def program(self) -> str:
        return "llmc" + " --attention cudnn" * self.cudnn + (f" --fp8 {self.fp8}" if self.fp8 else "")


OWN = [
    Own(model, descriptor, gpu, ranks, B, tokens, cudnn, fp8)
    for model, descriptor, B, tokens in (("124M", "d12", 32, 524288), ("1558M", "d48", 16, 1048576))
    for gpu in GPUS
    for ranks in (1, 8)
    # On older ones it is taken to be like our own.
    for cudnn in ((False, True) if GPUS[gpu].generation in CAPABILITY_9 else (False,))
    for fp8 in ((0, 1, 2) if GPUS[gpu].has_fp8 else (0,))
]


def own_step(run: Own) -> Step:
    options = _C.Options(
        batch_size=run.B,
        seq_len=run.T,
        precision="bf16",
        recompute=0,
        gelu_fusion=2 if GPUS[run.gpu].fuses_gelu and not run.fp8 else 0,
        bias_fusion=not run.fp8,
        cudnn_attention=run.cudnn,
        fp8=run.fp8,
        zero_stage=1,
        device="cuda",
    )
    config = core_config(run.descriptor, models.resolve(run.descriptor, None))
    return Step(config, options, run.ranks, run.tokens // (run.B * run.T * run.ranks))


def fits(step: Step, gpu: str) -> bool:
    buffers = memory_plan(step.config, step.options, step.world_size)
    return total_bytes(buffers) <= GPUS[gpu].memory_mib * 2**20


# --- the table --------------------------------------------------------------------------------------------------------

HEADER = [
    "program",
    "model",
    "gpu",
    "ranks",
    "B",
    "T",
    "tokens",
    "published_ms",
    "use",
    "predicted_ms",
    "error_percent",
]
HEADER += ["published_mfu", "predicted_mfu", "largest_loss", "second_loss", "third_loss"]


def row(program: str, run: Published | Own, ranks: int, prediction: Prediction) -> list[str]:
    cells = [program, run.model, run.gpu, str(ranks), str(run.B), str(run.T), str(run.tokens)]
    ms = 1e3 * prediction.seconds
    published_mfu = ""
    if isinstance(run, Published):
        published_mfu = f"{100 * prediction.mfu * ms / run.milliseconds:.1f}"
        use = "fitted" if run.fitted else "predicted"
        cells += [f"{run.milliseconds:g}", use, f"{ms:.1f}", f"{100 * (ms / run.milliseconds - 1):+.1f}"]
    else:
        cells += ["", "predicted", f"{ms:.1f}", ""]
    losses = [f"{cause}: {1e3 * seconds:.1f} ms" for cause, seconds in prediction.losses.items()]
    return [*cells, published_mfu, f"{100 * prediction.mfu:.1f}", *losses[:3]]


def report() -> list[list[str]]:
    table = [HEADER]
    for published in PUBLISHED:
        if published.fitted:
            share, constant = fitted_share(published), roofline.PRODUCT_SHARE[GPUS[published.gpu].generation]
            if abs(share - constant) > 0.0006:  # it is written with three digits
                sys.exit(f"{published.model} gives a PRODUCT_SHARE of {share:.4f}, llmc/roofline.py has {constant}")
        prediction = predict(llmc_step(published), machine(published))
        table.append(row("llm.c", published, RANKS, prediction))
    for own in OWN:
        step = own_step(own)
        if fits(step, own.gpu):
            table.append(row(own.program, own, own.ranks, predict(step, Machine(GPUS[own.gpu], "bf16"))))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the table to this file instead of printing it")
    arguments = parser.parse_args()
    table = report()
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        return
    widths = [max(len(cells[i]) for cells in table) for i in range(len(HEADER))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
