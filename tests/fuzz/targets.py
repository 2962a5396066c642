"""The readers of files that anybody may have written: how each is called, and intact files to begin with.

A reader may refuse a file with an error of the package, and nothing else: any other exception, a hang and memory out of
proportion are defects. The rules of chess, which are C++, are in native.py.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import zstandard

from llmc import _C, algorithms, checksum, chess_eval, debug_state, hf, hf_tokenizer, inspect_file, plot
from llmc.build import core_config
from llmc.config import TrainConfig
from llmc.config_file import read_config_file, write_config_file
from llmc.data import choices, eval_file, mmlu, shards, source, text, writer
from llmc.data.loader import DataLoader, LoaderState
from llmc.data.tinystories import read_stories
from llmc.errors import RunError, UsageError
from llmc.model_file import ModelShape, load_model, read_model_header, read_model_step, save_model
from llmc.multiple_choice import Source, load_examples
from llmc.prompt import encode_prompt
from llmc.state_file import TrainState, map_arrays, read_state, read_world_size, write_state
from llmc.tokenizer import Tokenizer, make_encoder, write_tokenizer

SHAPE = ModelShape(max_seq_len=4, vocab_size=3, padded_vocab_size=4, num_layers=1, num_heads=1, channels=8)
N = 5  # parameters of the states' model
FINGERPRINT = {"files": [["a.txt", 5, 6]], "tokenizer": "t"}


@dataclass(frozen=True)
class Target:
    """A reader."""

    file: str  # the name its file is given
    read: Callable[[Path], object]
    seeds: Callable[[Path], None]  # writes intact files, whose names do not matter, into a directory
    beside: Callable[[Path], None] = lambda directory: None  # writes what has to lie beside the file
    words: tuple[str, ...] = ()  # worth being put into a file


def accepted(read: Callable[[Path], object], path: Path) -> bool:
    """False if the reader refuses the file as it should; everything else is raised."""
    try:
        read(path)
        return True
    except (RunError, UsageError, _C.Error):
        return False


def drain(iterator: Iterator[object]) -> None:
    for _ in iterator:
        pass


# ---- our own files


def parameters_of(shape: ModelShape) -> dict[str, torch.Tensor]:
    return {name: torch.full(size, 0.5) for name, size in shape.parameters()}


def read_model(path: Path) -> None:
    shape, _ = read_model_header(path)
    read_model_step(path)
    core_config(str(path), shape)
    with contextlib.suppress(RunError):  # it differs in nearly every file here
        checksum.verify(path)
    load_model(path, parameters_of(shape))


def model_seeds(directory: Path) -> None:
    save_model(directory / "fp32", SHAPE, "fp32", parameters_of(SHAPE), step=7)
    save_model(directory / "bf16", replace(SHAPE, num_layers=2), "bf16", parameters_of(replace(SHAPE, num_layers=2)))


def loader_state(shuffle: bool) -> LoaderState:
    order = np.array([1, 0], np.int32) if shuffle else np.zeros(0, np.int32)
    samples = np.array([1, 0, 2], np.int32) if shuffle else np.zeros(0, np.int32)
    generator = np.arange(624 if shuffle else 0, dtype=np.uint32)
    consumed = {0: {1: np.array([[0, 2], [4, 6]])}} if shuffle else {}
    return LoaderState(shuffle, 1, 1, order, samples, generator, 100, B=1, T=2, epoch=0, consumed=consumed)


def state_seeds(directory: Path) -> None:
    for shuffle in (False, True):
        for version, has_master in ((1, True), (2, False)):
            arrays = ["m", "v", "master"] if has_master else ["m", "v"]
            state = TrainState(
                *(version, 3, 1, 0, version - 1, has_master, N, N, 5, 6),
                loader=loader_state(shuffle),
                loss_window=(2.5, 2.0),
                norm_window=(1.0,),
                fp8_history=(0.5, 2.0) if has_master else (),
            )
            path = directory / f"{shuffle}{version}"
            write_state(path, state, {name: [torch.ones(N)] for name in arrays})
    raw = (directory / "True1").read_bytes()  # llm.c's do not say N, and have no trailer
    end = 1024 + 12 * N + 8 + 8 + 8 + 12 + 2520
    (directory / "llm.c").write_bytes(raw[:48] + bytes(8) + raw[56:end])


def beside_state(directory: Path) -> None:
    """Data of which the state has 3 batches a shard, as one rank or as one of two."""
    for ranks in (1, 2):
        for shard in range(2):
            shards.write_shard(directory / f"of_{ranks}_{shard}.bin", np.arange(6 * ranks + 1))


def read_training_state(path: Path) -> None:
    read_world_size(path)
    state = read_state(path, N)
    for array in map_arrays(path, state).values():
        array.sum()
    for ranks in (1, 2):  # that wrote it, if this is one of them and the other one stands at the beginning
        new, other = loader_and_other(f"{path.parent}/of_{ranks}_*.bin", ranks, state.loader.shuffle)
        loader = copy.copy(new)  # shares the generator, to which load_states gives another state
        states = [state.loader, replace(other, B=state.loader.B, T=state.loader.T)]
        loader.load_states(states[:ranks], ["one", "two"][:ranks])
        loader.next_batch()


@functools.cache  # they are the same for every file
def loader_and_other(pattern: str, ranks: int, shuffle: bool) -> tuple[DataLoader, LoaderState]:
    """A loader at the beginning, of one rank, and the state of the last of so many."""
    last = DataLoader(pattern, B=1, T=2, rank=ranks - 1, world_size=ranks, shuffle=shuffle)
    return DataLoader(pattern, B=1, T=2, shuffle=shuffle), last.state()


def trailer_seeds(directory: Path) -> None:
    state_seeds(directory)
    raw = (directory / "True1").read_bytes()
    for path in directory.iterdir():
        path.unlink()
    (directory / "a").write_bytes(raw[raw.index(b'{"loss_window') :])


def beside_trailer(directory: Path) -> None:
    beside_state(directory)
    (seeds := directory / "seeds").mkdir()
    state_seeds(seeds)


def read_state_trailer(path: Path) -> None:
    """The file is the trailer alone, without its length."""
    trailer, raw = path.read_bytes(), (path.parent / "seeds" / "True1").read_bytes()
    before = raw.index(b'{"loss_window') - 8
    whole = path.with_name("state.bin")
    whole.unlink(missing_ok=True)
    whole.write_bytes(raw[:before] + struct.pack("<Q", len(trailer)) + trailer)
    read_training_state(whole)


def shard_seeds(directory: Path) -> None:
    shards.write_shard(directory / "16", np.arange(9))
    shards.write_shard(directory / "32", np.arange(9, dtype=np.uint32))


def read_shard(path: Path) -> None:
    loader = DataLoader(str(path), 1, 2, vocab_size=70_000)
    loader.next_batch()
    drain(chess_eval.games([path]))


TOKENS = [b"<|endoftext|>", b"a", b"b", b"ab", b"\xff\x00", bytes(255)]


def tokenizer_seeds(directory: Path) -> None:
    write_tokenizer(directory / "6", TOKENS, 0)
    write_tokenizer(directory / "2", [b"a", b"b"], 1)


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(path)
    tokenizer.decode(range(tokenizer.vocab_size))
    for id in range(tokenizer.vocab_size):
        tokenizer.printable(id)
    with contextlib.suppress(RunError):  # not every tokenizer can
        encode_prompt(tokenizer, "abba")


def eval_seeds(directory: Path) -> None:
    example = eval_file.Example(0, 1, np.array([5, 6]), [np.array([7] * n) for n in (1, 2, 3, 1)])
    eval_file.write_eval(directory / "1", [example])
    eval_file.write_eval(directory / "2", [example, replace(example, index=1, label=3)])


def read_eval(path: Path) -> None:
    load_examples(str(path), 8, 16, 50257, Source("--mmlu", "--mmlu", "llmc-data mmlu"))


def debug_seeds(directory: Path) -> None:
    x = torch.zeros(1, 2, dtype=torch.int32)
    debug_state.write_debug_state(directory / "a", x, x, torch.zeros(1, 2, 3), 1.0986, parameters_of(SHAPE))


def read_debug_state(path: Path) -> None:
    state = debug_state.read_debug_state(path, SHAPE)
    for array in (state.x, state.y, state.logits, *state.gradients.values()):
        array.sum()


def all_seeds(directory: Path) -> None:
    for name, seeds in (
        *(("model", model_seeds), ("state", state_seeds), ("shard", shard_seeds)),
        *(("tokenizer", tokenizer_seeds), ("eval", eval_seeds), ("debug", debug_seeds)),
    ):
        (own := directory / name).mkdir()
        seeds(own)
        for path in own.iterdir():
            path.rename(directory / f"{name}_{path.name}")
        own.rmdir()
    (directory / "state_llm.c").unlink()  # it needs its model


def inspect(path: Path) -> None:
    drain(inspect_file.inspect_file(path, inspect_file.Options()))


def beside_inspected(directory: Path) -> None:
    """The model of the debug state, and a tokenizer."""
    save_model(directory / "x.bin", SHAPE, "fp32", parameters_of(SHAPE))
    write_tokenizer(directory / "tokenizer.bin", TOKENS, 0)


def journal_seeds(directory: Path) -> None:
    counts = {"train": {"documents": 2}, "val": {}}
    journal = {"items": {"train": 1, "val": 0}, "tokens": {"train": 2, "val": 0}, "counts": counts}
    (directory / "same").write_text(json.dumps({"fingerprint": FINGERPRINT, **journal}))
    (directory / "other").write_text(json.dumps({"fingerprint": 1, **journal}))


def read_journal(path: Path) -> None:
    (path.parent / "train.tokens").write_bytes(bytes(8))
    with contextlib.redirect_stderr(io.StringIO()):
        unfinished = writer._Unfinished(path.parent, np.dtype("<u2"), FINGERPRINT)
    try:
        for split in writer.SPLITS:
            unfinished.tokens(split).sum()
            unfinished.append(split, writer.Encoded(np.arange(2, dtype=np.uint16), writer.Counter(documents=1)))
        unfinished.save()
    finally:
        unfinished.close()


# ---- Hugging Face's files


def hf_config() -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{"vocab_size": 3, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_inner": None},
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }


def hf_seeds(directory: Path) -> None:
    hf.write_model(directory, SHAPE, "bf16", parameters_of(SHAPE), 0)
    for name in (hf.CONFIG, "generation_config.json"):
        (directory / name).unlink()


def beside_weights(directory: Path) -> None:
    (directory / hf.CONFIG).write_text(json.dumps(hf_config()))


def read_hf_model(path: Path) -> None:
    for parameters in hf.parameters(hf.open_model(path.parent, "the hub")):
        for values in parameters.values():
            values.sum()


def hf_header_seeds(directory: Path) -> None:
    hf_seeds(directory)
    raw = (directory / hf.WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    (directory / hf.WEIGHTS).write_bytes(raw[8 : 8 + length])


def read_hf_header(path: Path) -> None:
    """The file is the header alone: without its length, which would be wrong after every insertion."""
    header = path.read_bytes()
    whole = path.with_name(hf.WEIGHTS)
    whole.unlink(missing_ok=True)
    whole.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * sum(map(len_of, SHAPE.parameters()))))
    read_hf_model(whole)


def len_of(parameter: tuple[str, tuple[int, ...]]) -> int:
    name, size = parameter
    return int(np.prod(size if name != "wte" else (SHAPE.vocab_size, size[1])))


def hf_config_seeds(directory: Path) -> None:
    (directory / "a").write_text(json.dumps(hf_config()))
    few = {key: value for key, value in hf_config().items() if key in hf.SIZES}
    (directory / "b").write_text(json.dumps({**few, "model_type": "gpt2", "activation_function": "gelu_new"}))


def beside_config(directory: Path) -> None:
    hf_seeds(directory)


def hf_index_seeds(directory: Path) -> None:
    names = [hf.hf_name(name) for name, _ in SHAPE.parameters()]
    (directory / "a").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}))


def beside_index(directory: Path) -> None:
    hf_seeds(directory)
    (directory / hf.WEIGHTS).rename(directory / "one.safetensors")
    beside_weights(directory)


def tokenizer_json(decoder: str) -> str:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<|endoftext|>": 4}, "merges": ["a b"]}
    added = {"id": 4, "content": "<|endoftext|>", "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    kinds: Mapping[str, object] = {
        "ByteLevel": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    }
    before = after = kinds[decoder.removeprefix("Sequence of ")]
    normalizer = None
    if decoder.startswith("Sequence"):
        split = {"type": "Split", "pattern": {"Regex": " ?a+"}, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, {"type": "FixedLength", "length": 5}, before]}
        after = {"type": "Sequence", "decoders": [after, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
        steps = [{"type": "Replace", "pattern": {"String": "b"}, "content": "a"}, {"type": "NFC"}]
        normalizer = {"type": "Sequence", "normalizers": steps}
    return json.dumps(
        {
            **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [added]},
            **{"normalizer": normalizer, "pre_tokenizer": before, "post_processor": None, "decoder": after},
            "model": model,
        }
    )


def tokenizer_json_seeds(directory: Path) -> None:
    for decoder in ("ByteLevel", "Metaspace", "Sequence of ByteLevel"):
        tokenizers.Tokenizer.from_str(tokenizer_json(decoder))
        (directory / decoder).write_text(tokenizer_json(decoder))


def read_tokenizer_json(path: Path) -> None:
    with contextlib.suppress(hf_tokenizer.NoTokenizer):
        hf_tokenizer.read_tokenizer(path.parent, 5, 4)
    encoder = make_encoder(str(path), list)
    encoder.token_bytes()
    encoder.encode("ab ba <|endoftext|>")


def rank_file_seeds(directory: Path) -> None:
    (directory / "a").write_text("YQ== 0\nYg== 1\nYWI= 2\n")


def read_rank_file(path: Path) -> None:
    make_encoder(str(path), list)


# ---- text files


def log_seeds(directory: Path) -> None:
    (directory / "a").write_text("s:0 tel:10.5000\ns:0 trl:9.2500 lr:0.000300 norm:1.00\ns:20 eval:0.2500\ns:1 trl:na")
    (directory / "b").write_text("s:1 trl:nan\n")


def json_log_seeds(directory: Path) -> None:
    record = {"loss": 9.25, "norm": 1.0, "lr": 3e-4, "ms": 20.0, "tokens_per_s": 1e5, "mfu": None}
    lines = [{"step": 0, "tokens": 0, "val_loss": 10.5}, {"step": 1, "tokens": 64, **record}]
    (directory / "a").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_log(path: Path) -> None:
    run = plot.read_run(path)
    for series in run.log.series.values():
        plot.running_mean(plot.points(series, 512.0)[1])
    if run.log.tokens_per_step is not None:
        float(run.log.tokens_per_step)


def algorithms_seeds(directory: Path) -> None:
    algorithms.write_algorithms(directory / "a", {"GPU": {"product": [0, 2**64 - 1] * 4, "other": [0] * 8}, "none": {}})


def algorithm_lists_seeds(directory: Path) -> None:
    algorithms_seeds(directory)
    (directory / "a").write_text(json.dumps(algorithms.read_algorithms(directory / "a")))


def read_algorithm_lists(path: Path) -> None:
    """The file is the lists alone: with the checksum of what they are."""
    try:
        devices = json.loads(path.read_bytes())
        content = {"format": algorithms.FORMAT, "checksum": algorithms.checksum(devices), "devices": devices}
    except (ValueError, RecursionError) as error:
        raise RunError("no lists") from error
    whole = path.with_name(algorithms.NAME)
    whole.write_text(json.dumps(content))
    for products in algorithms.read_algorithms(whole).values():
        for words in products.values():
            struct.pack("<8Q", *words)  # as the core takes them


def config_toml_seeds(directory: Path) -> None:
    write_config_file(directory / "all", TrainConfig())
    (directory / "few").write_text('batch-size = 8\nlearning_rate = 1e-3\nresume = true\nmodel = "d12"\n')


def config_yaml_seeds(directory: Path) -> None:
    (directory / "a").write_text("batch-size: 8\nlearning-rate: 1e-3\nresume: true\nmodel: d12\n")
    (directory / "b").write_text("# none\n")


def read_config(path: Path) -> None:
    TrainConfig(**read_config_file(str(path)))


def choices_seeds(directory: Path) -> None:
    line = json.dumps({"ctx": "a", "endings": ["b", "c", "d", "é"], "label": 3})
    (directory / "a").write_text(f"{line}\n\n{line}\n")


def read_choices(path: Path) -> None:
    encoder = make_encoder("bytes", list)
    for index, question in enumerate(choices.read_jsonl(path)):
        choices.encode(encoder, index, question)


def mmlu_seeds(directory: Path) -> None:
    (directory / "a").write_bytes(b'"Find x, if\n2x = ""4"".",1,2,None,4,B\r\nWhich flies?,bat,cod,dog,cow,A\n')


def read_mmlu(path: Path) -> None:
    drain(mmlu.read_mmlu(path.parent))


def archive_seeds(directory: Path) -> None:
    for mode in ("w", "w:gz"):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode=mode) as archive:
            for name in ("a_test.csv", "b"):
                member = tarfile.TarInfo(f"data/{name}")
                member.size = 12
                archive.addfile(member, io.BytesIO(b"q,1,2,3,4,A\n"))
        (directory / mode.replace(":", "")).write_bytes(content.getvalue())


def read_archive(path: Path) -> None:
    drain(mmlu.read_mmlu(path))


def stories_seeds(directory: Path) -> None:
    (directory / "a").write_text(json.dumps([{"story": " Once.", "source": "GPT-4"}, {"story": ""}]))


def lines_seeds(directory: Path) -> None:
    (directory / "a").write_text('{"text": "a \\ud83d b"}\n\n{"text": "", "id": 1}\n')


def read_documents(path: Path) -> None:
    encode = text.EncodeText(make_encoder("bytes", list))
    sources = source.find_sources([path])
    for item in text.file_items(sources, "text", True):
        encode(item)
    make_encoder("chars", lambda: text._all_text(sources, "text"))


def compressed_seeds(directory: Path) -> None:
    content = b"One line.\nAnother \xc3\xa9\n" * 5
    (directory / "gz").write_bytes(gzip.compress(content))
    (directory / "zst").write_bytes(zstandard.compress(content) * 2)


def read_compressed(path: Path) -> None:
    """As .zst or .gz, by what it looks like."""
    suffix = ".gz" if path.read_bytes()[:1] == b"\x1f" else ".zst"
    read_documents(path.rename(path.with_name(f"text{suffix}")))


def positions_seeds(directory: Path) -> None:
    (directory / "a").write_text("f2f3 e7e5 g2g4 d8h4\n\na2a4 b7b5 a4b5 a7a6 b5a6 c8b7 a6b7 d7d6 b7a8q\n")


def read_positions(path: Path) -> None:
    drain(iter(chess_eval.read_positions(str(path), 64)))


SQUARE = tuple(file + rank for file in "abcdefgh" for rank in "12345678")
TRAILER = ("loss_window", "norm_window", "consumed", "epoch", '"B"', '"T"')
CONFIG_WORDS = ("batch-size", "seq-len", "resume", "seed", "true", "nan", "0x", "1_0", "2024-01-01", "'''", "[a]", "{}")

TARGETS = {
    "model": Target("x.bin", read_model, model_seeds),
    "state": Target("x.bin", read_training_state, state_seeds, beside_state, TRAILER),
    "state_trailer": Target("trailer", read_state_trailer, trailer_seeds, beside_trailer),
    "shard": Target("x.bin", read_shard, shard_seeds),
    "tokenizer": Target("x.bin", read_tokenizer, tokenizer_seeds),
    "eval": Target("x.bin", read_eval, eval_seeds),
    "debug_state": Target("x.bin", read_debug_state, debug_seeds),
    "inspect": Target("x_debug_state.bin", inspect, all_seeds, beside_inspected, TRAILER),
    "journal": Target("journal.json", read_journal, journal_seeds, words=("1e999", "null", "-1")),
    "safetensors": Target(hf.WEIGHTS, read_hf_model, hf_seeds, beside_weights),
    "safetensors_header": Target("header", read_hf_header, hf_header_seeds, beside_weights, ("F32", "BF16", "I64")),
    "hf_config": Target(hf.CONFIG, read_hf_model, hf_config_seeds, beside_config, tuple(hf.SIZES)),
    "hf_index": Target(hf.INDEX, read_hf_model, hf_index_seeds, beside_index, ("../", "/etc/passwd", "\\u0000")),
    "tokenizer_json": Target(
        "tokenizer.json", read_tokenizer_json, tokenizer_json_seeds, words=("Precompiled", "precompiled_charsmap")
    ),
    "rank_file": Target("x.tiktoken", read_rank_file, rank_file_seeds),
    "main_log": Target("main.log", read_log, log_seeds, words=("trl:", "tel:", "eval:", "norm:", "inf", "1e+30")),
    "json_log": Target("main.jsonl", read_log, json_log_seeds, words=("step", "tokens", "NaN", "1e999", "null")),
    "algorithms": Target(
        algorithms.NAME, algorithms.read_algorithms, algorithms_seeds, words=("1e999", "null", "true")
    ),
    "algorithm_lists": Target("lists", read_algorithm_lists, algorithm_lists_seeds, words=("1e999", "-1", "9" * 20)),
    "config_toml": Target("config.toml", read_config, config_toml_seeds, words=CONFIG_WORDS),
    "config_yaml": Target(
        "config.yaml", read_config, config_yaml_seeds, words=(*CONFIG_WORDS, "<<:", "&a", "*a", "!!")
    ),
    "choices": Target("x.jsonl", read_choices, choices_seeds, words=("\\ud83d", "null", "endings", "label")),
    "mmlu": Target("x_test.csv", read_mmlu, mmlu_seeds),
    "archive": Target("x.tar", read_archive, archive_seeds, words=("ustar", "././@LongLink", "GNU.sparse.map=1")),
    "stories": Target("x.json", lambda path: drain(read_stories([path])), stories_seeds),
    "lines": Target("x.jsonl", read_documents, lines_seeds, words=("\\ud83d", "null", "1e999")),
    "compressed": Target("x.any", read_compressed, compressed_seeds),
    "positions": Target("x.txt", read_positions, positions_seeds, words=SQUARE),
}
