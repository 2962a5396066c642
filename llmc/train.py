"""The training loop."""

import math
import time
from pathlib import Path

from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.logger import Logger, StepReport, Throughput
from llmc.outliers import OutlierDetector
from llmc.prepare import Run, prepare
from llmc.report import batch_report, memory_report, parameter_table
from llmc.sample import print_sample


def train(config: TrainConfig) -> None:
    """Train as `config` says. Raises UsageError or RunError; those of the preparation leave the disk as it was."""
    run = prepare(config)
    model = run.model
    print(parameter_table(run), batch_report(run), sep="\n", flush=True)
    logger = Logger(Path(config.output_dir) if config.output_dir else None)
    print(memory_report(run), flush=True)
    loss_outliers, norm_outliers = OutlierDetector(), OutlierDetector()
    throughput = Throughput(run.tokens_per_step, run.flops_per_token, peak_flops=None)

    for step in range(run.num_steps + 1):
        last = step == run.num_steps
        if last or (config.val_every > 0 and step % config.val_every == 0):
            logger.validation(step, validate(run, step))
        if config.sample_every > 0 and (last or (step > 0 and step % config.sample_every == 0)):
            print_sample(model, config.seq_len, config.sample_length, run.start_token, run.tokenizer)
        if last:
            break

        started = time.perf_counter()
        if config.overfit_one_batch:
            run.train_loader.reset()
        for micro_step in range(run.accumulation_steps):
            inputs, targets = run.train_loader.next_batch()
            model.forward(inputs)
            model.backward(targets, micro_step, run.accumulation_steps)
        learning_rate = run.schedule(step)
        model.update(learning_rate, config.weight_decay, step + 1)
        loss, grad_norm = model.loss(), model.grad_norm()
        seconds = time.perf_counter() - started

        check_finite(config, "loss", loss, step)
        check_finite(config, "gradient norm", grad_norm, step)
        tokens_per_second = throughput.update(seconds)
        report = StepReport(
            step=step,
            num_steps=run.num_steps,
            loss=loss,
            loss_z=loss_outliers.update(loss),
            grad_norm=grad_norm,
            grad_norm_z=norm_outliers.update(grad_norm),
            learning_rate=learning_rate,
            seconds=seconds,
            mfu=throughput.mfu(seconds),
            tokens_per_second=tokens_per_second,
            seconds_left=throughput.seconds_left(run.num_steps - step - 1),
        )
        logger.training(report)

    if throughput.steps > 0:
        print(f"total average iteration time: {throughput.average_ms():f} ms")


def validate(run: Run, step: int) -> float:
    """Mean loss over the validation batches, always the same ones."""
    run.val_loader.reset()
    total = 0.0
    for _ in range(run.val_batches):
        inputs, targets = run.val_loader.next_batch()
        total += float(run.model.evaluate(inputs, targets).mean())
    check_finite(run.config, "validation loss", total, step)
    return total / run.val_batches


def check_finite(config: TrainConfig, name: str, value: float, step: int) -> None:
    """A NaN never goes away again: stop before hours are lost. What is known at step 0 is of the unchanged weights."""
    if math.isfinite(value):
        return
    if step == 0:
        raise RunError(f"the weights of -e {config.model} already give a {name} of {value}: start from other weights")
    raise RunError(
        f"the {name} is {value} at step {step + 1}: "
        "lower the learning rate -l or the weight decay -c, or raise the warm-up -u"
    )
