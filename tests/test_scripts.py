"""The scripts that start training runs: dry runs against numbers worked out by hand, what they start, when they stop.

Programs that they start are replaced by fakes, earlier on PATH, which write down how they were called.
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmc.build import model_shape
from llmc.cli.train import _main as llmc_train
from llmc.command_line import parse_args
from llmc.config import RECOMPUTE, TrainConfig, flag_fields, flag_of, names, show
from llmc.device import device_on_paper
from llmc.dry_run import largest_batch

SCRIPT_VARIABLES = "SLURM_|NPROC$|DRY_RUN$|HEAD$|HOSTFILE$"
SCRIPTS = Path(__file__).parent.parent / "scripts"
HELLASWAG = "dev/data/hellaswag/hellaswag_val.bin"
MIB = 2**20


class Run:
    """What a script does: parameters N, rows B and tokens T of a pass, processes P, micro-steps and steps."""

    def __init__(self, model, N, B, T, P, micro_steps, steps, tokens_per_step, tokens):
        self.processes = P
        self.headline = (
            f"{model}: {N} parameters, bf16, B={B} T={T} -r 0 -z 1, {P} process(es), {micro_steps} micro-step(s)"
        )
        self.steps = f"steps: {steps} of {tokens_per_step} tokens = {tokens} tokens in all"
        self.saved = 12 * N * (P - 1) / P / MIB  # of m, v and the master copy, fp32 each, a process keeps 1/P


MULTI_NODE = Run("d12", 124475904, 64, 1024, 16, 2, 4716, 2097152, "9.89e9")
RUNS = {
    "run_gpt2_124M.sh": Run("d12", 124475904, 64, 1024, 8, 1, 18865, 524288, "9.89e9"),
    "run_gpt2_350M.sh": Run("d24", 354871296, 64, 1024, 8, 1, 60000, 524288, "3.15e10"),
    "run_gpt2_774M.sh": Run("d36", 774090240, 32, 1024, 8, 2, 286102, 524288, "1.50e11"),
    "run_gpt2_1558M.sh": Run("d48", 1557686400, 16, 1024, 8, 8, 32000, 1048576, "3.36e10"),
    "run_gpt3_125M.sh": Run("gpt3:c768", 125262336, 32, 2048, 8, 1, 572204, 524288, "3.00e11"),
    "run_chess_124M.sh": Run("chess:d12", 85940736, 11, 1024, 1, 1, 30000, 11264, "3.38e8"),
    "run_chess_d8.sh": Run("chess:d8", 25809920, 28, 1024, 1, 1, 12000, 28672, "3.44e8"),
    "multi_node/run_gpt2_124M_mpi.sh": MULTI_NODE,
    "multi_node/run_gpt2_124M_torchrun.sh": MULTI_NODE,
    "multi_node/run_gpt2_124M_srun.sbatch": MULTI_NODE,
    "multi_node/run_gpt2_124M_tcp.sbatch": MULTI_NODE,
    "multi_node/run_gpt2_124M_fs.sbatch": MULTI_NODE,
}
REFERENCE_RUNS = {  # processes, steps, tokens
    "pyrun_gpt2_124M.sh": (8, "steps: 18865 of 524288 tokens = 9.89e9 tokens in all"),
    "pyrun_chess_d8.sh": (1, "steps: 12000 of 28672 tokens = 3.44e8 tokens in all"),
}
ALL = [*RUNS, *REFERENCE_RUNS]
SINGLE_NODE = [script for script in RUNS if not script.startswith("multi_node/")]


def start(script, directory, *arguments, **environment):
    """Run a script in a directory; a Slurm script as sbatch would, from a copy elsewhere."""
    path = [f"{directory}/bin"] * (directory / "bin").exists() + [str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: value for name, value in os.environ.items() if not re.match(SCRIPT_VARIABLES, name)}
    environment = inherited | {"PATH": ":".join(path), "SLURM_SUBMIT_DIR": str(SCRIPTS.parent)} | environment
    with tempfile.TemporaryDirectory() as spool:
        file = SCRIPTS / script if script.endswith(".sh") else shutil.copy(SCRIPTS / script, spool)
        command = ["bash", file, *arguments]
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)


def test_every_script_is_tested():
    found = [*SCRIPTS.glob("run_*_*.sh"), *SCRIPTS.glob("pyrun_*.sh"), *SCRIPTS.glob("multi_node/run_*")]
    assert sorted(ALL) == sorted(str(path.relative_to(SCRIPTS)) for path in found)


@pytest.mark.parametrize("script", [*ALL, "run_common.sh", "multi_node/common.sh"])
def test_form(script):
    path = SCRIPTS / script
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert os.access(path, os.X_OK) == text.startswith("#!/usr/bin/env bash\n") == (script in ALL)


# ----------------------------------------------------------------------------------------------------------------------
# Fake programs

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $*" >>calls
read -r status step < <(sed -n "$(wc -l <calls)p" outcomes 2>/dev/null)
if [ -n "$step" ]; then mkdir -p log && touch "log/DONE_$step"; fi
if [ "$status" = interrupt ]; then kill -INT $PPID; exit 1; fi
[ "${status:-0}" = 0 ] || echo "the reason" >&2
exit "${status:-0}"
"""
# Slurm's: one of the tasks.
FAKE_SRUN = """#!/usr/bin/env bash
echo "srun $1" >>calls
shift
SLURM_NTASKS=16 SLURM_NTASKS_PER_NODE=8 SLURM_PROCID=11 exec "$@"
"""


@pytest.fixture
def directory(tmp_path):
    """A working directory with fake programs in bin/ and a file for every pattern of the scripts."""
    (tmp_path / "bin").mkdir()
    programs = {name: FAKE for name in ("llmc-train", "mpirun", "torchrun")}
    for name, text in {**programs, "srun": FAKE_SRUN, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for stem in ("fineweb10B/fineweb", "fineweb100B/fineweb", "edu_fineweb100B/edu_fineweb", "201506/201506"):
        for split in ("train", "val"):
            path = tmp_path / f"dev/data/{stem}_{split}_000000.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (tmp_path / HELLASWAG).parent.mkdir()
    (tmp_path / HELLASWAG).touch()
    return tmp_path


def calls(directory):
    file = directory / "calls"
    return [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []


def config_of(arguments):
    """The configuration that llmc-train makes of them: no flag is unknown or has a value that no run can use."""
    command = parse_args(arguments)
    assert not command.dry_run
    return command.config


# ----------------------------------------------------------------------------------------------------------------------
# Dry runs


@pytest.mark.parametrize("script", RUNS)
def test_dry_run(directory, capsys, script):
    for path in directory.glob("dev/data/*/*"):
        path.unlink()
    result, run = start(script, directory, DRY_RUN="1"), RUNS[script]
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    ((program, *arguments),) = calls(directory)
    assert program == "llmc-train"
    llmc_train(arguments)  # in this process, which has imported torch already
    output = capsys.readouterr().out
    assert output.splitlines()[:2] == [run.headline, run.steps]
    assert re.search(r"^total: \d+ bytes, .*: fits$", output, re.MULTILINE)
    saved = float(re.search(r"^-z 1: ([\d.]+) MiB less per process than -z 0$", output, re.MULTILINE)[1])
    assert saved == pytest.approx(run.saved, abs=1)  # the parts are padded


def test_dry_run_of_the_real_program(tmp_path):
    result, run = start("run_gpt2_124M.sh", tmp_path, DRY_RUN="1"), RUNS["run_gpt2_124M.sh"]
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[:2] == [run.headline, run.steps]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", REFERENCE_RUNS)
def test_dry_run_of_the_reference(tmp_path, reference, script):
    result, (processes, steps) = start(script, tmp_path, DRY_RUN="1"), REFERENCE_RUNS[script]
    assert (result.returncode, result.stderr) == (0, "")
    first, command = result.stdout.splitlines()
    assert first == steps
    words = shlex.split(command)
    program = words.index(str(SCRIPTS / "train_gpt2.py"))
    assert words[:program] == ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    args = reference.parse(words[program + 1 :])
    assert args.total_batch_size % (args.batch_size * args.sequence_length * processes) == 0
    same = RUNS[script.removeprefix("py")]
    assert same.headline.startswith(args.model + ":") and f" T={args.sequence_length} " in same.headline
    assert same.steps.startswith(f"steps: {args.num_iterations} of {args.total_batch_size} tokens")


# ----------------------------------------------------------------------------------------------------------------------
# Real runs


SAME = {"seq_len": 1024, "recompute": 0, "zero_stage": 1, "weight_decay": 0.1, "scheduler": "cosine", "resume": True}
GPT = SAME | {
    "val_every": 250,
    "hellaswag": True,
    "sample_every": 20000,
    "sample_length": 144,
    "total_batch_size": 524288,
    "warmup_steps": 700,
}
CHESS = SAME | {
    "val_every": 500,
    "sample_every": 500,
    "sample_length": 640,
    "checkpoint_every": 500,
    "keep_checkpoints": 1,
}
SETTINGS = {  # what else is not the default
    "run_gpt2_124M.sh": GPT
    | {"model": "d12", "batch_size": 64, "learning_rate": 6e-4, "final_lr_fraction": 0}
    | {"checkpoint_every": 5000, "max_steps": 18865, "output_dir": "log_gpt2_124M"},
    "run_gpt2_350M.sh": GPT
    | {"model": "d24", "batch_size": 64, "learning_rate": 3e-4, "final_lr_fraction": 0, "sample_every": 100000}
    | {"checkpoint_every": 2000, "max_steps": 60000, "output_dir": "log_gpt2_350M"},
    "run_gpt2_774M.sh": GPT
    | {"model": "d36", "batch_size": 32, "learning_rate": 2.5e-4, "final_lr_fraction": 0, "sample_every": 300000}
    | {"checkpoint_every": 4000, "max_steps": 286102, "output_dir": "log_gpt2_774M"},
    "run_gpt2_1558M.sh": GPT
    | {"model": "d48", "batch_size": 16, "learning_rate": 6e-4, "final_lr_fraction": 0.1, "sample_every": 300000}
    | {"checkpoint_every": 2000, "max_steps": 32000, "output_dir": "log_gpt2_1558M"}
    | {"total_batch_size": 1048576, "gelu_fusion": 1, "sample_length": 384},
    "run_gpt3_125M.sh": GPT
    | {"model": "gpt3:c768", "batch_size": 32, "learning_rate": 6e-4, "final_lr_fraction": 0.1, "seq_len": 2048}
    | {"checkpoint_every": 10000, "max_steps": 572204, "output_dir": "log_gpt3_125M", "gelu_fusion": 1}
    | {"keep_checkpoints": 5, "major_every": 50000, "skip_loss_z": 7, "skip_norm_z": 7},
    "run_chess_124M.sh": CHESS
    | {"model": "chess:d12", "batch_size": 11, "learning_rate": 7e-5, "final_lr_fraction": 0}
    | {"max_steps": 30000, "output_dir": "log_chess_124M", "log_gpu_every": 500},
    "run_chess_d8.sh": CHESS
    | {"model": "chess:d8", "batch_size": 28, "learning_rate": 3e-4, "final_lr_fraction": 0, "warmup_steps": 700}
    | {"max_steps": 12000, "output_dir": "log_chess_d8", "total_batch_size": 28672},
}
DATA = {
    "run_gpt2_124M.sh": "dev/data/fineweb10B/fineweb",
    "run_gpt2_350M.sh": "dev/data/fineweb100B/fineweb",
    "run_gpt2_774M.sh": "dev/data/fineweb100B/fineweb",
    "run_gpt2_1558M.sh": "dev/data/edu_fineweb100B/edu_fineweb",
    "run_gpt3_125M.sh": "dev/data/fineweb100B/fineweb",
    "run_chess_124M.sh": "dev/data/201506/201506",
    "run_chess_d8.sh": "dev/data/201506/201506",
}


@pytest.mark.parametrize("script", SINGLE_NODE)
def test_settings(directory, script):
    result = start(script, directory)
    assert (result.returncode, result.stderr) == (0, "")
    (call,) = calls(directory)
    processes = RUNS[script].processes
    launcher = [] if processes == 1 else ["mpirun", "-np", str(processes)]
    assert call[: len(launcher) + 1] == [*launcher, "llmc-train"]
    data = {name: f"{DATA[script]}_{split}_*.bin" for name, split in (("train_data", "train"), ("val_data", "val"))}
    assert config_of(call[len(launcher) + 1 :]) == TrainConfig(**SETTINGS[script], **data)


THREE_TIMES = "run_gpt2_124M.sh: failed 3 times (status 1) without a new checkpoint: the reason is above"
OUTCOMES = {  # status of each attempt, checkpoint that it leaves: status of the script, attempts, last line on stderr
    "success": (["0"], 0, 1, ""),
    "usage error": (["2"], 2, 1, "the reason"),
    "usage error later": (["1 00005000", "2"], 2, 2, "the reason"),
    "asked to end": (["75 00000123"], 75, 1, "the reason"),
    "interrupted": (["130"], 130, 1, "the reason"),
    "interrupted, but mpirun gives it another status": (["interrupt"], 130, 1, ""),
    "three times": (["1", "1", "1"], 1, 3, THREE_TIMES),
    "twice": (["137", "1", "0"], 0, 3, "run_gpt2_124M.sh: failed (status 1); going on from the beginning"),
    "with progress": (
        ["1 00005000", "1 00010000", "1", "1 00015000", "0 00018865"],
        *(0, 5, "run_gpt2_124M.sh: failed (status 1); going on from DONE_00015000"),
    ),
    "three times after progress": (
        ["1 00005000", "1 00010000", "1", "3"],
        *(1, 4, THREE_TIMES.replace("status 1", "status 3")),
    ),
    "twice before any": (["1", "1", "1 00005000", "9", "9"], 1, 5, "run_gpt2_124M.sh: failed 3 times (status 9)"),
    "dead after the last checkpoint": (["1 00018865"], 0, 1, "run_gpt2_124M.sh: failed (status 1)"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_retries(directory, name):
    outcomes, status, attempts, last_line = OUTCOMES[name]
    (directory / "outcomes").write_text("\n".join(outcomes) + "\n")
    result = start("run_gpt2_124M.sh", directory, "-o", "log")
    assert (result.returncode, len(calls(directory))) == (status, attempts)
    assert (result.stderr.splitlines() or [""])[-1].startswith(last_line)
    failures = directory / "log" / "failures"
    assert not (failures.exists() and status == 0)


def test_failures_are_counted_over_several_starts(directory):
    """A job that is queued again and again does not fail for ever; who starts it by hand gets one try."""
    (directory / "log").mkdir()
    (directory / "outcomes").write_text("1\n" * 6 + "1 00005000\n" + "1\n" * 9)
    counts = []
    for failures, attempts in (("2", 2), ("4", 2), ("4", 1), ("5", 1), ("7", 7)):
        before = len(calls(directory))
        result = start("run_gpt2_124M.sh", directory, "-o", "log", FAILURES=failures)
        assert (result.returncode, len(calls(directory)) - before) == (1, attempts)
        counts.append((directory / "log" / "failures").read_text())
    assert counts == ["none 2\n", "none 4\n", "none 5\n", "none 6\n", "DONE_00005000 7\n"]


LISTENING = """#!/usr/bin/env bash
trap 'touch log/DONE_00000123; exit 75' TERM
echo "${0##*/} $*" >>calls
touch ready
while :; do /bin/sleep 0.05; done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_to_the_script_reach_the_run(directory, number):
    """As of Slurm, which tells the script alone; it ends as the run does, and does not start it again."""
    (directory / "bin" / "mpirun").write_text(LISTENING)
    (directory / "log").mkdir()
    environment = {**os.environ, "PATH": f"{directory}/bin:{os.environ['PATH']}"}
    script = ["bash", SCRIPTS / "run_gpt2_124M.sh", "-o", "log"]
    process = subprocess.Popen(script, cwd=directory, env=environment, start_new_session=True)
    end = time.monotonic() + 20
    while not (directory / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (directory / "log" / "DONE_00000123").exists()
    assert len(calls(directory)) == 1 and not (directory / "log" / "failures").exists()


@pytest.mark.parametrize(
    ("arguments", "final"),
    [([], "log_gpt2_124M/DONE_00018865"), (["--max-steps=9", "--output-dir", "a b", "-o", "c d"], "c d/DONE_00000009")],
)
def test_a_complete_run_is_left_alone(directory, arguments, final):
    (directory / final).parent.mkdir()
    (directory / final).touch()
    result = start("run_gpt2_124M.sh", directory, *arguments)
    assert (result.returncode, result.stdout) == (0, f"run_gpt2_124M.sh: {final} is there: the run is complete\n")
    assert calls(directory) == []


def test_arguments_and_processes(directory):
    assert start("run_gpt2_124M.sh", directory, "-b", "16", "-z", "3", NPROC="4").returncode == 0
    assert start("run_gpt2_124M.sh", directory, NPROC="1").returncode == 0
    several, alone = calls(directory)
    assert several[:4] == ["mpirun", "-np", "4", "llmc-train"]
    config = config_of(several[4:])
    assert (config.batch_size, config.zero_stage, config.total_batch_size) == (16, 3, 524288)
    assert alone[0] == "llmc-train" and config_of(alone[1:]).accumulation_steps(world_size=1) == 8


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_data(directory, script, split):
    for path in directory.glob(f"dev/data/*/*_{split}_*.bin"):
        path.unlink()
    result = start(script, directory)
    pattern = f"{DATA.get(script.removeprefix('py'), 'dev/data/fineweb10B/fineweb')}_{split}_*.bin"
    assert result.returncode == 1
    assert result.stderr.startswith(f"{Path(script).name}: no file matches {pattern}: ")
    assert re.search(r"llmc-data (fineweb|lichess 2015-06)", result.stderr) and result.stderr.count("\n") == 1
    assert calls(directory) == []


@pytest.mark.parametrize("script", SINGLE_NODE)
def test_hellaswag_is_left_out_without_its_file(directory, script):
    (directory / HELLASWAG).unlink()
    result = start(script, directory)
    (call,) = calls(directory)
    expected = f"{script}: no HellaSwag: there is no {HELLASWAG}, which llmc-data hellaswag makes\n"
    assert (result.returncode, result.stderr) == (0, "" if script.startswith("run_chess") else expected)
    assert config_of(call[call.index("llmc-train") + 1 :]).hellaswag is False


@pytest.mark.parametrize("flags", ["-h 1", "-h=1", "--hellaswag 1", "--hellaswag-data my.bin", "-h 0"])
def test_hellaswag_as_the_arguments_say(directory, flags):
    """Also without the file: llmc-train says then what is wrong."""
    (directory / HELLASWAG).unlink()
    result = start("run_gpt2_124M.sh", directory, *flags.split())
    (call,) = calls(directory)
    assert (result.returncode, result.stderr) == (0, "")
    assert config_of(call[call.index("llmc-train") + 1 :]).hellaswag is (flags != "-h 0")


def test_llmc_is_not_installed(directory):
    (directory / "bin/llmc-train").unlink()
    result = start("run_gpt2_124M.sh", directory, PATH=f"{directory}/bin:/usr/bin:/bin")
    assert (result.returncode, calls(directory)) == (1, [])
    assert result.stderr == (
        "run_gpt2_124M.sh: there is no llmc-train: activate the environment that llmc is installed in\n"
    )


MULTI_NODE_SETTINGS = SETTINGS["run_gpt2_124M.sh"] | {
    **{"total_batch_size": 2097152, "checkpoint_every": 1000, "max_steps": 4716, "output_dir": "log_gpt2_124M_multi"},
    **{"train_data": "dev/data/fineweb10B/fineweb_train_*.bin", "val_data": "dev/data/fineweb10B/fineweb_val_*.bin"},
}


def test_mpi_on_several_nodes(directory):
    script = "multi_node/run_gpt2_124M_mpi.sh"
    result = start(script, directory)
    assert result.returncode == 1
    assert result.stderr.startswith("run_gpt2_124M_mpi.sh: there is no file hostfile: ")
    (directory / "nodes").write_text("node1:8\nnode2:8\n")
    assert start(script, directory, HOSTFILE="nodes").returncode == 0
    (call,) = calls(directory)
    assert call[:6] == ["mpirun", "--hostfile", "nodes", "-np", "16", f"{directory}/bin/llmc-train"]
    assert config_of(call[6:]) == TrainConfig(**MULTI_NODE_SETTINGS | {"final_lr_fraction": 0.1, "resume": False})


def test_torchrun_on_several_nodes(directory):
    script = "multi_node/run_gpt2_124M_torchrun.sh"
    result = start(script, directory)
    assert (result.returncode, result.stderr) == (
        1,
        "run_gpt2_124M_torchrun.sh: set HEAD to the name or address of one node, the same on all nodes\n",
    )
    assert start(script, directory, HEAD="node1").returncode == 0
    (call,) = calls(directory)
    program = call.index("llmc-train")
    assert call[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    assert "node1:29500" in call[:program] and call[program - 1] == "--no-python"
    assert config_of(call[program + 1 :]) == TrainConfig(**MULTI_NODE_SETTINGS)


@pytest.mark.parametrize("method", ["srun", "tcp", "fs"])
def test_slurm(directory, method):
    result = start(f"multi_node/run_gpt2_124M_{method}.sbatch", directory)
    assert (result.returncode, result.stderr) == (0, "")
    srun, call = calls(directory)
    assert srun == ["srun", "--kill-on-bad-exit=1"] and call[0] == "llmc-train"
    config = config_of(call[1:])
    expected = MULTI_NODE_SETTINGS
    if method != "srun":
        expected = expected | {"start_method": method, "num_processes": 16, "process_rank": 11, "gpus_per_node": 8}
    if method == "tcp":
        expected = expected | {"server_ip": os.uname().nodename}
    if method == "fs":
        expected = expected | {"shared_path": config.shared_path}
        assert Path(config.shared_path).parent == directory
        assert not Path(config.shared_path).exists()  # any more
    assert config == TrainConfig(**expected)


# ----------------------------------------------------------------------------------------------------------------------
# scripts/README.md


def listing():
    """All flags, from the table in llmc/config.py."""
    lines = []
    for group, entries in itertools.groupby(flag_fields(), key=lambda entry: flag_of(entry).group):
        lines += [f"**{group}**", "", "| flag | default | meaning |", "|---|---|---|"]
        for entry in entries:
            rule, meaning = flag_of(entry).rule, flag_of(entry).help.replace("*", r"\*")
            if rule.choices and isinstance(entry.default, str):
                meaning += f" ({', '.join(rule.choices)})"
            flags = " ".join(f"`{name}`" for name in names(entry))
            lines.append(f"| {flags} | `{show(entry.default)}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def memory_table():
    """The largest -b at each -r, as llmc-train --dry-run gives it."""
    lines = ["| GPU | `-e` | 1 GPU | 8 GPUs, `-z 1` | `-z 2` | `-z 3` |", "|---|---|---|---|---|---|"]
    for gib, model in itertools.product((24, 40, 80), ("d12", "d24", "d36", "d48")):
        cells = []
        for P, stage in ((1, 0), (8, 1), (8, 2), (8, 3)):
            config = TrainConfig(model=model, device="cuda", num_processes=P)
            device, (shape, _) = device_on_paper(config, gib * 2**30), model_shape(config, None)
            largest = [largest_batch(config, device, shape, "bf16", recompute, stage) for recompute in RECOMPUTE]
            cells.append(" / ".join(str(B or "–") for B in largest))
        lines.append(f"| {gib} GiB | {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("generate", [listing, memory_table])
def test_generated_parts_of_the_readme(generate):
    expected = generate()
    if expected not in (SCRIPTS / "README.md").read_text():
        pytest.fail(f"put this into scripts/README.md in place of what is there:\n\n{expected}", pytrace=False)
