"""The kernel laboratory: what it times, compares and counts; a user's variants, good and bad; the command."""

import csv
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import devices
import pytest
import torch
from devices import RealGPU, Simulator
from torch import Tensor

from llmc import _C, models
from llmc.cli import bench
from llmc.device import Device, cpu
from llmc.errors import RunError, UsageError
from llmc.lab import kernels, measure, variants
from llmc.lab.catalogue import OPERATIONS
from llmc.lab.kernels import parse_shape
from llmc.lab.limits import Limits, Machine
from llmc.lab.measure import Case
from llmc.lab.operation import Draw, Step

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = "custom:l=1,c=48,h=2,t=32,v=65"
STEP = Step(models.resolve(TINY, None), B=2, T=16)
NORM = "layernorm_forward"

# Sizes that are no multiples of anything, but for heads of 8.
ODD = {"B": 2, "T": 19, "C": 24, "V": 37, "N": 1031, "IC": 13, "OC": 7, "NH": 3}

RIGHT = """
import torch

def layernorm_forward(out, mean, rstd, x, weight, bias):
    variance, m = torch.var_mean(x.float(), -1, correction=0)
    mean.copy_(m)
    rstd.copy_((variance + 1e-5).rsqrt())
    out.copy_((x.float() - mean[:, None]) * rstd[:, None] * weight.float() + bias.float())
"""


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(cpu(), copy_bytes=2**16)


@pytest.fixture(scope="module", autouse=True)
def build_root(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        patch.setattr("llmc.lab.limits.COPY_BYTES", 2**16)
        patch.setattr(measure, "MAX_SETS", 4)
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # the calls are so short that a second thread on a busy machine would only be waited for
        yield
        torch.set_num_threads(threads)


# --- operations -------------------------------------------------------------------------------------------------------


def test_every_operation_can_be_measured() -> None:
    functions = {name for name in vars(_C.ops) if not name.startswith("_")}
    small = {"allow_tf32", "clip_scale", "fp8_scale", "raise_amax", "update_fp8_scales"}  # a switch; some numbers
    assert set(OPERATIONS) == functions - small


@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_are_those_of_the_core(name: str) -> None:
    signature = getattr(_C.ops, name).__doc__.splitlines()[0]
    parameters = re.findall(r"(\w+): ", signature)
    arguments = OPERATIONS[name].arguments(Draw(torch.float32, "meta"), *(8 for _ in OPERATIONS[name].sizes))
    assert list(arguments) == parameters[: len(arguments)]
    # Those that are left have defaults.
    assert signature.count("=") >= len(parameters) - len(arguments)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if not OPERATIONS[name].fp8])
def test_results_are_right(name: str, precision: str, machine: Machine) -> None:
    operation = OPERATIONS[name]
    case = Case(operation, tuple(ODD[size] for size in operation.sizes), precision)
    result = measure.measure(case, [], machine, seconds=0)
    assert [row.contender for row in result.rows] == ["llmc", "torch"]
    assert result.bytes > 0
    # Sums of some thousand values, and the rounding of a result to its precision; stochastic rounding takes two.
    assert 0 <= result.rows[0].error <= (2**-7 if "bf16" in (precision, {"cast": "bf16"}.get(name)) else 4e-6)
    for row in result.rows:
        assert row.error < 0.05  # PyTorch sums in bf16 here and there
        assert not row.mistake
        assert 0 < row.seconds < 1


@pytest.mark.parametrize("name", [name for name in OPERATIONS if OPERATIONS[name].fp8])
@pytest.mark.parametrize("sizes", [(48, 80, 32), (144, 16, 272)], ids=str)
def test_results_in_fp8_are_right(
    name: str, sizes: tuple[int, int, int], cuda: Simulator | RealGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core's in the simulator; PyTorch's but for products, which it has on GPUs only."""
    operation = OPERATIONS[name]
    arguments = operation.arguments(Draw(torch.bfloat16, "cpu"), *sizes[: len(operation.sizes)])
    own = measure.clone(arguments)
    monkeypatch.setattr(devices.ops, "device", cuda)
    getattr(devices.ops, name)(*own.values())
    exact = operation.torch(measure.clone(arguments, torch.float64))()
    contenders = [operation.results_of(own, None)]
    if "matmul" not in name:
        contenders.append(operation.torch(arguments)())
    for found in contenders:
        for result, ours, truth in zip(operation.results, found, exact, strict=True):
            rounding = {1: 2**-3, 2: 2**-7, 4: 2**-7}[ours.element_size()]  # E5M2's; bf16's, also of what amax is of
            assert measure.error_of(ours.double().flatten(), truth.flatten()) <= rounding, result


@pytest.mark.parametrize("name", OPERATIONS)
def test_pytorch_leaves_the_arguments_alone(name: str) -> None:
    """So that the truth is that of the same inputs; the optimizer is free to update in place."""
    operation = OPERATIONS[name]
    arguments = operation.arguments(Draw(torch.float32, "cpu"), *(ODD.get(size, 5) for size in operation.sizes))
    arguments = measure.clone(arguments, torch.float64) if operation.fp8 else arguments  # CPUs have no such products
    before = measure.clone(arguments)
    operation.torch(arguments)()
    for key, value in arguments.items():
        if isinstance(value, Tensor) and name not in ("adamw", "round_parameters"):
            assert torch.equal(value.double().nan_to_num(), before[key].double().nan_to_num()), key


def test_bytes_and_flops_are_those_of_the_step() -> None:
    """As csrc/ops/timed_ops.cpp counts them."""
    options = _C.Options(batch_size=STEP.B, seq_len=STEP.T, gelu_fusion=2)
    model = _C.GPT2(_C.GPT2Config(**vars(STEP.shape)), options, timed=True)
    model.init_random()
    tokens = torch.randint(65, (STEP.B, STEP.T + 1))
    for step in (1, 2):
        model.operation_times()
        model.forward(tokens[:, :-1])
        model.backward(tokens[:, 1:])
        model.update(lr=1e-3, weight_decay=0.1, step=step)
    times = {name: (flops / calls, moved / calls) for name, (calls, _, flops, moved) in model.operation_times().items()}
    compared = set()
    for name, operation in OPERATIONS.items():
        for sizes in operation.of_step(STEP):
            key = name
            if name.startswith("matmul"):
                N, IC, OC = sizes
                m, n, k = {"forward": (N, OC, IC), "input": (N, IC, OC), "weight": (OC, IC, N)}[name.split("_")[-1]]
                key = f"{name} {m}x{n}x{k}"
            if key in times and name not in ("adamw", "sum_of_squares", "bias_backward", "sum"):  # of other sizes
                arguments = operation.arguments(Draw(torch.float32, "cpu"), *sizes)
                found = operation.flops(*sizes), operation.bytes(arguments)
                assert found == pytest.approx(times[key]), key
                compared.add(name)
    assert len(compared) >= 12, compared


def test_bytes_of_the_optimizer() -> None:
    """gradient, m and v twice, parameter twice; in bf16 the master copy twice and the parameter once."""
    for dtype, expected in ((torch.float32, 4 + 16 + 8), (torch.bfloat16, 2 + 16 + 8 + 2)):
        operation = OPERATIONS["adamw"]
        assert operation.bytes(operation.arguments(Draw(dtype, "cpu"), 100)) == 100 * expected


def test_limits() -> None:
    limits = Limits(flops=1e9, bandwidth=1e8)
    assert limits.least_seconds(flops=2e9, moved=1e8) == 2
    assert limits.least_seconds(flops=1e9, moved=3e8) == 3
    assert limits.least_seconds(flops=0, moved=1e8) == 1
    assert Limits(None, 1e8).least_seconds(flops=1, moved=1) is None
    assert Limits(None, 1e8).least_seconds(flops=0, moved=1e8) == 1


def test_what_the_machine_can_do(machine: Machine) -> None:
    limits = machine.limits("fp32")
    assert limits.flops is not None and 1e8 < limits.flops < 1e14
    assert 1e8 < limits.bandwidth < 1e13


# --- times and errors -------------------------------------------------------------------------------------------------


def variant(tmp_path: Path, text: str, name: str = "mine.py", operation: str = NORM) -> list[variants.Variant]:
    path = tmp_path / name
    path.write_text(text)
    return variants.load_variants([path], [OPERATIONS[operation]], on_cuda=False)


def norm_case(precision: str = "fp32") -> Case:
    return Case(OPERATIONS[NORM], (7, 40), precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_right_variant(tmp_path: Path, machine: Machine, precision: str) -> None:
    result = measure.measure(norm_case(precision), variant(tmp_path, RIGHT), machine, seconds=0)
    assert [(row.contender, row.mistake) for row in result.rows] == [("llmc", ""), ("torch", ""), ("mine", "")]
    assert result.rows[2].error <= {"fp32": 1e-6, "bf16": 2**-7}[precision]


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (("+ bias.float()", ""), "out is off by "),
        (("+ 1e-5", "+ 1e-3"), "out is off by "),
        (("mean.copy_(m)", "mean.copy_(m); out[3, 5] = 0"), ""),  # overwritten
        (("    rstd.copy_((variance + 1e-5).rsqrt())", "    rstd = (variance + 1e-5).rsqrt()"), "rstd is not written"),
        (("weight.float()", "weight.float() / 0"), "out is not written, or not finite"),
    ],
)
def test_wrong_results(tmp_path: Path, machine: Machine, change: tuple[str, str], mistake: str) -> None:
    assert change[0] in RIGHT
    result = measure.measure(norm_case(), variant(tmp_path, RIGHT.replace(*change)), machine, seconds=0)
    assert result.rows[2].mistake.startswith(mistake) and bool(result.rows[2].mistake) == bool(mistake)
    assert not result.rows[0].mistake and not result.rows[1].mistake


def test_times(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of a call; every round runs all contenders over all sets of arguments."""
    monkeypatch.setattr(measure, "MAX_SETS", 5)
    text = RIGHT + "\n    time.sleep(0.002)\n    calls.append(out.data_ptr())\n\nimport time\ncalls = []\n"
    (mine,) = variant(tmp_path, text)
    result = measure.measure(norm_case(), [mine], machine, seconds=0)
    assert 0.002 <= result.rows[2].seconds < 0.1
    assert result.rows[0].seconds < 0.001
    calls = mine.module.calls[1:]  # the first one was checked
    assert len(calls) == 5 * (1 + measure.MIN_ROUNDS)
    assert len(set(calls)) == 5 and calls[:5] == calls[5:10]


def test_more_seconds_are_more_rounds(machine: Machine) -> None:
    started = time.perf_counter()
    measure.measure(norm_case(), [], machine, seconds=0.3)
    assert time.perf_counter() - started >= 0.6  # two contenders


def test_what_accumulates_begins_anew(tmp_path: Path, machine: Machine) -> None:
    text = "import torch\nseen = []\ndef gelu_backward(dx, x):\n    seen.append(float(dx[0]))\n"
    text += "    dx.copy_(torch.ops.aten.gelu_backward(dx, x, approximate='tanh'))\n"
    (mine,) = variant(tmp_path, text, operation="gelu_backward")
    measure.measure(Case(OPERATIONS["gelu_backward"], (100,), "fp32"), [mine], machine, seconds=0)
    assert len(mine.module.seen) > measure.MIN_ROUNDS
    assert len(set(mine.module.seen)) == 1


def test_numbers_that_are_returned(tmp_path: Path, machine: Machine) -> None:
    text = "def sum_of_squares(tensors):\n    return sum(float(x.double().square().sum()) for x in tensors)\n"
    case = Case(OPERATIONS["sum_of_squares"], (1000,), "fp32")
    for text_, mistake in ((text, ""), (text.replace(".square()", ""), "the result is off by ")):
        result = measure.measure(case, variant(tmp_path, text_, operation="sum_of_squares"), machine, seconds=0)
        assert result.rows[2].mistake.startswith(mistake) and bool(result.rows[2].mistake) == bool(mistake)


def test_what_has_no_fp8() -> None:
    """Is left out, or refused if it was asked for."""
    gpu = Device("cuda:0", "Old GPU", 2**30, True, has_fp8=False)
    for device, precisions, reason in (
        (cpu(), ["bf16"], "a GPU of compute capability 8.9 or newer, which "),
        (gpu, ["bf16"], "a GPU of compute capability 8.9 or newer, which Old GPU is not"),
        (replace(gpu, has_fp8=True), ["bf16", "fp32"], "--precision bf16 alone"),
        (replace(gpu, has_fp8=True), ["bf16"], ""),
    ):
        assert kernels.why_not(OPERATIONS["quantize"], device, precisions).startswith(reason)
        assert bool(kernels.why_not(OPERATIONS["quantize"], device, precisions)) == bool(reason)
        assert not kernels.why_not(OPERATIONS[NORM], device, precisions)
    with pytest.raises(UsageError, match="quantize_gelu needs a GPU of compute capability"):
        bench._main(["kernels", "quantize_gelu", "--device", "cpu"])


def test_no_room(machine: Machine) -> None:
    case = Case(OPERATIONS["gelu_forward"], (2**38,), "fp32")
    with pytest.raises(UsageError, match=r"--shape N=274877906944: gelu_forward needs .* GiB, there are .*; give smal"):
        measure.measure(case, [], machine, seconds=0)


# --- the contract of variants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("def layernorm(out): pass", "has no function layernorm_forward"),
        ("layernorm_forward = 3", "has no function layernorm_forward"),
        ("def layernorm_forward(:", "cannot be imported: SyntaxError: "),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_bad_python(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(RunError, match=re.escape(f"mine.py {error}")) as caught:
        variant(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("def layernorm_forward(out, x): pass", "it must take the arguments of layernorm_forward(out, mean, rstd, x, "),
        (RIGHT + "    x.add_(1)", "layernorm_forward writes to x, which it may only read"),
        (RIGHT + "    weight[3] = 0", "layernorm_forward writes to weight, which it may only read"),
        (RIGHT + "    raise ValueError('no\\nluck')", "layernorm_forward(out, mean, rstd, x, weight, bias) failed: no"),
        (
            RIGHT + "    x + out[:, :3]",
            "layernorm_forward(out, mean, rstd, x, weight, bias) failed: The size of tensor",
        ),
    ],
)
def test_bad_calls(tmp_path: Path, machine: Machine, text: str, error: str) -> None:
    with pytest.raises(RunError, match=re.escape(f"mine.py: {error}")) as caught:
        measure.measure(norm_case(), variant(tmp_path, text), machine, seconds=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mine.txt", "mine.txt: give a .cpp, .cu or .py file"),
        ("mine.cu", "mine.cu: CUDA code needs a GPU (--device cuda)"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        variant(tmp_path, "", name)
    with pytest.raises(UsageError, match=r"--variant .*none\.cpp: there is no such file"):
        variants.load_variants([tmp_path / "none.cpp"], [], on_cuda=False)


def test_names_in_the_table(tmp_path: Path) -> None:
    """The file's; with its directory where that is not enough."""
    paths = [tmp_path / "a" / "fast.py", tmp_path / "b" / "fast.py", tmp_path / "torch.py", tmp_path / "mine.py"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(RIGHT)
    loaded = variants.load_variants(paths, [OPERATIONS[NORM]], on_cuda=False)
    assert [v.name for v in loaded] == [*map(str, paths[:3]), "mine"]


def test_a_file_with_two_operations(tmp_path: Path, machine: Machine) -> None:
    text = RIGHT + "\ndef gelu_forward(out, x):\n    out.copy_(torch.nn.functional.gelu(x, approximate='tanh'))\n"
    path = tmp_path / "two.py"
    path.write_text(text)
    operations = [OPERATIONS[name] for name in (NORM, "gelu_forward", "gelu_backward")]
    loaded = variants.load_variants([path], operations, on_cuda=False)
    for operation, sizes, contenders in zip(operations, [(3, 8), (9,), (9,)], [3, 3, 2], strict=True):
        result = measure.measure(Case(operation, sizes, "fp32"), loaded, machine, seconds=0)
        assert len(result.rows) == contenders


def test_the_example_in_cpp(machine: Machine) -> None:
    loaded = variants.load_variants([EXAMPLES / "my_layernorm.cpp"], [OPERATIONS[NORM]], on_cuda=False)
    for precision, sizes in (("fp32", (67, 33)), ("bf16", (5, 768))):
        result = measure.measure(Case(OPERATIONS[NORM], sizes, precision), loaded, machine, seconds=0)
        assert [(row.contender, row.mistake) for row in result.rows][2:] == [("my_layernorm", "")]
    # Only what has changed is compiled: this took ten seconds.
    started = time.perf_counter()
    variants.load_variants([EXAMPLES / "my_layernorm.cpp"], [OPERATIONS[NORM]], on_cuda=False)
    assert time.perf_counter() - started < 3
    # pybind11 checks the signature; the message has many lines.
    arguments = OPERATIONS[NORM].arguments(Draw(torch.float32, "cpu"), 3, 8)
    with pytest.raises(TypeError) as caught:
        loaded[0].call(OPERATIONS[NORM], {**arguments, "more": 1})()
    line = str(loaded[0].explain(OPERATIONS[NORM], arguments, caught.value))
    assert "my_layernorm.cpp: it must take the arguments of layernorm_forward(out, mean, rstd, x, weight, bias)" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('\n#error "no luck"\n', r"mine\.cpp does not compile: .*mine\.cpp:2:2: error: #error"),
        ("int f() { return 1; }", r"mine\.cpp is no module: it needs PYBIND11_MODULE\(TORCH_EXTENSION_NAME, m\)"),
        ("int f(); int g = f();", r"mine\.cpp is no module: .*undefined symbol"),
    ],
)
def test_bad_cpp(tmp_path: Path, build_root, text: str, error: str) -> None:
    # A process that was killed while it compiled has left PyTorch's lock.
    path = tmp_path / "mine.cpp"
    directory = variants.build_root() / variants.module_name(path)
    directory.mkdir()
    (directory / "lock").touch()
    with pytest.raises(RunError, match=error) as caught:
        variant(tmp_path, text, "mine.cpp")
    assert "\n" not in str(caught.value)


def test_a_module_without_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "compile_file", lambda path: SimpleNamespace(gelu_forward=print))
    with pytest.raises(RunError, match=r"mine\.cpp has no function layernorm_forward: PYBIND11_MODULE\(.*\} adds it"):
        variant(tmp_path, "", "mine.cpp")


def test_no_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(RunError, match=r"mine\.cpp cannot be compiled without ninja: pip install ninja"):
        variant(tmp_path, "", "mine.cpp")


# --- the command ------------------------------------------------------------------------------------------------------


def run(arguments: str) -> None:
    bench._main(["kernels", *arguments.split()])


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RIGHT)
    arguments = f"{NORM} matmul_forward --shape {TINY}:2x16 --precision fp32 --precision bf16 --variant mine.py"
    run(f"{arguments} --seconds 0 --threads 2 --device cpu --csv k.csv --chart k.png")
    run(f"{NORM} --shape N=3,C=5 --seconds 0 --threads 1 --csv k.csv")
    output = capsys.readouterr().out
    assert re.search(r"^.*, 2 threads, torch .*\n(.*\n)*.*, 1 threads, torch ", output)
    head = rf"^{NORM} N=32,C=48 fp32: 0\.01293 MB; [\d.]+ us at [\d.]+ GB/s$"
    assert re.search(head, output, re.M)
    for name in ("llmc", "torch", "mine"):
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+x +[\d.]+ +[\d.]+% +\d\.\de-\d\d$", output, re.M)
    assert re.search(r"^matmul_forward N=32,IC=48,OC=144 bf16: .* MB, 0\.0004424 GFLOP; .* GFLOP/s$", output, re.M)
    assert len(re.findall(r"^mine ", output, re.M)) == 2

    with open(tmp_path / "k.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # (1 shape of 3 contenders, 4 of 2) in two precisions, then 2 contenders
    assert len(rows) == 2 * (3 + 8) + 2
    for row in rows:
        rate = float(row["bytes"]) / (float(row["median_us"]) * 1e-6) / 1e9
        assert float(row["gbs"]) == pytest.approx(rate, rel=0.01, abs=0.01)
        least = float(row["bytes"]) / float(row["copy_gbs"]) / 1e9
        least = max(least, float(row["flops"]) / float(row["peak_gflops"]) / 1e9)
        assert float(row["of_roofline"]) == pytest.approx(least / float(row["median_us"]) * 1e6, rel=0.03, abs=1e-4)
        assert 0 <= float(row["max_error"]) < 0.01
        assert row["threads"] in "12" and row["command"].startswith("llmc-bench kernels ")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_wrong_results_end_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(RIGHT.replace("+ bias.float()", ""))
    with pytest.raises(RunError) as caught:
        run(f"{NORM} --shape N=3,C=8 --shape N=3,C=16 --seconds 0 --variant {path}")
    assert re.fullmatch(
        r"mine: layernorm_forward N=3,C=8 fp32: out is off by .* of its largest value; .* would be rounding "
        r"\(and 1 more\)",
        str(caught.value),
    )
    assert len(re.findall(r"^mine .* WRONG$", capsys.readouterr().out, re.M)) == 2


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    run("--list")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(OPERATIONS)
    assert "layernorm_forward(out, mean, rstd, x, weight, bias)  N,C" in lines


def test_shapes() -> None:
    assert parse_shape("C=5,N=3", OPERATIONS[NORM]) == [(3, 5)]
    assert parse_shape(f"{TINY}:2x16", OPERATIONS[NORM]) == [(32, 48)]
    assert parse_shape("d12:4x256", OPERATIONS["attention_forward"]) == [(4, 256, 768, 12)]
    assert (1024, 3072, 768) in parse_shape("d12:4x256", OPERATIONS["matmul_backward_weight"])
    # 64 MiB of logits in fp32 are 333 rows: 1024 rows go in four chunks.
    assert parse_shape("d12:4x256", OPERATIONS["fused_classifier"]) == [(256, 50257)]
    assert parse_shape("d12:1x8", OPERATIONS["adamw"]) == [(12 * 768**2 + 13 * 768,)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("no_such", "no_such is no operation: give one or more of embedding_forward, "),
        (f"{NORM} --shape N=3", "--shape N=3: layernorm_forward has N=...,C=...; or give MODEL:BxT"),
        (f"{NORM} --shape N=3,C=4,B=2", "--shape N=3,C=4,B=2: layernorm_forward has N=...,C=..."),
        (f"{NORM} --shape N=3,C=0", "--shape N=3,C=0: layernorm_forward has N=...,C=..."),
        (f"{NORM} --shape N=3;C=4", "--shape N=3;C=4: layernorm_forward has N=...,C=..."),
        (f"{NORM} --shape N=3,C=99999999999999", "--shape N=3,C=99999999999999: sizes are at most"),
        ("--shape d12:4x1025", "--shape d12:4x1025: a row has up to 1024 tokens, the model's context"),
        ("--shape d13:4x16", "d13 is no model"),
        ("--precision fp16", "argument --precision: invalid choice: 'fp16'"),
        ("--seconds -1", "argument --seconds: '-1' is not a number from 0 to 3600"),
        ("--threads 0", "argument --threads: '0' is not a whole number from 1"),
        ("--variant none.cpp", "--variant none.cpp: there is no such file"),
        ("--chart none/k.png", "--chart none/k.png: there is no directory none"),
    ],
)
def test_usage_errors(arguments: str, error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)) as caught:
        run(arguments)
    assert "\n" not in str(caught.value)


def test_a_foreign_csv(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"--csv .*other\.csv: the file has other columns"):
        run(f"{NORM} --csv {path}")
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(not _C.why_no_cuda_device(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(RunError, match=r"--device cuda: .*; use --device cpu"):
        run("--device cuda")


def test_sizes_that_the_core_refuses() -> None:
    with pytest.raises(_C.Error, match="head sizes must be multiples of 8"):
        run("attention_forward --shape B=1,T=4,C=30,NH=3 --seconds 0")


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    bench._main([])
    assert "kernels" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(bool(_C.why_no_cuda_device()), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_gpu(name: str, precision: str) -> None:
    from llmc.config import TrainConfig
    from llmc.device import choose_device

    operation = OPERATIONS[name]
    gpu = Machine(choose_device(TrainConfig(device="cuda")), copy_bytes=2**20)
    result = measure.measure(Case(operation, operation.of_step(STEP)[0], precision), [], gpu, seconds=0)
    assert not any(row.mistake for row in result.rows)
