"""llmc-train --device cuda from the command line, in the CUDA simulator: training, checkpoint, resume, and refusals."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from devices import SIMULATOR, require_simulator
from training_data import V, text, write_shard, write_tokenizer

from llmc import algorithms
from llmc.algorithms import read_algorithms, write_algorithms
from llmc.state_file import read_state

RUNNER = Path(__file__).parent / "run_in_simulator.py"
BASE = (
    f"-e custom:l=2,c=32,h=2,t=32,v={V} -i data/t_train_*.bin -j data/t_val_*.bin -b 2 -t 16 -m 2 -v 0 -s 0 -g 8 "
    "-l 0.01 --device cuda"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    require_simulator()
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "t_train_0.bin", text(0, 500))
    write_shard(data / "t_val_0.bin", text(2, 300))
    write_tokenizer(data / "tokenizer.bin", V)
    return tmp_path


def run(flags, ranks=1, **environment):
    command = [sys.executable, str(RUNNER), "llmc-train", *BASE.split(), *flags.split()]
    return start(["mpirun", "-np", str(ranks), *command] if ranks > 1 else command, **environment)


def start(command, **environment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of mpirun
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(RUNNER.parent), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def train(flags, ranks=1, **environment):
    result = run(flags, ranks, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def losses(output):
    return [float(loss) for loss in re.findall(r"^step .*? \| loss ([\d.]+) ", output, re.MULTILINE)]


def test_it_learns_and_names_the_device():
    output = train("-x 20 -s 20 -r 2 -ge 2", CUDASIM_VARIANT="checked")
    assert re.search(r"\| device +\| .*simulat", output, re.IGNORECASE)
    assert re.search(r"\| precision +\| BF16", output)
    found = losses(output)
    assert len(found) == 20 and found[-1] < found[0] - 0.5
    assert "n/a bf16 MFU" in output  # no peak is known of it


NUMERICS = [("--precision fp32", 1), ("--precision bf16", 1), ("--fp8 1 -v 2 -s 2", 1), ("--fp8 2 -z 3 -r 4", 2)]


@pytest.mark.parametrize(("numerics", "ranks"), NUMERICS)
def test_resume_is_bit_equal(directory, numerics, ranks):
    flags = f"-n 3 {numerics}"
    train(f"{flags} -x 6 -o whole", ranks)
    train(f"{flags} -x 3 -o parts", ranks)
    assert "resuming at step 3" in train(f"{flags} -x 6 -o parts -y 1", ranks)
    for name in ("model_00000006.bin", *(f"state_00000006_0000{rank}.bin" for rank in range(ranks))):
        assert (directory / "whole" / name).read_bytes() == (directory / "parts" / name).read_bytes()


def test_fp8_goes_on_with_other_ranks_at_another_level_or_without(directory):
    """With scales found anew; a history of other length than this version's counts as none."""
    train("--fp8 1 -x 2 -n 2 -o run", 2)
    state = read_state(directory / "run" / "state_00000002_00001.bin")
    assert len(state.fp8_history) == 3 * 2 * 4 * 16
    output = train("--fp8 1 -x 4 -n 2 -o run -y 1")
    assert re.search(r"\| precision +\| BF16 and FP8 ", output) and len(losses(output)) == 2
    output = train("--fp8 2 -x 6 -n 2 -o run -y 1")
    assert re.search(r"\| precision +\| BF16 and FP8, loss head too ", output) and len(losses(output)) == 2
    assert len(read_state(directory / "run" / "state_00000006_00000.bin").fp8_history) == (3 * 2 * 4 + 2) * 16
    assert len(losses(train("--fp8 1 -x 8 -n 2 -o run -y 1"))) == 2
    assert len(losses(train("-x 10 -n 2 -o run -y 1"))) == 2
    assert read_state(directory / "run" / "state_00000010_00000.bin").fp8_history == ()


def test_fp8_learns_on_a_consumer_device():
    found = losses(train("--fp8 1 -x 20", CUDASIM_VARIANT="checked", CUDASIM_SHARED_MEMORY="101376"))
    assert len(found) == 20 and found[-1] < found[0] - 0.5
    result = run("--fp8 1 -x 1 -b 1 -t 24")
    assert result.returncode == 2 and "--fp8 1 needs batches of a multiple of 16 tokens" in result.stderr


def test_several_ranks_through_nccl():
    """One batch, in fp32: the curve of one CPU process, on any number of GPUs and at any stage of ZeRO."""
    flags = "-a 1 -d 192 -l 1e-4 --precision fp32 -n 2 -o ranks -y 1"
    expected = losses(train("-a 1 -d 192 -l 1e-4 -x 6 --device cpu"))
    found = []
    for part, (ranks, stage) in enumerate([(2, 3), (3, 1), (2, 2)]):
        output = train(f"{flags} -f 0 -z {stage} -x {2 * part + 2}", ranks, CUDASIM_VARIANT="checked", CUDASIM_LAZY="1")
        assert f"| num_processes         | {ranks} " in output and f"| zero_stage            | {stage} " in output
        found += losses(output)
    assert len(found) == 6
    # Sums in another order: a few ulps of 4.2, and a little more with each update.
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_ranges_of_a_step(directory):
    """What a profiler is told through NVTX: two steps of two micro-steps, then a validation of two batches."""
    record = directory / "ranges"
    recorder = SIMULATOR / "library_tests" / "libnvtx_recorder.so"
    train("-x 2 -d 64", NVTX_INJECTION64_PATH=str(recorder), NVTX_RECORD=str(record))
    root: list = []
    stack = [root]
    for line in record.read_text().splitlines():
        if line == "pop":
            stack.pop()
            continue
        stack[-1].append((line.removeprefix("push "), []))
        stack.append(stack[-1][-1][1])
    assert len(stack) == 1  # each range was ended
    forward = ("forward", [("block", []), ("block", [])])
    loss_head, block = ("loss head", []), ("backward of a block", [])
    micro_step = [forward, ("backward", [loss_head, block, block])]
    step = [*micro_step, *micro_step, ("update", [])]
    validation = ("evaluate", [forward, loss_head])
    timing = [*micro_step, *micro_step]  # of cuBLASLt's algorithms
    assert root == [*timing, *step, *step, validation, validation]


def test_lazy_streams_change_nothing():
    """Work that runs as late as a GPU may run it: every wait that is needed is there."""
    eager, lazy = (train("-x 4 -d 64", CUDASIM_LAZY=str(value)) for value in (0, 1))
    assert losses(eager) == losses(lazy)


def test_cuda_graphs_change_nothing(directory):
    """With micro-steps, validation and samples, on both sides of a checkpoint."""
    flags = "-n 4 -d 64 -v 2 -s 3"
    expected = train(f"{flags} -x 8 -o whole")
    train(f"{flags} -x 4 -o parts --cuda-graphs 1")
    output = train(f"{flags} -x 8 -o parts -y 1 --cuda-graphs 1", CUDASIM_VARIANT="checked", CUDASIM_LAZY="1")
    for name in ("model_00000008.bin", "state_00000008_00000.bin"):
        assert (directory / "whole" / name).read_bytes() == (directory / "parts" / name).read_bytes()
    assert output.splitlines()[-1] == expected.splitlines()[-1] or losses(output) == losses(expected)[4:]
    assert re.findall("^val loss .*", output, re.M) == re.findall("^val loss .*", expected, re.M)[2:]


def test_products_that_cublaslt_cannot_fuse():
    """-ge 2 runs as -ge 0 then, to the bit."""
    plain = train("-x 4 -ge 0")
    fused = train("-x 4 -ge 2")
    without = train("-x 4 -ge 2", CUDASIM_CUBLASLT_WITHOUT="GELU_AUX_BIAS,DGELU")
    assert losses(without) == losses(plain) != losses(fused)


def test_a_checkpoint_of_the_cpu_goes_on_the_gpu():
    train("-x 3 -n 3 -o run --precision fp32 --device cpu")
    assert "resuming at step 3" in train("-x 5 -n 5 -o run --precision fp32 -y 1")


def test_no_device():
    result = run("-x 1", CUDASIM_DEVICES="0")
    assert result.returncode == 1
    assert result.stderr.startswith("llmc-train: error: --device cuda: no CUDA device")
    assert result.stderr.count("\n") == 1
    assert "--device cpu" in result.stderr


def test_a_model_larger_than_the_device():
    result = run("-x 1 -e custom:l=2,c=1024,h=8,t=32,v=65 -l 0.001", CUDASIM_MEMORY=str(64 * 2**20))
    assert result.returncode == 1
    assert re.match(r"llmc-train: error: the run needs \d+ MiB of memory, .* has \d+ MiB free: lower", result.stderr)


@pytest.mark.parametrize("flags", ["", "--offload-optimizer 1", "--precision fp32"])
def test_checkpoints_from_pinned_memory(directory, flags):
    """Written by a thread: the files are those of a run that waits for them."""
    train(f"{flags} -x 6 -n 2 -nk 2 -o waits")
    output = train(
        f"{flags} -x 6 -n 2 -nk 2 -o goes_on --async-checkpoint 1", CUDASIM_LAZY="1", CUDASIM_VARIANT="checked"
    )
    assert output.count("is complete") == 3
    for path in (directory / "waits").glob("[msD]*"):
        assert path.read_bytes() == (directory / "goes_on" / path.name).read_bytes(), path.name


def test_an_offloaded_optimizer_changes_nothing(directory):
    """Nor on both sides of a checkpoint."""
    flags = "--precision bf16 -n 3"
    train(f"{flags} -x 6 -o whole")
    output = train(f"{flags} -x 3 -o parts --offload-optimizer 1", CUDASIM_LAZY="1")
    assert re.search(r"AdamW optimizer state m in host memory", output)
    train(f"{flags} -x 6 -o parts -y 1 --offload-optimizer 1", CUDASIM_LAZY="1")
    for name in ("model_00000006.bin", "state_00000006_00000.bin"):
        assert (directory / "whole" / name).read_bytes() == (directory / "parts" / name).read_bytes()


# --- algorithms of cuBLASLt chosen by time --------------------------------------------------------------------------

FASTEST = "CUDASIM_CUBLASLT_FASTEST"  # the number of the algorithm that is chosen
# Kinds of products: five forward, five of inputs' gradients, five of weights'; as Vp = 4C, the input's gradient of the
# logits is like that of fc. Where the four with biases are timed apart, too, that of fc's weights is like the logits'.
FUSED, BOTH = 5 + 4 + 5, 5 + 4 + 5 + 3
ADDING_FUSED, ADDING_BOTH = 5, 5 + 3


@pytest.fixture
def cache_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmc" / algorithms.NAME


def numbers(path):
    """Of the algorithms in a file."""
    return {algorithm[0] for products in read_algorithms(path).values() for algorithm in products.values()}


def counts(output):
    """Of kinds of products, and of those that were timed."""
    found = re.search(r"^(\d+) kinds of matrix products, (\d+) timed", output, re.M)
    return [int(number) for number in found.groups()]


def warnings(output):
    """But for the one that T is less than the model's context."""
    return [text for text in re.findall("WARNING: (.*)", output) if not text.startswith("sequence length")]


def checkpoint(directory, step=6):
    return [(directory / name).read_bytes() for name in (f"model_{step:08}.bin", f"state_{step:08}_00000.bin")]


def test_another_run_finds_the_choice_in_the_cache(directory, cache_file):
    assert counts(train("-x 1 -o one -d 64", **{FASTEST: "2"})) == [BOTH + ADDING_BOTH] * 2
    assert numbers(directory / "one" / algorithms.NAME) == numbers(cache_file) == {2}
    written = cache_file.stat().st_mtime_ns
    assert counts(train("-x 1 -o two -d 64", **{FASTEST: "3"})) == [FUSED + ADDING_FUSED, 0]
    assert numbers(directory / "two" / algorithms.NAME) == {2}
    assert cache_file.stat().st_mtime_ns == written
    assert counts(train("-x 1 -o three -b 1", **{FASTEST: "3"})) == [BOTH, BOTH]  # without products that add
    assert numbers(cache_file) == {2, 3}


def test_a_resumed_run_takes_its_own_algorithms(directory, cache_file):
    """Whatever is fastest now: else the bits would change."""
    flags = "-n 3 --precision fp32 -f 0"
    train(f"{flags} -x 6 -o whole", **{FASTEST: "2"})
    train(f"{flags} -x 3 -o own", **{FASTEST: "2"})
    shutil.copytree("own", "others")
    (directory / "others" / algorithms.NAME).unlink()
    cache_file.unlink()
    output = train(f"{flags} -x 6 -o own -y 1", **{FASTEST: "3"})
    assert counts(output) == [FUSED, 0] and warnings(output) == []
    assert checkpoint(directory / "own") == checkpoint(directory / "whole")
    cache_file.unlink()
    output = train(f"{flags} -x 6 -o others -y 1", **{FASTEST: "3"})
    assert counts(output) == [BOTH, BOTH] and len(warnings(output)) == 1
    assert checkpoint(directory / "others") != checkpoint(directory / "whole")


def test_a_resumed_run_without_its_algorithms_says_so(directory, cache_file):
    train("-x 2 -n 2 -o run")
    (device,) = stored = read_algorithms(directory / "run" / algorithms.NAME)
    product = next(name for name in stored[device] if "epilogue 4" in name)  # with a bias
    differs = "the run may differ in the last bits from one that was not interrupted"
    for trouble, expected in (
        ("damaged", rf"damaged/{algorithms.NAME} is damaged: it is no JSON \(.*\): {differs}"),
        ("moved", f"moved/{algorithms.NAME} has no algorithms of this {re.escape(device)}: {differs}"),
        ("refused", f"cuBLASLt no longer has the algorithm of refused/.* for {re.escape(product)}: {differs}"),
    ):
        shutil.copytree("run", trouble)
        path = directory / trouble / algorithms.NAME
        if trouble == "damaged":
            path.write_text(path.read_text()[:-9])
        elif trouble == "moved":
            write_algorithms(path, {"NVIDIA Other": stored[device]})
        else:
            write_algorithms(path, {device: stored[device] | {product: [9] * 8}})
        output = train(f"-x 3 -n 3 -o {trouble} -y 1")
        assert "resuming at step 2" in output
        (warning,) = warnings(output)
        assert re.fullmatch(expected, warning)
        found = read_algorithms(path)
        assert found[device].items() >= {product: stored[device][product]}.items()
        assert ("NVIDIA Other" in found) == (trouble == "moved")


def test_a_damaged_cache_is_replaced(directory, cache_file):
    cache_file.parent.mkdir(parents=True)
    cache_file.write_text("{")
    output = train("-x 1")
    (warning,) = warnings(output)
    assert warning.startswith(f"{cache_file} is damaged") and counts(output) == [BOTH, BOTH]
    assert warnings(train("-x 1")) == []


def test_a_cache_that_cannot_be_written(directory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    output = train("-x 1 -o run")
    assert "WARNING: cannot write /proc/none/llmc/" in output and (directory / "run" / algorithms.NAME).exists()


def test_all_ranks_take_the_algorithms_of_rank_0(directory, cache_file):
    """Though rank 1 would choose others."""

    def ranks(*fastest, **settings):
        flags = f"{BASE} -x 2 -n 2 -d 64 -z 2 --precision fp32 -f 0 -o {'_'.join(fastest)}".split()
        command = ["mpirun"]
        for number in fastest:
            command += [":"] * (len(command) > 1) + ["-np", "1", "env", f"{FASTEST}={number}"]
            command += [sys.executable, str(RUNNER), "llmc-train", *flags]
        result = start(command)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        cache_file.unlink()
        return checkpoint(directory / "_".join(fastest), 2), result.stdout

    expected, output = ranks("2", "2")
    assert counts(output) == [BOTH, BOTH]  # at stage 2 no product adds to gradients
    assert ranks("2", "3")[0] == expected != ranks("3", "2")[0]


def test_without_autotune_it_is_the_first_choice(directory, cache_file):
    flags = "-x 2 -n 2 --precision fp32 -f 0"
    output = train(f"{flags} -o off --autotune 0", **{FASTEST: "3"})
    assert "matrix products" not in output
    assert not cache_file.exists() and not (directory / "off" / algorithms.NAME).exists()
    slow = {"CUDASIM_CUBLASLT_SLOW": "BGRADB"}  # or gradients of biases would come out of the products
    train(f"{flags} -o first", **slow)
    assert checkpoint(directory / "off", 2) == checkpoint(directory / "first", 2)


def test_nothing_is_timed_for_no_step(directory, cache_file):
    assert "matrix products" not in train("-x 0 -o run")
    assert not cache_file.exists()
