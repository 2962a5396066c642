"""llmc-train --dry-run: steps and memory of a run on paper, for any device, before anything is allocated."""

import re
from dataclasses import dataclass

from llmc import models
from llmc.build import (
    HOST,
    Buffer,
    bytes_by_lifetime,
    check_fp8,
    core_config,
    core_options,
    is_file,
    memory_plan,
    model_shape,
    precision_of,
    total_bytes,
)
from llmc.checkpoint_copies import copy_buffers
from llmc.config import INT32_MAX, RECOMPUTE, TrainConfig
from llmc.data.shards import find_shards, read_shard
from llmc.device import Device, device_on_paper
from llmc.errors import RunError, UsageError
from llmc.kernels import Step
from llmc.model_file import FileDtype, ModelShape
from llmc.roofline import GPUS, Machine
from llmc.roofline_report import roofline_report
from llmc.tokenizer import Tokenizer, dataset_tokenizer

MIB = 2**20
MAX_BATCH = 2**16  # a search needs an end


def dry_run(config: TrainConfig, memory_gib: float | None, roofline: str | None) -> None:
    """Print the steps, every buffer of one process, the totals, and what would fit into the memory of the device; with
    the name of a GPU in `roofline` also the predicted time of a step there."""
    device = device_on_paper(config, None if memory_gib is None else round(memory_gib * 2**30), roofline)
    memory = device.memory
    shape, stored_as = model_shape(config, vocabulary(config))
    if shape.max_seq_len < config.seq_len:
        raise UsageError(f"-t {config.seq_len} is longer than the context of -e {config.model}: {shape.max_seq_len}")
    precision = precision_of(config, device.is_cuda, stored_as)
    check_fp8(config, shape, precision, device)
    P = config.num_processes
    accumulation_steps = config.accumulation_steps(P)
    steps = steps_line(config, accumulation_steps * P * config.batch_size * config.seq_len)
    print(
        f"{config.model}: {shape.num_parameters} parameters, {precision}, B={config.batch_size} T={config.seq_len} "
        f"-r {config.recompute} -z {config.zero_stage}, {P} process(es), {accumulation_steps} micro-step(s)\n"
        f"{steps}\n\nmemory of each process:"
    )
    buffers = plan(config, device, shape, precision, config.batch_size, config.recompute, config.zero_stage)
    print(*buffer_lines(buffers), *total_lines(buffers, config.batch_size, memory), sep="\n")
    if config.zero_stage > 0:
        uncut = plan(config, device, shape, precision, config.batch_size, config.recompute, stage=0)
        saved = total_bytes(uncut) - total_bytes(buffers)
        print(f"-z {config.zero_stage}: {saved / MIB:.1f} MiB less per process than -z 0")
    stages = range(4) if P > 1 else [0]
    print(f"\nwhat fits into {memory / 2**30:.1f} GiB at -t {config.seq_len}:")
    print("  -z  -r  MiB at this -b  largest -b")
    for stage in stages:
        for recompute in RECOMPUTE:
            need = total_bytes(plan(config, device, shape, precision, config.batch_size, recompute, stage))
            largest = largest_batch(config, device, shape, precision, recompute, stage)
            print(f"  {stage:2}  {recompute:2}  {need / MIB:14.1f}  {largest or 'none':>10}")
    if roofline is not None:
        print(f"\n{prediction(config, roofline, device, shape, precision)}")


def prediction(config: TrainConfig, roofline: str, device: Device, shape: ModelShape, precision: FileDtype) -> str:
    P = config.num_processes
    machine = Machine(GPUS[roofline], precision, config.tf32, config.gpus_per_node)

    def step(stage: int) -> Step:
        options = core_options(config, precision, device, zero_stage=stage)
        return Step(core_config(f"-e {config.model}", shape), options, P, config.accumulation_steps(P))

    return roofline_report(roofline, machine, step(config.zero_stage), step)


def steps_line(config: TrainConfig, tokens_per_step: int) -> str:
    """How many steps and tokens the run has. Only an epoch needs the data for that, and only its headers."""
    steps, epoch = config.max_steps, ""
    if steps == -1:
        pattern = config.val_data if config.overfit_one_batch else config.train_data
        try:
            paths = find_shards(pattern)
        except RunError:
            return f"steps: one epoch, however long that is: {pattern} is not there; -x says it"
        num_tokens = sum(read_shard(path).size for path in paths)
        steps, epoch = num_tokens // tokens_per_step, f" (an epoch of {num_tokens})"
    total = f"{steps * tokens_per_step:.2e}".replace("e+0", "e").replace("e+", "e")
    return f"steps: {steps} of {tokens_per_step} tokens = {total} tokens in all{epoch}"


def vocabulary(config: TrainConfig) -> int | None:
    """Of the data, where the model asks for it: nothing else of a dry run needs data."""
    if config.tokenizer:
        return Tokenizer(config.tokenizer).vocab_size
    if is_file(config.model) or not models.takes_vocabulary_of_data(config.model):
        return None
    tokenizer = dataset_tokenizer(find_shards(config.train_data)[0])
    return tokenizer.vocab_size if tokenizer else None


def plan(
    config: TrainConfig,
    device: Device,
    shape: ModelShape,
    precision: FileDtype,
    batch_size: int,
    recompute: int,
    stage: int,
) -> list[Buffer]:
    if config.num_processes == 1:
        stage = 0  # as in training: there is nothing to cut
    options = core_options(config, precision, device, batch_size=batch_size, recompute=recompute, zero_stage=stage)
    buffers = memory_plan(core_config(f"-e {config.model}", shape), options, config.num_processes)
    if config.async_checkpoint:
        buffers += copy_buffers(shape, options, config.num_processes, 0, buffers)
    return buffers


def largest_batch(
    config: TrainConfig, device: Device, shape: ModelShape, precision: FileDtype, recompute: int, stage: int
) -> int:
    """A B whose plan fits into the device's memory while that of B + 1 does not; 0: not even one row does.

    That is the largest one, but for small models: their total falls a little where the logits take one more chunk.
    """

    def fits(batch_size: int) -> bool:
        return total_bytes(plan(config, device, shape, precision, batch_size, recompute, stage)) <= device.memory

    low, high = 0, min(MAX_BATCH, INT32_MAX // config.seq_len)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass
class Group:
    """Buffers that are alike in all layers."""

    first: Buffer
    count: int = 1


def buffer_lines(buffers: list[Buffer]) -> list[str]:
    """A line per buffer, those of the layers together; one that shares the memory of earlier ones says so."""
    groups: dict[tuple[str, str], Group] = {}
    for buffer in buffers:
        key = (buffer.lifetime, re.sub(r"^h[0-9]+\.", "h*.", buffer.name))
        if key in groups:
            groups[key].count += 1
        else:
            groups[key] = Group(buffer)
    lines = [f"  {'lifetime':<12}{'buffer':<20}{'dtype':<6}{'shape':<26}{'MiB':>12}"]
    listed: dict[str, Buffer] = {}
    for (lifetime, name), group in groups.items():
        shape = f"{group.count} x " * (group.count > 1) + str(group.first.shape).replace(" ", "").replace(",)", ")")
        mib = group.count * group.first.bytes / MIB
        others = [other for other, buffer in listed.items() if overlap(buffer, group.first)]
        listed[name] = group.first
        shared = f"  (shares memory with {', '.join(others)})" if others else ""
        lines.append(f"  {lifetime:<12}{name:<20}{group.first.dtype:<6}{shape:<26}{mib:>12.3f}{shared}")
    return lines


def overlap(a: Buffer, b: Buffer) -> bool:
    return a.lifetime == b.lifetime and a.offset < b.offset + b.bytes and b.offset < a.offset + a.bytes


def total_lines(buffers: list[Buffer], batch_size: int, memory: int) -> list[str]:
    lifetimes = bytes_by_lifetime(buffers)
    lines = [f"{lifetime}: {size} bytes, {size / MIB:.1f} MiB" for lifetime, size in lifetimes.items()]
    needed = total_bytes(buffers)
    total = "total without host" if HOST in lifetimes else "total"
    return [
        "",
        *lines,
        f"{total}: {needed} bytes, {needed / MIB:.1f} MiB of {memory / MIB:.1f} MiB: "
        + ("fits" if needed <= memory else "does not fit"),
        f"memory per sequence: {lifetimes['activations'] / batch_size / MIB:.1f} MiB",
    ]
