"""The table of flags: parsing, defaults, refusals, help."""

import dataclasses
import re
import subprocess
import sys

import pytest

from llmc.config import TrainConfig, build_parser, parse_args
from llmc.errors import UsageError

# The contract, written a second time by hand: field, short name, long name, default, a text for it, its value.
FLAGS = [
    ("model", "-e", "--model", "chessGPT_d8_bf16.bin", "gpt2:d12", "gpt2:d12"),
    ("train_data", "-i", "--train-data", "dev/data/201506/201506_train_*.bin", "a_*.bin", "a_*.bin"),
    ("val_data", "-j", "--val-data", "dev/data/201506/201506_val_*.bin", "b=c_?.bin", "b=c_?.bin"),
    ("output_dir", "-o", "--output-dir", "log_chess_gpt", "-logs", "-logs"),
    ("batch_size", "-b", "--batch-size", 4, "12", 12),
    ("seq_len", "-t", "--seq-len", 1024, "64", 64),
    ("total_batch_size", "-d", "--total-batch-size", -1, "524288", 524288),
    ("max_steps", "-x", "--max-steps", -1, "0", 0),
    ("learning_rate", "-l", "--learning-rate", 3e-4, "1e-4", 1e-4),
    ("warmup_steps", "-u", "--warmup-steps", 0, "700", 700),
    ("final_lr_fraction", "-q", "--final-lr-fraction", 1.0, ".5", 0.5),
    ("scheduler", "-k", "--scheduler", "cosine", "wsd", "wsd"),
    ("weight_decay", "-c", "--weight-decay", 0.0, "0.1", 0.1),
    ("val_every", "-v", "--val-every", 20, "-1", -1),
    ("val_max_batches", "-m", "--val-max-batches", 20, "-1", -1),
    ("sample_every", "-s", "--sample-every", 20, "0", 0),
    ("sample_length", "-g", "--sample-length", 64, "+32", 32),
    ("overfit_one_batch", "-a", "--overfit-one-batch", False, "1", True),
    ("recompute", "-r", "--recompute", 1, "2", 2),
    ("master_weights", "-w", "--master-weights", True, "0", False),
    ("precision", None, "--precision", "auto", "bf16", "bf16"),
]


def test_table_is_complete():
    assert {flag[0] for flag in FLAGS} == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(("field", "short", "long", "default", "text", "value"), FLAGS, ids=[f[0] for f in FLAGS])
def test_flag(field, short, long, default, text, value):
    assert getattr(parse_args([]), field) == default
    context = ["-t", "64"] if field != "seq_len" else []  # room for the default sample length
    spellings = [[long, text], [f"{long}={text}"]] + ([[short, text]] if short else [])
    for spelling in spellings:
        config = parse_args(context + spelling)
        assert getattr(config, field) == value
        assert type(getattr(config, field)) is type(default)
        # Nothing else has changed.
        assert dataclasses.replace(config, **{"seq_len": 1024, field: default}) == TrainConfig()


def test_llm_c_command_line():
    line = "-e d12 -b 64 -t 1024 -d 524288 -r 0 -c 0.1 -l 0.0006 -q 0.0 -u 700 -v 250 -s 20000 -g 144 -x -1"
    config = parse_args(line.split())
    expected = TrainConfig(
        model="d12",
        batch_size=64,
        seq_len=1024,
        total_batch_size=524288,
        recompute=0,
        weight_decay=0.1,
        learning_rate=0.0006,
        final_lr_fraction=0.0,
        warmup_steps=700,
        val_every=250,
        sample_every=20000,
        sample_length=144,
    )
    assert config == expected
    assert config.accumulation_steps(world_size=1) == 8
    assert config.accumulation_steps(world_size=4) == 2


def test_last_flag_wins():
    assert parse_args(["-b", "2", "--batch-size=3", "-b", "5"]).batch_size == 5
    assert parse_args(["-b", "5", "--batch-size", "3"]).batch_size == 3


def test_a_learning_rate_of_zero_is_allowed():
    assert parse_args(["-l", "0"]).learning_rate == 0


def test_empty_output_directory_means_none():
    assert parse_args(["-o", ""]).output_dir == ""


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
    ("-u 5 -k constant", "-u 5 has no effect with -k constant"),
    ("-q 0.1 -k constant", "-q 0.1 has no effect with -k constant"),
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
    ("-r 3", "-r/--recompute 3: it must be one of 0, 1, 2"),
    ("-r -1", "-r/--recompute -1"),
    ("-w true", "-w/--master-weights true: it must be 0 or 1"),
    ("--precision fp16", "--precision fp16: it must be one of auto, fp32, bf16"),
    ("train", "stray argument train"),
    ("-", "unknown flag -"),
    ("--", "unknown flag --"),
    # Flags of llm.c that this version does not have.
    ("-sl 3", "unknown flag -sl"),
    ("-sg 3", "unknown flag -sg"),
    ("-ge 1", "unknown flag -ge"),
    ("-z 1", "unknown flag -z"),
    ("-n 100", "unknown flag -n"),
    ("-y 1", "unknown flag -y"),
]


@pytest.mark.parametrize(("line", "message"), BAD_INPUTS, ids=[line for line, _ in BAD_INPUTS])
def test_bad_input_gets_one_clear_line(line, message):
    with pytest.raises(UsageError) as caught:
        parse_args(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_values_are_refused():
    for flag in ("-e", "-i", "-j"):
        with pytest.raises(UsageError, match=f"{flag}/.* '': it must be a name or pattern"):
            parse_args([flag, ""])


def test_total_batch_size_must_be_a_multiple():
    config = TrainConfig(batch_size=4, seq_len=64, total_batch_size=1000)
    with pytest.raises(UsageError, match=re.escape("-d 1000 is not a multiple of 256")) as caught:
        config.accumulation_steps(world_size=1)
    assert "use -d 768 or -d 1024" in str(caught.value)
    with pytest.raises(UsageError, match=r"use -d 2048$"):
        dataclasses.replace(config, total_batch_size=1024).accumulation_steps(world_size=8)


def test_help_lists_every_flag_with_its_default():
    text = " ".join(build_parser().format_help().split())
    for _, short, long, default, *_ in FLAGS:
        shown = str(int(default)) if isinstance(default, bool) else str(default)
        # From this flag's name to the first default after it, no other long name in between.
        entry = re.search(rf"{long} (?:(?!--).)*?\(default: (.*?)\)", text)
        assert entry and entry[1] == shown, long
        assert short is None or re.search(rf"{short}[ ,]", text)  # Python 3.13 writes -e, --model
    for group in ("model:", "files:", "batch:", "optimization:", "evaluation:", "memory:"):
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
