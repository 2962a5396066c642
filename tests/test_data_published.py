"""Published data sets on small inputs in their own formats: Tiny Shakespeare, TinyStories, FineWeb; and downloads."""

import gzip
import http.server
import io
import json
import random
import re
import sys
import tarfile
import threading
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from data_testing import call, refuse, shard

from llmc.data import tinyshakespeare, tinystories, writer
from llmc.data.download import download
from llmc.errors import RunError
from llmc.tokenizer import gpt2

EOT = 50256


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def expected(documents: Iterable[str]) -> list[int]:
    """tiktoken on whole documents."""
    return [token for document in documents for token in [EOT, *gpt2()._encoding.encode_ordinary(document)]]


def visible(directory: str) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir() if not path.name.startswith("."))


# ---- Tiny Shakespeare


def speeches(n: int) -> str:
    generator = random.Random(0)
    words = ["the", "King", "and", "thou", "art", "not", "Rome,", "'tis"]
    return "\n\n".join(f"Citizen:\n{' '.join(generator.choices(words, k=20))}." for _ in range(n)) + "\n"


def test_tinyshakespeare() -> None:
    text = speeches(2000)
    Path("input.txt").write_text(text)
    call("tinyshakespeare", "--input", "input.txt")
    out = "dev/data/tinyshakespeare"
    parts = text.split("\n\n")
    tokens = expected([*(part + "\n\n" for part in parts[:-1]), parts[-1]])
    assert shard(f"{out}/tiny_shakespeare_val_000000.bin") == tokens[:32_768]
    assert shard(f"{out}/tiny_shakespeare_train_000000.bin") == tokens[32_768:]
    assert visible(out) == ["tiny_shakespeare_train_000000.bin", "tiny_shakespeare_val_000000.bin", "tokenizer.bin"]
    assert Path(out, "tiny_shakespeare_val_000000.bin").stat().st_size == 66_560  # as published


def test_tinyshakespeare_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text(speeches(10))
    error = refuse(capsys, 1, "tinyshakespeare", "--input", "short.txt", "--out", "o")
    assert error.startswith("the train split of tiny_shakespeare is empty (")
    Path("d").mkdir()
    for name in "ab":
        Path("d", name).write_text("x")
    error = refuse(capsys, 1, "tinyshakespeare", "--input", "d", "--out", "o")
    assert error == "--input d is a directory of 2 files: give the one with the text"
    assert refuse(capsys, 1, "tinyshakespeare", "--input", "x") == "cannot read x: No such file or directory"


def test_tinyshakespeare_download(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = speeches(2000)
    Path("input.txt").write_text(text)
    monkeypatch.setattr(tinyshakespeare, "URL", Path("input.txt").absolute().as_uri())
    error = refuse(capsys, 1, "tinyshakespeare", "--out", "o")
    assert error.startswith(f"o/tiny_shakespeare.txt has {len(text)} bytes, the text has 1115394: delete it")
    monkeypatch.setattr(tinyshakespeare, "CHARACTERS", len(text))
    call("tinyshakespeare", "--out", "o")
    assert len(shard("o/tiny_shakespeare_val_000000.bin")) == 32_768


# ---- TinyStories

STORIES = {f"data{i:02d}.json": [f" Once upon a time, story {j} of {i}.\n" for j in range(20 + i)] for i in range(4)}


def story_file(stories: Iterable[str]) -> bytes:
    return json.dumps([{"story": story, "source": "GPT-4", "instruction": {"words": []}} for story in stories]).encode()


def story_archive(path: str) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name in reversed(STORIES):  # an archive need not be in order
            member = tarfile.TarInfo(f"./{name}")
            content = story_file(STORIES[name])
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shuffled(names: list[str]) -> list[str]:
    """By llm.c's seeds: 1337 plus the number of the file in its split."""
    result = []
    for i, name in enumerate(names):
        stories = list(STORIES[name])
        random.Random(1337 + i).shuffle(stories)
        result += [story.strip() for story in stories]
    return result


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("form", ["archive", "directory"])
def test_tinystories(form: str, workers: int) -> None:
    if form == "archive":
        story_archive("TinyStories_all_data.tar.gz")
    else:
        Path("d").mkdir()
        for name, stories in STORIES.items():
            Path("d", name).write_bytes(story_file(stories))
    source = "d" if form == "directory" else "TinyStories_all_data.tar.gz"
    call("tinystories", "--input", source, "--workers", workers)
    out = "dev/data/tinystories"
    assert shard(f"{out}/TinyStories_val_000000.bin") == expected(shuffled(["data00.json"]))
    train = expected(shuffled(["data01.json", "data02.json", "data03.json"]))
    assert shard(f"{out}/TinyStories_train_000000.bin") == train
    assert len(list(Path(out).iterdir())) == 3


def test_tinystories_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The unpacked files are there still, and so are the tokens."""
    story_archive("a.tar.gz")
    call("tinystories", "--input", "a.tar.gz", "--out", "once")
    monkeypatch.setattr("llmc.data.text.ITEM_CHARACTERS", 100)
    append = writer._Unfinished.append

    def interrupted(self: writer._Unfinished, split: str, encoded: writer.Encoded) -> None:
        append(self, split, encoded)
        if self.items["train"] == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer._Unfinished, "append", interrupted)
    with pytest.raises(SystemExit):
        call("tinystories", "--input", "a.tar.gz", "--out", "o", "--workers", 1)
    monkeypatch.setattr(writer._Unfinished, "append", append)
    capsys.readouterr()
    call("tinystories", "--input", "a.tar.gz", "--out", "o", "--workers", 1)
    assert capsys.readouterr().err.startswith("going on in o/.TinyStories.unfinished: ")
    for name in visible("once"):
        assert Path("o", name).read_bytes() == Path("once", name).read_bytes()


def test_tinystories_of_another_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run unpacked is not taken for files of the next one's archive, whatever their names."""
    story_archive("a.tar.gz")
    Path("d").mkdir()
    for i in range(2):
        Path(f"d/data0{i}.json").write_bytes(story_file([f"A story, the {i}th."]))
    with tarfile.open("b.tar.gz", "w:gz") as archive:
        archive.add("d", ".")
    with monkeypatch.context() as patch:
        patch.setattr(writer._Unfinished, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            call("tinystories", "--input", "a.tar.gz", "--out", "o", "--workers", 1)
    call("tinystories", "--input", "b.tar.gz", "--out", "o", "--workers", 1)
    assert shard("o/TinyStories_train_000000.bin") == expected(["A story, the 1th."])


def test_tinystories_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    story_archive("a.tar.gz")
    Path("cut.tar.gz").write_bytes(Path("a.tar.gz").read_bytes()[:-200])
    Path("bad.tar.gz").write_bytes(gzip.compress(b"no archive"))
    for name in ("cut.tar.gz", "bad.tar.gz"):
        error = refuse(capsys, 1, "tinystories", "--input", name, "--out", "o")
        assert error.startswith(f"cannot read {name}, expected TinyStories_all_data.tar.gz: ")
    error = refuse(capsys, 1, "tinystories", "--input", "absent.tar.gz", "--out", "o")
    assert error == "cannot read absent.tar.gz: No such file or directory"
    Path("d").mkdir()
    Path("d/data00.json").write_bytes(story_file(["x"]))
    error = refuse(capsys, 1, "tinystories", "--input", "d", "--out", "o")
    assert error == "d holds 1 .json files, expected 2 or more: the first is for validation"
    for content in (b"{", b"{}{", b"5", b'["x"]', b'[{"text": "x"}]', b'[{"story": 5}]', b"\xff", b"[" * 100_000):
        Path("d/data01.json").write_bytes(content)
        error = refuse(capsys, 1, "tinystories", "--input", "d", "--out", "o")
        assert error == 'd/data01.json is not a JSON list of objects with a "story"'
    assert visible("o") == []


def test_tinystories_download(monkeypatch: pytest.MonkeyPatch) -> None:
    story_archive("a.tar.gz")
    monkeypatch.setattr(tinystories, "URL", Path("a.tar.gz").absolute().as_uri())
    call("tinystories", "--out", "o", "--workers", 1)
    assert "TinyStories_val_000000.bin" in visible("o") and "TinyStories_all_data.tar.gz" in visible("o")


# ---- FineWeb

PAGES = [f"Page {i} of the web.\n\nWith a paragraph, café." for i in range(400)]


@pytest.fixture(params=["parquet", "jsonl.gz"])
def pages(request: pytest.FixtureRequest) -> str:
    """A directory with the pages in two files, and one that is not of the data."""
    Path("in/sample").mkdir(parents=True)
    Path("in/README.md").write_text("about it")
    for i, part in enumerate((PAGES[:150], PAGES[150:])):
        path = f"in/sample/{i:03d}.{request.param}"
        if request.param == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            table = pyarrow.table({"id": list(range(len(part))), "text": part})
            parquet.write_table(table, path, row_group_size=100)
        else:
            Path(path).write_bytes(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in part)))
    return "in"


def fineweb_tokens(out: str, name: str) -> list[int]:
    """As cut: the first 1000 tokens for validation, the rest in equal shards of at most 1000."""
    assert len(shard(f"{out}/{name}_val_000000.bin")) == 1000
    train = [shard(f"{out}/{file}") for file in visible(out) if file.startswith(f"{name}_train_")]
    assert max(map(len, train)) - min(map(len, train)) <= 1 and max(map(len, train)) <= 1000
    return shard(f"{out}/{name}_val_000000.bin") + [token for part in train for token in part]


@pytest.mark.parametrize("workers", [1, 2])
def test_fineweb(pages: str, workers: int) -> None:
    call("fineweb", "--input", pages, "--shard-tokens", 1000, "--workers", workers)
    assert fineweb_tokens("dev/data/fineweb10B", "fineweb") == expected(PAGES)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Iterable[object]) -> list[object]:
    """A package that gives these rows; returns the arguments of its calls."""
    calls: list[object] = []

    def load_dataset(*arguments: object, **options: object) -> Iterable[object]:
        calls.append((arguments, options))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_fineweb_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_datasets(monkeypatch, ({"text": page, "url": "x"} for page in PAGES))
    call("fineweb", "--type", "edu", "--size", "100B", "--shard-tokens", 1000, "--workers", 1)
    assert fineweb_tokens("dev/data/edu_fineweb100B", "edu_fineweb") == expected(PAGES)
    options = {"name": "sample-100BT", "split": "train", "streaming": True}
    assert calls == [(("HuggingFaceFW/fineweb-edu",), options)]


def test_fineweb_stream_breaks_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[object]:
        yield from ({"text": page} for page in PAGES[:300])
        raise ConnectionError("reset\nby peer")

    arguments = ("fineweb", "--shard-tokens", 1000, "--workers", 1, "--out", "o")
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("llmc.data.text.ITEM_CHARACTERS", 1000)
    fake_datasets(monkeypatch, rows())
    error = refuse(capsys, 1, *arguments)
    assert error == "HuggingFaceFW/fineweb broke off (reset by peer): run the same command again, it goes on"
    fake_datasets(monkeypatch, ({"text": page} for page in PAGES))
    call(*arguments)
    assert re.match(r"going on in o/\.fineweb\.unfinished: \d,\d{3} tokens are there\n", capsys.readouterr().err)
    assert fineweb_tokens("o", "fineweb") == expected(PAGES)


def test_fineweb_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "package datasets: python -m pip install datasets; or give --input" in refuse(capsys, 1, "fineweb")
    Path("d").mkdir()
    Path("d/a.txt").write_text("x")
    assert refuse(capsys, 1, "fineweb", "--input", "d") == "d holds no .parquet and no .jsonl files"
    assert "argument --size: invalid choice: '1B'" in refuse(capsys, 2, "fineweb", "--size", "1B")
    Path("d/a.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "pyarrow", None)
        error = refuse(capsys, 1, "fineweb", "--input", "d", "--out", "o")
    assert error == "d/a.parquet needs the package pyarrow: python -m pip install pyarrow"
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert refuse(capsys, 1, "fineweb", "--input", "d", "--out", "o").startswith("cannot read d/a.parquet: ")
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), "d/a.parquet")
    error = refuse(capsys, 1, "fineweb", "--input", "d", "--out", "o")
    assert error == "d/a.parquet has no column 'text', it has id, body"
    for values, kind in (([5], "int64"), ([b"x"], "binary"), ([["x"]], "list<element: string>")):
        parquet.write_table(pyarrow.table({"text": values}), "d/a.parquet")
        error = refuse(capsys, 1, "fineweb", "--input", "d", "--out", "o")
        assert error == f"d/a.parquet: its column 'text' holds {kind}, expected text (string)"
    parquet.write_table(pyarrow.table({"text": ["x", None]}), "d/a.parquet")
    error = refuse(capsys, 1, "fineweb", "--input", "d", "--out", "o")
    assert error == "the train split of fineweb is empty (2 tokens in all): give more text or fewer --shard-tokens"


# ---- downloads

CONTENT = random.Random(0).randbytes(300_000)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; breaks off after `most` bytes; understands ranges if `ranges`."""

    most = len(CONTENT)
    ranges = True
    requests: list[str | None]

    def do_GET(self) -> None:
        self.requests.append(self.headers["Range"])
        begin = 0
        if self.ranges and self.headers["Range"]:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if begin >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin : begin + self.most])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    kind = type("Server", (Server,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/file", kind
        listening.shutdown()


def test_download_goes_on(server: tuple[str, type[Server]]) -> None:
    url, kind = server
    kind.most = 100_000
    for have in (100_000, 200_000):
        with pytest.raises(RunError, match=rf"ended {300_000 - have} bytes before the end: the same command goes on"):
            download(url, Path("d/f"), "COMMAND")
        assert visible("d") == []
    assert download(url, Path("d/f"), "COMMAND") == Path("d/f")
    assert Path("d/f").read_bytes() == CONTENT and [path.name for path in Path("d").iterdir()] == ["f"]
    assert kind.requests == [None, "bytes=100000-", "bytes=200000-"]
    download(url, Path("d/f"), "COMMAND")
    assert len(kind.requests) == 3  # it is there


def test_download_from_a_server_without_ranges(server: tuple[str, type[Server]]) -> None:
    url, kind = server
    kind.ranges = False
    Path(".f.part").write_bytes(b"something")
    assert download(url, Path("f"), "COMMAND").read_bytes() == CONTENT


def test_download_over_a_part_of_another_file(server: tuple[str, type[Server]]) -> None:
    url, kind = server
    Path(".f.part").write_bytes(bytes(400_000))
    assert download(url, Path("f"), "COMMAND").read_bytes() == CONTENT
    assert kind.requests == ["bytes=400000-", None]


def test_failed_download() -> None:
    with pytest.raises(RunError, match=r"^cannot download file:///absent \(.*\); get the file .* run: COMMAND$"):
        download("file:///absent", Path("f"), "COMMAND")
    with pytest.raises(RunError, match=r"cannot download http://127\.0\.0\.1:9/x \(.*refused\)"):
        download("http://127.0.0.1:9/x", Path("f"), "COMMAND")
    assert visible(".") == []
