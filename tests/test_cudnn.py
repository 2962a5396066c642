"""--attention cudnn: refusals everywhere; where cuDNN is installed, what its graphs describe, computed by PyTorch, and
its plans for GPUs that are not there; the step itself on a GPU only.

pip install -r scripts/cudnn_wheels.txt installs what the second part needs.
"""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from devices import gpu, require_simulator
from model_testing import batch, build, gradients_of, reference_model, train_step
from training_data import V, text, write_shard, write_tokenizer

from llmc import _C
from llmc.cli.train import _main as command
from llmc.errors import UsageError

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
WHEELS = SITE_PACKAGES / "nvidia"
NO_CUDNN = "reinstall with LLMC_CUDNN=ON, which says what is missing"

# --- refusals, and the plan on paper ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--device cpu", "--attention cudnn needs a GPU, this run is on a CPU: drop it"),
        ("--roofline H100 --precision fp32", "--attention cudnn needs --precision bf16, this run is in fp32"),
        ("--roofline H100 -t 1 -g 1", "--attention cudnn needs -t 2 or more, -t is 1: use --attention flash"),
        ("--roofline H100 --attention fast", "--attention fast: it must be one of flash, cudnn"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UsageError) as error:
        command(["--dry-run", "-e", "d12", "--attention", "cudnn", *flags.split()])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "t_train_0.bin", text(0, 500))
    write_shard(tmp_path / "t_val_0.bin", text(2, 300))
    write_tokenizer(tmp_path / "tokenizer.bin", V)


def test_a_build_without_cudnn_says_so(data):
    """In the simulator, which has a CUDA device and can have no cuDNN."""
    require_simulator()
    runner = Path(__file__).parent / "run_in_simulator.py"
    flags = f"-e custom:l=1,c=32,h=2,t=32,v={V} -i t_train_*.bin -j t_val_*.bin -b 2 -t 16 -g 8 -x 1 -o log"
    program = [sys.executable, str(runner), "llmc-train", *flags.split(), "--device", "cuda", "--attention", "cudnn"]
    env = {**os.environ, "PYTHONPATH": str(runner.parent)}
    result = subprocess.run(program, capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"--attention cudnn: this build of llmc has no cuDNN: {NO_CUDNN}" in result.stderr
    assert not Path("log").exists()


SIZES = {"max_seq_len": 64, "vocab_size": 65, "padded_vocab_size": 128, "num_layers": 1, "num_heads": 2, "channels": 32}


def test_the_core_refuses_too():
    config = _C.GPT2Config(**SIZES)
    for options, message in [
        ({"precision": "bf16"}, "cudnn_attention needs a GPU and bf16: the precision is bf16 on cpu"),
        ({"device": "cuda"}, "cudnn_attention needs a GPU and bf16: the precision is fp32 on cuda:0"),
        ({"device": "cuda", "precision": "bf16", "seq_len": 1}, "seq_len is 1, cuDNN needs 2 or more"),
    ]:
        with pytest.raises(_C.Error, match=message):
            _C.plan(config, _C.Options(**{"seq_len": 64, **options}, cudnn_attention=True))


def test_the_simulated_core_has_none(cudasim_core):
    options = cudasim_core.Options(seq_len=64, precision="bf16", device="cuda", cudnn_attention=True)
    with pytest.raises(cudasim_core.Error, match=f"this build of llmc has no cuDNN: {NO_CUDNN}"):
        cudasim_core.GPT2(cudasim_core.GPT2Config(**SIZES), options)


@pytest.fixture
def cudasim_core():
    from devices import Simulator

    require_simulator()
    return Simulator("fast").core


def workspace(B, T, NH, HS):
    sizes = {**SIZES, "max_seq_len": T, "num_heads": NH, "channels": NH * HS}
    options = _C.Options(batch_size=B, seq_len=T, precision="bf16", device="cuda", cudnn_attention=True)
    return next(row[5] for row in _C.plan(_C.GPT2Config(**sizes), options) if row[0] == "workspace")


def test_its_workspace_is_planned():
    """(T,T) in bf16 for each head, tiles of 64 by 128, and a sum in fp32 of each row.

    32 MiB and 4C sums in fp32 are planned anyway.
    """
    assert workspace(64, 1024, 12, 64) == 64 * 12 * (1024 * 1024 * 2 + 1024 * 4) + 256
    assert workspace(16, 1000, 25, 64) == 16 * 25 * (1024 * 1024 * 2 + 1000 * 4) + 256
    assert workspace(64, 520, 12, 64) == 64 * 12 * (576 * 640 * 2 + 520 * 4) + 256
    assert workspace(1, 64, 1, 64) == 32 * 2**20 + 4 * 64 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["-DLLMC_CUDNN=ON"], "LLMC_CUDNN=ON needs the CUDA backend: LLMC_CUDA=ON says what is missing for that"),
        (["-DLLMC_CUDNN=AUTO"], "LLMC_CUDNN is 'AUTO', it must be ON or OFF"),
    ],
)
def test_the_build_refuses(settings, message, tmp_path):
    python = f"-DPython_EXECUTABLE={sys.executable}"
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", python, "-DLLMC_CUDA=OFF", *settings]
    result = subprocess.run(configure, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


# --- the graphs and cuDNN's plans for them ----------------------------------------------------------------------------

SHAPES = [(2, 37, 3, 8), (3, 130, 2, 40), (1, 2, 1, 128), (2, 256, 5, 64)]  # B, T, NH, HS
TRAINED = [(64, 1024, 12, 64), (16, 1024, 25, 64), (4, 2048, 16, 128)]
HOPPER = {
    **{
        "deviceName": "NVIDIA H100 80GB HBM3",
        "deviceVer": 900,
        "driverVer": 13000,
        "cudaDeviceId": 0,
        "pciDeviceId": 0,
    },
    **{
        "multiProcessorCount": 132,
        "smClockRateKHz": 1980000,
        "memClockRateKHz": 2619000,
        "totalGlobalMem": 85520809984,
    },
    **{"maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "warpSize": 32},
    **{"regsPerBlock": 65536, "maxRegistersPerSM": 65536, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048},
    **{"maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024},
    **{"l2CacheSize": 52428800, "maxCtasPerSM": 32, "isTccDriver": 0, "supportCoopLaunch": 1},
}  # cuDNN's names; from NVIDIA's data sheet and the Programming Guide's table of compute capabilities
DEVICES = {
    80: {
        **HOPPER,
        **{"deviceName": "NVIDIA A100-SXM4-80GB", "deviceVer": 800, "multiProcessorCount": 108},
        **{"maxSharedMemoryPerBlockOptin": 166912, "l2CacheSize": 41943040},
    },
    90: HOPPER,
    100: {**HOPPER, "deviceName": "NVIDIA B200", "deviceVer": 1000, "multiProcessorCount": 148},
}  # by compute capability


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """tests/cudnn/plans.cpp, and what it needs instead of a GPU's driver."""
    if importlib.util.find_spec("nvidia.cudnn") is None or not (SITE_PACKAGES / "include/cudnn_frontend.h").exists():
        pytest.skip("cuDNN and its frontend are not installed")
    out = tmp_path_factory.mktemp("cudnn")
    source = ROOT / "tests" / "cudnn"
    headers = [SITE_PACKAGES / "include", WHEELS / "cudnn/include", WHEELS / "cu13/include"]
    compiler = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    compiler += [f"-isystem{folder}" for folder in headers]
    files = [source / "plans.cpp", ROOT / "csrc/cuda/cudnn_graph.cpp", ROOT / "csrc/core/check.cpp"]
    libraries = [WHEELS / "cudnn/lib/libcudnn.so.9", WHEELS / "cu13/lib/libcudart.so.13"]
    driver = [*compiler, "-shared", "-fPIC", source / "device.cpp", "-o", out / "libcuda.so.1"]
    subprocess.run(driver, check=True)
    plans = [*compiler, "-DLLMC_RUNTIME", source / "device.cpp", *files, *libraries, "-o", out / "plans"]
    subprocess.run(plans, check=True)

    def run(compute_capability, *shapes, plan):
        device = out / f"{compute_capability}.json"
        device.write_text(json.dumps(DEVICES[compute_capability]))
        arguments = [str(device) if plan else "", *("x".join(map(str, shape)) for shape in shapes)]
        folders = ":".join(map(str, [out, WHEELS / "cudnn/lib", WHEELS / "cu13/lib"]))
        env = {**os.environ, "LD_LIBRARY_PATH": folders, "LLMC_COMPUTE_CAPABILITY": str(compute_capability)}
        result = subprocess.run([out / "plans", *arguments], capture_output=True, text=True, env=env, timeout=300)
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        return list(zip(shapes, lines[0::2], lines[1::2], strict=True))

    return run


@pytest.mark.parametrize("compute_capability", DEVICES)
def test_cudnn_has_deterministic_plans(program, compute_capability):
    """For the shapes that are trained and odd ones. Its heuristics are asked, and the kernels compiled; none is run."""
    for shape, forward, backward in program(compute_capability, *SHAPES, *TRAINED, plan=True):
        bytes = max(forward["workspace_bytes"], backward["workspace_bytes"])
        assert bytes <= backward["planned_bytes"] == workspace(*shape), shape
        if compute_capability == 90 and bytes > 32 * 2**20:
            assert bytes == backward["planned_bytes"], shape  # and nothing is planned in vain


OPERANDS = {1: "qkv", 2: "out", 3: "lse", 4: "dqkv", 5: "dout"}  # plans.cpp's addresses, in units of 2^40
ITEM_BYTES = {"BFLOAT16": 2, "FLOAT": 4}


class Memory:
    """The operands of a graph by its pointers: fp64 here, addressed as what the graph says they are."""

    def __init__(self, line, **operands):
        self.operands = operands
        self.pointers = {int(id): pointer for id, pointer in line["pointers"].items()}
        self.tensors = line["graph"]["tensors"]
        self.io_type = line["graph"]["context"]["io_data_type"]  # of tensors that have none of their own

    def view(self, name):
        tensor = self.tensors[name]
        pointer = self.pointers[tensor["uid"]]
        operand = self.operands[OPERANDS[pointer >> 40]]
        offset, rest = divmod(pointer & (2**40 - 1), ITEM_BYTES[tensor["data_type"] or self.io_type])
        assert rest == 0 and not tensor["is_virtual"]
        return torch.as_strided(operand, tensor["dim"], tensor["stride"], offset)


def softmax_scores(memory, node):
    """q·kᵀ times the scale where the mask of the node lets it pass, else -inf."""
    assert (node["left_bound"], node["right_bound"], node["diagonal_alignment"]) == (None, 0, "TOP_LEFT")
    assert not node["padding_mask"] and not node["alibi_mask"] and node["dropout_probability"] is None
    (scale,) = struct.unpack(">f", bytes.fromhex(node["attn_scale_value"]))
    q, k = (memory.view(node["inputs"][name]) for name in ("Q", "K"))
    scores = scale * q @ k.transpose(-1, -2)
    return scale, scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)


def run_forward(memory, node):
    assert node["tag"] == "SDPA_FWD" and node["generate_stats"]
    _, scores = softmax_scores(memory, node)
    memory.view(node["outputs"]["O"]).copy_(torch.softmax(scores, -1) @ memory.view(node["inputs"]["V"]))
    memory.view(node["outputs"]["Stats"]).copy_(torch.logsumexp(scores, -1, keepdim=True))


def run_backward(memory, node):
    assert node["tag"] == "SDPA_BWD" and node["is_deterministic_algorithm"]
    scale, scores = softmax_scores(memory, node)
    q, k, v, out, dout, lse = (memory.view(node["inputs"][name]) for name in ("Q", "K", "V", "O", "dO", "Stats"))
    p = torch.exp(scores - lse)
    ds = scale * p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
    memory.view(node["outputs"]["dQ"]).copy_(ds @ k)
    memory.view(node["outputs"]["dK"]).copy_(ds.transpose(-1, -2) @ q)
    memory.view(node["outputs"]["dV"]).copy_(p.transpose(-1, -2) @ dout)


def sdpa(qkv, NH):
    """PyTorch's attention of qkv (B,T,3C)."""
    q, k, v = (x.unflatten(-1, (NH, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_the_graphs_are_our_attention(program):
    """What the graphs describe, computed on our memory, is PyTorch's attention and its gradient: which bytes they read
    and write, mask, scale, statistics. Every value of the results is written."""
    for (B, T, NH, HS), forward, backward in program(90, *SHAPES, plan=False):
        C = NH * HS
        torch.manual_seed(T)
        qkv, dout = torch.randn(B, T, 3 * C, dtype=torch.float64), torch.randn(B, T, C, dtype=torch.float64)
        nan = torch.tensor(math.nan, dtype=torch.float64)
        out, lse, dqkv = nan.repeat(B, T, C), nan.repeat(B, NH, T), nan.repeat(B, T, 3 * C)
        for line in (forward, backward):
            types, (node,) = line["graph"]["context"], line["graph"]["nodes"]
            assert types["compute_data_type"] == types["intermediate_data_type"] == "FLOAT"
            assert types["io_data_type"] == "BFLOAT16"
            own = {name: tensor["data_type"] for name, tensor in line["graph"]["tensors"].items()}
            assert own.pop({**node["inputs"], **node["outputs"]}["Stats"]) == "FLOAT"
            assert set(own.values()) == {None}

        memory = Memory(forward, qkv=qkv, out=out, lse=lse)
        (node,) = forward["graph"]["nodes"]
        run_forward(memory, node)
        x = qkv.clone().requires_grad_()
        exact = sdpa(x, NH)
        # The scale is an fp32 number: 6e-8 of itself, times scores of some units.
        torch.testing.assert_close(out, exact.detach(), rtol=0, atol=1e-6)
        q, k, _ = (y.unflatten(-1, (NH, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        future = torch.ones(T, T).triu(1).bool()
        scores = (q @ k.transpose(-1, -2) / math.sqrt(HS)).masked_fill(future, -math.inf)
        torch.testing.assert_close(lse, torch.logsumexp(scores, -1), rtol=0, atol=1e-6)

        memory = Memory(backward, qkv=qkv, out=out, lse=lse, dqkv=dqkv, dout=dout)
        (node,) = backward["graph"]["nodes"]
        run_backward(memory, node)
        exact.backward(dout)
        torch.testing.assert_close(dqkv, x.grad, rtol=0, atol=1e-5)  # sums over up to 256 positions


# --- on a GPU ---------------------------------------------------------------------------------------------------------

# (maxT, V, L, NH, C, B, T)
CASES = [(64, 256, 2, 2, 128, 2, 64), (41, 331, 1, 3, 72, 3, 37), (1024, 50257, 2, 12, 768, 4, 1024)]


@pytest.mark.gpu
@pytest.mark.skipif(not _C.build_info()["cudnn"], reason="this build has no cuDNN")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_on_a_gpu(reference, case):
    """Gradients as near to fp64's as with our own attention, and the same bits again."""
    gpu()
    x, y = batch(case, seed=1)

    def gradients(cudnn):
        model = build(case, device="cuda", precision="bf16", cudnn_attention=cudnn)
        model.forward(x)
        model.backward(y)
        return {name: gradient.cpu() for name, gradient in model.gradients().items()}

    model = build(case, precision="bf16")
    exact = gradients_of(reference_model(reference, model, torch.float64), model, x, y)

    def error(gradients):
        return math.sqrt(sum(float((gradients[n][: len(exact[n])].double() - exact[n]).norm()) ** 2 for n in exact))

    first, again, flash = gradients(True), gradients(True), gradients(False)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert error(first) < 1.3 * error(flash)  # they round to bf16 at the same places, but within attention
    model = build(case, device="cuda", precision="bf16", cudnn_attention=True)
    train_step(model, x, y)
    model.forward(x[:1, :2])  # another shape: our own kernels
