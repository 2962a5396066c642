"""llmc-data inspect on files of every kind, laid out by hand: the exact lines, and every way it refuses."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc import inspect_file
from llmc.binfile import atomic_write
from llmc.checksum import seal
from llmc.cli import run
from llmc.cli.data import _main

KINDS = (
    "model checkpoint, debug state, tokenizer, token shard, multiple-choice evaluation file, training state, "
    "token shard (uint32)"
)
COMPLETE = "ok: header, contents and file size agree"
NO_TOKENIZER = "tokenizer: none beside the file, give one with --tokenizer to see text"

# maxT = 2, V = 3, L = 1, NH = 1, C = 2, Vp = 4: the shapes of the 16 tensors, written out.
SLOTS = (2, 3, 1, 1, 2, 4)
SHAPES = {
    **{"wte": (4, 2), "wpe": (2, 2), "ln1w": (1, 2), "ln1b": (1, 2), "qkvw": (1, 6, 2), "qkvb": (1, 6)},
    **{"attprojw": (1, 2, 2), "attprojb": (1, 2), "ln2w": (1, 2), "ln2b": (1, 2), "fcw": (1, 8, 2), "fcb": (1, 8)},
    **{"fcprojw": (1, 2, 8), "fcprojb": (1, 2), "lnfw": (2,), "lnfb": (2,)},
}
N = 90
TOKENS = [b"<|end|>", b"a", b"\n", b"bcd", b"a"]  # end-of-text: 0


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]):
    """Run the command: its exit status, the lines it printed, and its one line of error or ""."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        status = 0
        try:
            run("llmc-data", _main, ["inspect", *map(str, arguments)])
        except SystemExit as exit:
            status = int(exit.code)
        out, err = capsys.readouterr()
        assert err == "" or (err.startswith("llmc-data: error: ") and err.count("\n") == 1)
        return status, out.splitlines(), err.removeprefix("llmc-data: error: ").rstrip("\n")

    return call


def header(*slots: int, **later: int) -> bytes:
    """1024 bytes; s10=7 puts 7 in slot 10, and an unsigned 64-bit number in slots 20 and 21 is u20=..."""
    raw = bytearray(struct.pack(f"<{len(slots)}i", *slots).ljust(1024, b"\0"))
    for name, value in later.items():
        struct.pack_into("<i" if name[0] == "s" else "<Q", raw, 4 * int(name[1:]), value)
    return bytes(raw)


def tensors() -> dict[str, np.ndarray]:
    """wte holds 3, 4 and zeros, the i-th of the others i everywhere: exact in bf16 too."""
    values = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(SHAPES.items())}
    values["wte"][0] = 3, 4
    return values


def model_bytes(values: dict[str, np.ndarray], version: int = 3) -> bytes:
    flat = np.concatenate([array.ravel() for array in values.values()])
    # Values that are exact in bf16 have nothing in the lower half of their bits.
    body = flat.tobytes() if version == 3 else (flat.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return header(20240326, version, *SLOTS) + body


def table(rows: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]) -> list[str]:
    """The table for names with shapes and five figures."""
    name_width, shape_width = max(map(len, rows)), max(len(str(shape)) for shape, _ in rows.values())
    columns = "".join(f"{column:>12}" for column in ("mean", "std", "min", "max", "norm"))
    lines = [f"{'tensor':<{name_width}}  {'shape':<{shape_width}}{columns}"]
    for name, (shape, figures) in rows.items():
        lines.append(f"{name:<{name_width}}  {shape!s:<{shape_width}}" + "".join(f"{x:12.4g}" for x in figures))
    return lines


def constant_row(shape: tuple[int, ...], value: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return shape, (value, 0, value, value, value * math.sqrt(math.prod(shape)))


# wte: mean 7/8, variance 25/8 - 49/64, norm of (3, 4).
WTE_ROW = ((4, 2), (7 / 8, math.sqrt(25 / 8 - 49 / 64), 0, 4, 5))
MODEL_ROWS = {"wte": WTE_ROW, **{name: constant_row(shape, i) for i, (name, shape) in enumerate(SHAPES.items()) if i}}


def tokenizer_bytes(tokens: list[bytes] = TOKENS, version: int = 2) -> bytes:
    return header(20240328, version, len(tokens), 0) + b"".join(bytes([len(t)]) + t for t in tokens)


def shard_bytes(tokens: list[int]) -> bytes:
    return header(20240520, 1, len(tokens)) + struct.pack(f"<{len(tokens)}H", *tokens)


def shard_32_bytes(tokens: list[int]) -> bytes:
    return header(20240801, 7, len(tokens)) + struct.pack(f"<{len(tokens)}I", *tokens)


def eval_bytes(last: int = 4) -> bytes:
    examples = [[65535, 34, 0, 2, 4, 2, 1, 3, 1, 1, 1, 3, 2, 3, 2, 1, last], [65535, 30, 1, 2, 4] + [1, 0] * 5]
    return header(20240522, 1, 2, 34) + struct.pack("<32H", *examples[0], *examples[1])


X, Y = [[0, 1], [2, 1], [1, 1]], [[1, 2], [1, 1], [1, 0]]  # B = 3, T = 2


def logits() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 2, 3), dtype=np.float32)


def debug_bytes(logits: np.ndarray, loss: float, gradients: dict[str, np.ndarray], y: list[list[int]] = Y) -> bytes:
    tokens = np.array([X, y], "<i4").tobytes()
    parts = [tokens, logits.tobytes(), struct.pack("<f", loss), *(array.tobytes() for array in gradients.values())]
    return header(20240327, 2, 3, 2) + b"".join(parts)


def torch_loss() -> float:
    logits_64 = torch.from_numpy(logits()).double().view(6, 3)
    return torch.nn.functional.cross_entropy(logits_64, torch.tensor(Y).view(6)).item()


def state_bytes(
    m: list[float], v: list[float], master: list[float] | None = None, ours: bool = True, **slots: int
) -> bytes:
    """Of 2 ranks, shuffled: shard 1 of 3, sample 2 of 4. llm.c's files lack slots 6, 12 and 14 and the trailer."""
    own = {"s1": 2, "s6": 1, "u12": N, "u14": len(m)} if ours else {}
    given = {"s4": int(master is not None), "s5": 1, "s10": 20, "u20": 2**63 + 5, "u22": 9, "u30": 1, "u32": 2}
    raw = header(20240527, 1, 2, 1, **{**given, **own, **slots})
    raw += np.array([*m, *v, *(master or [])], "<f4").tobytes()
    raw += struct.pack("<Q3i", 3, 2, 0, 1) + struct.pack("<Q4i", 4, 3, 1, 0, 2)
    raw += struct.pack("<QiI", 0, 625 - 600, 600) + struct.pack("<624I2I", *range(624), 0, 0x9908B0DF)
    fields = {"loss_window": [1.5, 2.5], "norm_window": [0.5], "B": 6, "T": 8, "epoch": 1}
    trailer = json.dumps({**fields, "consumed": {"1": {"0": [[0, 7], [9, 12]], "2": [[5, 6]]}}}).encode()
    return raw + struct.pack("<iQ", 20261124, len(trailer)) + trailer if ours else raw


# ---- models


@pytest.mark.parametrize("version, dtype, size", [(3, "fp32", 1024 + 4 * N), (5, "bf16", 1024 + 2 * N)])
def test_model(inspect, version: int, dtype: str, size: int) -> None:
    Path("m.bin").write_bytes(model_bytes(tensors(), version))
    status, lines, error = inspect("m.bin")
    assert (status, error) == (0, "")
    assert lines == [
        f"file: m.bin ({size} bytes)",
        f"kind: model checkpoint, version {version}",
        f"dtype: {dtype}",
        "max_seq_len: 2",
        "vocab_size: 3",
        "padded_vocab_size: 4",
        "num_layers: 1",
        "num_heads: 1",
        "channels: 2",
        "parameters: 90",
        *table(MODEL_ROWS),
        COMPLETE,
        "ok: all values are finite",
        "ok: the 1 padding rows of wte are zero",
    ]
    assert lines[10:13] == [
        "tensor    shape            mean         std         min         max        norm",
        "wte       (4, 2)          0.875       1.536           0           4           5",
        "wpe       (2, 2)              1           0           1           1           2",
    ]


@pytest.mark.parametrize("version", [3, 5])
def test_model_with_problems(inspect, version: int) -> None:
    values = tensors()
    values["qkvw"][0, 1] = math.nan, math.inf
    values["qkvw"][0, 2, 0] = -math.inf
    values["lnfb"][:] = math.nan
    values["wte"][3] = 1, -0.0
    Path("m.bin").write_bytes(model_bytes(values, version))
    status, lines, error = inspect("m.bin")
    assert (status, error) == (1, "m.bin: 3 problems found")
    assert lines[-4:] == [
        COMPLETE,
        "problem: qkvw has 1 NaN and 2 infinite values",
        "problem: lnfb has 2 NaN and 0 infinite values",
        "problem: the 1 padding rows of wte have 1 values that are not zero",
    ]
    finite = ((1, 6, 2), (4, 0, 4, 4, 4 * math.sqrt(9)))
    assert lines[11 + 4] == table({**MODEL_ROWS, "qkvw": finite})[1 + 4]
    assert lines[11 + 15] == table({**MODEL_ROWS, "lnfb": ((2,), (math.nan,) * 5)})[1 + 15]


@pytest.mark.parametrize("mean", [0, 1, -1e4])
def test_figures_in_pieces(monkeypatch: pytest.MonkeyPatch, mean: float) -> None:
    """fp64 sums of 10^4 values err by at most 1e-12 relative; of numbers near the mean, not of their squares."""
    monkeypatch.setattr(inspect_file, "CHUNK", 7)
    values = (mean + 0.01 * np.random.default_rng(1).standard_normal((100, 100))).astype(np.float32)
    x = values.astype(np.float64)
    expected = (x.mean(), x.std(), x.min(), x.max(), np.linalg.norm(x))
    np.testing.assert_allclose(inspect_file.statistics(values), expected, rtol=1e-11)
    assert inspect_file.count(values, lambda piece: piece > mean) == (values > mean).sum()


# ---- token shards and tokenizers


def test_shard(inspect) -> None:
    Path("s.bin").write_bytes(shard_bytes([0, 1, 3, 2, 0, 3]))
    Path("tokenizer.bin").write_bytes(tokenizer_bytes())
    status, lines, error = inspect("s.bin", "--tokens", 4)
    assert (status, error) == (0, "")
    assert lines == [
        "file: s.bin (1036 bytes)",
        "kind: token shard, version 1",
        "tokens: 6",
        "smallest: 0",
        "largest: 3",
        "tokenizer: tokenizer.bin (5 tokens)",
        "documents: 2 (end-of-text tokens, 0)",
        "first tokens: 0 1 3 2 ...",
        r"first tokens as text: '<|end|>abcd\n' ...",
        COMPLETE,
        "ok: all tokens are in the vocabulary of tokenizer.bin (5 tokens)",
    ]


def test_shard_32(inspect) -> None:
    Path("s.bin").write_bytes(shard_32_bytes([4, 2**32 - 1, 1]))
    status, lines, error = inspect("s.bin")
    assert (status, error) == (0, "")
    assert lines == [
        "file: s.bin (1036 bytes)",
        "kind: token shard (uint32), version 7",
        "tokens: 3",
        "smallest: 1",
        "largest: 4294967295",
        NO_TOKENIZER,
        "first tokens: 4 4294967295 1",
        COMPLETE,
    ]


@pytest.mark.parametrize("make", [shard_bytes, shard_32_bytes])
def test_token_outside_the_vocabulary(inspect, make) -> None:
    Path("s.bin").write_bytes(make([1, 5, 3, 65535]))
    Path("other").mkdir()
    Path("other/t.bin").write_bytes(tokenizer_bytes())
    Path("tokenizer.bin").write_bytes(b"not looked at")
    status, lines, error = inspect("s.bin", "--tokenizer", "other/t.bin")
    assert (status, error) == (1, "s.bin: 1 problem found")
    assert lines[5:] == [
        "tokenizer: other/t.bin (5 tokens)",
        "documents: 0 (end-of-text tokens, 0)",
        "first tokens: 1 5 3 65535",
        "first tokens as text: 'a<5>bcd<65535>'",
        COMPLETE,
        "problem: 2 tokens are outside the vocabulary of other/t.bin (5 tokens)",
    ]


def test_damaged_tokenizer(inspect) -> None:
    """One that was found is a problem, one that was given is an error."""
    Path("s.bin").write_bytes(shard_bytes([1]))
    Path("tokenizer.bin").write_bytes(tokenizer_bytes()[:-1])
    status, lines, error = inspect("s.bin")
    assert (status, error) == (1, "s.bin: 1 problem found")
    assert lines[5:] == ["problem: tokenizer.bin is truncated: it ends in token 4 of 5", "first tokens: 1", COMPLETE]
    expected = (1, [], "tokenizer.bin is truncated: it ends in token 4 of 5")
    assert inspect("s.bin", "--tokenizer", "tokenizer.bin") == expected


def test_tokens_by_default(inspect) -> None:
    Path("s.bin").write_bytes(shard_bytes(list(range(65))))
    assert f"first tokens: {' '.join(map(str, range(64)))} ..." in inspect("s.bin")[1]


def test_tokenizer(inspect) -> None:
    Path("t.bin").write_bytes(tokenizer_bytes([*TOKENS, b"e", b"\xff", b"f", b"g", b"h"]))
    status, lines, error = inspect("t.bin")
    assert (status, error) == (0, "")
    assert lines == [
        "file: t.bin (1052 bytes)",
        "kind: tokenizer, version 2",
        "vocabulary: 10 tokens",
        "end of text: 0 b'<|end|>'",
        "longest: 0 b'<|end|>' (7 bytes)",
        "duplicates: 1",
        "token 0: b'<|end|>'",
        "token 1: b'a'",
        r"token 2: b'\n'",
        "token 3: b'bcd'",
        r"token 6: b'\xff'",
        "token 7: b'f'",
        "token 8: b'g'",
        "token 9: b'h'",
        COMPLETE,
    ]


def test_small_tokenizer(inspect) -> None:
    Path("t.bin").write_bytes(tokenizer_bytes())
    assert [line for line in inspect("t.bin")[1] if line.startswith("token ")] == [
        f"token {i}: {token!r}" for i, token in enumerate(TOKENS)
    ]


# ---- evaluation files


def test_eval(inspect) -> None:
    Path("e.bin").write_bytes(eval_bytes())
    Path("gpt2_tokenizer.bin").write_bytes(tokenizer_bytes())
    status, lines, error = inspect("e.bin", "--tokens", 1)
    assert (status, error) == (0, "")
    assert lines == [
        "file: e.bin (1088 bytes)",
        "kind: multiple-choice evaluation file, version 1",
        "examples: 2",
        "longest example: 34 bytes",
        "labels: 0 times 0, 0 times 1, 2 times 2, 0 times 3",
        "tokenizer: gpt2_tokenizer.bin (5 tokens)",
        "label of example 0: 2",
        "context: 1 ...",
        "context as text: 'a' ...",
        "completion 0: 1",
        "completion 0 as text: 'a'",
        "completion 1: 3",
        "completion 1 as text: 'bcd'",
        "completion 2: 3 ...",
        "completion 2 as text: 'bcd' ...",
        "completion 3: 4",
        "completion 3 as text: 'a'",
        COMPLETE,
        "ok: all tokens are in the vocabulary of gpt2_tokenizer.bin (5 tokens)",
    ]


def test_eval_of_another_vocabulary(inspect) -> None:
    Path("e.bin").write_bytes(eval_bytes(last=7))
    Path("t.bin").write_bytes(tokenizer_bytes())
    status, lines, error = inspect("e.bin", "--tokenizer", "t.bin")
    assert (status, error) == (1, "e.bin: 1 problem found")
    assert lines[-1] == "problem: 1 tokens are outside the vocabulary of t.bin (5 tokens)"
    assert inspect("e.bin")[0] == 0  # without a tokenizer nothing tells


# ---- states

STATE_LINES = [
    "step: 20",
    "world_size: 2",
    "rank: 1",
    "zero_stage: 1",
    "has_master: True",
    "num_parameters: 90",
    "array_size: 2",
    "rng_state: 9223372036854775813",
    "last_update_rng_state: 9",
    "B: 6",
    "T: 8",
    "epoch: 1",
    "shuffle: True",
    "shard_index: 1",
    "next_sample: 2",
    "shard_order: 3",
    "sample_order: 4",
    "generator position: 600",
    "consumed before in epoch 1: 11 tokens, in 2 shards",
    "loss_window: 2",
    "norm_window: 1",
]
STATE_CHECKS = [
    COMPLETE,
    "ok: all values are finite",
    "ok: no value of v is negative",
    "ok: the rank is one of world_size",
    "ok: shard_order is a permutation",
    "ok: the loader is inside shard_order",
    "ok: sample_order is a permutation",
    "ok: the loader is inside sample_order",
]


def test_state(inspect) -> None:
    raw = state_bytes([-3, 4], [0, 2], [1, 1])
    Path("s.bin").write_bytes(raw)
    status, lines, error = inspect("s.bin")
    assert (status, error) == (0, "")
    rows = {
        "m": ((2,), (0.5, 3.5, -3, 4, 5)),
        "v": ((2,), (1, 1, 0, 2, 2)),
        "master": ((2,), (1, 0, 1, 1, math.sqrt(2))),
    }
    title = [f"file: s.bin ({len(raw)} bytes)", "kind: training state, version 2"]
    assert lines == [*title, *STATE_LINES, *table(rows), *STATE_CHECKS]


@pytest.mark.parametrize("raw", [model_bytes(tensors()), state_bytes([-3, 4], [0, 2], [1, 1])], ids=["model", "state"])
def test_checksum(inspect, raw) -> None:
    with atomic_write("a.bin") as file:
        file.write(raw)
        seal(file)
    status, lines, _ = inspect("a.bin")
    assert status == 0 and lines[lines.index(COMPLETE) + 1] == "ok: the checksum is right"
    damaged = bytearray(Path("a.bin").read_bytes())
    damaged[1030] ^= 1
    Path("a.bin").write_bytes(damaged)
    status, lines, _ = inspect("a.bin")
    assert status == 1 and lines[lines.index(COMPLETE) + 1].startswith("problem: a.bin is damaged: its checksum is ")


def test_state_with_problems(inspect) -> None:
    raw = state_bytes([math.nan, 4], [-1, 2], s3=2, u30=3, u32=5).replace(
        struct.pack("<4i", 3, 1, 0, 2), struct.pack("<4i", 3, 1, 0, 3)
    )
    Path("s.bin").write_bytes(raw)
    status, lines, error = inspect("s.bin")
    assert (status, error) == (1, "s.bin: 6 problems found")
    assert lines[-8:] == [
        COMPLETE,
        "problem: m has 1 NaN and 0 infinite values",
        "problem: v, a mean of squares, has 1 negative values",
        "problem: rank 2 is none of 2 ranks",
        "ok: shard_order is a permutation",
        "problem: the loader is at 3, shard_order ends at 2",
        "problem: sample_order is no permutation of 4 numbers",
        "problem: the loader is at 5, sample_order ends at 4",
    ]


def test_unshuffled_state(inspect) -> None:
    raw = header(20240527, 1, 1, 0, s10=7, u12=1, u32=4) + struct.pack("<2f", 1, 1)
    trailer = b'{"loss_window": [], "norm_window": []}'
    Path("s.bin").write_bytes(raw + struct.pack("<iQ", 20261124, len(trailer)) + trailer)
    status, lines, error = inspect("s.bin")
    assert (status, error) == (0, "")
    assert lines[11:14] == ["B: None", "T: None", "epoch: 0"]
    assert lines[14:19] == ["shuffle: False", "shard_index: 0", "next_sample: 4", "loss_window: 0", "norm_window: 0"]
    assert lines[-4:] == STATE_CHECKS[:4]


def test_state_of_llm_c_takes_its_model(inspect) -> None:
    path = Path("state_00000020_00001.bin")
    path.write_bytes(state_bytes([1] * N, [1] * N, [1] * N, ours=False))
    assert inspect(path)[2].startswith(f"{path} does not say how many parameters it is for: it is llm.c's")
    Path("model_00000020.bin").write_bytes(model_bytes(tensors(), 5))
    found = inspect(path)
    assert found[0] == 0 and f"num_parameters: {N}" in found[1] and found[1][-8:] == STATE_CHECKS
    Path("model_00000020.bin").rename("m.bin")
    assert inspect(path, "--model", "m.bin") == found


def test_state_of_llm_c_in_parts(inspect) -> None:
    """Rank 1 of 2 with half of each array, which the header does not say."""
    Path("m.bin").write_bytes(model_bytes(tensors()))
    Path("s.bin").write_bytes(header(20240527, 1, 2, 1, 1) + struct.pack("<f", 1) * (3 * N // 2))
    status, lines, _ = inspect("s.bin", "--model", "m.bin")
    assert status == 0 and lines[5:9] == ["zero_stage: 1", "has_master: True", "num_parameters: 90", "array_size: 45"]
    assert lines[-7:-4] == table({name: constant_row((N // 2,), 1) for name in ("m", "v", "master")})[1:]


def test_state_of_another_model(inspect) -> None:
    Path("m.bin").write_bytes(model_bytes(tensors()))
    Path("s.bin").write_bytes(state_bytes([1] * 64, [1] * 64))
    assert inspect("s.bin", "--model", "m.bin")[0] == 0
    Path("s.bin").write_bytes(state_bytes([1] * (N // 2), [1] * (N // 2), s1=1, s6=0, u12=N // 2, u14=0))
    assert inspect("s.bin", "--model", "m.bin") == (
        1,
        [],
        "s.bin is of another model: it has the state of 45 parameters, the model has 90",
    )


# ---- debug states


def test_debug_state(inspect) -> None:
    """The gradients are those values once more, of the one layer h0."""
    raw = debug_bytes(logits(), torch_loss(), tensors())
    Path("m_debug_state.bin").write_bytes(raw)
    Path("m.bin").write_bytes(model_bytes(tensors(), 5))
    Path("t.bin").write_bytes(tokenizer_bytes())
    status, lines, error = inspect("m_debug_state.bin", "--tokenizer", "t.bin")
    assert (status, error) == (0, "")
    x = logits().astype(np.float64)
    rows = {"logits": ((3, 2, 3), (x.mean(), x.std(), x.min(), x.max(), np.linalg.norm(x)))}
    for name, (shape, figures) in MODEL_ROWS.items():
        whole = name in ("wte", "wpe", "lnfw", "lnfb")
        rows[name if whole else f"h0.{name}"] = (shape if whole else shape[1:], figures)
    assert lines[:-1] == [
        f"file: m_debug_state.bin ({len(raw)} bytes)",
        "kind: debug state, version 2",
        "B: 3",
        "T: 2",
        "tokenizer: t.bin (5 tokens)",
        "first inputs x: 0 1 2 1 1 1",
        r"first inputs x as text: '<|end|>a\naaa'",
        "model: m.bin",
        f"loss: {torch_loss():.6f}",
        *table(rows),
        COMPLETE,
        "ok: all inputs x are in the vocabulary of m.bin (3 tokens)",
        "ok: all targets y are in the vocabulary of m.bin (3 tokens)",
        "ok: all values are finite",
        "ok: the 1 padding rows of wte are zero",
    ]
    assert lines[-1].startswith(f"ok: the loss of the logits in fp64 is {torch_loss():.6f}, ")
    assert lines[-1].endswith(" from the loss")
    Path("m.bin").rename("other.bin")
    moved = inspect("m_debug_state.bin", "--tokenizer", "t.bin", "--model", "other.bin")
    assert moved == (0, [line.replace("m.bin", "other.bin") for line in lines], "")


def test_debug_state_without_its_model(inspect) -> None:
    raw = debug_bytes(logits(), torch_loss(), tensors())
    Path("d.bin").write_bytes(raw)
    assert inspect("d.bin", "--tokens", 2) == (
        0,
        [
            f"file: d.bin ({len(raw)} bytes)",
            "kind: debug state, version 2",
            "B: 3",
            "T: 2",
            NO_TOKENIZER,
            "first inputs x: 0 1 ...",
            "model: none beside the file, give one with --model to see more",
        ],
        "",
    )


def test_debug_state_with_problems(inspect) -> None:
    Path("m.bin").write_bytes(model_bytes(tensors()))
    gradients = tensors()
    gradients["wte"][3, 1] = 1
    Path("m_debug_state.bin").write_bytes(debug_bytes(logits(), torch_loss() + 0.001, gradients))
    status, lines, error = inspect("m_debug_state.bin")
    assert (status, error) == (1, "m_debug_state.bin: 2 problems found")
    assert lines[-2:] == [
        "problem: the 1 padding rows of wte have 1 values that are not zero",
        f"problem: the loss of the logits in fp64 is {torch_loss():.6f}, 1.0e-03 from the loss",
    ]
    bad = logits()
    bad[1, 0, 2] = math.inf
    Path("m_debug_state.bin").write_bytes(debug_bytes(bad, torch_loss(), tensors()))
    status, lines, error = inspect("m_debug_state.bin")
    assert (status, error) == (1, "m_debug_state.bin: 2 problems found")
    assert "problem: logits has 0 NaN and 1 infinite values" in lines
    assert lines[-1] == "problem: the loss of the logits in fp64 is nan, nan from the loss"


@pytest.mark.parametrize("target", [3, -1])
def test_debug_state_with_a_target_outside_the_vocabulary(inspect, target: int) -> None:
    Path("m.bin").write_bytes(model_bytes(tensors()))
    y = [[1, target], *Y[1:]]
    Path("m_debug_state.bin").write_bytes(debug_bytes(logits(), torch_loss(), tensors(), y))
    status, lines, error = inspect("m_debug_state.bin")
    assert (status, error) == (1, "m_debug_state.bin: 1 problem found")
    assert "problem: 1 targets y are outside the vocabulary of m.bin (3 tokens)" in lines
    assert "in fp64" not in lines[-1]


def test_loss_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_file, "CHUNK", 7)  # two rows of three logits
    loss = inspect_file.cross_entropy(logits() * 1000, np.array(Y, np.int32))
    large = torch.from_numpy(logits() * 1000).double().view(6, 3)
    expected = torch.nn.functional.cross_entropy(large, torch.tensor(Y).view(6)).item()
    assert loss == pytest.approx(expected, rel=1e-12)  # both in fp64


# ---- refused

GOOD = {
    "model checkpoint": model_bytes(tensors()),
    "debug state": debug_bytes(logits(), torch_loss(), tensors()),
    "tokenizer": tokenizer_bytes(),
    "token shard": shard_bytes([1, 2]),
    "token shard (uint32)": shard_32_bytes([1, 2]),
    "multiple-choice evaluation file": eval_bytes(),
    "training state": state_bytes([1, 1], [1, 1]),
}
VERSIONS = {
    "model checkpoint": "3 or 5",
    "debug state": "2",
    "tokenizer": "1 or 2",
    "token shard (uint32)": "7",
    "training state": "1 or 2",
}


@pytest.fixture
def model_file() -> None:
    Path("f.bin").write_bytes(GOOD["model checkpoint"])


@pytest.mark.parametrize("kind", GOOD)
def test_damaged(inspect, model_file: None, kind: str) -> None:
    path = Path("f_debug_state.bin")  # beside its model, should it be one
    path.write_bytes(GOOD[kind])
    assert inspect(path)[0] == 0
    version = f"{path}: {kind} of version 99, this program reads version {VERSIONS.get(kind, '1')}"
    for content, message in (
        (GOOD[kind][:-1], " is truncated"),
        (GOOD[kind][:1024], " is truncated"),
        (GOOD[kind] + bytes(13), " is too long: "),
        (GOOD[kind][:4] + struct.pack("<i", 99) + GOOD[kind][8:], version),
    ):
        path.write_bytes(content)
        status, lines, error = inspect(path)
        assert (status, lines) == (1, []) and error.startswith(str(path)) and message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"cannot read f.bin: No such file or directory (known are {KINDS})"),
        (b"", f"f.bin is of no known kind: it has 0 bytes, a header alone takes 1024 (known are {KINDS})"),
        (bytes(1023), f"f.bin is of no known kind: it has 1023 bytes, a header alone takes 1024 (known are {KINDS})"),
        (header(-7), f"f.bin is of no known kind: its magic number is -7 (known are {KINDS})"),
        (header(20240801, 7, 0), "f.bin: its header gives 0 tokens, expected at least 1"),
        (header(20240801, 7, -1), "f.bin: its header gives -1 tokens, expected at least 1"),
        (header(20240327, 2, 0, 2), "f.bin is damaged: its header says B = 0, T = 2, which must be positive"),
        (header(20240327, 2, 3, -1), "f.bin is damaged: its header says B = 3, T = -1, which must be positive"),
        (
            header(20240327, 2, 3, 2) + bytes(20),
            "f.bin is truncated: it has 1044 bytes, the inputs of B = 3, T = 2 end at 1048",
        ),
    ],
)
def test_bad_file(inspect, content: bytes | None, message: str) -> None:
    if content is not None:
        Path("f.bin").write_bytes(content)
    assert inspect("f.bin") == (1, [], message)


@pytest.mark.parametrize("flag, kind", [("--model", "debug state"), ("--tokenizer", "token shard")])
def test_flag_names_a_file_of_another_kind(inspect, model_file: None, flag: str, kind: str) -> None:
    Path("x.bin").write_bytes(GOOD[kind])
    status, lines, error = inspect("x.bin", flag, "x.bin")
    needed = {"--model": "model checkpoint", "--tokenizer": "tokenizer"}[flag]
    assert (status, lines, error) == (1, [], f"x.bin is not a {needed}: it is a {kind}")
    status, lines, error = inspect("x.bin", flag, "absent.bin")
    assert (status, lines, error) == (1, [], f"cannot read {needed} absent.bin: No such file or directory")
