"""The PyTorch reference: its weights, formula, files, data order, schedule, log and command line."""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from llmc.errors import RunError, UsageError

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_gpt2.py"
TINY = "custom:l=2,c=16,h=2,t=12,v=19"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt2_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ref = load_script()


def tiny_model(**changes: int):
    sizes = {"max_seq_len": 12, "vocab_size": 19, "num_layers": 2, "num_heads": 2, "channels": 16} | changes
    return ref.GPT(ref.GPTConfig(**sizes))


def write_shard(path: Path, tokens) -> str:
    tokens = np.asarray(tokens, dtype="<u2")
    path.write_bytes(np.array([20240520, 1, len(tokens), *[0] * 253], dtype="<i4").tobytes() + tokens.tobytes())
    return str(path)


def one_process(rank: int = 0, world_size: int = 1):
    return ref.Ranks(rank, world_size, torch.device("cpu"))


# Weights


def test_initial_weights_are_draws_in_the_stated_order() -> None:
    """One generator, seed 42: wte, wpe, then per layer qkv, attproj, fc, fcproj; projections scaled by 1/sqrt(2L)."""
    C, V, T, L = 16, 19, 12, 2
    generator = torch.Generator().manual_seed(42)
    tensors = ref.named_tensors(tiny_model())
    draws = [("wte", (V, C), 0.02), ("wpe", (T, C), 0.02)]
    for layer in range(L):
        draws += [(f"h{layer}.qkvw", (3 * C, C), 0.02), (f"h{layer}.attprojw", (C, C), 0.01)]  # 0.02 / sqrt(2·2)
        draws += [(f"h{layer}.fcw", (4 * C, C), 0.02), (f"h{layer}.fcprojw", (C, 4 * C), 0.01)]
    for name, shape, std in draws:
        torch.testing.assert_close(tensors.pop(name).data, torch.normal(0.0, std, shape, generator=generator))
    assert len(tensors) == 2 * 8 + 2  # the biases and layernorms of two layers, and the last layernorm
    for name, tensor in tensors.items():
        assert (tensor == (1.0 if re.fullmatch(r"(h\d\.)?ln.w", name) else 0.0)).all(), name


@pytest.mark.parametrize(
    "name, L, C, NH, V, prefix",
    [
        ("d12", 12, 768, 12, 50257, "gpt2_d12"),
        ("d48", 48, 1600, 25, 50257, "gpt2_d48"),
        ("chess:d8", 8, 512, 8, 72, "chess_d8"),
        ("chess:d12", 12, 768, 12, 72, "chess_d12"),
        ("custom:l=4,c=128,h=8,t=64,v=65", 4, 128, 8, 65, "custom"),
    ],
)
def test_descriptors(name: str, L: int, C: int, NH: int, V: int, prefix: str, monkeypatch) -> None:
    monkeypatch.setattr(ref, "GPT", lambda config, flash: config)  # sizes only: d48 would take 6 GB
    config, found_prefix = ref.make_model(name, False)
    T = 64 if name.startswith("custom") else 1024
    assert config == ref.GPTConfig(T, V, L, NH, C, 50304 if V == 50257 else 128)
    assert found_prefix == prefix


def test_pretrained_weights_are_transposed() -> None:
    """A state dict in Hugging Face's names and (in, out) layout gives back the model it was made of."""
    source, target = tiny_model(), tiny_model()
    names = {
        **{"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj"},
        **{"ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj", "lnf": "ln_f"},
    }
    state = {}
    for index, (name, parameter) in enumerate(source.named_parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        *path, module, kind = name.split(".")
        linear = isinstance(source.get_submodule(".".join([*path, module])), torch.nn.Linear)
        state[".".join(["transformer", *path, names.get(module, module), kind])] = (
            parameter.data.T if linear and kind == "weight" else parameter.data
        )
    ref.copy_pretrained(target, state)
    for (name, expected), actual in zip(source.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(expected, actual), name


# The formula


def formula(w: dict[str, torch.Tensor], tokens: torch.Tensor, L: int, NH: int) -> torch.Tensor:
    """GPT-2's logits in the dtype of the weights, position by position and head by head."""

    def layernorm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}w"] + w[f"{name}b"]

    def linear(x, name):
        return x @ w[f"{name}w"].T + w[f"{name}b"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    rows = []
    for row in tokens:
        x = w["wte"][row] + w["wpe"][: len(row)]
        for layer in range(L):
            qkv = linear(layernorm(x, f"h{layer}.ln1"), f"h{layer}.qkv")
            T, C = x.shape
            HS = C // NH
            mixed = torch.zeros_like(x)
            for head, t in itertools.product(range(NH), range(T)):
                q, k, v = (qkv[:, part * C + head * HS : part * C + (head + 1) * HS] for part in range(3))
                weights = ((k[: t + 1] @ q[t]) / math.sqrt(HS)).exp()
                mixed[t, head * HS : (head + 1) * HS] = (weights / weights.sum()) @ v[: t + 1]
            x = x + linear(mixed, f"h{layer}.attproj")
            x = x + linear(gelu(linear(layernorm(x, f"h{layer}.ln2"), f"h{layer}.fc")), f"h{layer}.fcproj")
        rows.append(layernorm(x, "lnf") @ w["wte"].T)
    return torch.stack(rows)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(
    "seed, B, T, sizes", [(0, 1, 1, {}), (1, 3, 7, {}), (2, 2, 12, {"num_layers": 1, "channels": 24})]
)
def test_forward_and_backward_follow_the_formula(flash: bool, seed: int, B: int, T: int, sizes: dict[str, int]) -> None:
    model = tiny_model(num_heads=4, **sizes).double()
    model.flash = flash
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # large random weights, so that every term of the formula shows
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x, y = torch.randint(0, 19, (2, B, T), generator=generator)

    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in ref.named_tensors(model).items()}
    expected_logits = formula(weights, x, model.config.num_layers, 4)
    log_probabilities = expected_logits - expected_logits.exp().sum(-1, keepdim=True).log()
    expected_loss = -log_probabilities.gather(2, y[:, :, None]).mean()
    expected_loss.backward()

    logits, loss = model(x, y)
    loss.backward()
    # Both sides are float64; but the loss is taken in fp32 (24 bits, 6e-8 relative) and so are gradients through it.
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for name, tensor in ref.named_tensors(model).items():
        difference = (tensor.grad - weights[name].grad).norm() / weights[name].grad.norm().clamp(min=1e-3)
        assert difference < 1e-5, name


# Files


def test_model_files(tmp_path: Path) -> None:
    model = tiny_model()
    ref.write_model(tmp_path / "m.bin", model, "fp32")
    ref.write_model(tmp_path / "m_bf16.bin", model, "bf16")
    header = np.fromfile(tmp_path / "m.bin", "<i4", 256)
    assert list(header[:9]) == [20240326, 3, 12, 19, 2, 2, 16, 128, 0]
    values = np.fromfile(tmp_path / "m.bin", "<f4", offset=1024)
    assert len(values) == 128 * 16 + 12 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    wte = values[: 128 * 16].reshape(128, 16)
    np.testing.assert_array_equal(wte[:19], model.wte.weight.detach().numpy())
    assert not wte[19:].any()
    # qkvw comes after wte, wpe, ln1w, ln1b, both layers together
    offset = 128 * 16 + 12 * 16 + 2 * 2 * 16
    qkv = values[offset : offset + 2 * 48 * 16].reshape(2, 48, 16)
    np.testing.assert_array_equal(qkv[1], model.h[1].qkv.weight.detach().numpy())

    half = np.fromfile(tmp_path / "m_bf16.bin", "<u2", offset=1024)
    assert np.fromfile(tmp_path / "m_bf16.bin", "<i4", 2)[1] == 5
    widened = (half.astype(np.uint32) << 16).view(np.float32)
    assert len(half) == len(values)
    np.testing.assert_allclose(widened, values, rtol=2.0**-8)  # bf16 has 8 significant bits

    for name in ("m.bin", "m_bf16.bin"):
        loaded = ref.load_model_file(str(tmp_path / name))
        assert loaded.config == model.config
        for expected, actual in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(expected if name == "m.bin" else expected.bfloat16().float(), actual)


SIZES = (12, 19, 2, 2, 16, 128)  # T, V, L, NH, C, Vp: 8,832 parameters


@pytest.mark.parametrize(
    "header, size, message",
    [
        ((), 0, "is not a model file of version 3 or 5: it begins with 0, 0"),
        ((20240520, 1, 5), 1034, "is not a model file of version 3 or 5: it begins with 20240520, 1"),
        ((20240326, 4, *SIZES), 1024, "it begins with 20240326, 4"),
        ((20240326, 3, *SIZES), 36351, "is damaged: its header promises 36352 bytes, but it has 36351"),
        ((20240326, 5, *SIZES), 36352, "is damaged: its header promises 18688 bytes, but it has 36352"),
        ((20240326, 3, 12, 19, 2, 3, 16, 128), 1024, "is damaged: its header says T=12 V=19 L=2 NH=3 C=16 Vp=128"),
        ((20240326, 3, 12, 19, 2, 0, 16, 128), 1024, "is damaged: its header says .* NH=0"),
        ((20240326, 3, 12, 19, -2, 2, 16, 128), 1024, "is damaged: its header says .* L=-2"),
        ((20240326, 3, 12, 129, 2, 2, 16, 128), 1024, "is damaged: its header says .* V=129 .* Vp=128"),
    ],
)
def test_bad_model_file(tmp_path: Path, header: tuple[int, ...], size: int, message: str) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(np.array([*header, *[0] * 256], "<i4").tobytes()[:1024].ljust(size, b"\0")[:size])
    with pytest.raises(RunError, match=message) as error:
        ref.load_model_file(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_debug_state(tmp_path: Path) -> None:
    model = tiny_model()
    x, y = torch.randint(0, 19, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    ref.write_debug_state(tmp_path / "d.bin", model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())
    raw = (tmp_path / "d.bin").read_bytes()
    N = 128 * 16 + 12 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert len(raw) == 1024 + 8 * 3 * 5 + 4 * 3 * 5 * 19 + 4 + 4 * N
    assert list(np.frombuffer(raw, "<i4", 5)) == [20240327, 2, 3, 5, 0]
    tokens = np.frombuffer(raw, "<i4", 2 * 15, 1024).reshape(2, 3, 5)
    np.testing.assert_array_equal(tokens, np.stack([x.numpy(), y.numpy()]))
    floats = np.frombuffer(raw, "<f4", offset=1024 + 8 * 15)

    logits, loss = model(x, y)
    loss.backward()
    np.testing.assert_array_equal(floats[: 15 * 19].reshape(3, 5, 19), logits.detach().numpy())
    assert floats[15 * 19] == loss.item()
    gradients = floats[15 * 19 + 1 :]
    wte = gradients[: 128 * 16].reshape(128, 16)
    np.testing.assert_array_equal(wte[:19], model.wte.weight.grad.numpy())
    assert not wte[19:].any()
    np.testing.assert_array_equal(gradients[-32:-16], model.lnf.weight.grad.numpy())
    np.testing.assert_array_equal(gradients[-16:], model.lnf.bias.grad.numpy())


# Tokens


def test_loader_order_over_two_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "b_1.bin", range(100, 113))  # 13 tokens: exactly two samples of 6 and the look-ahead
    write_shard(tmp_path / "b_0.bin", range(18))  # 18 tokens: two samples, the third lacks its look-ahead token
    loader = ref.TokenLoader("--input_bin", str(tmp_path / "b_*.bin"), 2, 3, one_process(), 200)
    assert loader.num_tokens == 31
    starts = []
    for _ in range(6):
        x, y = loader.next_batch()
        assert x.dtype == torch.int64 and x.shape == y.shape == (2, 3)
        assert x.flatten().tolist() == list(range(int(x[0, 0]), int(x[0, 0]) + 6))
        assert torch.equal(y, x + 1)
        starts.append(int(x[0, 0]))
    assert starts == [0, 6, 100, 106, 0, 6]
    loader.reset()
    assert loader.next_batch()[0][0, 0] == 0


def test_ranks_change_shard_together(tmp_path: Path) -> None:
    """With 20 tokens rank 1's second part would not fit behind its own offset, but rank 0's position decides."""
    write_shard(tmp_path / "a.bin", range(20))
    write_shard(tmp_path / "b.bin", range(100, 120))
    loaders = [ref.TokenLoader("", str(tmp_path / "*.bin"), 1, 4, one_process(rank, 2), 200) for rank in range(2)]
    starts = [[int(loader.next_batch()[0][0, 0]) for _ in range(5)] for loader in loaders]
    assert starts == [[0, 8, 100, 108, 0], [4, 12, 104, 112, 4]]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a token shard of version 1: it begins with 0, 0"),
        (np.array([20240520, 2, 40, *[0] * 273], "<i4").tobytes(), "is not a token shard of version 1"),
        (np.array([20240520, 1, 0, *[0] * 253], "<i4").tobytes(), "is damaged: its header says 0 tokens"),
        (np.array([20240520, 1, 40, *[0] * 272], "<i4").tobytes(), "is damaged: .* 1104 bytes, but it has 1100"),
        (np.array([20240520, 1, 40, *[0] * 274], "<i4").tobytes(), "is damaged: .* 1104 bytes, but it has 1108"),
        (np.array([20240520, 1, 6, *[0] * 256], "<i4").tobytes(), "has 6 tokens, one batch of all processes needs 7"),
    ],
)
def test_bad_shard(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        ref.TokenLoader("--input_bin", str(tmp_path / "t.bin"), 2, 3, one_process(), 200)
    assert str(tmp_path / "t.bin") in str(error.value)


# Training


def test_learning_rate_table() -> None:
    """Peak 1, two warm-up steps, then cosine from 1 to 0.2 over eight: 0.2 + 0.4·(1 + cos(pi·k/8))."""
    expected = [0.5, 1.0, 1.0, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448]
    actual = [ref.learning_rate(step, 10, 1.0, 2, 0.2) for step in range(10)]
    np.testing.assert_allclose(actual, expected, atol=5e-7)  # the table has six digits
    assert [ref.learning_rate(step, 10, 3e-4, 0, 1.0) for step in range(10)] == [3e-4] * 10


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return write_shard(tmp_path / "tokens.bin", np.random.default_rng(3).integers(0, 19, 400))


BASE = "--device cpu --batch_size 2 --sequence_length 8 --total_batch_size 32 --learning_rate 1e-2"


def run_script(*arguments: str) -> None:
    ref.train([*BASE.split(), "--model", TINY, *arguments])


STEP = re.compile(
    r"step +(\d+)/(\d+) \| train loss (\d+\.\d{6}) \| norm (\d+\.\d{4}) \| lr (\d\.\d\de[+-]\d\d) "
    r"\| \((\d+\.\d\d) ms \| (\d+) tok/s\)"
)


def steps_of(output: str) -> list[re.Match]:
    return [match for line in output.splitlines() if (match := STEP.fullmatch(line))]


def test_ten_steps(shard: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "main.log").write_text("an older run\n")
    run_script("--input_bin", shard, "--output_dir", str(out))
    output = capsys.readouterr().out
    steps = steps_of(output)
    assert [(step[1], step[2], step[5]) for step in steps] == [(str(k), "10", "1.00e-02") for k in range(1, 11)]
    losses = [float(step[3]) for step in steps]
    assert abs(losses[0] - math.log(19)) < 0.1  # new weights know nothing
    assert losses[-1] < losses[0] - 0.5
    assert (out / "main.log").read_text().splitlines() == [f"s:{k} trl:{step[3]}" for k, step in enumerate(steps)]
    assert re.search(r"^final 9 iters avg: \d+\.\d{3}ms\npeak memory consumption: 0 MiB$", output, re.MULTILINE)
    assert sorted(path.name for path in out.iterdir()) == [
        "custom.bin",
        "custom_bf16.bin",
        "custom_debug_state.bin",
        "main.log",
    ]
    # The debug state is of the first micro-batch, before any update.
    tokens = np.fromfile(out / "custom_debug_state.bin", "<i4", 16, offset=1024)
    np.testing.assert_array_equal(tokens, np.fromfile(shard, "<u2", 16, offset=1024))


def test_steps_are_adamw_with_accumulation_and_clipping(shard: str, tmp_path: Path, capsys) -> None:
    """Three steps by hand: two micro-batches of 2x8 are one batch of 4x8; textbook AdamW with decay on matrices.

    The files of --write_tensors take a batch of their own, after which training starts with the first.
    """
    flags = "--overfit_single_batch 0 --num_iterations 3 --weight_decay 0.1 --grad_clip 0.5 --warmup_iters 2"
    run_script("--input_bin", shard, "--output_dir", str(tmp_path), *flags.split())
    steps = steps_of(capsys.readouterr().out)

    model = tiny_model()
    tokens = torch.from_numpy(np.fromfile(shard, "<u2", offset=1024).astype(np.int64))
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for t, step in enumerate(steps, start=1):
        begin = (t - 1) * 32
        _, loss = model(tokens[begin : begin + 32].view(4, 8), tokens[begin + 1 : begin + 33].view(4, 8))
        model.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        lr = (5e-3, 1e-2, 1e-2)[t - 1]
        # Printed digits, and fp32 sums in another order: a few units of 1e-7 times a norm of 1 or less.
        assert float(step[3]) == pytest.approx(loss.item(), abs=3e-6)
        assert float(step[4]) == pytest.approx(norm.item(), abs=1e-4)
        assert float(step[5]) == lr
        for name, p in model.named_parameters():
            g = p.grad * min(1.0, 0.5 / norm.item())
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            update = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            p.data -= lr * (update + (0.1 if p.dim() == 2 else 0.0) * p.data)


def test_two_processes_compute_what_one_does(shard: str, tmp_path: Path, capsys) -> None:
    """Both passes of one process with accumulation are the two ranks' passes here; the optimizer state is sharded."""
    flags = (
        f"--input_bin {shard} --overfit_single_batch 0 --num_iterations 3 --input_val_bin {shard} --val_loss_every 3"
    )
    run_script(*flags.split(), *f"--val_max_steps 4 --output_dir {tmp_path / 'one'}".split())
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 {SCRIPT} {BASE} --model {TINY}"
    result = subprocess.run(
        f"{launch} {flags} --val_max_steps 2 --output_dir {tmp_path / 'two'} --zero_stage 1".split(),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    one, two = ((tmp_path / name / "main.log").read_text() for name in ("one", "two"))
    number = r"\d\.\d{6}"
    assert re.sub(number, "", one) == re.sub(number, "", two)
    # fp32 sums in another order
    np.testing.assert_allclose(*([float(x) for x in re.findall(number, text)] for text in (one, two)), atol=3e-6)


def test_gpt2_vocabulary(shard: str, tmp_path: Path, capsys) -> None:
    flags = "--model custom:l=1,c=8,h=1,t=12,v=50257 --num_iterations 1 --sample_every 1"
    run_script("--input_bin", shard, "--output_dir", str(tmp_path), *flags.split())
    raw = (tmp_path / "gpt2_tokenizer.bin").read_bytes()
    assert list(np.frombuffer(raw, "<i4", 5)) == [20240328, 2, 50257, 50256, 0]
    assert raw[1024:1028] == b'\x01!\x01"'  # tokens 0 and 1
    assert raw.endswith(b"\x0d<|endoftext|>")
    samples = re.findall(r"-{15}\n(.*?)\n-{15}\n", capsys.readouterr().out, re.DOTALL)
    assert len(samples) == 2
    assert re.search("[a-z]{3}", samples[0])  # text, not numbers


def test_validation_and_sampling(shard: str, tmp_path: Path, capsys) -> None:
    flags = (
        "--val_loss_every 2 --val_max_steps 3 --sample_every 2 --num_iterations 3 --learning_rate 0 --write_tensors 0"
    )
    run_script("--input_bin", shard, "--input_val_bin", shard, "--output_dir", str(tmp_path), *flags.split())
    output = capsys.readouterr().out
    streams = [re.match(r"s:(\d+) (te|tr)l:", line).groups() for line in (tmp_path / "main.log").open()]
    assert streams == [("0", "te"), ("0", "tr"), ("1", "tr"), ("2", "te"), ("2", "tr"), ("3", "te")]
    # Three batches of 2x8 of an untrained model
    tokens = torch.from_numpy(np.fromfile(shard, "<u2", offset=1024).astype(np.int64))
    expected = tiny_model()(tokens[:48].view(6, 8), tokens[1:49].view(6, 8))[1].item()
    printed = [float(value) for value in re.findall(r"^val loss (\d\.\d{6})$", output, re.MULTILINE)]
    assert printed == pytest.approx([expected] * 3, abs=2e-6)  # six digits; the rate is 0, the batches are the same
    samples = re.findall(r"-{15}\n(.*)\n-{15}\n", output)
    assert len(samples) == 3
    assert all(0 <= int(token) < 19 for token in samples[0].split()) and len(samples[0].split()) == 32


def test_generate_draws_from_the_likeliest() -> None:
    model = tiny_model()
    expected = [3]
    for _ in range(5):
        x = torch.tensor([expected])
        expected.append(int(model(x, x)[0][0, -1].argmax()))
    assert model.generate(3, 5, top_k=1, generator=torch.Generator()) == expected[1:]
    drawn = [
        model.generate(3, 1, top_k=top_k, generator=torch.Generator().manual_seed(i))[0]
        for top_k in (4, None)
        for i in range(100)
    ]
    likeliest = set(model(torch.tensor([[3]]))[0][0, -1].topk(4).indices.tolist())
    assert set(drawn[:100]) == likeliest
    assert set(drawn[100:]) > likeliest


def test_inference_only_changes_nothing(shard: str, tmp_path: Path, capsys) -> None:
    run_script("--input_bin", shard, "--inference_only", "1", "--num_iterations", "2", "--output_dir", str(tmp_path))
    first, second = steps_of(capsys.readouterr().out)
    assert first[3] == second[3]
    assert not list(tmp_path.glob("custom*"))


def test_zero_iterations_only_validate(shard: str, capsys) -> None:
    flags = "--num_iterations 0 --val_loss_every 5 --write_tensors 0"
    run_script("--input_bin", shard, "--input_val_bin", shard, *flags.split())
    output = capsys.readouterr().out
    assert output.count("val loss") == 1
    assert not steps_of(output)


def test_max_seconds(shard: str, capsys, monkeypatch) -> None:
    """Every step takes 2 s by this clock: 5 s are over at the third step; the schedule is that of all 100."""
    clock = itertools.count(step=2.0)
    monkeypatch.setattr(ref, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    flags = "--num_iterations 100 --max_seconds 5 --learning_rate_decay_frac 0 --val_loss_every 50 --write_tensors 0"
    run_script("--input_bin", shard, "--input_val_bin", shard, *flags.split())
    output = capsys.readouterr().out
    steps = steps_of(output)
    assert [step[1] for step in steps] == ["1", "2", "3"]
    assert steps[2][5] == f"{0.5e-2 * (1 + math.cos(math.pi * 2 / 100)):.2e}"
    assert output.count("val loss") == 2  # at the start and at the end


def test_model_file_gives_the_weights_and_is_not_written_again(shard: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(num_layers=1)
    model.lnf.weight.data.fill_(0.0)  # logits 0: the loss of these weights is exactly log 19
    ref.write_model("mine_bf16.bin", model, "bf16")
    before = Path("mine_bf16.bin").read_bytes()
    run_script("--input_bin", shard, "--num_iterations", "1", "--model", "mine_bf16.bin")
    assert float(steps_of(capsys.readouterr().out)[0][3]) == pytest.approx(math.log(19), abs=1e-6)
    assert Path("mine_bf16.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine_bf16.bin",
        "mine_bf16_debug_state.bin",
        "tokens.bin",
    ]


def test_pretrained_weights_become_model_files(shard: str, tmp_path: Path, monkeypatch) -> None:
    """`--model gpt2 --num_iterations 0` only writes files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ref.GPT2_DEPTHS, 12, (8, 1))
    monkeypatch.setattr(ref, "fetch_pretrained", lambda name: {})
    monkeypatch.setattr(ref, "copy_pretrained", lambda model, weights: model.lnf.bias.data.fill_(3.0))
    ref.train(["--model", "gpt2", "--num_iterations", "0", "--input_bin", shard, "--device", "cpu"])
    raw = (tmp_path / "gpt2_124M_bf16.bin").read_bytes()
    assert list(np.frombuffer(raw, "<i4", 8)) == [20240326, 5, 1024, 50257, 12, 1, 8, 50304]
    assert np.frombuffer(raw[-16:], "<u2").tolist() == [0x4040] * 8  # 3.0 in bf16


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "big.bin", [*range(19), 19, *range(15)])
    with pytest.raises(RunError, match=r"big\.bin has token 19, but the model's vocabulary has 19 tokens"):
        run_script("--input_bin", shard, "--num_iterations", "1", "--write_tensors", "0")


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--batch_size x", "argument --batch_size: invalid int value: 'x'"),
        ("--batch_size 0", "argument --batch_size: 0 must be at least 1"),
        ("--sequence_length 0", "argument --sequence_length: 0 must be at least 1"),
        ("--sequence_length 16", "--sequence_length 16 is longer than the model's context of 12"),
        ("--total_batch_size 40", r"--total_batch_size 40 must be a multiple of 16 \(--batch_size 2 x"),
        ("--num_iterations -1", "argument --num_iterations: -1 must be at least 0"),
        ("--max_seconds -1", "argument --max_seconds: -1 must be at least 0"),
        ("--learning_rate nan", "argument --learning_rate: nan must be at least 0"),
        ("--learning_rate inf", "argument --learning_rate: inf must be"),
        ("--learning_rate_decay_frac 1.5", "--learning_rate_decay_frac: 1.5 must be at least 0 and at most 1"),
        ("--grad_clip 0", "argument --grad_clip: 0 must be more than 0"),
        ("--flash 2", "argument --flash: 2 must be at least 0 and at most 1"),
        ("--zero_stage 3", "argument --zero_stage: 3 must be at least 0 and at most 1"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--device toaster", "--device toaster: unknown device; use one of .*cpu"),
        ("--device meta", "--device meta: not available here; use one of .*cpu"),
        ("--batch 3", "unrecognized arguments: --batch 3"),
        ("--val_loss_every 5", "--val_loss_every 5 needs --input_val_bin"),
        ("--model d13", "--model d13: the depth must be one of 6, 12, 24, 36, 48, 60, 72, 84"),
        ("--model d8", "--model d8: the depth must be one of"),
        ("--model gpt5", "--model gpt5: unknown model; use gpt2"),
        ("--model custom:l=2,c=16,h=2,t=12", "give each of l, c, h, t, v once"),
        ("--model custom:l=2,c=16,h=2,t=12,v=19,v=20", "give each of l, c, h, t, v once"),
        ("--model custom:l=0,c=16,h=2,t=12,v=19", "give each of l, c, h, t, v once"),
        ("--model custom:l=2,c=16,h=3,t=12,v=19", "3 heads do not divide 16 channels"),
    ],
)
def test_usage_errors(shard: str, arguments: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        run_script("--input_bin", shard, "--write_tensors", "0", *arguments.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--input_bin none_*.bin", r"--input_bin none_\*\.bin: no such file"),
        ("--val_loss_every 1 --input_val_bin none.bin", r"--input_val_bin none\.bin: no such file"),
        ("--model none.bin", r"cannot read none\.bin: No such file"),
        ("--model gpt2-xl", "--model gpt2-xl needs the transformers package"),
    ],
)
def test_run_errors(shard: str, arguments: str, message: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(RunError, match=message) as error:
        run_script("--input_bin", shard, "--write_tensors", "0", *arguments.split())
    assert "\n" not in str(error.value)


def test_pretrained_weights_without_network(monkeypatch) -> None:
    def from_pretrained(name: str):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection.")

    model = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(GPT2LMHeadModel=model))
    with pytest.raises(RunError, match="--model gpt2: cannot fetch the weights") as error:
        ref.fetch_pretrained("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, status", [(["--flash", "7"], 2), (["--model", TINY, "--input_bin", "none"], 1)])
def test_exit_status_and_one_line(arguments: list[str], status: int, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train_gpt2.py", "--sequence_length", "12", "--total_batch_size", "48", *arguments]
    )
    with pytest.raises(SystemExit) as error:
        ref.main()
    assert error.value.code == status
    stderr = capsys.readouterr().err
    assert stderr.startswith("train_gpt2.py: error: ") and stderr.count("\n") == 1


def test_help_names_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        ref.parse(["--help"])
    assert error.value.code == 0
    flags = (
        "input_bin input_val_bin output_dir model batch_size sequence_length total_batch_size num_iterations "
        "inference_only learning_rate warmup_iters learning_rate_decay_frac weight_decay grad_clip val_loss_every "
        "val_max_steps sample_every overfit_single_batch tensorcores device compile flash dtype zero_stage "
        "write_tensors max_seconds"
    )
    found = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(found) == sorted(flags.split())


def test_defaults() -> None:
    """llm.c's defaults."""
    assert vars(ref.parse([])) == {
        "input_bin": "dev/data/tinyshakespeare/tiny_shakespeare_val.bin",
        "input_val_bin": "",
        "output_dir": "",
        "model": "gpt2",
        "batch_size": 4,
        "sequence_length": 64,
        "total_batch_size": 256,
        "num_iterations": 10,
        "inference_only": 0,
        "learning_rate": 1e-4,
        "warmup_iters": 0,
        "learning_rate_decay_frac": 1.0,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "val_loss_every": 0,
        "val_max_steps": 20,
        "sample_every": 0,
        "overfit_single_batch": 1,
        "tensorcores": 0,
        "device": "",
        "compile": 0,
        "flash": 0,
        "dtype": "float32",
        "zero_stage": 0,
        "write_tensors": 1,
        "max_seconds": 0,
    }
