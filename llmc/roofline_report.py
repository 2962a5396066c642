"""What llmc-train --dry-run --roofline prints: the predicted step, kernel by kernel."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from llmc.kernels import Kernel, Step
from llmc.roofline import LAUNCH, Machine, Prediction, predict

LARGEST = 3  # losses that are named
# The furthest that the model is from a published step of llm.c that it was not fitted to, docs/roofline.csv.
ERROR = "of llm.c's published steps, predicted with two fitted constants, the worst is 9 % off (docs/roofline.csv)"


@dataclass
class Sum:
    """Of all launches of an operation."""

    launches: int = 0
    bytes: float = 0
    flops: float = 0
    least: float = 0  # seconds
    predicted: float = 0


def roofline_report(name: str, machine: Machine, step: Step, at_stage: Callable[[int], Step]) -> str:
    """name: of the GPU. at_stage: the same step at another ZeRO stage."""
    prediction = predict(step, machine)
    parts = [heading(name, machine, step.world_size, bool(step.options.fp8)), *kernel_lines(machine, prediction)]
    if step.world_size > 1:
        parts += ["", *stage_lines(machine, step, at_stage)]
    return "\n".join([*parts, "", *summary(machine, step, prediction)])


def heading(name: str, machine: Machine, ranks: int, in_fp8: bool) -> str:
    gpu = machine.gpu
    links = f"; {gpu.link_name} at {gpu.link / 1e9:g} GB/s" if ranks > 1 else ""
    if ranks > machine.gpus_per_node:
        links += f", {gpu.network / 1e9:g} GB/s for each GPU between machines of {machine.gpus_per_node}"
    fp8 = f" in bf16, of which the MFU is, and {gpu.fp8_peak / 1e12:.0f} in FP8" if in_fp8 else ""
    return (
        f"predicted for {name} ({gpu.device}), measured by nobody: data sheet {machine.peak / 1e12:.0f} TFLOP/s{fp8}, "
        f"{gpu.bandwidth / 1e9:g} GB/s{links}\n\nthe kernels of a step of one process:"
    )


def kernel_lines(machine: Machine, prediction: Prediction) -> list[str]:
    """The slowest operation first."""
    sums: defaultdict[tuple[str, str], Sum] = defaultdict(Sum)
    for kernel, count in prediction.launches.items():
        for key in ((kernel.what, kernel.name), ("all", "")):
            add(sums[key], machine, kernel, count)
    lines = [f"  {'operation':<51}{'launches':>9}{'MB':>11}{'GFLOP':>11}{'roofline ms':>13}{'predicted ms':>14}"]
    whole = sums.pop(("all", ""))
    ordered = sorted(sums.items(), key=lambda item: -item[1].predicted)
    for what, total in [*((what, total) for (what, _), total in ordered), ("all", whole)]:
        lines.append(
            f"  {what:<51}{total.launches:>9}{total.bytes / 1e6:>11.1f}{total.flops / 1e9:>11.1f}"
            f"{1e3 * total.least:>13.3f}{1e3 * total.predicted:>14.3f}"
        )
    return lines


def add(total: Sum, machine: Machine, kernel: Kernel, count: int) -> None:
    total.launches += count
    total.bytes += kernel.bytes * count
    total.flops += kernel.flops * count
    total.least += machine.least_seconds(kernel) * count
    total.predicted += machine.seconds(kernel) * count


def stage_lines(machine: Machine, step: Step, at_stage: Callable[[int], Step]) -> list[str]:
    """What the ranks send each other; kernels run at the same time."""
    lines = ["communication:", "  -z         MB  predicted ms   waited ms   step ms    MFU"]
    for stage in range(4):
        prediction = predict(step if stage == step.stage else at_stage(stage), machine)
        lines.append(
            f"  {stage:2}{prediction.moved / 1e6:>11.1f}{1e3 * prediction.collective_seconds:>14.3f}"
            f"{1e3 * prediction.waiting:>12.3f}{1e3 * prediction.seconds:>10.1f}{100 * prediction.mfu:>6.1f}%"
        )
    return lines


def summary(machine: Machine, step: Step, prediction: Prediction) -> list[str]:
    tokens = step.N * step.accumulation_steps * step.world_size
    ideal = prediction.mfu * prediction.seconds
    lines = [
        f"predicted step: {1e3 * prediction.seconds:.1f} ms, {tokens / prediction.seconds:.0f} tokens/s, "
        f"predicted MFU {100 * prediction.mfu:.1f}%; {ERROR}",
        f"the model's flops at the peak take {1e3 * ideal:.1f} ms; the {LARGEST} largest losses, as predicted:",
    ]
    for number, (cause, seconds) in enumerate(list(prediction.losses.items())[:LARGEST], 1):
        lines.append(f"  {number}. {cause}: {1e3 * seconds:.1f} ms, {100 * seconds / prediction.seconds:.1f}%")
    if machine.gpu.begins_early:
        early = step.early_launches()
        lines.append(
            f"{early} of {sum(prediction.launches.values())} launches may begin while the kernel before them ends, "
            f"which the prediction leaves out: it saves at most {100 * early * LAUNCH / prediction.seconds:.1f}%"
        )
    return lines
