"""The table of flags: parsing, defaults, refusals, help."""

import dataclasses
import re
import subprocess
import sys

import pytest

from llmc.command_line import Command, build_parser, parse_args
from llmc.config import TrainConfig
from llmc.errors import UsageError

# The contract, written a second time by hand: field, short names, long name, default, a text for it, its value, and the
# flags without which it would have no effect.
FLAGS = [
    ("model", "-e", "--model", "chessGPT_d8_bf16.bin", "gpt2:d12", "gpt2:d12", ""),
    ("train_data", "-i", "--train-data", "dev/data/201506/201506_train_*.bin", "a_*.bin", "a_*.bin", ""),
    ("val_data", "-j", "--val-data", "dev/data/201506/201506_val_*.bin", "b=c_?.bin", "b=c_?.bin", ""),
    ("tokenizer", "", "--tokenizer", "", "data/tokenizer.bin", "data/tokenizer.bin", ""),
    ("output_dir", "-o", "--output-dir", "log_chess_gpt", "-logs", "-logs", ""),
    ("checkpoint_every", "-n", "--checkpoint-every", 0, "5000", 5000, ""),
    ("keep_checkpoints", "-nk", "--keep-checkpoints", 0, "5", 5, "-n 10"),
    ("major_every", "-nm", "--major-every", 0, "50000", 50000, "-n 10 -nk 5"),
    ("async_checkpoint", "", "--async-checkpoint", False, "1", True, "-n 10"),
    ("resume", "-y", "--resume", False, "1", True, ""),
    ("batch_size", "-b", "--batch-size", 4, "12", 12, ""),
    ("seq_len", "-t", "--seq-len", 1024, "64", 64, ""),
    ("total_batch_size", "-d", "--total-batch-size", -1, "524288", 524288, ""),
    ("max_steps", "-x", "--max-steps", -1, "0", 0, ""),
    ("max_time", "", "--max-time", "", "3:55:00", "3:55:00", ""),
    ("scheduler", "-k", "--scheduler", "cosine", "wsd", "wsd", ""),
    ("learning_rate", "-l", "--learning-rate", 3e-4, "1e-4", 1e-4, ""),
    ("warmup_steps", "-u", "--warmup-steps", 0, "700", 700, ""),
    ("final_lr_fraction", "-q", "--final-lr-fraction", 1.0, ".5", 0.5, ""),
    ("weight_decay", "-c", "--weight-decay", 0.0, "0.1", 0.1, ""),
    ("skip_loss_z", "-sl", "--skip-loss-z", 0.0, "7.0", 7.0, ""),
    ("skip_norm_z", "-sg", "--skip-norm-z", 0.0, "11.26", 11.26, ""),
    ("on_nan", "", "--on-nan", "stop", "skip", "skip", ""),
    ("seed", "", "--seed", 42, "0", 0, ""),
    ("val_every", "-v", "--val-every", 20, "-1", -1, ""),
    ("val_max_batches", "-m", "--val-max-batches", 20, "-1", -1, ""),
    ("sample_every", "-s", "--sample-every", 20, "0", 0, ""),
    ("sample_length", "-g", "--sample-length", 64, "+32", 32, ""),
    ("hellaswag", "-h", "--hellaswag", False, "1", True, ""),
    ("hellaswag_data", "", "--hellaswag-data", "dev/data/hellaswag/hellaswag_val.bin", "mmlu.bin", "mmlu.bin", "-h 1"),
    ("overfit_one_batch", "-a", "--overfit-one-batch", False, "1", True, ""),
    ("log_gpu_every", "-lg", "--log-gpu-every", -1, "10", 10, ""),
    ("json_log", "", "--json-log", "", "1", "1", ""),
    ("tensorboard", "", "--tensorboard", "", "runs/a", "runs/a", ""),
    ("wandb", "", "--wandb", "", "chess", "chess", ""),
    ("device", "", "--device", "auto", "cuda", "cuda", ""),
    ("precision", "", "--precision", "auto", "bf16", "bf16", ""),
    ("grad_dtype", "", "--grad-dtype", "auto", "fp32", "fp32", ""),
    ("master_weights", "-w", "--master-weights", True, "0", False, ""),
    ("tf32", "-f", "--tf32", True, "0", False, ""),
    ("autotune", "", "--autotune", True, "0", False, ""),
    ("gelu_fusion", "-ge", "--gelu-fusion", -1, "2", 2, ""),
    ("attention", "", "--attention", "flash", "cudnn", "cudnn", ""),
    ("cuda_graphs", "", "--cuda-graphs", False, "1", True, ""),
    ("fp8", "", "--fp8", 0, "2", 2, ""),
    ("recompute", "-r", "--recompute", 1, "2", 2, ""),
    ("offload_optimizer", "", "--offload-optimizer", False, "1", True, ""),
    ("zero_stage", "-z", "--zero-stage", 0, "3", 3, ""),
    ("gpus_per_node", "-pg", "--gpus-per-node", 8, "4", 4, "-pm fs"),
    ("start_method", "-pm -pi", "--start-method", "mpi", "tcp", "tcp", ""),
    ("num_processes", "-pn", "--num-processes", 1, "16", 16, ""),
    ("shared_path", "-pp -pf", "--shared-path", "/tmp", "/shared", "/shared", "-pm fs"),
    ("process_rank", "-pr", "--process-rank", 0, "3", 3, "-pm tcp -pn 4"),
    ("server_ip", "-ps", "--server-ip", "-1", "10.0.0.1", "10.0.0.1", "-pm tcp"),
]
IDS = [row[0] for row in FLAGS]


def parse(*argv):
    return parse_args(list(argv)).config


def test_table_is_complete():
    assert [field.name for field in dataclasses.fields(TrainConfig)] == IDS


def test_defaults():
    assert parse_args([]) == Command(TrainConfig(), dry_run=False, memory_gib=None)
    for name, _, _, default, *_ in FLAGS:
        value = getattr(TrainConfig(), name)
        assert (type(value), value) == (type(default), default)


@pytest.mark.parametrize(("field", "short", "long", "default", "text", "value", "needs"), FLAGS, ids=IDS)
def test_flag(field, short, long, default, text, value, needs):
    context = needs.split() + (["-g", "32"] if field == "seq_len" else [])
    without = parse(*context)
    assert getattr(without, field) == default
    for name in [long, *short.split()]:
        for spelling in ([name, text], [f"{name}={text}"]):
            config = parse(*context, *spelling)
            assert (type(getattr(config, field)), getattr(config, field)) == (type(default), value)
            assert dataclasses.replace(config, **{field: default}) == without  # nothing else has changed
            assert parse(*spelling, *context) == config


def test_dry_run():
    assert parse_args(["--dry-run", "-b", "8"]) == Command(TrainConfig(batch_size=8), dry_run=True)
    for argv in (["--dry-run", "--memory", "80"], ["--memory=80.0", "--dry-run"]):
        assert parse_args(argv) == Command(TrainConfig(), dry_run=True, memory_gib=80)


COMMON = "-v 250 -h 1 -r 0 -z 1 -c 0.1 -u 700 -y 1"
FINEWEB = "-i dev/data/fineweb10B/fineweb_train_*.bin -j dev/data/fineweb10B/fineweb_val_*.bin"
RUNS = {  # llm.c's run scripts: arguments, and what they change
    "gpt2_124M": (
        f"{FINEWEB} -o log_gpt2_124M -e d12 -b 64 -t 1024 -d 524288 {COMMON} -l 0.0006 -q 0.0 -s 20000 -g 144 -n 5000",
        {"model": "d12", "batch_size": 64, "learning_rate": 0.0006, "final_lr_fraction": 0.0, "checkpoint_every": 5000},
    ),
    "gpt2_350M": (
        f"{FINEWEB} -o log_gpt2_350M -e d24 -b 64 -t 1024 -d 524288 {COMMON} -u 2000 -l 0.0003 -q 0.0 -s 100000 -g 144 "
        "-n 2000 -x 60000",
        {"model": "d24", "batch_size": 64, "warmup_steps": 2000, "final_lr_fraction": 0.0, "sample_every": 100000}
        | {"checkpoint_every": 2000, "max_steps": 60000},
    ),
    "gpt2_774M": (
        f"{FINEWEB} -o log_gpt2_774M -e d36 -b 32 -t 1024 -d 524288 {COMMON} -l 0.00025 -q 0.0 -s 300000 -g 144 "
        "-n 4000 -x 286102",
        {"model": "d36", "batch_size": 32, "learning_rate": 0.00025, "final_lr_fraction": 0.0, "sample_every": 300000}
        | {"checkpoint_every": 4000, "max_steps": 286102},
    ),
    "gpt2_1558M": (
        f"{FINEWEB} -o log_gpt2_1558M -e d48 -b 16 -t 1024 -d 1048576 {COMMON} -k cosine -ge 1 -l 0.0006 -q 0.1 "
        "-s 300000 -g 384 -n 2000 -x 32000",
        {"model": "d48", "batch_size": 16, "total_batch_size": 1048576, "gelu_fusion": 1, "learning_rate": 0.0006}
        | {"final_lr_fraction": 0.1, "sample_every": 300000, "sample_length": 384, "checkpoint_every": 2000}
        | {"max_steps": 32000},
    ),
    "gpt3_125M": (
        f"{FINEWEB} -o log_gpt3_125M -e gpt3:c768 -b 32 -t 2048 -d 524288 {COMMON} -l 0.0006 -q 0.1 -s 20000 -g 144 "
        "-n 10000 -nk 5 -nm 50000 -ge 1 -sl 7.0 -sg 7.0 -x 572204",
        {"model": "gpt3:c768", "batch_size": 32, "seq_len": 2048, "learning_rate": 0.0006, "final_lr_fraction": 0.1}
        | {"checkpoint_every": 10000, "keep_checkpoints": 5, "major_every": 50000, "gelu_fusion": 1}
        | {"skip_loss_z": 7.0, "skip_norm_z": 7.0, "max_steps": 572204},
    ),
    "mpi": (
        f"{FINEWEB} -o log_gpt2_124M_multi -e d12 -b 64 -t 1024 -d 2097152 {COMMON} -y 0 -l 0.0006 -q 0.1 -s 20000 "
        "-g 144 -n 1000 -pi mpi",
        {"model": "d12", "batch_size": 64, "total_batch_size": 2097152, "resume": False, "learning_rate": 0.0006}
        | {"final_lr_fraction": 0.1, "checkpoint_every": 1000},
    ),
    "fs": (
        f"{FINEWEB} -o log_gpt2_124M_multi -e d12 -b 64 -t 1024 -d 2097152 {COMMON} -l 0.0006 -q 0.1 -s 20000 -g 144 "
        "-n 5000 -pi fs -pf /ephemeral/data -pn 16 -pr 9 -pg 8",
        {"model": "d12", "batch_size": 64, "total_batch_size": 2097152, "learning_rate": 0.0006}
        | {"final_lr_fraction": 0.1, "checkpoint_every": 5000, "start_method": "fs", "shared_path": "/ephemeral/data"}
        | {"num_processes": 16, "process_rank": 9},
    ),
    "tcp": (
        f"{FINEWEB} -o log_gpt2_124M_multi -e d12 -b 64 -t 1024 -d 2097152 {COMMON} -l 0.0006 -q 0.1 -s 20000 -g 144 "
        "-n 5000 -pi tcp -ps 192.168.0.7 -pn 16 -pr 0 -pg 8",
        {"model": "d12", "batch_size": 64, "total_batch_size": 2097152, "learning_rate": 0.0006}
        | {"final_lr_fraction": 0.1, "checkpoint_every": 5000, "start_method": "tcp", "server_ip": "192.168.0.7"}
        | {"num_processes": 16},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_command_lines_of_llm_c(name):
    line, changes = RUNS[name]
    common = TrainConfig(
        train_data="dev/data/fineweb10B/fineweb_train_*.bin",
        val_data="dev/data/fineweb10B/fineweb_val_*.bin",
        output_dir=f"log_{name if name in list(RUNS)[:5] else 'gpt2_124M_multi'}",
        total_batch_size=524288,
        val_every=250,
        hellaswag=True,
        recompute=0,
        zero_stage=1,
        weight_decay=0.1,
        warmup_steps=700,
        resume=True,
        sample_every=20000,
        sample_length=144,
    )
    assert parse(*line.split()) == dataclasses.replace(common, **changes)


def test_accumulation_steps():
    config = TrainConfig(batch_size=64, total_batch_size=524288)
    assert [config.accumulation_steps(world_size) for world_size in (1, 4, 8)] == [8, 2, 1]
    assert TrainConfig().accumulation_steps(8) == 1


@pytest.mark.parametrize("value", ["1", "0"])
def test_h_with_a_value_is_hellaswag(value):
    assert parse("-h", value).hellaswag is (value == "1")
    assert parse("-b", "8", "-h", value, "-t", "64") == TrainConfig(batch_size=8, seq_len=64, hellaswag=value == "1")


@pytest.mark.parametrize(
    "line", ["-h", "--help", "-b 8 -h", "-h -b 8", "-h --dry-run", "-h -h", "-h -h 1", "--help -b 8"]
)
def test_h_without_a_value_is_help(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(line.split())
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: llmc-train")


def test_last_flag_wins():
    assert parse("-b", "2", "--batch-size=3", "-b", "5").batch_size == 5
    assert parse("-b", "5", "--batch-size", "3").batch_size == 3


def test_a_learning_rate_of_zero_is_allowed():
    assert parse("-l", "0").learning_rate == 0


def test_empty_output_directory_means_none():
    assert parse("-o", "").output_dir == ""


def test_config_is_frozen_and_checks_itself():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().batch_size = 1
    with pytest.raises(UsageError, match="-b/--batch-size 0: it must be 1 or more"):
        TrainConfig(batch_size=0)


BAD_INPUTS = [  # command line, what the message must contain
    ("-b 12abc", "-b/--batch-size 12abc: it must be a whole number"),
    ("-b 1.5", "-b/--batch-size 1.5"),
    ("-b 1e3", "-b/--batch-size 1e3"),
    ("-b 1_000", "-b/--batch-size 1_000"),
    ("-b ٣", "-b/--batch-size ٣"),
    ("-b 0", "-b/--batch-size 0: it must be 1 or more"),
    ("-b -4", "-b/--batch-size -4: it must be 1 or more"),
    ("-b 2147483648", "whole number up to 2147483647"),
    ("-b 99999999999999999999", "whole number up to 2147483647"),
    ("-b", "-b needs a value"),
    ("-b -t 64", "-b needs a value, but the flag -t follows"),
    ("-bq 8", "unknown flag -bq"),
    ("-b4", "unknown flag -b4"),
    ("--batch 8", "unknown flag --batch"),
    ("--batch-size", "--batch-size needs a value"),
    ("--batch-size=", "-b/--batch-size '': it must be a whole number"),
    ("--no-such-flag=1", "unknown flag --no-such-flag=1"),
    ("-t 0", "-t/--seq-len 0: it must be 1 or more"),
    ("-t x", "-t/--seq-len x"),
    ("-b 65536 -t 65536", "-b 65536 times -t 65536"),
    ("-d 0", "-d/--total-batch-size 0: it must be 1 or more, or -1"),
    ("-d -2", "-d/--total-batch-size -2"),
    ("--max-time soon", "--max-time soon: it must be a time in minutes, minutes:seconds, "),
    ("-x -2", "-x/--max-steps -2: it must be 0 or more, or -1"),
    ("-x ten", "-x/--max-steps ten"),
    ("-k cosin", "-k/--scheduler cosin: it must be one of cosine, linear, constant, wsd"),
    ("-l -1e-4", "-l/--learning-rate -0.0001: it must be 0 or more"),
    ("-l nan", "-l/--learning-rate nan: it must be a finite number"),
    ("-l inf", "-l/--learning-rate inf"),
    ("-l 1e39", "-l/--learning-rate 1e39: it must be a finite number"),
    ("-l 3e-4x", "-l/--learning-rate 3e-4x"),
    ("-l 3,0", "-l/--learning-rate 3,0"),
    ("-u -1", "-u/--warmup-steps -1: it must be 0 or more"),
    ("-u 1.5", "-u/--warmup-steps 1.5: it must be a whole number"),
    ("-u 5 -k constant", "-u 5 only has an effect with another scheduler than -k constant; otherwise drop it"),
    ("-q 0.1 -k constant", "-q 0.1 only has an effect with another scheduler than -k constant"),
    ("-q x", "-q/--final-lr-fraction x: it must be a finite number"),
    ("-q 1.1", "-q/--final-lr-fraction 1.1: it must be between 0 and 1"),
    ("-q -0.1", "-q/--final-lr-fraction -0.1"),
    ("-c -0.1", "-c/--weight-decay -0.1: it must be 0 or more"),
    ("-v often", "-v/--val-every often"),
    ("-m 0", "-m/--val-max-batches 0: it must be 1 or more, or -1"),
    ("-m -2", "-m/--val-max-batches -2"),
    ("-s 1.0", "-s/--sample-every 1.0"),
    ("-g 0", "-g/--sample-length 0: it must be 1 or more"),
    ("-g 1025", "-g 1025 is longer than -t 1024: use -g 1024 or less"),
    ("-t 32", "-g 64 is longer than -t 32: use -g 32 or less"),
    ("-a 2", "-a/--overfit-one-batch 2: it must be 0 or 1"),
    ("-a yes", "-a/--overfit-one-batch yes"),
    ("-r 5", "-r/--recompute 5: it must be one of 0, 1, 2, 3, 4"),
    ("-r -1", "-r/--recompute -1"),
    ("-w true", "-w/--master-weights true: it must be 0 or 1"),
    ("--precision fp16", "--precision fp16: it must be one of auto, fp32, bf16"),
    ("train", "stray argument train"),
    ("-", "unknown flag -"),
    ("--", "unknown flag --"),
    ("-c much", "-c/--weight-decay much: it must be a finite number"),
    ("-c nan", "-c/--weight-decay nan"),
    ("-v 2.5", "-v/--val-every 2.5"),
    ("-m all", "-m/--val-max-batches all"),
    ("-s", "-s needs a value, but the command line ends there; try -s 20"),
    ("-g x", "-g/--sample-length x"),
    ("-g -1", "-g/--sample-length -1"),
    ("-x 1e6", "-x/--max-steps 1e6"),
    ("-d 0.5M", "-d/--total-batch-size 0.5M"),
    ("-d 2147483648", "-d/--total-batch-size 2147483648: it must be a whole number up to 2147483647"),
    ("-k", "-k needs a value, but the command line ends there; try -k cosine"),
    ("-e -i x", "-e needs a value, but the flag -i follows"),
    ("-i", "-i needs a value"),
    ("-j --val-every 2", "-j needs a value, but the flag --val-every follows"),
    ("-o", "-o needs a value"),
    ("-r full", "-r/--recompute full: it must be a whole number"),
    ("-h 2", "-h/--hellaswag 2: it must be 0 or 1"),
    ("-h yes", "-h/--hellaswag yes: it must be 0 or 1"),
    ("--hellaswag", "--hellaswag needs a value"),
    ("-h 1 -b 3", "-b 3 is too small for -h 1, where an example takes 4 rows: use -b 4 or more, or -h 0"),
    ("--hellaswag-data a.bin", "--hellaswag-data a.bin only has an effect with -h 1; otherwise drop it"),
    ("-h 1 --hellaswag-data=", "--hellaswag-data '': it must be a name or pattern"),
    ("-n -1", "-n/--checkpoint-every -1: it must be 0 or more"),
    ("-n often", "-n/--checkpoint-every often: it must be a whole number"),
    ("-n 100 --output-dir=", "-n 100 only has an effect with an output directory -o; otherwise drop it"),
    ("-nk -1", "-nk/--keep-checkpoints -1: it must be 0 or more"),
    ("-nk 2.0", "-nk/--keep-checkpoints 2.0"),
    ("-nk 5", "-nk 5 only has an effect with checkpoints: add -n"),
    ("-nm -1", "-nm/--major-every -1: it must be 0 or more"),
    ("-nm x", "-nm/--major-every x"),
    ("-nm 100", "-nm 100 only has an effect where checkpoints are deleted: add -nk"),
    ("--async-checkpoint 1", "--async-checkpoint 1 only has an effect with checkpoints: add -n"),
    ("--async-checkpoint 2 -n 10", "--async-checkpoint 2: it must be 0 or 1"),
    ("-nm 100 -n 10", "-nm 100 only has an effect where checkpoints are deleted: add -nk"),
    ("-y 2", "-y/--resume 2: it must be 0 or 1"),
    ("-y 1 --output-dir=", "-y 1 only has an effect with an output directory -o"),
    ("-y", "-y needs a value"),
    ("-sl -1", "-sl/--skip-loss-z -1.0: it must be between 0 and 11.27, the largest possible z-score"),
    ("-sl 11.28", "-sl/--skip-loss-z 11.28: it must be between 0 and 11.27"),
    ("-sl x", "-sl/--skip-loss-z x: it must be a finite number"),
    ("-sg -0.1", "-sg/--skip-norm-z -0.1: it must be between 0 and 11.27"),
    ("-sg 12", "-sg/--skip-norm-z 12.0: it must be between 0 and 11.27"),
    ("-sg nan", "-sg/--skip-norm-z nan: it must be a finite number"),
    ("--on-nan ignore", "--on-nan ignore: it must be one of stop, skip, rollback"),
    ("--on-nan rollback", "--on-nan rollback only has an effect with checkpoints: add -n; otherwise drop it"),
    ("--seed -1", "--seed -1: it must be 0 or more"),
    ("--seed 2147483648", "--seed 2147483648: it must be a whole number up to 2147483647"),
    ("--seed abc", "--seed abc"),
    ("-lg on", "-lg/--log-gpu-every on"),
    ("--json-log 0", "--json-log 0: it must be a file name, 1 for main.jsonl in -o, or '' for none"),
    ("--json-log 1 --output-dir=", "--json-log 1 only has an effect with an output directory -o; otherwise drop it"),
    ("--tensorboard", "--tensorboard needs a value"),
    ("--wandb", "--wandb needs a value"),
    ("-w 2", "-w/--master-weights 2"),
    ("-f -1", "-f/--tf32 -1: it must be 0 or 1"),
    ("-f off", "-f/--tf32 off"),
    ("-f 0 --precision bf16", "-f 0 only has an effect with --precision fp32; otherwise drop it"),
    ("-ge 3", "-ge/--gelu-fusion 3: it must be one of -1, 0, 1, 2"),
    ("-ge -2", "-ge/--gelu-fusion -2"),
    ("-ge x", "-ge/--gelu-fusion x"),
    ("--attention fa3", "--attention fa3: it must be one of flash, cudnn"),
    ("--cuda-graphs 2", "--cuda-graphs 2: it must be 0 or 1"),
    ("--fp8 3", "--fp8 3: it must be one of 0, 1, 2"),
    ("--offload-optimizer 2", "--offload-optimizer 2: it must be 0 or 1"),
    ("--autotune 2", "--autotune 2: it must be 0 or 1"),
    ("-z 4", "-z/--zero-stage 4: it must be one of 0, 1, 2, 3"),
    ("-z -1", "-z/--zero-stage -1"),
    ("-z one", "-z/--zero-stage one"),
    ("--device gpu", "--device gpu: it must be one of auto, cpu, cuda"),
    ("--precision BF16", "--precision BF16: it must be one of auto, fp32, bf16"),
    ("--grad-dtype fp64", "--grad-dtype fp64: it must be one of auto, fp32, bf16"),
    ("-pm nccl", "-pm/-pi/--start-method nccl: it must be one of mpi, tcp, fs"),
    ("-pi MPI", "-pm/-pi/--start-method MPI: it must be one of mpi, tcp, fs"),
    ("-pn 0", "-pn/--num-processes 0: it must be 1 or more"),
    ("-pn two", "-pn/--num-processes two"),
    ("-pg 0 -pm tcp", "-pg/--gpus-per-node 0: it must be 1 or more"),
    ("-pg 4", "-pg 4 only has an effect with -pm tcp or -pm fs"),
    ("-pr -1 -pm tcp", "-pr/--process-rank -1: it must be 0 or more"),
    ("-pr 1 -pn 2", "-pr 1 only has an effect with -pm tcp or -pm fs"),
    ("-pr 2 -pn 2 -pm tcp", "-pr 2 is no rank of -pn 2 processes: they count from 0"),
    ("-pr 1 -pm fs", "-pr 1 is no rank of -pn 1 processes"),
    ("-pp /shared", "-pp /shared only has an effect with -pm fs"),
    ("-pf /shared -pm tcp", "-pp /shared only has an effect with -pm fs"),
    ("-pp= -pm fs", "-pp/-pf/--shared-path '': it must be a name or pattern"),
    ("-ps 10.0.0.1", "-ps 10.0.0.1 only has an effect with -pm tcp"),
    ("-ps 10.0.0.1 -pm fs", "-ps 10.0.0.1 only has an effect with -pm tcp"),
    ("-ps= -pm tcp", "-ps/--server-ip '': it must be a name or pattern"),
    ("-p 4", "unknown flag -p"),
    ("--tokenizer", "--tokenizer needs a value"),
    ("--config", "--config needs a value, but the command line ends there; try --config FILE"),
    ("--memory", "--memory needs a value, but the command line ends there; try --memory 80"),
    ("--memory 80", "--memory 80 only has an effect with --dry-run; otherwise drop it"),
    ("--dry-run --memory 0", "--memory 0: it must be a positive number of GiB, such as 80"),
    ("--dry-run --memory -1", "--memory -1: it must be a positive number of GiB"),
    ("--dry-run --memory x", "--memory x: it must be a positive number of GiB"),
    ("--dry-run --memory 80GB", "--memory 80GB: it must be a positive number of GiB"),
    ("--dry-run --memory=", "--memory '': it must be a positive number of GiB"),
    ("--dry-run 1", "stray argument 1"),
    ("--dry-run=1", "unknown flag --dry-run=1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_INPUTS, ids=[line for line, _ in BAD_INPUTS])
def test_bad_input_gets_one_clear_line(line, message):
    with pytest.raises(UsageError) as caught:
        parse_args(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_inputs_cover_every_flag():
    for _, short, long, *_ in FLAGS:
        names = [long, *short.split()]
        assert any(argument.split("=")[0] in names for line, _ in BAD_INPUTS for argument in line.split()), long


def test_empty_values_are_refused():
    for flag in ("-e", "-i", "-j"):
        with pytest.raises(UsageError, match=f"{flag}/.* '': it must be a name or pattern"):
            parse(flag, "")


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m", "a\tb", "\x7f", "\u2028", "\udcff"])
@pytest.mark.parametrize("flag", [row[2] for row in FLAGS if type(row[3]) is str])
def test_text_that_cannot_be_printed_is_refused(flag, text):
    with pytest.raises(UsageError) as caught:
        parse(flag, text)
    assert f"{flag} {text!r}: it must be printable text" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["a\nb", "-\x1b"])
@pytest.mark.parametrize("argv", [["-b"], ["-l"], ["-y"], ["--dry-run", "--memory"], [], ["--config"]])
def test_other_text_that_cannot_be_printed(argv, text):
    """Also where no text belongs: the message is one line."""
    with pytest.raises(UsageError) as caught:
        parse(*argv, text)
    assert str(caught.value).isprintable() and repr(text) in str(caught.value)


def test_total_batch_size_must_be_a_multiple():
    config = TrainConfig(batch_size=4, seq_len=64, total_batch_size=1000)
    with pytest.raises(UsageError, match=re.escape("-d 1000 is not a multiple of 256")) as caught:
        config.accumulation_steps(world_size=1)
    assert "use -d 768 or -d 1024" in str(caught.value)
    with pytest.raises(UsageError, match=r"use -d 2048$"):
        dataclasses.replace(config, total_batch_size=1024).accumulation_steps(world_size=8)


def test_help_lists_every_flag_with_its_default():
    text = build_parser().format_help()
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", text)]
    for _, short, long, default, *_ in FLAGS:
        shown = str(int(default)) if isinstance(default, bool) else str(default) or "''"
        (entry,) = [entry for entry in entries if re.match(rf"(-\w+[ ,].*?)?{long} ", entry)]
        assert re.search(r"\(default: (.*?)\)", entry)[1] == shown, long
        for name in short.split():
            assert re.match(rf"(.*, )?{name}[ ,]", entry), name  # Python 3.13 writes -e, --model
    for name in ("--config FILE", "--dry-run", "--memory GIB", "--help"):
        assert f" {name} " in text
    for group in (
        "model:",
        "files:",
        "checkpoints:",
        "batch:",
        "optimization:",
        "evaluation:",
        "logging:",
        "memory:",
        "processes:",
    ):
        assert group in text
    assert "custom:l=4,c=128,h=4,t=64" in text


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_0_and_does_not_wait_for_torch(flag):
    code = "import sys; from llmc.cli.train import main; sys.argv = ['llmc-train', sys.argv[1]]\n"
    code += "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: llmc-train")
    assert result.stderr == "False\n"
