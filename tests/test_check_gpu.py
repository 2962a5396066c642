"""scripts/check_gpu.*: what can be tested without a GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmc.device import cpu
from llmc.errors import RunError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def check_gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import check_gpu

        yield check_gpu


def without_gpu(tmp_path, nvidia_smi):
    """check_gpu.sh where the only nvidia-smi, if any, is this script."""
    if nvidia_smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    for tool in ("bash", "dirname", "grep"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    command = ["bash", ROOT / "scripts" / "check_gpu.sh"]
    return subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)


@pytest.mark.parametrize("nvidia_smi", [None, "exit 0", "echo 'NVIDIA-SMI has failed'; exit 9"])
def test_without_a_gpu(tmp_path, nvidia_smi):
    result = without_gpu(tmp_path, nvidia_smi)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "check_gpu: there is no NVIDIA GPU here (nvidia-smi lists none)\n"


@pytest.mark.parametrize("refused", ["", "wheels", "build"])
def test_the_build_has_cudnn_if_possible(tmp_path, refused):
    """In a folder where setup.sh and the .venv's python only write down what they are asked for."""
    programs = {
        "nvidia-smi": "echo 'GPU 0: a GPU'",
        ".venv/bin/python": 'echo "python $*" >> log',
        "scripts/setup.sh": 'echo "setup ${LLMC_CUDA:-} ${LLMC_CUDNN:-}" >> log; PATH=$PWD/.venv/bin:$PATH',
    }
    if refused == "wheels":
        programs[".venv/bin/python"] += "; case $* in *cudnn_wheels*) exit 1; esac"
    if refused == "build":
        programs["scripts/setup.sh"] += '; [ "${LLMC_CUDNN:-}" != ON ]'
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "scripts" / "check_gpu.sh", tmp_path / "scripts")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", tmp_path / "scripts" / "check_gpu.sh"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ("could not be built" in result.stderr) == bool(refused)
    wheels = "python -m pip install -q -r scripts"
    tried = [] if refused == "wheels" else ["setup ON ON"]
    assert (tmp_path / "log").read_text().splitlines() == [
        *("setup  ", f"{wheels}/cuda_wheels.txt", f"{wheels}/cudnn_wheels.txt"),
        *tried,
        "setup ON " if refused else "setup ON ON",
        "python scripts/check_gpu.py",
    ]


@pytest.mark.parametrize("contender", ["llmc", "torch"])  # and the variants, on a GPU only
def test_a_measurement(check_gpu, monkeypatch, contender):
    monkeypatch.setattr(check_gpu, "STEPS", 2)
    measurement = check_gpu.measure(contender, "custom:l=1,c=16,h=2,t=64,v=65", 2, cpu())
    assert 0 < measurement.milliseconds < 60_000
    assert measurement.mebibytes == 0  # of a GPU


def memory_limits(check_gpu, llmc, torch):
    """Measurements on a device with room for these batches: llmc takes 2 ms for each row, with graphs 1, PyTorch 3;
    cuDNN's attention takes 4 ms and half of the room, FP8 5 ms, and 6 ms with the loss head."""
    contenders = {  # room and milliseconds
        **{"llmc": (llmc, 2.0), "--cuda-graphs 1": (llmc - 1, 1.0), "--attention cudnn": (llmc // 2, 4.0)},
        **{"--fp8 1": (llmc, 5.0), "--fp8 2": (llmc, 6.0), "torch": (torch, 3.0)},
    }

    def run(contender, descriptor, B):
        room, milliseconds = contenders[contender]
        if room < B:
            raise check_gpu.DoesNotFitError
        return check_gpu.Measurement(B * milliseconds, 100.0 * B)

    return run


@pytest.mark.parametrize(
    ("llmc", "torch", "B", "times"),  # of llmc, with graphs, with cuDNN, with FP8 (1, 2), of PyTorch
    [
        (1000, 1000, 64, (128, 64, 256, 320, 384, 192)),
        (64, 20, 16, (32, 16, 64, 80, 96, 48)),  # the largest that fits both
        (64, 1000, 64, (128, "does not fit", "does not fit", 320, 384, 192)),
        (3, 1000, 2, (4, 2, "does not fit", 10, 12, 6)),
        (33, 0, 32, (64, 32, "does not fit", 160, 192, "does not fit")),  # llmc's largest
        (0, 0, 1, ("does not fit",) * 6),
        (0, 5, 1, (*["does not fit"] * 5, 3)),
    ],
)
def test_the_batch_is_the_largest_that_fits_both(check_gpu, llmc, torch, B, times):
    row = check_gpu.compare("124M", memory_limits(check_gpu, llmc, torch))
    results = [getattr(result, "milliseconds", result) for result in (row.llmc, *row.variants.values(), row.torch)]
    assert (row.B, *results) == (B, *times)


def test_a_failure_is_reported_and_not_tried_again(check_gpu):
    asked = []

    def run(contender, descriptor, B):
        asked.append((contender, B))
        if contender in ("torch", "--attention cudnn"):
            raise RunError(f"no {contender}")
        return check_gpu.Measurement(1.0, 1.0)

    row = check_gpu.compare("350M", run)
    assert (row.torch, row.variants["--attention cudnn"]) == ("no torch", "no --attention cudnn")
    assert asked == [(name, 64) for name in ("llmc", "torch", *check_gpu.VARIANTS)]


@pytest.mark.parametrize(
    ("stderr", "raised"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "DoesNotFitError"),
        ("llmc._C.Error: GPU has no 300 MiB of memory left (200 of 16000 MiB are free): lower the", "DoesNotFitError"),
        ("a long story\nValueError: seven", "RunError"),
        ("", "RunError"),
    ],
)
def test_why_a_measurement_failed(check_gpu, monkeypatch, tmp_path, stderr, raised):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat >&2 <<'EOF'\n{stderr}\nEOF\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(check_gpu.sys, "executable", str(program))
    with pytest.raises(Exception) as caught:
        check_gpu.in_a_process("llmc", "d12", 64)
    assert type(caught.value).__name__ == raised
    if raised == "RunError":
        assert str(caught.value) == (stderr.splitlines() or ["ended with status 1"])[-1]


def test_the_speed_table(check_gpu):
    """A step of 124M with B = 64 has 65536 tokens of 6·124475904 + 6·12·768·1024 flops; in 0.25 s that is 21.3 % of the
    peak of 132 SMs at 1830 MHz with 4096 flops each."""
    Measurement, Row = check_gpu.Measurement, check_gpu.Row
    graphs, cudnn = "--cuda-graphs 1", "--attention cudnn"
    variants = [
        {graphs: Measurement(200.0, 17080.0), cudnn: "no"},
        {graphs: "no graph", cudnn: Measurement(450.0, 41000.0)},
    ]
    rows = [
        Row("124M", 64, Measurement(250.0, 17072.4), variants[0], Measurement(400.0, 40000.0)),
        Row("1558M", 8, Measurement(500.0, 40000.0), variants[1], "does not fit"),
    ]
    lines = check_gpu.speed_table(rows, "NVIDIA H100 80GB HBM3").splitlines()
    assert lines[2:] == [
        "| 124M | 64 | llmc | 250.0 | 262144 | 21.3% | 17072 | 1.00 |",
        "| 124M | 64 | llmc, --cuda-graphs 1 | 200.0 | 327680 | 26.6% | 17080 | 0.80 |",
        "| 124M | 64 | llmc, --attention cudnn | no | | | | |",
        "| 124M | 64 | PyTorch, compiled | 400.0 | 163840 | 13.3% | 40000 | 1.60 |",
        "| 1558M | 8 | llmc | 500.0 | 16384 | 16.3% | 40000 | 1.00 |",
        "| 1558M | 8 | llmc, --cuda-graphs 1 | no graph | | | | |",
        "| 1558M | 8 | llmc, --attention cudnn | 450.0 | 18204 | 18.1% | 41000 | 0.90 |",
        "| 1558M | 8 | PyTorch, compiled | does not fit | | | | |",
    ]
    assert "| n/a |" in check_gpu.speed_table(rows, "an unknown GPU")
    assert all(line.count("|") == 9 for line in lines)


def test_the_report(check_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(check_gpu, "ROOT", tmp_path)
    passed = check_gpu.Command("pytest -m gpu", "".join(f"line {i}\n" for i in range(99)), passed=True)
    failed = check_gpu.Command("llmc-train", "boom", passed=False)
    rows = [check_gpu.Row("124M", 64, "does not fit", {}, "does not fit")]
    path = check_gpu.write_report("NVIDIA GeForce RTX 4090", [passed], [failed], rows, passed)
    assert path.parent == tmp_path / "docs" / "gpu"
    assert path.name.startswith("nvidia-geforce-rtx-4090-20")
    text = path.read_text()
    assert "`pytest -m gpu`\n" in text
    assert "line 98" in text
    assert "`llmc-train` (failed)\n" in text
    assert "| 124M | 64 | llmc | does not fit |" in text


def test_commands_show_what_they_print(check_gpu, tmp_path, capfd):
    command = check_gpu.execute("sh", "-c", "echo out; echo err >&2; exit 3", cwd=tmp_path)
    assert (command.output, command.passed) == ("out\nerr\n", False)
    assert capfd.readouterr().out == "check_gpu: sh -c echo out; echo err >&2; exit 3\nout\nerr\n"
    assert check_gpu.execute("true", cwd=tmp_path).passed


def test_the_shell_script_is_valid():
    subprocess.run(["bash", "-n", ROOT / "scripts" / "check_gpu.sh"], check=True)
    assert os.access(ROOT / "scripts" / "check_gpu.sh", os.X_OK)
