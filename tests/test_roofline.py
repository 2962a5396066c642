"""The model of a step's time: its formulas by hand, its accounts, the published steps, and what the dry run prints."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import _C, roofline
from llmc.cli.train import _main as command
from llmc.errors import UsageError
from llmc.kernels import CUDNN, Collective, Kernel, Step, Wait, memset, product
from llmc.peak import GPUS as PROCESSORS
from llmc.roofline import GPUS, Machine, Timeline, predict

ROOT = Path(__file__).resolve().parent.parent
A100, H100 = Machine(GPUS["A100"], "bf16"), Machine(GPUS["H100"], "bf16")
PEAK = 108 * 1410e6 * 2048  # of A100: SMs, clock, flops


def test_every_gpu_has_a_peak():
    assert {gpu.device for gpu in GPUS.values()} <= PROCESSORS.keys()
    assert {"A100", "H100", "H200", "B200", "4090"} <= GPUS.keys()


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_memory_bound():
    """2039 GB/s of which kernels get 0.8, and 2.5 us of launch."""
    assert A100.seconds(memset("", 1e9)) == pytest.approx(2.5e-6 + 1e9 / (0.8 * 2039e9))
    assert A100.least_seconds(memset("", 1e9)) == pytest.approx(1e9 / 2039e9)


TILE = 2 * 256 * 128 / (0.813 * PEAK / 108)  # seconds of a step of K on one SM


@pytest.mark.parametrize(
    ("M", "N", "K", "seconds"),
    [
        (256 * 12, 128 * 9, 8192, 3.5e-6 + TILE * 8192),  # 108 tiles: one for each SM
        (256 * 12 * 3, 128 * 9, 8192, 3 * (3.5e-6 + TILE * 8192)),
        (128 * 9, 256 * 12, 8192, 3.5e-6 + TILE * 8192),  # tiles that stand upright
    ],
)
def test_products_that_fill_the_sms(M, N, K, seconds):
    assert A100.product_seconds(M, N, K) == pytest.approx(seconds)


def test_a_tile_too_many_costs_a_wave():
    """109 tiles of 128 x 128, the best there are for these columns, take two waves of 108."""
    small = TILE / 2 * (1 + 32 * (1 / 128 + 1 / 128)) / (1 + 32 * (1 / 256 + 1 / 128))
    assert A100.tiled_seconds(128 * 108, 128, 400, 128, 128, 1) == pytest.approx(3.5e-6 + small * 400)
    assert A100.tiled_seconds(128 * 109, 128, 400, 128, 128, 1) == pytest.approx(2 * (3.5e-6 + small * 400))


def test_a_long_loop_is_split():
    """27 tiles on 108 SMs: four parts of K, added as four fp32 matrices that are written and read."""
    sums = 2 * 4 * 4 * (256 * 3) * (128 * 9) / (0.8 * 2039e9)
    assert A100.product_seconds(256 * 3, 128 * 9, 65536) == pytest.approx(3.5e-6 + TILE * 65536 / 4 + sums)


def test_a_product_bound_by_memory():
    kernel = product("", 256 * 12, 128 * 9, 64, moved=1e9)
    assert A100.seconds(kernel) == pytest.approx(2.5e-6 + 1e9 / (0.8 * 2039e9))


def test_attention():
    """Half the share of long rows where T is the constant; on H100 at the rate of mma.sync."""
    forward = Kernel("attention", "", "", 0, 1e12, attention=("forward", 320))
    assert A100.seconds(forward) == pytest.approx(2.5e-6 + 1e12 / (PEAK * 0.49 / 2))
    backward = Kernel("attention", "", "", 0, 1e12, attention=("backward", 3 * 530))
    peak = 132 * 1830e6 * 4096
    assert H100.seconds(backward) == pytest.approx(2.5e-6 + 1e12 / (peak * 0.62 * 0.44 * 3 / 4))
    cudnn = Kernel("attention", "", CUDNN, 0, 1e12, attention=("backward", 3 * 530))  # with Hopper's own instructions
    assert H100.seconds(cudnn) == pytest.approx(2.5e-6 + 1e12 / (peak * 0.41 * 3 / 4))
    assert A100.seconds(cudnn) == A100.seconds(backward)


@pytest.mark.parametrize(
    ("gpu", "ranks", "per_node", "rate"),
    [
        ("A100", 8, 8, 300e9),
        ("A100", 16, 8, 8 * 25e9),
        ("H100", 2, 1, 50e9),
        ("4090", 4, 8, 16e9),
        ("B200", 64, 8, 400e9),
    ],
)
def test_collectives(gpu, ranks, per_node, rate):
    """A ring: the slowest link, the NVLink of a GPU or the network cards of a machine, takes all but one part."""
    machine = Machine(GPUS[gpu], "bf16", gpus_per_node=per_node)
    for operation, passes in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        seconds = machine.collective_seconds(Collective(operation, "", 10**9), ranks)
        assert seconds == pytest.approx(20e-6 + passes * 1e9 * (ranks - 1) / ranks / (0.77 * rate))


def test_fp32():
    """TF32 has half the peak, fp32 without it that of the data sheet."""
    assert Machine(GPUS["A100"], "fp32").peak == PEAK / 2
    assert Machine(GPUS["A100"], "fp32", tf32=False).peak == 19.5e12


# --- the step ---------------------------------------------------------------------------------------------------------


def test_collectives_run_beside_kernels():
    """A kernel of 10 ms, then a collective of 4 ms beside one of 3 ms: the one that waits starts at 14."""
    kernel = lambda ms: memset(f"{ms}", (ms * 1e-3 - 2.5e-6) * 0.8 * 2039e9)  # noqa: E731
    collective = Collective("all_gather", "a", round((4e-3 - 20e-6) * 2 * 0.77 * 300e9))
    timeline = Timeline(A100, 2)
    for event in (kernel(10), collective, kernel(3)):
        timeline.play(event)
    assert (timeline.kernels, timeline.collectives) == pytest.approx((13e-3, 14e-3))
    timeline.play(Wait("never sent"))
    assert timeline.kernels == pytest.approx(13e-3)
    timeline.play(Wait("a"))
    timeline.play(kernel(1))
    assert timeline.kernels == pytest.approx(15e-3)
    timeline.play(collective)  # behind the kernels
    timeline.play(collective)  # behind the first
    assert timeline.collectives == pytest.approx(23e-3)


def model(layers=3, **options):
    config = _C.GPT2Config(max_seq_len=1024, num_layers=layers, num_heads=12, channels=768)
    return config, _C.Options(batch_size=8, seq_len=1024, precision="bf16", device="cuda", **options)


def test_fp8_by_hand():
    """Twice the rate while a tile computes, the same wait; the largest of the data sheets' figures without sparsity."""
    peaks = {name: round(GPUS[name].fp8_peak / 1e12) for name in ("H100", "H200", "B200", "4090")}
    assert peaks == {"H100": 1979, "H200": 1979, "B200": 4498, "4090": 330}
    machine = Machine(GPUS["H100"], "bf16", product_share=1)
    tile = 2 * 256 * 128 * 4096 / (1979.05e12 / 132)
    assert machine.product_seconds(256 * 12, 128 * 11, 4096, fp8=True) == pytest.approx(3.5e-6 + tile, rel=1e-4)
    assert [name for name in GPUS if not GPUS[name].has_fp8] == ["A100", "A100-40GB", "A100-PCIe"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("gpu", "fp8"), [("A100", False), ("4090", False), ("4090", True)])
def test_the_times_add_up(stage, gpu, fp8):
    """Step = the useful flops at the peak + all losses. Micro-steps that are skipped take as long as the others."""
    machine = Machine(GPUS[gpu], "bf16")
    step = Step(*model(zero_stage=stage, fp8=fp8), world_size=8, accumulation_steps=7)
    prediction = predict(step, machine)
    useful = sum(kernel.useful_flops * count for kernel, count in prediction.launches.items())
    assert prediction.seconds == pytest.approx(useful / machine.peak + sum(prediction.losses.values()))
    assert prediction.waiting >= 0 and list(prediction.losses.values()) == sorted(prediction.losses.values())[::-1]
    timeline = Timeline(machine, 8)
    for phase, repetitions in step.phases():
        for _ in range(repetitions):
            for event in phase():
                timeline.play(event)
    assert prediction.seconds == pytest.approx(timeline.kernels)
    assert prediction.mfu == pytest.approx(step.model_flops_per_token * 8192 * 7 / prediction.seconds / machine.peak)


def test_slow_links_are_waited_for():
    """What the step waits for is the part of the collectives that no kernels hide; nothing with one rank."""
    fast, slow = (
        predict(Step(*model(zero_stage=3), world_size=8), Machine(GPUS[gpu], "bf16")) for gpu in ("A100", "4090")
    )
    assert fast.waiting < fast.collective_seconds < slow.waiting < slow.collective_seconds
    alone = predict(Step(*model()), A100)
    assert alone.waiting == pytest.approx(0, abs=1e-12) and alone.moved == 0
    assert "waiting for other ranks" not in alone.losses


# --- published steps --------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_script():
    """It refuses constants that the fit does not give."""
    command = [sys.executable, ROOT / "scripts" / "roofline_check.py", "--csv", "/dev/stdout"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    table = (ROOT / "docs" / "roofline.csv").read_text()
    assert result.stdout == table, "run python scripts/roofline_check.py --csv docs/roofline.csv"


def test_published_steps_are_predicted():
    """What the report says of its error. Fitted lines are exact up to the digits of the constants."""
    with open(ROOT / "docs" / "roofline.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["published_ms"]]
    errors = {
        use: [abs(float(row["error_percent"])) for row in rows if row["use"] == use] for use in ("fitted", "predicted")
    }
    assert len(errors["fitted"]) == 2 and max(errors["fitted"]) <= 0.1
    assert len(errors["predicted"]) == 3 and 8 < max(errors["predicted"]) <= 9


def test_a_constant_that_is_not_the_fit_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import roofline_check

    monkeypatch.setitem(roofline.PRODUCT_SHARE, "Hopper", 0.72)
    with pytest.raises(SystemExit, match=r"1558M gives a PRODUCT_SHARE of 0\.69\d\d, llmc/roofline\.py has 0\.72"):
        roofline_check.report()


# --- the dry run ------------------------------------------------------------------------------------------------------

FLAGS = "--dry-run -e d12 -b 32 -t 1024 -x 5"
OPERATION = re.compile(r"^  (\S.*?) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


def report(capsys, flags):
    command(flags.split())
    return capsys.readouterr().out.partition("\npredicted for ")[2]


def test_report(capsys):
    text = report(capsys, f"{FLAGS} -d 524288 --roofline H100 -pn 8 -z 1 -r 0")
    assert text.startswith(
        "H100 (NVIDIA H100 80GB HBM3), measured by nobody: data sheet 989 TFLOP/s, 3350 GB/s; NVLink 4 at 450"
    )
    config = _C.GPT2Config()
    fusion = {"gelu_fusion": 2, "bias_fusion": True}
    options = _C.Options(
        batch_size=32, seq_len=1024, precision="bf16", recompute=0, zero_stage=1, device="cuda", **fusion
    )
    prediction = predict(Step(config, options, 8, 2), H100)
    *operations, whole = OPERATION.findall(text)
    sums = [sum(float(row[i]) for row in operations) for i in range(1, 6)]
    assert [float(cell) for cell in whole[1:]] == pytest.approx(sums, rel=1e-3)  # rounded line by line
    assert int(whole[1]) == sum(prediction.launches.values())
    assert float(whole[5]) == pytest.approx(1e3 * prediction.kernel_seconds, abs=1e-3)
    ms, tokens, mfu = re.search(
        r"^predicted step: ([\d.]+) ms, (\d+) tokens/s, predicted MFU ([\d.]+)%", text, re.M
    ).groups()
    assert float(ms) == pytest.approx(1e3 * prediction.seconds, abs=0.05)
    assert int(tokens) == pytest.approx(524288 / prediction.seconds, abs=1)
    assert float(mfu) == pytest.approx(100 * prediction.mfu, abs=0.05)
    stages = re.findall(r"^   (\d) +([\d.]+) +[\d.]+ +[\d.]+ +([\d.]+) +[\d.]+%$", text, re.M)
    assert [stage for stage, _, _ in stages] == ["0", "1", "2", "3"] and stages[1][2] == ms
    assert float(stages[0][1]) == pytest.approx(
        2 * 124475904 / 1e6, rel=1e-3
    )  # the gradients in bf16; units are padded
    losses = re.findall(r"^  (\d)\. (.*): ([\d.]+) ms, [\d.]+%$", text, re.M)
    assert [(cause, float(seconds)) for _, cause, seconds in losses] == [
        (cause, pytest.approx(1e3 * seconds, abs=0.05)) for cause, seconds in list(prediction.losses.items())[:3]
    ]


def test_report_of_one_gpu(capsys):
    """No communication; an A100 does not fuse GELU, so its kernels are there, and none of them begins early."""
    text = report(capsys, f"{FLAGS} --roofline A100")
    assert "communication" not in text and "NVLink" not in text and "GELU backward" in text and "begin" not in text


def test_what_early_launches_could_save(capsys):
    """Of one micro-step at -r 0: the first layernorm after the embedding; in each of 12 blocks attention's second and
    third kernel backward, and the second halves of two layernorms; that of the last layernorm; the two sums of the
    losses after the classifier's; the second gradient of the embedding; the norm's second and third kernel."""
    text = report(capsys, f"{FLAGS} -d 32768 --roofline H100 -r 0")
    pattern = r"^(\d+) of (\d+) launches may begin .* at most ([\d.]+)%$"
    early, launches, percent = re.search(pattern, text, re.M).groups()
    assert int(early) == 1 + 12 * (2 + 2) + 1 + 2 + 1 + 2
    assert int(launches) == int(OPERATION.findall(text)[-1][1])
    ms = float(re.search(r"^predicted step: ([\d.]+) ms", text, re.M)[1])
    assert float(percent) == pytest.approx(int(early) * 2.5e-3 / ms * 100, abs=0.05)


def test_report_of_several_machines(capsys):
    assert "NVLink 3 at 300 GB/s, 25 GB/s for each GPU between machines of 8" in report(
        capsys, f"{FLAGS} --roofline A100 -pn 16"
    )


def test_the_gpu_gives_the_memory(capsys):
    command(f"{FLAGS} --roofline 4090".split())
    text = capsys.readouterr().out
    assert "of 24564.0 MiB" in text and ", bf16, " in text
    command(f"{FLAGS} --roofline 4090 --memory 48".split())
    assert "of 49152.0 MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--roofline H100", "--roofline H100 only has an effect with --dry-run; otherwise drop it"),
        ("--dry-run --roofline h100", "--roofline h100: it must be one of A100, A100-40GB, A100-PCIe, H100,"),
        ("--dry-run --roofline", "--roofline needs a value"),
        ("--dry-run --roofline H100 --device cpu", "--roofline H100 is a GPU: drop --device cpu"),
    ],
)
def test_errors(flags, message):
    with pytest.raises(UsageError) as caught:
        command(flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
