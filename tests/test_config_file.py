"""Configuration files: the same settings as the command line, written and read back, and what is refused."""

import dataclasses
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml

from llmc.command_line import parse_args
from llmc.config import TrainConfig
from llmc.config_file import read_config_file, write_config_file
from llmc.errors import RunError, UsageError

TOML = """
# a comment
model = "d12"
batch-size = 8
seq_len = 256            # underscores as well as dashes
learning-rate = 3e-4
final-lr-fraction = 0.5
weight_decay = 0.1
warmup-steps = 10
master-weights = false
precision = "bf16"
output-dir = "log"
checkpoint-every = 5
keep_checkpoints = 2
resume = true
"""
YAML = """
# a comment
model: d12
batch-size: 8
seq_len: 256             # underscores as well as dashes
learning-rate: 3e-4      # text by the rules of YAML 1.1, where a number needs a point
final-lr-fraction: .5
weight_decay: 0.1
warmup-steps: 10
master-weights: no
precision: bf16
output-dir: "log"
checkpoint-every: 5
keep_checkpoints: 2
resume: on
"""
FLAGS = "-e d12 -b 8 -t 256 -l 3e-4 -q .5 -c 0.1 -u 10 -w 0 --precision bf16 -o log -n 5 -nk 2 -y 1"

# One setting after the other differs from its default; no two of them contradict each other.
CHANGED = TrainConfig(
    model='models/it\'s a "model".bin',
    train_data="C:\\data\\[a-z]?_train_*.bin",
    val_data="dätä/ü_{val}_*.bin",
    tokenizer="#no comment = 1",
    output_dir="log = 'x' # y",
    checkpoint_every=5,
    keep_checkpoints=3,
    major_every=100,
    async_checkpoint=True,
    resume=True,
    batch_size=7,
    seq_len=333,
    total_batch_size=2331,
    max_steps=12,
    max_time="1-12:30",
    scheduler="wsd",
    learning_rate=1e-05,
    warmup_steps=3,
    final_lr_fraction=1 / 3,
    weight_decay=0.1,
    skip_loss_z=6.25,
    skip_norm_z=7.0,
    on_nan="skip",
    seed=2147483647,
    val_every=-5,
    val_max_batches=-1,
    sample_every=0,
    sample_length=9,
    hellaswag=True,
    hellaswag_data="dätä/hellaswag_val.bin",
    overfit_one_batch=True,
    log_gpu_every=50,
    json_log="1",
    tensorboard="runs/a",
    wandb="chess",
    device="cuda",
    precision="fp32",
    grad_dtype="fp32",
    master_weights=False,
    tf32=False,
    autotune=False,
    gelu_fusion=2,
    attention="cudnn",
    cuda_graphs=True,
    fp8=2,
    recompute=0,
    offload_optimizer=True,
    zero_stage=3,
    gpus_per_node=4,
    start_method="tcp",
    num_processes=16,
    shared_path="/tmp",  # has no effect with tcp: below
    process_rank=15,
    server_ip="10.0.0.1",
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def parse(*argv):
    return parse_args(list(argv)).config


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_a_file_says_what_the_command_line_says(name, text):
    assert parse("--config", write(name, text)) == parse(*FLAGS.split())
    assert parse(f"--config={name}") == parse(*FLAGS.split())


def test_yaml_reads_3e_4_as_text():
    """The reason why text is taken for numbers, too."""
    assert yaml.safe_load("3e-4") == "3e-4"


@pytest.mark.parametrize("value", ["true", "1", '"1"'])
def test_spellings_of_true(value):
    assert parse("--config", write("a.toml", f"overfit-one-batch = {value}")).overfit_one_batch is True


@pytest.mark.parametrize("value", ["false", "0", '"0"'])
def test_spellings_of_false(value):
    assert parse("--config", write("a.toml", f"tf32 = {value}")).tf32 is False


def test_flags_win_wherever_they_stand():
    write("a.toml", "batch-size = 8\nmax-steps = 5")
    for argv in (["-b", "2", "--config", "a.toml"], ["--config", "a.toml", "-b", "2"]):
        config = parse(*argv)
        assert (config.batch_size, config.max_steps) == (2, 5)
    # Also a flag that says what is the default anyway, and one that makes good what the file lacks.
    assert parse("-b", "4", "--config", "a.toml").batch_size == 4
    write("a.toml", "keep-checkpoints = 2")
    assert parse("--config", "a.toml", "-n", "10").keep_checkpoints == 2


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_an_empty_file_says_nothing(name, text):
    assert parse("--config", write(name, text)) == TrainConfig()


def test_every_setting_survives_writing_and_reading():
    fs = dataclasses.replace(CHANGED, start_method="fs", server_ip="-1", shared_path="/shared/~ $x %s")
    for field in dataclasses.fields(TrainConfig):  # or the test would miss it
        assert getattr(fs if field.name == "shared_path" else CHANGED, field.name) != field.default, field.name
    for config in (TrainConfig(), CHANGED, fs):
        write_config_file("a.toml", config)
        assert parse("--config", "a.toml") == config
        types = [type(value) for value in read_config_file("a.toml").values()]
        assert types == [type(field.default) for field in dataclasses.fields(TrainConfig)]


@pytest.mark.parametrize(
    "text", ["it's", '"', "\\", '\\"', "\\n", "'''", "ü", "日本", "🙂", "a*?[b]{c}", "=", "#", " ", "-e"]
)
def test_awkward_text_survives(text):
    config = TrainConfig(model=text, output_dir=text)
    write_config_file("a.toml", config)
    assert parse("--config", "a.toml") == config


@pytest.mark.parametrize("value", [0.0, 1e-30, 5e-324, 0.1, 1 / 3, 1.0, 1e20, 3.4028234663852886e38])
def test_numbers_survive(value):
    write_config_file("a.toml", TrainConfig(learning_rate=value))
    assert parse("--config", "a.toml").learning_rate == value


def test_the_written_file_lists_every_flag_once():
    write_config_file("a.toml", TrainConfig())
    with open("a.toml") as file:
        keys = re.findall(r"^([a-z0-9-]+) = ", file.read(), re.MULTILINE)
    assert keys == [field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)]


REFUSED = [  # file, its text, what the message must contain
    ("a.toml", "batch-size = 0", "--config a.toml: -b/--batch-size 0: it must be 1 or more"),
    ("a.toml", "batch-size = 1.5", "--config a.toml: -b/--batch-size 1.5: it must be a whole number"),
    ("a.toml", "learning-rate = 'fast'", "-l/--learning-rate fast: it must be a finite number"),
    ("a.toml", "batch-size = true", "--config a.toml: batch-size must be 4 or the like, not true"),
    ("a.toml", "a=" + "[" * 20000, "--config a.toml is not valid TOML"),
    ("a.yaml", "[" * 2**16, "--config a.yaml is not valid YAML: its brackets are nested too deeply"),
    ("a.toml", "learning-rate = nan", "-l/--learning-rate nan: it must be a finite number"),
    ("a.toml", "learning-rate = inf", "-l/--learning-rate inf: it must be a finite number"),
    ("a.toml", "seed = 99999999999", "--seed 99999999999: it must be a whole number"),
    ("a.toml", "scheduler = 'cosin'", "-k/--scheduler cosin: it must be one of cosine, linear"),
    ("a.toml", "tf32 = 2", "-f/--tf32 2: it must be 0 or 1"),
    ("a.toml", 'model = ""', "-e/--model '': it must be a name or pattern"),
    ("a.toml", 'model = "a\\nb"', r"-e/--model 'a\nb': it must be printable text"),
    ("a.toml", "batchsize = 4", "--config a.toml: unknown setting 'batchsize'; they are the long flags of --help"),
    ("a.toml", "b = 4", "unknown setting 'b';"),
    ("a.toml", '"--batch-size" = 4', "unknown setting '--batch-size';"),
    ("a.toml", "config = 'b.toml'", "unknown setting 'config';"),
    ("a.toml", "dry-run = true", "unknown setting 'dry-run';"),
    ("a.toml", '"a\\nb" = 4', r"unknown setting 'a\nb';"),
    ("a.toml", "batch-size = [4]", "--config a.toml: batch-size must be one value, not a list"),
    ("a.toml", "[model]\nname = 'd12'", "--config a.toml: model must be one value, not a dict"),
    ("a.toml", "[batch]\nbatch-size = 4", "unknown setting 'batch';"),
    ("a.toml", "model = 2024-01-01", "--config a.toml: model must be one value, not a date"),
    ("a.toml", "model = 12:00:00", "--config a.toml: model must be one value, not a time"),
    ("a.toml", "\nbatch-size == 4", "--config a.toml is not valid TOML"),
    ("a.toml", "\nbatch-size == 4", "line 2"),
    ("a.toml", "batch-size = 4\nbatch-size = 5", "--config a.toml is not valid TOML"),
    ("a.yaml", "batch-size: 0", "--config a.yaml: -b/--batch-size 0: it must be 1 or more"),
    ("a.yaml", "batch-size: 12abc", "-b/--batch-size 12abc: it must be a whole number"),
    ("a.yaml", "batch-size: 1_000.0", "-b/--batch-size 1000.0: it must be a whole number"),
    ("a.yaml", "model:", "--config a.yaml: model must be one value, not a NoneType"),
    ("a.yaml", "model: [d12]", "model must be one value, not a list"),
    ("a.yaml", "model: {name: d12}", "model must be one value, not a dict"),
    ("a.yaml", "model: 2024-01-01", "model must be one value, not a date"),
    ("a.yaml", "1: d12", "--config a.yaml: unknown setting '1';"),
    ("a.yaml", "- d12", "--config a.yaml: it must hold one setting per line, such as batch-size = 4"),
    ("a.yaml", "model: &a d12\nval-data: *a", "a.yaml is not valid YAML: it refers to another place with *"),
    (
        "a.yaml",  # a line more would double what it stands for
        "m: &m {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [*{p}, *{p}]}}\n" for p, c in pairwise("mabcdefghijk")),
        "a.yaml is not valid YAML: it refers to another place with *",
    ),
    ("a.toml", f"seed = 0x{'f' * 5000}", "--config a.toml"),
    ("a.yaml", f"seed: 0x{'f' * 5000}", "--config a.yaml"),
    ("a.yaml", "d12", "--config a.yaml: it must hold one setting per line"),
    ("a.yaml", "3", "--config a.yaml: it must hold one setting per line"),
    ("a.yaml", "batch-size: 4\nmodel: 'd12", "--config a.yaml is not valid YAML"),
    ("a.yaml", "batch-size: 4\nmodel: 'd12", "line 2"),
    ("a.yaml", "model: !!python/object/apply:os.getcwd []", "--config a.yaml is not valid YAML"),
    ("a.yaml", "model: d12\n---\nmodel: d24", "--config a.yaml is not valid YAML"),
    ("a.toml", "#" * 2**16 + "#", "--config a.toml is not valid TOML: it has more than 65536 bytes"),
    ("a.yaml", "#" * 2**16 + "#", "--config a.yaml is not valid YAML: it has more than 65536 bytes"),
    ("a.json", "{}", "--config a.json: the name must end in .toml, .yaml, .yml"),
    ("a", "", "--config a: the name must end in .toml"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED, ids=[f"{row[0]}: {row[1]!r:.60}" for row in REFUSED])
def test_bad_file_gets_one_clear_line(name, text, message):
    with pytest.raises(UsageError) as caught:
        parse("--config", write(name, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
def test_a_file_that_is_not_utf_8(name):
    with open(name, "wb") as file:
        file.write(b"model = 'd\xfc12'")
    with pytest.raises(UsageError, match=f"--config {name} is not valid") as caught:
        parse("--config", name)
    assert "\n" not in str(caught.value)


def test_combinations_of_file_and_flags_are_checked():
    write("a.toml", "warmup-steps = 5")
    with pytest.raises(UsageError, match="-u 5 only has an effect with another scheduler"):
        parse("--config", "a.toml", "-k", "constant")


@pytest.mark.parametrize("name", ["missing.toml", "missing.yaml", "no/such/directory.yml"])
def test_a_missing_file(name):
    with pytest.raises(RunError, match=f"--config {name} cannot be read: No such file or directory"):
        parse("--config", name)


def test_a_directory(tmp_path):
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(RunError, match=r"--config a.toml cannot be read: Is a directory"):
        parse("--config", "a.toml")


def test_an_empty_name():
    with pytest.raises(UsageError, match=r"--config '': the name must end in \.toml"):
        parse("--config", "")


@pytest.mark.parametrize(("text", "status"), [(None, 1), ("batch-size = 0", 2)])
def test_exit_status(text, status):
    if text is not None:
        write("a.toml", text)
    code = "from llmc.cli.train import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "--config", "a.toml"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith("llmc-train: error: --config a.toml") and result.stderr.count("\n") == 1
