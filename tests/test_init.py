"""llmc-init: files against torch's own draws and bytes by hand, and every way it refuses."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc import init_model
from llmc.cli import run
from llmc.cli.init import _main
from llmc.config import TrainConfig
from llmc.models import DESCRIPTORS
from llmc.tokenizer import gpt2, write_tokenizer

SMALL = "custom:l=2,c=16,h=2,t=24,v=65"
SMALL_FILE = "custom_l2_c16_h2_t24_v65_bf16.bin"
SMALL_SIZES = (24, 65, 2, 2, 16, 128)  # T, V, L, NH, C, padded V: as in the header


def call(*arguments: object) -> None:
    run("llmc-init", _main, [str(argument) for argument in arguments])


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Expect failure with this status and one line, and no change of any file; return the line."""
    before = contents()
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == status
    assert out == "" and err.startswith("llmc-init: error: ") and err.count("\n") == 1
    assert contents() == before
    return err.removeprefix("llmc-init: error: ").strip()


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn_by_torch(T: int, V: int, L: int, NH: int, C: int, padded_V: int, seed: int) -> torch.Tensor:
    """Every value of the file in its order, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 0.02) -> torch.Tensor:
        return torch.empty(size).normal_(0, std, generator=generator)

    wte = torch.cat([normal(V, C), torch.zeros(padded_V - V, C)])
    wpe = normal(T, C)
    residual = 0.02 / math.sqrt(2 * L)
    layers = [
        (normal(3 * C, C), normal(C, C, std=residual), normal(4 * C, C), normal(C, 4 * C, std=residual))
        for _ in range(L)
    ]
    qkvw, attprojw, fcw, fcprojw = (torch.stack(weights) for weights in zip(*layers, strict=True))
    ones, zeros = torch.ones(L, C), torch.zeros
    tensors = [
        *(wte, wpe, ones, zeros(L, C), qkvw, zeros(L, 3 * C), attprojw, zeros(L, C)),
        *(ones, zeros(L, C), fcw, zeros(L, 4 * C), fcprojw, zeros(L, C), ones[0], zeros(C)),
    ]
    return torch.cat([tensor.flatten() for tensor in tensors])


def check_header(raw: bytes, version: int, T: int, V: int, L: int, NH: int, C: int, padded_V: int) -> None:
    slots = struct.pack("<8i", 20240326, version, T, V, L, NH, C, padded_V)
    assert raw[:160] + raw[168:1024] == slots + bytes(984)  # between them the checksum: tests/test_checksum.py


def check_bf16(raw: bytes, expected: torch.Tensor) -> None:
    """The draws differ by up to 5.4e-8 and may then round to the neighbour. Steps of values near 0.02 are 1.2e-4."""
    bits = torch.from_numpy(np.frombuffer(raw, "<i2", offset=1024).astype(np.int32))
    steps = (bits - expected.to(torch.bfloat16).view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 1e-3


def chess_tokenizer() -> bytes:
    tokens = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unknown|>"]
    tokens += [f"{'abcdefgh'[i % 8]}{i // 8 + 1}" for i in range(64)] + ["Q", "B", "R", "N"]
    body = b"".join(bytes([len(token)]) + token.encode() for token in tokens)
    return struct.pack("<4I", 20240328, 2, 72, 2) + bytes(1008) + body


def test_chess(capsys: pytest.CaptureFixture[str]) -> None:
    call("chess:d8")
    assert names() == ["chessGPT_d8_bf16.bin", "chessGPT_tokenizer.bin"]
    assert Path(TrainConfig().model).exists()  # what llmc-train starts from without -e
    raw = Path("chessGPT_d8_bf16.bin").read_bytes()
    sizes = (1024, 72, 8, 8, 512, 128)
    check_header(raw, 5, *sizes)
    check_bf16(raw, drawn_by_torch(*sizes, seed=42))
    tokenizer = chess_tokenizer()
    assert Path("chessGPT_tokenizer.bin").read_bytes() == tokenizer
    assert capsys.readouterr().out.splitlines() == [
        "chessGPT_d8_bf16.bin: 8 layers, 512 channels, 8 heads, context 1024, vocabulary 72, "
        "25,809,920 parameters in bf16, 51,620,864 bytes",
        f"chessGPT_tokenizer.bin: vocabulary of 72 tokens, {len(tokenizer):,} bytes",
    ]


def test_small_model_in_fp32() -> None:
    call(SMALL, "--precision", "fp32", "--seed", 7)
    raw = Path("custom_l2_c16_h2_t24_v65.bin").read_bytes()
    check_header(raw, 3, *SMALL_SIZES)
    values = torch.from_numpy(np.frombuffer(raw, "<f4", offset=1024).copy())
    # The draws' log, sin and cos differ in the last bits: 5.4e-8 at a standard deviation of 0.02.
    torch.testing.assert_close(values, drawn_by_torch(*SMALL_SIZES, seed=7), rtol=0, atol=5.4e-8)


def test_small_model_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    call("custom:v=65,t=24,h=2,c=16,l=2")  # the name does not depend on the order
    assert names() == [SMALL_FILE]
    raw = Path(SMALL_FILE).read_bytes()
    check_header(raw, 5, *SMALL_SIZES)
    check_bf16(raw, drawn_by_torch(*SMALL_SIZES, seed=42))
    assert capsys.readouterr().out.splitlines()[1] == (
        "no tokenizer is known for a vocabulary of 65 tokens: "
        "give its file with --tokenizer, or copy it to tokenizer.bin"
    )


def test_seeds() -> None:
    for name, seed in (("a.bin", 1), ("b.bin", 1), ("c.bin", 2), ("last.bin", 2**32 - 1)):
        call(SMALL, "--out", name, "--seed", seed)
    a, b, c, last = (Path(f"{name}.bin").read_bytes() for name in ("a", "b", "c", "last"))
    assert a == b and a != c and last not in (a, c)


@pytest.mark.parametrize(
    ("descriptor", "precision", "model", "tokenizer"),
    [
        ("d12", "bf16", "gpt2_d12_bf16.bin", "gpt2_tokenizer.bin"),
        ("gpt2:d12", "bf16", "gpt2_d12_bf16.bin", "gpt2_tokenizer.bin"),
        ("d12", "fp32", "gpt2_d12.bin", "gpt2_tokenizer.bin"),
        ("gpt3:c768", "bf16", "gpt3_c768_bf16.bin", "gpt2_tokenizer.bin"),
        ("chess:d12", "fp32", "chessGPT_d12.bin", "chessGPT_tokenizer.bin"),
        ("custom:l=1,c=8,h=1,t=4,v=72", "bf16", "custom_l1_c8_h1_t4_v72_bf16.bin", "chessGPT_tokenizer.bin"),
    ],
)
def test_default_names(
    monkeypatch: pytest.MonkeyPatch, descriptor: str, precision: str, model: str, tokenizer: str
) -> None:
    """Without the weights, which are hundreds of megabytes."""

    class Weights:
        def parameters(self) -> None:
            pass

    monkeypatch.setattr(init_model, "random_model", lambda *_: Weights())
    monkeypatch.setattr(init_model, "save_model", lambda path, *_: path.write_bytes(b""))
    call(descriptor, "--precision", precision)
    assert names() == sorted([model, tokenizer])


def test_gpt2s_tokenizer_beside_another_directory(capsys: pytest.CaptureFixture[str]) -> None:
    Path("models").mkdir()
    write_tokenizer("expected.bin", gpt2().token_bytes(), 50256)
    for name in ("one", "two"):
        call("custom:l=1,c=8,h=1,t=4,v=50257", "--out", f"models/{name}.bin")
        assert Path("models/gpt2_tokenizer.bin").read_bytes() == Path("expected.bin").read_bytes()
    said = [line for line in capsys.readouterr().out.splitlines() if "tokenizer" in line]
    size = Path("expected.bin").stat().st_size
    assert said == [
        f"models/gpt2_tokenizer.bin: vocabulary of 50,257 tokens, {size:,} bytes",
        "models/gpt2_tokenizer.bin: vocabulary of 50,257 tokens (was there already)",
    ]


def test_a_tokenizer_gives_the_vocabulary_and_is_copied() -> None:
    Path("data").mkdir()
    write_tokenizer("data/tokenizer.bin", [b"<|endoftext|>", b"a", b"b"], 0)
    for descriptor in ("custom:l=1,c=8,h=1,t=4", "custom:l=2,c=8,h=1,t=4,v=3"):
        call(descriptor, "--tokenizer", "data/tokenizer.bin")
    assert names() == ["custom_l1_c8_h1_t4_v3_bf16.bin", "custom_l2_c8_h1_t4_v3_bf16.bin", "data", "tokenizer.bin"]
    assert Path("tokenizer.bin").read_bytes() == Path("data/tokenizer.bin").read_bytes()
    check_header(Path("custom_l1_c8_h1_t4_v3_bf16.bin").read_bytes(), 5, 4, 3, 1, 1, 8, 128)


def test_a_tokenizer_of_chess_size_is_not_taken_for_chess() -> None:
    write_tokenizer("72.bin", [b"x"] * 72, 1)
    call("custom:l=1,c=8,h=1,t=4", "--tokenizer", "72.bin")
    assert names() == ["72.bin", "custom_l1_c8_h1_t4_v72_bf16.bin", "tokenizer.bin"]
    assert Path("tokenizer.bin").read_bytes() == Path("72.bin").read_bytes()


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DESCRIPTOR (see llmc-init --help)"),
        (["d13"], "d13 is no model: use one of dN or gpt2:dN with N = 6, 12, 24, 36, 48, 60, 72, 84; gpt3:cN"),
        (["model.bin"], "model.bin is no model: use one of dN"),
        (["custom:l=2,c=16,h=2,v=65"], "custom:l=2,c=16,h=2,v=65: t= is missing, write it like custom:l=4"),
        (["custom:l=2,c=16,h=2,t=24,v=0"], "custom:l=2,c=16,h=2,t=24,v=0: 'v=0' is not understood"),
        (
            ["custom:l=2,c=16,h=2,t=24"],
            "custom:l=2,c=16,h=2,t=24 has no vocabulary size: add ,v=SIZE or give a tokenizer file with --tokenizer",
        ),
        ([SMALL, "--out", "model.pt"], "--out model.pt: the name of a model file ends in .bin, such as model.bin"),
        ([SMALL, "--out", ""], "--out .: the name of a model file ends in .bin, such as model.bin"),
        ([SMALL, "--out", "tokenizer.bin"], "--out tokenizer.bin is the name of the tokenizer file: choose another"),
        (["chess:d8", "--out", "chessGPT_tokenizer.bin"], "--out chessGPT_tokenizer.bin is the name of the tokenizer"),
        ([SMALL, "--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        ([SMALL, "--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 4294967295, such as 42"),
        ([SMALL, "--seed", str(2**32)], "argument --seed: '4294967296' is not a whole number"),
        ([SMALL, "--seed", "x"], "argument --seed: 'x' is not a whole number"),
        ([SMALL, "more"], "unrecognized arguments: more (see llmc-init --help)"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert refuse(capsys, 2, *arguments).startswith(message)


def test_a_model_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path(SMALL_FILE).write_bytes(b"trained for weeks")
    message = f"{SMALL_FILE} exists: remove it or choose another name with --out"
    assert refuse(capsys, 1, SMALL) == message
    assert refuse(capsys, 1, SMALL, "--out", SMALL_FILE) == message


@pytest.mark.parametrize("other", ["damaged", "other tokens", "other end of text"])
def test_a_tokenizer_is_not_overwritten(capsys: pytest.CaptureFixture[str], other: str) -> None:
    write_tokenizer("mine.bin", [b"<|endoftext|>", b"a"], 0)
    if other == "damaged":
        Path("tokenizer.bin").write_bytes(b"x")
    else:
        write_tokenizer("tokenizer.bin", [b"<|endoftext|>", b"b" if other == "other tokens" else b"a"], 1)
    line = refuse(capsys, 1, "custom:l=1,c=8,h=1,t=4", "--tokenizer", "mine.bin")
    fix = "remove it or choose another directory with --out"
    assert line == f"tokenizer.bin exists and is not the tokenizer of this model: {fix}"


def test_bad_tokenizers(capsys: pytest.CaptureFixture[str]) -> None:
    line = refuse(capsys, 1, SMALL, "--tokenizer", "absent.bin")
    assert line == "cannot read tokenizer absent.bin: No such file or directory"
    Path("short.bin").write_bytes(b"x")
    assert refuse(capsys, 1, SMALL, "--tokenizer", "short.bin").startswith("short.bin is not a tokenizer: it has 1")
    write_tokenizer("two.bin", [b"a", b"b"], 0)
    for descriptor, size in ((SMALL, 65), ("chess:d8", 72)):
        assert refuse(capsys, 1, descriptor, "--tokenizer", "two.bin") == (
            f"--tokenizer two.bin has 2 tokens, the model {descriptor} {size}: "
            f"give a tokenizer of {size} tokens or another model"
        )


def test_places_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_bytes(b"")
    for folder in ("absent", "file"):
        line = refuse(capsys, 1, SMALL, "--out", f"{folder}/m.bin")
        assert line == f"--out {folder}/m.bin: {folder} is not a directory; make it or choose another one"


def test_sizes_that_the_core_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    descriptor = "custom:l=5000,c=16,h=2,t=24,v=72"
    assert refuse(capsys, 1, descriptor).startswith(f"{descriptor}: num_layers is 5000, it must be between 1 and 4096")


def test_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parameters and the largest tensor's draws; not what training needs."""
    L, C, T, V = 8, 256, 16, 72
    parameters = 2 * (128 * C + T * C + L * (12 * C * C + 13 * C) + 2 * C)
    draws = (4 + 2) * 4 * C * C
    descriptor = f"custom:l={L},c={C},h=4,t={T},v={V}"
    monkeypatch.setattr(init_model, "memory_bytes", lambda: parameters + draws)
    needed = (parameters + draws) // 2**20
    assert refuse(capsys, 1, descriptor) in [
        f"{descriptor} needs {mib} MiB of memory to be made, this machine has {needed} MiB: use a smaller model"
        for mib in (needed, needed + 1)
    ]
    monkeypatch.setattr(init_model, "memory_bytes", lambda: parameters + draws + 2**20)  # activations of one token
    call(descriptor)
    capsys.readouterr()
    monkeypatch.setattr(init_model, "memory_bytes", lambda: 2**30)
    assert refuse(capsys, 1, "gpt3:c12288").startswith("gpt3:c12288 needs 33")  # 174.6e9 parameters: 333 thousand MiB


def test_help_comes_without_torch() -> None:
    program = "import sys\nfrom llmc.cli.init import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: llmc-init [-h] [--out FILE]")
    for descriptor in DESCRIPTORS:
        assert descriptor in result.stdout
