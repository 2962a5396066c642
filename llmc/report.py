"""What the trainer says before the first step: the table of settings and the sizes in memory."""

from llmc.build import bytes_by_lifetime, total_bytes
from llmc.checkpoint_copies import PREFIX
from llmc.logger import Row, table
from llmc.model_file import ITEM_BYTES
from llmc.prepare import Run

MIB = 2**20


def parameter_table(run: Run) -> str:
    config, shape = run.config, run.shape
    settings: list[Row] = [
        ("train data pattern", run.train_pattern),
        ("val data pattern", config.val_data),
        ("output log dir", config.output_dir or "NULL"),
        ("checkpoint_every", config.checkpoint_every),
        ("resume", int(config.resume)),
        ("micro batch size B", config.batch_size),
        ("sequence length T", config.seq_len),
        ("total batch size", run.tokens_per_step),
        ("LR scheduler", config.scheduler),
        ("learning rate (LR)", f"{config.learning_rate:e}"),
        ("warmup iterations", config.warmup_steps),
        ("final LR fraction", f"{config.final_lr_fraction:e}"),
        ("weight decay", f"{config.weight_decay:e}"),
        ("skip update lossz", f"{config.skip_loss_z:f}"),
        ("skip update gradz", f"{config.skip_norm_z:f}"),
        ("max_steps", config.max_steps),
        ("val_loss_every", config.val_every),
        ("val_max_steps", config.val_max_batches),
        ("sample_every", config.sample_every),
        ("genT", config.sample_length),
        ("overfit_single_batch", int(config.overfit_one_batch)),
        ("use_master_weights", "enabled" if config.master_weights else "disabled"),
        ("gelu_fusion", run.model.options.gelu_fusion),
        ("recompute", config.recompute),
    ]
    device: list[Row] = [
        ("device", run.device.name),
        ("peak TFlops", "n/a" if run.peak_flops is None else f"{run.peak_flops / 1e12:.1f}"),
        ("precision", run.precision.upper() + ("", " and FP8", " and FP8, loss head too")[run.config.fp8]),
    ]
    model: list[Row] = [
        ("weight init method", "intermediate checkpoint" if run.resumed else config.model),
        ("max_sequence_length T", shape.max_seq_len),
        ("vocab_size V", shape.vocab_size),
        ("padded_vocab_size Vp", shape.padded_vocab_size),
        ("num_layers L", shape.num_layers),
        ("num_heads NH", shape.num_heads),
        ("channels C", shape.channels),
        ("num_parameters", shape.num_parameters),
    ]
    batches: list[Row] = [("train_num_batches", run.num_steps), ("val_num_batches", run.val_batches)]
    stage = run.model.options.zero_stage
    alone = f": -z {config.zero_stage} has nothing to cut over one process" if config.zero_stage else ""
    processes: list[Row] = [("num_processes", run.ranks.size), ("zero_stage", stage)]
    if stage == 0:
        processes.insert(0, f"Zero Optimization is disabled{alone}")
    return table(
        [settings, device, model, batches, [("run hellaswag", "yes" if config.hellaswag else "no")], processes]
    )


def batch_report(run: Run) -> str:
    """The plain lines below the table: warnings, size of the model, and how a step's batch is cut."""
    config, shape = run.config, run.shape
    B, T = config.batch_size, config.seq_len
    lines = []
    if not run.tokenizer:
        lines += warning(f"no tokenizer beside {run.train_pattern}: samples are printed as token numbers")
    if shape.max_seq_len > T:
        lines += warning(
            f"sequence length {T} is below the model's context {shape.max_seq_len}: later positions do not train"
        )
    if run.resumed and run.resumed.has_master and run.precision == "bf16" and not config.master_weights:
        lines += warning("-w 0: the master weights of the checkpoint are left aside")
    if config.max_time and not (config.output_dir and config.checkpoint_every > 0):
        lines += warning(
            f"--max-time {config.max_time} will end the run without a checkpoint: only -o and -n write them"
        )
    for passed in run.passed_over:
        lines += warning(f"passing over {passed.checkpoint.done}: {passed.problem}")
    if config.resume:
        lines.append(
            f"resuming at step {run.start_step}" if run.resumed else f"no checkpoint in {config.output_dir}: a new run"
        )
    lines += [
        f"num_parameters: {shape.num_parameters} => bytes: {shape.num_parameters * ITEM_BYTES[run.precision]}",
        f"allocated {bytes_by_lifetime(run.buffers)['parameters'] // MIB} MiB for model parameters",
        f"batch_size B={B} * seq_len T={T} * num_processes={run.ranks.size} and total_batch_size={run.tokens_per_step}",
        f"=> setting grad_accum_steps={run.accumulation_steps}",
    ]
    return "\n".join(lines)


def memory_report(run: Run) -> str:
    """The lines after those: sizes of the other allocations, and what would still fit."""
    B = run.config.batch_size
    lifetimes = bytes_by_lifetime(run.buffers)
    optimizer = {buffer.name: buffer.bytes for buffer in run.buffers if buffer.name in ("m", "v", "master")}
    used, memory = total_bytes(run.buffers), run.device.memory
    host = " in host memory" if run.config.offload_optimizer else ""
    per_sequence = lifetimes["activations"] // B
    lines = [
        f"allocating {lifetimes['gradients'] // MIB} MiB for parameter gradients",
        f"allocating {lifetimes['activations'] // MIB} MiB for activations",
        f"allocating {optimizer['m'] // MIB} MiB for AdamW optimizer state m{host}",
        f"allocating {optimizer['v'] // MIB} MiB for AdamW optimizer state v{host}",
    ]
    if "master" in optimizer:
        lines.append(f"allocating {optimizer['master'] // MIB} MiB for master copy of params{host}")
    if run.config.async_checkpoint:
        copies = sum(buffer.bytes for buffer in run.buffers if buffer.name.startswith(PREFIX))
        lines.append(f"allocating {copies // MIB} MiB for a copy of what a checkpoint holds")
    lines += [
        f"device memory usage: {used // MIB} MiB / {memory // MIB} MiB",
        f"memory per sequence: {per_sequence // MIB} MiB",
        f" -> estimated maximum batch size: {B + (memory - used) // per_sequence}",
    ]
    return "\n".join(lines)


def warning(text: str) -> list[str]:
    return ["---", f"WARNING: {text}", "---"]
