"""The training loop."""

import math
import time
from dataclasses import dataclass

from llmc.algorithms import choose_algorithms
from llmc.checkpoint_writer import CheckpointWriter
from llmc.config import TrainConfig
from llmc.errors import RunError
from llmc.guard import Guard
from llmc.hellaswag import count_correct
from llmc.lock import Lock
from llmc.logger import Logger, Progress, StepReport, Throughput
from llmc.output_dir import open_output_dir
from llmc.prepare import Run, prepare
from llmc.ranks import Ranks
from llmc.report import batch_report, memory_report, parameter_table
from llmc.sample import print_sample
from llmc.stop import StopRequest
from llmc.trackers import check_trackers, open_trackers
from llmc.wall_time import WallTime, read_wall_time


def train(config: TrainConfig, ranks: Ranks) -> bool:
    """Train as `config` says; False if a signal or --max-time ended the run before its last step.

    Raises UsageError or RunError; those of the preparation leave the disk as it was. All ranks run this; what is
    printed here is shown for rank 0 only.
    """
    if ranks.rank == 0:
        check_trackers(config)
    with Lock(config.output_dir) as lock:
        if problem := ranks.problem_of_rank_0("the lock of -o", lock.take):
            raise RunError(problem)
        run = prepare(config, ranks)
        print(parameter_table(run), batch_report(run), sep="\n", flush=True)
        output_dir = open_output_dir(config, ranks, lock)
        with open_trackers(config, ranks.rank, run.start_step, run.tokens_per_step) as tracker:
            logger = Logger(output_dir if ranks.rank == 0 else None, append=config.resume, tracker=tracker)
            print(memory_report(run), flush=True)
            choose_algorithms(run, output_dir)
            checkpoints = CheckpointWriter(run, output_dir) if output_dir and config.checkpoint_every > 0 else None
            stop = StopRequest()
            with stop.listening():
                try:
                    return take_steps(run, checkpoints, logger, stop)
                except RunError:
                    # Several ranks cannot, unless all end here: then guard.py has done it.
                    if checkpoints and ranks.size == 1:
                        checkpoints.complete()
                    raise


def take_steps(run: Run, checkpoints: CheckpointWriter | None, logger: Logger, stop: StopRequest) -> bool:
    """From the first step of the run to its end; False if it is asked to end earlier."""
    config, ranks = run.config, run.ranks
    guard = Guard(run, checkpoints)
    progress = Progress()
    throughput = Throughput(run.tokens_per_step, run.flops_per_token, run.peak_flops, ranks.size)
    wall_time = WallTime(read_wall_time(config.max_time))
    stopped = False

    step = run.start_step
    while True:
        last = step == run.num_steps
        if last or due(step, config.val_every, also_at_0=True):
            val_loss = validate(run, step, progress)
            if (back := guard.after_validation(step, val_loss)) is not None:
                step = back
                continue
            logger.validation(step, val_loss)
        if config.hellaswag and (last or due(step, config.val_every)):
            correct = count_correct(run.model, run.hellaswag_examples, config.batch_size, ranks)
            logger.hellaswag(step, correct, len(run.hellaswag_examples))
        takes_part = ranks.rank == 0 or run.model.options.zero_stage == 3  # where no rank has all the weights
        if takes_part and config.sample_every > 0 and (last or due(step, config.sample_every)):
            print_sample(run.model, config.sample_length, run.start_token, run.tokenizer)
        if checkpoints and (last or due(step, config.checkpoint_every)):
            logger.flush()  # what the log says of the steps before a checkpoint is not computed again
            checkpoints.write(step)
        if last:
            break
        wall_time.before_step()

        started = time.perf_counter()
        if config.overfit_one_batch:
            run.train_loader.reset()
        learning_rate = run.schedule(step)
        batches = []
        with progress.during("step") as show:
            for micro_step in range(run.accumulation_steps):
                show(f"step {step + 1}/{run.num_steps}: micro-batch {micro_step + 1}/{run.accumulation_steps}")
                inputs, targets = run.train_loader.next_batch()
                batches.append(run.train_loader.position)
                run.model.forward(inputs)
                busy = checkpoints is not None and checkpoints.busy
                run.model.vote([wants_to_stop(run, stop, wall_time, checkpoints), busy])
                run.model.backward(targets, micro_step, run.accumulation_steps)
            result = update(run, step, learning_rate, progress)
        seconds = time.perf_counter() - started

        if (back := guard.after_step(step, result.loss, result.grad_norm, batches)) is not None:
            step = back
            continue
        tokens_per_second = throughput.update(seconds)
        report = StepReport(
            step=step,
            num_steps=run.num_steps,
            loss=result.loss,
            loss_z=result.loss_z,
            grad_norm=result.grad_norm,
            grad_norm_z=result.grad_norm_z,
            learning_rate=learning_rate,
            seconds=seconds,
            mfu=throughput.mfu(seconds),
            tokens_per_second=tokens_per_second,
            seconds_left=throughput.seconds_left(run.num_steps - step - 1),
        )
        logger.training(report)
        if run.telemetry and due(step + 1, config.log_gpu_every):  # llm.c counts steps from 1 here
            print(run.telemetry.line(), flush=True)
        wall_time.after_step()
        stops, busy_ones = run.model.votes()
        if checkpoints:
            checkpoints.after_step(busy_ones > 0)
        if stops > 0 or (ranks.size == 1 and wants_to_stop(run, stop, wall_time, checkpoints)):
            stopped = True
            logger.flush()
            end_early(run, step + 1, stop, checkpoints)
            break
        step += 1

    if throughput.steps > 0:
        print(f"total average iteration time: {throughput.average_ms():f} ms")
    if checkpoints:
        checkpoints.finish()
    logger.close()
    return not stopped


def wants_to_stop(run: Run, stop: StopRequest, wall_time: WallTime, checkpoints: CheckpointWriter | None) -> bool:
    """Whether this rank has heard a signal, or, as rank 0, sees the end of --max-time."""
    seconds = checkpoints.seconds if checkpoints else 0.0
    return stop.reason != "" or (run.ranks.rank == 0 and wall_time.is_near(seconds))


def end_early(run: Run, step: int, stop: StopRequest, checkpoints: CheckpointWriter | None) -> None:
    """Save the run as it is before `step`, and say why it ends."""
    reason = run.ranks.first_problem(stop.reason, "why to stop") or f"--max-time {run.config.max_time}"
    print(f"{reason}: stopping after step {step}/{run.num_steps}", flush=True)
    if checkpoints:
        checkpoints.write(step)
    else:
        print("there is no checkpoint to go on from: only runs with -o and -n write them", flush=True)


def due(step: int, every: int, also_at_0: bool = False) -> bool:
    return every > 0 and step % every == 0 and (step > 0 or also_at_0)


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of a step, and how unusual they are."""

    loss: float
    loss_z: float
    grad_norm: float  # before clipping
    grad_norm_z: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def measure(run: Run) -> StepResult:
    loss, grad_norm = run.model.loss(), run.model.grad_norm()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):  # in a window it would hide the next 128 outliers
        return StepResult(loss, math.nan, grad_norm, math.nan)
    return StepResult(loss, run.loss_outliers.update(loss), grad_norm, run.norm_outliers.update(grad_norm))


def update(run: Run, step: int, learning_rate: float, progress: Progress) -> StepResult:
    """Update the parameters, unless an outlier forbids it; a skipped step counts like any other.

    Where loss or gradients are not finite, the model leaves the update out by itself.
    """
    config = run.config
    result = None
    if config.skip_loss_z > 0 or config.skip_norm_z > 0:  # only then must the host wait for the device here
        result = measure(run)
        for name, z, limit in (
            ("loss", result.loss_z, config.skip_loss_z),
            ("grad", result.grad_norm_z, config.skip_norm_z),
        ):
            if 0 < limit < z:  # not while z is NaN
                progress.erase()
                print(f"skipping update due to {name} z-score of {z:f}")
                return result
    random = run.model.rng_state, run.model.last_update_rng_state
    run.model.update(learning_rate, config.weight_decay, step + 1)
    result = result or measure(run)
    if not result.finite:
        run.model.rng_state, run.model.last_update_rng_state = random
    return result


def validate(run: Run, step: int, progress: Progress) -> float:
    """Mean loss over the validation batches of all ranks, always the same ones."""
    run.val_loader.reset()
    total = 0.0
    with progress.during("validation") as show:
        for batch in range(run.val_batches):
            show(f"step {step}/{run.num_steps}: validation batch {batch + 1}/{run.val_batches}")
            inputs, targets = run.val_loader.next_batch()
            total += float(run.model.evaluate(inputs, targets).mean())
    return run.ranks.mean(total / run.val_batches, "validation loss")
