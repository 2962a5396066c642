"""llmc-data text: files, directories, compression, JSON lines and encodings, against tokens of whole documents."""

import base64
import contextlib
import gc
import gzip
import json
import random
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import data_testing
import numpy as np
import pytest

from llmc.data import source, text
from llmc.data.source import Piece, Source
from llmc.errors import RunError
from llmc.tokenizer import BytePairTokenizer, gpt2, make_encoder

EOT = 50256
DOCUMENTS = ["Hello world", "naïve café,\n\n東京 42", "It's <|endoftext|> in a text."]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def text_command(*arguments: object) -> tuple[object, ...]:
    return ("text", *arguments, "--out", "o", "--name", "n")


def call(*arguments: object) -> None:
    data_testing.call(*text_command(*arguments))


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    return data_testing.refuse(capsys, status, *text_command(*arguments))


def all_tokens() -> list[int]:
    """Both splits, read by the format's description."""
    tokens: list[int] = []
    for split in ("train", "val"):
        for path in sorted(Path("o").glob(f"n_{split}_*.bin")):
            raw = path.read_bytes()
            (magic,) = struct.unpack("<i", raw[:4])
            tokens += np.frombuffer(raw[1024:], {20240520: "<u2", 20240801: "<u4"}[magic]).tolist()
    return tokens


def expected(documents: Iterable[str]) -> list[int]:
    """tiktoken on whole documents."""
    return [token for document in documents for token in [EOT, *gpt2()._encoding.encode_ordinary(document)]]


def json_lines(documents: Iterable[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: document}).encode() + b"\n" for document in documents)


def test_hello_world() -> None:
    Path("t.txt").write_text("Hello world")
    call("t.txt", "--val-fraction", 0.4)
    assert all_tokens() == [EOT, 15496, 995]


def test_files_and_directories_in_order() -> None:
    for path in ("d/b.txt", "d/a/z.md", "d/a/c.anything", "d/.hidden", "d/.git/config", "d/c.jsonl", "last.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path)
    Path("d/c.jsonl").write_bytes(json_lines(["one", "two"]))
    call("last.txt", "d")
    assert all_tokens() == expected(["last.txt", "d/a/c.anything", "d/a/z.md", "d/b.txt", "one", "two"])


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_compressed_files(compression: str) -> None:
    def write(name: str, content: bytes) -> None:
        if compression == ".gz":
            content = gzip.compress(content[:10]) + gzip.compress(content[10:])  # two members
        if compression == ".zst":
            zstandard = pytest.importorskip("zstandard")
            content = zstandard.compress(content[:10]) + zstandard.compress(content[10:])  # two frames
        Path(name + compression).write_bytes(content)

    write("a.jsonl", json_lines(DOCUMENTS, "body") + b"\n  \n" + json_lines(["after blank lines"], "body"))
    write("b.txt", "\ufeffA text.\n".encode())
    call(f"a.jsonl{compression}", f"b.txt{compression}", "--key", "body")
    assert all_tokens() == expected([*DOCUMENTS, "after blank lines", "A text.\n"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("encoding", ["gpt2", "chars", "bytes"])
def test_pieces_and_processes(monkeypatch: pytest.MonkeyPatch, encoding: str, workers: int) -> None:
    """Long documents in small pieces, lines in small items: the tokens are those of whole documents."""
    monkeypatch.setattr(source, "CHUNK_BYTES", 50)
    monkeypatch.setattr(text, "ITEM_CHARACTERS", 1000)
    generator = random.Random(0)
    words = ["\n", "\n\n", " ", "  ", "\t", "a", "bc", "it's", ".", "42", "é", "東京", "😀"]
    documents = ["".join(generator.choices(words, k=3000)) for _ in range(3)]
    for i, document in enumerate(documents[:2]):
        Path(f"{i}.txt").write_text(document)
    Path("2.jsonl").write_bytes(json_lines(documents))
    call("0.txt", "2.jsonl", "1.txt", "--encoding", encoding, "--workers", workers, "--shard-tokens", 5000)
    documents = [documents[0], *documents, documents[1]]
    if encoding == "gpt2":
        assert all_tokens() == expected(documents)
    elif encoding == "bytes":
        assert all_tokens() == [token for document in documents for token in [256, *document.encode()]]
    else:
        characters = sorted(set("".join(documents)))
        ids = {character: id for id, character in enumerate(characters, 1)}
        assert all_tokens() == [token for document in documents for token in [0, *map(ids.__getitem__, document)]]


@pytest.mark.parametrize("seed", range(3))
def test_cuts_are_where_words_begin(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """In the white space where patterns look ahead, after punctuation that takes newlines along, too."""
    monkeypatch.setattr(source, "CHUNK_BYTES", 7)
    words = ["\n", "\n\n", "\r\n", " ", "\t", "a", "bc", "it's", ".", "...", "/", "42", "é"]
    content = "".join(random.Random(seed).choices(words, k=3000))
    Path("t.txt").write_text(content, newline="")
    pieces = list(source.read_pieces(Source(Path("t.txt"), 0, True), divide=True))
    assert "".join(piece.text for piece in pieces) == content and len(pieces) > 100
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert sum(piece.size for piece in pieces) == len(content.encode())
    ranks = gpt2()._encoding._mergeable_ranks
    for name in ("GPT-2", "cl100k_base", "o200k_base"):
        encoder = with_pattern_of(name, ranks)
        whole = encoder.encode(content).tolist()
        assert [token for piece in pieces for token in encoder.encode(piece.text).tolist()] == whole
    whole_pieces = source.read_pieces(Source(Path("t.txt"), 0, True), divide=False)
    assert list(whole_pieces) == [Piece(True, content, len(content.encode()))]


def with_pattern_of(name: str, ranks: dict[bytes, int]) -> BytePairTokenizer:
    import tiktoken

    from llmc.tokenizer import RANK_FILES

    kind = next(kind for kind in RANK_FILES.values() if kind.name == name)
    encoding = tiktoken.Encoding("x", pat_str=kind.pattern, mergeable_ranks=ranks, special_tokens={})
    return BytePairTokenizer(encoding, 0, 50257)


def test_empty_documents_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").mkdir()
    Path("d/a.txt").write_text("")
    Path("d/b.txt").write_text("some text")
    Path("d/c.jsonl").write_bytes(json_lines(["", "more text"]))
    Path("d/e.jsonl").write_text("")
    call("d", "--val-fraction", 0.3)
    assert all_tokens() == expected(["some text", "more text"])
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 4 documents were empty and left out"


def test_half_of_a_character() -> None:
    """JSON can escape one, which is no Unicode text."""
    Path("a.jsonl").write_text('{"text": "a\\ud83db \\ud83d\\ude00"}\n')
    call("a.jsonl", "--encoding", "bytes")
    assert bytes(all_tokens()[1:]).decode() == "a\ufffdb 😀"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 1}\n', "a.jsonl line 3 has no text under 'text' (it has 'text')"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl line 1 has no text under 'text' (it has 'body', 'id')"),
        ("a.jsonl", b'["x"]\n', "a.jsonl line 1 has no text under 'text' (it is no object): use --key"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"', "a.jsonl line 2 is not JSON: "),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON: its brackets are nested too deeply"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1 is not JSON: "),
        ("a.txt.gz", b"no gzip", "cannot read a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"text" * 99)[:-9], "cannot read a.txt.gz: Compressed file ended before"),
        ("a.jsonl.zst", b"no zstd", "cannot read a.jsonl.zst: "),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd\x24", "cannot read a.txt.zst: it is truncated"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    monkeypatch.setattr(text, "ITEM_CHARACTERS", 10)
    Path(name).write_bytes(content)
    workers = 2 if name == "a.jsonl" else 1  # lines are read in the workers
    assert refuse(capsys, 1, name, "--workers", workers).startswith(message)
    assert not list(Path("o").iterdir())


@pytest.mark.parametrize(
    ("name", "good", "line", "message"),
    [
        ("a.txt.gz", "it ends\n", "no end ", "a.txt.gz has more than 1,000 characters in one piece: divide it"),
        ("a.jsonl.gz", '{"text": "x"}\n', "  ", "a.jsonl.gz line 2 has more than 1,000 bytes"),
    ],
)
def test_text_without_an_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, good: str, line: str, message: str
) -> None:
    """A compressed megabyte stands for a gigabyte of it, which would have to be in memory."""
    monkeypatch.setattr(source, "CHUNK_BYTES", 100)
    for module in (source, text):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 1000)
    Path(name).write_bytes(gzip.compress((good + line * 1000).encode()))
    assert refuse(capsys, 1, name) == message
    Path(name).write_bytes(gzip.compress((good * 200).encode()))
    call(name, "--encoding", "bytes")


def test_truncated_zstd_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.compress(random.Random(0).randbytes(50_000).hex().encode())
    Path("a.txt.zst").write_bytes(whole[: len(whole) // 2])
    assert refuse(capsys, 1, "a.txt.zst") == "cannot read a.txt.zst: it is truncated"


def test_an_error_keeps_no_buffers() -> None:
    """Of which a frame may ask for gigabytes."""
    zstandard = pytest.importorskip("zstandard")
    Path("a.txt.zst").write_bytes(zstandard.compress(b"text") + b"damage")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RunError, match="Unknown frame descriptor"):
            list(source.read_pieces(Source(Path("a.txt.zst"), 1, True), divide=True))
        assert not any(isinstance(kept, source._Zstd) for kept in gc.get_objects())
    finally:
        gc.enable()


def test_zstd_of_nothing_but_zeros(tmp_path: Path) -> None:
    """Some thousand bytes stand for a gigabyte, which comes piece by piece."""
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor().compressobj()
    content = b"".join([*(compressor.compress(bytes(2**24)) for _ in range(64)), compressor.flush()])
    assert len(content) < 100_000
    (path := tmp_path / "a.zst").write_bytes(content)
    tracemalloc.start()
    with source.open_source(path) as (_, text):
        assert text.read(5) == bytes(5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.txt.zst"), ("tokenizers", "tokenizer.json")])
def test_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    Path(name).write_bytes(b"{}")
    arguments = [name] if name.endswith(".zst") else [__file__, "--encoding", name]
    assert refuse(capsys, 1, *arguments) == f"{name} needs the package {package}: python -m pip install {package}"


# ---- encodings


@pytest.mark.parametrize(
    ("encoding", "status", "message"),
    [
        ("tiktoken:gpt9", 2, "--encoding tiktoken:gpt9: tiktoken has no such encoding, it has "),
        ("absent.tiktoken", 1, "cannot read absent.tiktoken: No such file"),
        ("absent.json", 1, "cannot read absent.json: No such file"),
        ("t.txt", 1, "t.txt is no tiktoken rank file: a line is not a token in base64 and its rank"),
        ("short.tiktoken", 1, "short.tiktoken has 1 ranks, and does not say how to split text into words"),
        ("bad.json", 1, "bad.json is no tokenizer.json of Hugging Face: "),
        ("gpt3", 2, "--encoding gpt3 is none of gpt2, chars, bytes, tiktoken:NAME"),
    ],
)
def test_bad_encoding(capsys: pytest.CaptureFixture[str], encoding: str, status: int, message: str) -> None:
    if encoding.endswith(".json"):
        pytest.importorskip("tokenizers")
    Path("t.txt").write_text("some text")
    Path("short.tiktoken").write_text("YQ== 0\n")
    Path("bad.json").write_text("{}")
    assert refuse(capsys, status, "t.txt", "--encoding", encoding).startswith(message)
    assert not Path("o").exists()


def rank_file(name: str, ranks: Iterable[bytes]) -> str:
    Path(name).write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)))
    return name


def test_rank_file_of_gpt2() -> None:
    name = rank_file("ranks.tiktoken", gpt2().token_bytes()[:-1])
    Path("t.txt").write_text("\n".join(DOCUMENTS))
    call("t.txt", "--encoding", name)
    assert all_tokens() == expected(["\n".join(DOCUMENTS)])
    assert Path("o/tokenizer.bin").read_bytes()[1024:] == b"".join(
        bytes([len(token)]) + token for token in gpt2().token_bytes()
    )


def test_rank_file_of_a_large_vocabulary() -> None:
    """Llama 3's number of ranks: bytes, then pairs of bytes, and uint32 shards."""
    pairs = [bytes(pair) for pair in np.ndindex(256, 256)]
    triples = [b"ab" + bytes(pair) for pair in np.ndindex(256, 256)]
    name = rank_file("ranks.tiktoken", [*(bytes([b]) for b in range(256)), *pairs, *triples][:128_000])
    Path("t.txt").write_text("abcd")
    call("t.txt", "--encoding", name, "--val-fraction", 0.3)
    # llm.c's separator; then "ab" and "cd" are merged, and "abcd" to the rank after 256 + 65536 + 256 * c + d.
    assert all_tokens() == [128_000, 256 + 65_536 + 256 * ord("c") + ord("d")]
    raw = Path("o/n_train_000000.bin").read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240801, 7, 1) and len(raw) == 1028
    assert struct.unpack("<4I", Path("o/tokenizer.bin").read_bytes()[:16]) == (20240328, 2, 128_256, 128_000)


def trained(kind: str) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    kinds = {"byte-level": tokenizers.ByteLevelBPETokenizer, "sentencepiece": tokenizers.SentencePieceBPETokenizer}
    tokenizer = kinds[kind]()
    specials = ["<unk>", "</s>"] if kind == "sentencepiece" else ["<|endoftext|>"]
    tokenizer.train_from_iterator([*DOCUMENTS, "hello hello world world"] * 5, special_tokens=specials, vocab_size=400)
    tokenizer.save("tokenizer.json")
    return "tokenizer.json"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_hugging_face(kind: str) -> None:
    encoder = make_encoder(trained(kind), list)
    tokens = encoder.token_bytes()
    content = "hello world, naïve café 東京"
    decoded = b"".join(tokens[id] for id in encoder.encode(content)).decode()
    assert decoded == (content if kind == "byte-level" else f" {content}")  # it puts a space before a text
    assert tokens[encoder.end_of_text] == (b"<|endoftext|>" if kind == "byte-level" else b"</s>")
    assert encoder.end_of_text not in encoder.encode("a <|endoftext|> b </s> c")


def test_hugging_face_data_set_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setattr(source, "CHUNK_BYTES", 20)
    monkeypatch.setattr(text, "ITEM_CHARACTERS", 30)
    name = trained("byte-level")
    Path("a.txt").write_text("\n".join(DOCUMENTS))
    Path("b.jsonl").write_bytes(json_lines(["hello world", "world"] * 20))
    call("a.txt", "b.jsonl", "--encoding", name, "--workers", 2)
    theirs = tokenizers.Tokenizer.from_file(name)
    theirs.encode_special_tokens = True
    documents = ["\n".join(DOCUMENTS), *["hello world", "world"] * 20]
    assert all_tokens() == [token for document in documents for token in [0, *theirs.encode(document).ids]]


def test_hugging_face_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    Path("t.txt").write_text("hello world")
    vocabulary = {"[UNK]": 0, "hello": 1, "##world": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.save("a.json")
    error = refuse(capsys, 1, "t.txt", "--encoding", "a.json")
    assert error.startswith("a.json has no end-of-text token: none of <|endoftext|>, ")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save("a.json")
    error = refuse(capsys, 1, "t.txt", "--encoding", "a.json")
    assert error.startswith("a.json is neither byte-level nor like SentencePiece")


def test_tokens_of_hugging_face_that_spell_no_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    Path("t.txt").write_text("hello world")
    content = json.loads(Path(trained("byte-level")).read_text())
    for token, id, message in (
        ("東", 500, "a.json: token 500, '東', spells no bytes: '東' stands for none"),
        ("ab", 2**31, f"a.json has a token {2**31}: ids go up to 1048575"),
    ):
        changed = json.loads(json.dumps(content))
        changed["model"]["vocab"][token] = id
        Path("a.json").write_text(json.dumps(changed))
        assert refuse(capsys, 1, "t.txt", "--encoding", "a.json") == message
    unknown = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "[UNK]"}
    Path("a.json").write_text(json.dumps({**content, "model": unknown, "added_tokens": []}))
    assert refuse(capsys, 1, "t.txt", "--encoding", "a.json").startswith("a.json cannot encode a text: ")
    # Of SentencePiece: what only looks like the name of a byte is text.
    content = json.loads(Path(trained("sentencepiece")).read_text())
    id = len(content["model"]["vocab"])
    content["model"]["vocab"].update({"<0xZZ>": id, "<0x4a>": id + 1})
    Path("a.json").write_text(json.dumps(content))
    assert make_encoder("a.json", list).token_bytes()[id:] == [b"<0xZZ>", b"J"]


def test_another_encoder_of_the_same_vocabulary_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces are others, so the number of pieces done would leave text out."""
    fingerprints = []
    monkeypatch.setattr(
        text, "write_dataset", lambda *_, fingerprint, **__: fingerprints.append(fingerprint) or ([], {})
    )
    Path("a.txt").write_text("hello")
    name = trained("byte-level")
    for encoding in ("gpt2", "bytes", name):
        text.prepare_text(["a.txt"], encoding, "o", "a", 0.1, key="text", shard_tokens=100, workers=1)
    changed = Path(name).read_text()
    Path(name).write_text(changed + "\n")
    text.prepare_text(["a.txt"], name, "o", "a", 0.1, key="text", shard_tokens=100, workers=1)
    assert len({json.dumps(fingerprint["encoding"]) for fingerprint in fingerprints}) == 4


UNTYPED = {"prefix": "##", "cleanup": True}  # a WordPiece decoder, as old files have it


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # the package panics,
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},  # or does so when it encodes
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": UNTYPED},
        {"decoder": {"type": "Sequence", "decoders": [UNTYPED]}},
        {"decoder": {"type": "ByteLevel", "decoders": 5}},
    ],
)
def test_odd_tokenizers_are_read_or_refused(change: dict[str, object]) -> None:
    path = Path(trained("byte-level"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with contextlib.suppress(RunError):
        make_encoder(str(path), list).encode("hello world")


def test_llama_3_begins_documents_with_begin_of_text() -> None:
    """As its rank file does, and llm.c's shards."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    specials = ["<|end_of_text|>", "<|begin_of_text|>"]
    tokenizer.train_from_iterator(DOCUMENTS, special_tokens=specials, vocab_size=300)
    tokenizer.save("tokenizer.json")
    assert make_encoder("tokenizer.json", list).end_of_text == 1
