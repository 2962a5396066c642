"""The checksum in the header of models and states, against the definition in docs/file-formats.md, bit by bit."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc import checksum
from llmc.binfile import atomic_write, write_header
from llmc.checksum import BLOCK, seal, verify
from llmc.errors import RunError
from llmc.model_file import ModelShape, load_model, save_model

SHAPE = ModelShape(max_seq_len=4, vocab_size=5, padded_vocab_size=128, num_layers=1, num_heads=1, channels=8)


def crc32(data: bytes) -> int:
    """By the definition: the remainder of a division by 0x04C11DB7, bits reversed, first and last 32 bits inverted."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0xEDB88320 if byte & 1 else 0)
        table.append(byte)
    value = 0xFFFFFFFF
    for byte in data:
        value = (value >> 8) ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def write(path: Path, size: int, seed: int = 0) -> bytes:
    contents = np.random.default_rng(seed).bytes(size - 1024)
    with atomic_write(path) as file:
        write_header(file, {0: 1, 10: 7})
        file.write(contents)
        seal(file)
    return contents


@pytest.mark.parametrize("size", [1024, 1025, 5000, BLOCK - 1, BLOCK, BLOCK + 1])
def test_definition(tmp_path, size):
    assert crc32(b"123456789") == 0xCBF43926  # as published
    contents = write(tmp_path / "a.bin", size)
    header = struct.pack("<256i", 1, *[0] * 9, 7, *[0] * 29, 20261129, *[0] * 215)
    raw = header + contents
    blocks = [raw[i : i + 4 * 2**20] for i in range(0, size, 4 * 2**20)]
    value = crc32(b"".join(struct.pack("<I", crc32(block)) for block in blocks))
    assert (tmp_path / "a.bin").read_bytes() == header[:164] + struct.pack("<I", value) + header[168:] + contents
    assert verify(tmp_path / "a.bin") and verify(tmp_path / "a.bin", past_cache=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(tmp_path, monkeypatch, threads):
    """The same value in any number, of a file of several blocks."""
    monkeypatch.setattr(checksum, "BLOCK", 1000)
    monkeypatch.setattr(checksum, "cpu_count", lambda: threads)
    contents = write(tmp_path / "a.bin", 123_456)
    raw = (tmp_path / "a.bin").read_bytes()
    zeroed = raw[:164] + bytes(4) + raw[168:]
    assert zeroed.endswith(contents)
    crcs = b"".join(struct.pack("<I", crc32(zeroed[i : i + 1000])) for i in range(0, len(raw), 1000))
    assert struct.unpack_from("<I", raw, 164)[0] == crc32(crcs)
    assert verify(tmp_path / "a.bin")


def test_every_bit_counts(tmp_path, monkeypatch):
    """Of the header, the contents, and the checksum itself; also across blocks."""
    monkeypatch.setattr(checksum, "BLOCK", 1100)
    monkeypatch.setattr(checksum, "cpu_count", lambda: 1)
    path = tmp_path / "a.bin"
    write(path, 1500)
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(RunError, match=r"a\.bin is damaged: its (checksum is|header names a checksum of kind)"):
            verify(path)
    for other in (good[:-1], good + b"\0", good[:1100], good[:1100] + good[1100:][::-1]):
        path.write_bytes(other)
        with pytest.raises(RunError, match=r"a\.bin is damaged"):
            verify(path)


def test_files_without_one(tmp_path):
    (tmp_path / "a.bin").write_bytes(struct.pack("<256i", 20240326, *[0] * 255) + b"anything")
    assert not verify(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(b"")
    assert not verify(tmp_path / "a.bin")
    with pytest.raises(RunError, match=r"cannot read .*b\.bin: No such file"):
        verify(tmp_path / "b.bin")


def test_a_model_file_has_one(tmp_path):
    """Where llm.c does not look: its slots are what they were, the tensors follow the header."""
    parameters = {name: torch.randn(size) for name, size in SHAPE.parameters()}
    save_model(tmp_path / "m.bin", SHAPE, "fp32", parameters)
    raw = (tmp_path / "m.bin").read_bytes()
    slots = struct.unpack_from("<256i", raw)
    assert slots[:8] == (20240326, 3, 4, 5, 1, 1, 8, 128)
    assert [slot for slot, value in enumerate(slots[8:], 8) if value != 0] == [40, 41]
    assert verify(tmp_path / "m.bin")
    loaded = {name: torch.zeros(size) for name, size in SHAPE.parameters()}
    load_model(tmp_path / "m.bin", loaded)
    assert all(torch.equal(loaded[name], parameters[name]) for name in parameters)
