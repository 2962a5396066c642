"""Model files and debug states, against bytes laid out by hand with numpy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.debug_state import read_debug_state, write_debug_state
from llmc.errors import RunError
from llmc.model_file import (
    ModelShape,
    load_model,
    read_model_header,
    save_model,
    save_units,
)

SHAPE = ModelShape(max_seq_len=5, vocab_size=7, padded_vocab_size=9, num_layers=3, num_heads=2, channels=4)
SLOTS = {"maxT": 5, "V": 7, "L": 3, "NH": 2, "C": 4, "Vp": 9}  # 2 to 7 of the header


def file_tensors(L: int = 3, C: int = 4, Vp: int = 9, T: int = 5) -> dict[str, tuple[int, ...]]:
    """The format's table of tensors, written out once more."""
    return {
        "wte": (Vp, C),
        "wpe": (T, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def random_values(seed: int) -> dict[str, np.ndarray]:
    """fp32 values for every tensor of the file; all mantissa bits are in use, so rounding to bf16 is not exact."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in file_tensors().items()}


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round to nearest even on the bit pattern: the definition, without torch."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def header(*slots: int) -> bytes:
    return np.array([*slots, *[0] * (256 - len(slots))], dtype="<i4").tobytes()


def model_bytes(values: dict[str, np.ndarray], version: int) -> bytes:
    arrays = values.values() if version == 3 else map(to_bf16_bits, values.values())
    return header(20240326, version, *SLOTS.values()) + b"".join(array.tobytes() for array in arrays)


def by_layer(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values by the names that the program uses."""
    result = {}
    for name, value in values.items():
        if name in ("wte", "wpe", "lnfw", "lnfb"):
            result[name] = value
        else:
            result.update({f"h{layer}.{name}": value[layer] for layer in range(len(value))})
    return result


def empty_parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """NaN everywhere, in an order of names that is not the file's: only names may count."""
    names = sorted(by_layer(random_values(0)).items(), reverse=True)
    return {name: torch.full(value.shape, torch.nan, dtype=dtype) for name, value in names}


def test_counts_are_the_published_ones() -> None:
    assert ModelShape(1024, 50257, 50304, 12, 12, 768).num_parameters == 124_475_904
    assert ModelShape(1024, 72, 128, 8, 8, 512).num_parameters == 25_809_920
    assert ModelShape(1024, 50257, 50304, 48, 25, 1600).num_parameters == 1_557_686_400


def test_tensors_are_in_the_order_of_the_format() -> None:
    assert SHAPE.tensors() == list(file_tensors().items())
    assert [name for name, _ in SHAPE.parameters()] == list(by_layer(random_values(0)))


@pytest.mark.parametrize("version, dtype", [(3, "fp32"), (5, "bf16")])
def test_header(tmp_path: Path, version: int, dtype: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(random_values(1), version))
    assert read_model_header(path) == (SHAPE, dtype)


def test_header_is_read_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(random_values(1), 3))
    program = "import sys; sys.modules['torch'] = None; from llmc.model_file import read_model_header as r; "
    output = subprocess.run(
        [sys.executable, "-c", program + f"print(r({str(path)!r})[0].num_parameters)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(output) == SHAPE.num_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [3, 5])
def test_load(tmp_path: Path, version: int, dtype: torch.dtype) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(random_values(2), version))
    parameters = empty_parameters(dtype)
    load_model(path, parameters)
    for name, value in by_layer(random_values(2)).items():
        exact = value if version == 3 and dtype == torch.float32 else from_bf16_bits(to_bf16_bits(value))
        np.testing.assert_array_equal(parameters[name].float().numpy(), exact, err_msg=name)


def test_load_fills_views_of_other_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(random_values(3), 3))
    parameters = empty_parameters(torch.float32)
    memory = torch.zeros(5, 8)
    parameters["wpe"] = memory[:, ::2]  # not contiguous
    load_model(path, parameters)
    np.testing.assert_array_equal(memory[:, ::2].numpy(), random_values(3)["wpe"])
    assert not memory[:, 1::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", [3, 5])
@pytest.mark.parametrize("cut", [0.0, 0.3, 1.0])
def test_load_parts(tmp_path: Path, cut: float, version: int, dtype: torch.dtype) -> None:
    """Each tensor in two flat parts, one of which may be empty or keep the tensor's shape."""
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(random_values(2), version))
    sizes = {name: value.size for name, value in by_layer(random_values(2)).items()}
    cuts = {name: int(cut * size) for name, size in sizes.items()}
    first = {name: torch.full((n,), torch.nan, dtype=dtype) for name, n in cuts.items()}
    second = {name: torch.full((size - cuts[name],), torch.nan, dtype=dtype) for name, size in sizes.items()}
    if cut == 0:
        second["wte"] = second["wte"].view(9, 4)
    load_model(path, first, {name: (0, n) for name, n in cuts.items()})
    load_model(path, second, {name: (cuts[name], size) for name, size in sizes.items()})
    for name, value in by_layer(random_values(2)).items():
        exact = value if version == 3 and dtype == torch.float32 else from_bf16_bits(to_bf16_bits(value))
        parts = torch.cat([first[name].view(-1), second[name].view(-1)])
        np.testing.assert_array_equal(parts.float().numpy(), exact.reshape(-1), err_msg=name)
    with pytest.raises(RunError, match=r"holds another model than the one to load it into, which differs in wte"):
        load_model(path, first, {name: (0, n + 1) for name, n in cuts.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version, file_dtype", [(3, "fp32"), (5, "bf16")])
def test_save(tmp_path: Path, version: int, file_dtype: str, dtype: torch.dtype) -> None:
    path = tmp_path / "model.bin"
    values = random_values(4)
    if dtype == torch.bfloat16:
        values = {name: from_bf16_bits(to_bf16_bits(value)) for name, value in values.items()}
    parameters = {name: torch.from_numpy(value).to(dtype) for name, value in by_layer(values).items()}
    save_model(path, SHAPE, file_dtype, parameters)
    written, expected = path.read_bytes(), model_bytes(values, version)
    assert written[:160] + bytes(8) + written[168:] == expected  # test_checksum.py is about the other 8 bytes
    assert os.listdir(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("version, file_dtype", [(3, "fp32"), (5, "bf16")])
def test_save_in_units(tmp_path: Path, version: int, file_dtype: str) -> None:
    """In the order of the program, which is not the file's, and of which nothing outlives its turn."""
    tensors = {name: torch.from_numpy(value) for name, value in by_layer(random_values(4)).items()}
    groups = [["wte", "wpe"], *([n for n in tensors if n.startswith(f"h{i}.")] for i in range(3)), ["lnfw", "lnfb"]]

    def units():
        for group in groups:
            unit = {name: tensors[name].clone() for name in group}
            yield unit
            for tensor in unit.values():
                tensor.fill_(torch.nan)

    save_units(tmp_path / "units.bin", SHAPE, file_dtype, units(), 7)
    save_model(tmp_path / "whole.bin", SHAPE, file_dtype, tensors, 7)
    assert (tmp_path / "units.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert (tmp_path / "units.bin").read_bytes()[1024:] == model_bytes(random_values(4), version)[1024:]
    del groups[2]
    with pytest.raises(ValueError, match=r"^h1\.ln1w, h1\.ln1b, .* did not come"):
        save_units(tmp_path / "short.bin", SHAPE, file_dtype, units())
    assert sorted(os.listdir(tmp_path)) == ["units.bin", "whole.bin"]


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    parameters = {name: torch.from_numpy(value) for name, value in by_layer(random_values(5)).items()}
    parameters["h2.fcprojb"] = torch.zeros(5)  # found when nearly all is written
    with pytest.raises(ValueError, match=r"h2\.fcprojb has shape \(5,\)"):
        save_model(path, SHAPE, "fp32", parameters)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_save_into_missing_directory(tmp_path: Path) -> None:
    parameters = {name: torch.from_numpy(value) for name, value in by_layer(random_values(5)).items()}
    with pytest.raises(RunError, match=r"cannot write .*none/model\.bin: No such file"):
        save_model(tmp_path / "none" / "model.bin", SHAPE, "fp32", parameters)


GOOD = model_bytes(random_values(6), 3)


def with_slots(**changes: int) -> bytes:
    """A header-only file with some slots changed: the header must be refused before the size is looked at."""
    slots = SLOTS | changes
    return header(20240326, 3, *slots.values())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read model checkpoint .*: No such file or directory"),
        (b"", "is not a model checkpoint: it has 0 bytes"),
        (GOOD[:1000], "is not a model checkpoint: it has 1000 bytes, the header alone takes 1024"),
        (header(20240520, 3) + GOOD[1024:], "is not a model checkpoint: it is a token shard"),
        (header(77, 3) + GOOD[1024:], "is not a model checkpoint: its magic number is 77"),
        (
            header(20240326, 4, *SLOTS.values()) + GOOD[1024:],
            "model checkpoint of version 4, this program reads version 3 or 5",
        ),
        (GOOD[:-1], f"is truncated: it has {len(GOOD) - 1} bytes, its header promises {len(GOOD)}"),
        (GOOD[:1024], "is truncated: it has 1024 bytes"),
        (GOOD + b"\0", "is too long"),
        (header(20240326, 5, *SLOTS.values()) + GOOD[1024:], "is too long"),  # fp32 values under a bf16 header
        (with_slots(maxT=0), "is damaged: its header says max_seq_len = 0, which must be positive"),
        (with_slots(V=-7), "is damaged: its header says vocab_size = -7"),
        (with_slots(L=0), "is damaged: its header says num_layers = 0"),
        (with_slots(L=2**12 + 1), "is damaged: its header says num_layers = 4097, the most are 4096"),
        (with_slots(NH=0), "is damaged: its header says num_heads = 0"),
        (with_slots(C=-4), "is damaged: its header says channels = -4"),
        (with_slots(Vp=0), "is damaged: its header says padded_vocab_size = 0"),
        (with_slots(Vp=6), "is damaged: its header says padded_vocab_size = 6, less than vocab_size = 7"),
        (with_slots(NH=3), "is damaged: its header says channels = 4, which num_heads = 3 does not divide"),
        (with_slots(L=2**12, C=2**31 - 1, NH=1), r"is damaged: its header promises \d+ parameters"),
    ],
)
def test_bad_model_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.bin"
    if content is not None:
        path.write_bytes(content)
    for read in (read_model_header, lambda path: load_model(path, empty_parameters(torch.float32))):
        with pytest.raises(RunError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda parameters: parameters.update(wpe=torch.zeros(6, 4)),
        lambda parameters: parameters.pop("h2.ln1w"),
        lambda parameters: parameters.update({"h3.ln1w": torch.zeros(4)}),
    ],
    ids=["shape", "missing", "additional"],
)
def test_load_into_another_model(tmp_path: Path, change) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(GOOD)
    parameters = empty_parameters(torch.float32)
    change(parameters)
    with pytest.raises(RunError, match=r"model\.bin holds another model"):
        load_model(path, parameters)
    assert parameters["wte"].isnan().all()  # refused before anything was overwritten


def debug_parts(B: int = 2, T: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.integers(0, 7, (B, T), dtype=np.int32)
    y = rng.integers(0, 7, (B, T), dtype=np.int32)
    return x, y, rng.standard_normal((B, T, 7), dtype=np.float32), np.array([1.2345678], dtype=np.float32)


def debug_bytes() -> bytes:
    arrays = [*debug_parts(), *random_values(8).values()]
    return header(20240327, 2, 2, 3) + b"".join(array.tobytes() for array in arrays)


def test_write_debug_state(tmp_path: Path) -> None:
    path = tmp_path / "debug.bin"
    x, y, logits, loss = debug_parts()
    gradients = {name: torch.from_numpy(value) for name, value in by_layer(random_values(8)).items()}
    long = [torch.from_numpy(array).long() for array in (x, y)]
    write_debug_state(path, *long, torch.from_numpy(logits), float(loss[0]), gradients)
    assert path.read_bytes() == debug_bytes()


def test_read_debug_state(tmp_path: Path) -> None:
    path = tmp_path / "debug.bin"
    path.write_bytes(debug_bytes())
    state = read_debug_state(path, SHAPE)
    x, y, logits, loss = debug_parts()
    np.testing.assert_array_equal(state.x, x)
    np.testing.assert_array_equal(state.y, y)
    np.testing.assert_array_equal(state.logits, logits)
    assert (state.x.dtype, state.logits.dtype, state.loss) == (np.int32, np.float32, float(loss[0]))
    gradients = by_layer(random_values(8))
    assert list(state.gradients) == list(gradients)
    for name, value in gradients.items():
        np.testing.assert_array_equal(state.gradients[name], value, err_msg=name)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read debug state .*: No such file"),
        (b"short", "is not a debug state: it has 5 bytes"),
        (GOOD, "is not a debug state: it is a model checkpoint"),
        (header(20240327, 1, 2, 3) + debug_bytes()[1024:], "debug state of version 1, this program reads version 2"),
        (debug_bytes()[:-4], "is truncated"),
        (debug_bytes() + b"\0", "is too long"),
        (header(20240327, 2, 0, 3), "does not fit the model: its header says B = 0, T = 3"),
        (header(20240327, 2, 2, 6), "does not fit the model: its header says B = 2, T = 6; .* T from 1 to 5"),
        (header(20240327, 2, 2**31 - 1, 5), "is truncated"),
    ],
)
def test_bad_debug_state(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "debug.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        read_debug_state(path, SHAPE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
