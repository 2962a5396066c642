"""Token shards: the bytes on disk, every way a file can be bad, and the search for files."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.binfile import atomic_write
from llmc.data.shards import find_shards, read_shard, token_dtype, write_shard
from llmc.errors import RunError


def shard_bytes(tokens: list[int], magic: int = 20240520, version: int = 1, n: int | None = None) -> bytes:
    """The format by hand."""
    header = struct.pack("<3i", magic, version, len(tokens) if n is None else n) + bytes(1024 - 12)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def test_written_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([0, 1, 258, 65535]))
    assert path.read_bytes() == shard_bytes([0, 1, 258, 65535])
    assert list(tmp_path.iterdir()) == [path]


def test_written_bytes_of_uint32(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([0, 1, 2**32 - 1], np.uint32))
    assert path.read_bytes() == struct.pack("<3i", 20240801, 7, 3) + bytes(1012) + struct.pack("<3I", 0, 1, 2**32 - 1)
    tokens = read_shard(path)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint32 and tokens.tolist() == [0, 1, 2**32 - 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_type_of_a_vocabulary(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">u2"])
def test_round_trip(tmp_path: Path, dtype: object) -> None:
    tokens = np.random.default_rng(0).integers(0, 65536 if dtype in (np.uint16, ">u2") else 30000, 1001).astype(dtype)
    write_shard(tmp_path / "a.bin", tokens[::-1])
    assert np.array_equal(read_shard(tmp_path / "a.bin"), tokens[::-1])


def test_reader_maps_memory(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(10))
    tokens = read_shard(tmp_path / "a.bin")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (shard_bytes([1])[:1023], "it has 1023 bytes"),
        (shard_bytes([1], magic=20240326), "it is a model checkpoint"),
        (shard_bytes([1], magic=20240801, version=7), "is truncated: it has 1026 bytes, its header promises 1028"),
        (shard_bytes([1], magic=20240801, version=1), "version 1, this program reads version 7"),
        (shard_bytes([1], magic=7), "its magic number is 7, expected 20240520"),
        (shard_bytes([1], version=2), "version 2, this program reads version 1"),
        (shard_bytes([], n=0), "gives 0 tokens, expected at least 1"),
        (shard_bytes([], n=-1), "gives -1 tokens, expected at least 1"),
        (shard_bytes([1, 2], n=3), "is truncated: it has 1028 bytes, its header promises 1030"),
        (shard_bytes([1, 2, 3])[:-1], "is truncated: it has 1029 bytes, its header promises 1030"),
        (shard_bytes([1, 2, 3], n=2), "is too long: it has 1030 bytes, its header promises 1028"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path}.*{message}"):
        read_shard(path)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read token shard .*absent.bin: No such file"):
        read_shard(tmp_path / "absent.bin")
    with pytest.raises(RunError, match=r"cannot read token shard .*: Is a directory"):
        read_shard(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([], dtype=np.int64), "0 tokens, a shard holds 1 to 2147483647"),
        (np.broadcast_to(np.uint16(7), 2**31), "2147483648 tokens, a shard holds 1 to 2147483647"),  # takes no memory
        (np.array([3, 65536, 1]), "token 65536, a shard holds tokens 0 to 65535"),
        (np.array([3, -1, 1]), "token -1, a shard holds tokens 0 to 65535"),
    ],
)
def test_refused_tokens(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RunError, match=f"cannot write {path}: {message}"):
        write_shard(path, tokens)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """A child process may write 2 KB per file: as if the disk were full."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys, numpy as np; from llmc.data.shards import write_shard\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "write_shard(sys.argv[1], np.zeros(100_000, np.uint16))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"RunError: cannot write {path}: File too large" in result.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_without_a_system_message_keeps_its_own(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*a\.bin: the cable fell out$"), atomic_write(tmp_path / "a.bin"):
        raise OSError("the cable fell out")
    assert not list(tmp_path.iterdir())


def test_find_shards_in_byte_order(tmp_path: Path) -> None:
    for name in ("x_b.bin", "x_a.bin", "x_10.bin", "x_9.bin", "x_Z.bin", "x_é.bin", ".x_hidden.bin", "y.bin"):
        (tmp_path / name).touch()
    found = [path.name for path in find_shards(f"{tmp_path}/x_*.bin")]
    assert found == ["x_10.bin", "x_9.bin", "x_Z.bin", "x_a.bin", "x_b.bin", "x_é.bin"]
    assert [path.name for path in find_shards(f"{tmp_path}/x_[ab].bin")] == ["x_a.bin", "x_b.bin"]
    assert [path.name for path in find_shards(f"{tmp_path}/y.bin")] == ["y.bin"]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("dev/data/shakespeare/shakespeare_train_*.bin", "make them with llmc-data shakespeare$"),
        ("other/shakespeare_val_*.bin", "make them with llmc-data shakespeare --out other$"),
        ("shakespeare_val_*.bin", r"make them with llmc-data shakespeare --out \.$"),
        ("dev/data/tinyshakespeare/tiny_shakespeare_val.bin", "make them with llmc-data tinyshakespeare$"),
        ("d/TinyStories_train_*.bin", "make them with llmc-data tinystories --out d$"),
        ("dev/data/fineweb10B/fineweb_train_*.bin", "make them with llmc-data fineweb$"),
        ("dev/data/fineweb100B/fineweb_train_*.bin", "make them with llmc-data fineweb --size 100B$"),
        ("dev/data/edu_fineweb100B/edu_fineweb_*.bin", "check the pattern, or .* llmc-data text$"),
        ("dev/data/edu_fineweb100B/edu_fineweb_val_*", "make them with llmc-data fineweb --type edu --size 100B$"),
        ("dev/data/other/201506_train_*.bin", "check the pattern, or .* llmc-data text$"),
        ("dev/data/201506/201506_val_*.bin", "games of chess: make them with llmc-data lichess 2015-06; or give "),
    ],
)
def test_no_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, advice: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=advice) as caught:
        find_shards(pattern)
    assert f"no token shards match {pattern} (working directory {tmp_path})" in str(caught.value)
