"""llmc-convert: against transformers, safetensors and tokenizers, bytes by hand, and every way it refuses."""

import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_data import rewrite, without_checksum

from llmc import _C, hf_hub, json_text
from llmc.cli import run
from llmc.cli.convert import _main
from llmc.model_file import ModelShape, load_model, read_model_header, save_model
from llmc.models import shape as shape_of
from llmc.tokenizer import Tokenizer, gpt2, write_tokenizer

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

T, V, L, NH, C = 24, 90, 3, 2, 16
SIZES = {"n_positions": T, "vocab_size": V, "n_layer": L, "n_head": NH, "n_embd": C}
SHAPE = ModelShape(T, V, 128, L, NH, C)
MATRICES = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
LAYER_TENSORS = [  # in the order of the file
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
]


def call(*arguments: object) -> None:
    run("llmc-convert", _main, [str(argument) for argument in arguments])


def refuse(capsys: pytest.CaptureFixture[str], status: int, *arguments: object) -> str:
    """Expect failure with this status and one line, and no change of any file; return the line."""
    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    err = capsys.readouterr().err
    assert caught.value.code == status
    assert err.startswith("llmc-convert: error: ") and err.count("\n") == 1
    assert contents() == before
    return err.removeprefix("llmc-convert: error: ").strip()


def contents() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_hf(name: str = "source", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A directory of transformers with random values everywhere; returns the model."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **config})).to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # its biases are 0 and its layernorms 1, where errors hide
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(name)
    return model


def edit_config(directory: str, **changes: Any) -> None:
    path = Path(directory, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: str, edit: Any) -> None:
    path = Path(directory, "model.safetensors")
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file(edit(tensors), path, metadata={"format": "pt"})


def make_bin(name: str, dtype: Any = "fp32", shape: ModelShape = SHAPE, seed: int = 0) -> dict[str, torch.Tensor]:
    """A model file with random values and zeros in the rows of padding; returns the parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: torch.randn(size, generator=generator) for name, size in shape.parameters()}
    parameters["wte"][shape.vocab_size :] = 0
    save_model(name, shape, dtype, parameters)
    return parameters


def values_by_hand(state: dict[str, torch.Tensor]) -> np.ndarray:
    """The values of the model file in its order, fp32, from transformers' tensors."""
    wte = np.zeros((128, C), np.float32)
    wte[:V] = state["transformer.wte.weight"]
    arrays = [wte, state["transformer.wpe.weight"].numpy()]
    for tensor in LAYER_TENSORS:
        for layer in range(L):
            array = state[f"transformer.h.{layer}.{tensor}"].numpy()
            arrays.append(array.transpose() if tensor in MATRICES else array)
    arrays += [state["transformer.ln_f.weight"].numpy(), state["transformer.ln_f.bias"].numpy()]
    return np.concatenate([array.ravel() for array in arrays])


def header_by_hand(version: int) -> bytes:
    return np.array([20240326, version, T, V, L, NH, C, 128] + [0] * 248, "<i4").tobytes()


# ---- exactness


def test_the_file_byte_for_byte(capsys: pytest.CaptureFixture[str]) -> None:
    values = values_by_hand(make_hf().state_dict())
    call("source", "model.bin")
    assert without_checksum("model.bin") == header_by_hand(3) + values.tobytes()
    call("source", "model_bf16.bin")
    bits = values.view(np.uint32).astype(np.uint64)
    to_nearest_even = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    assert without_checksum("model_bf16.bin") == header_by_hand(5) + to_nearest_even.tobytes()
    call("source", "any.bin", "--precision", "bf16")
    assert Path("any.bin").read_bytes() == Path("model_bf16.bin").read_bytes()
    call("source", "in_fp32_bf16.bin", "--precision", "fp32")
    assert Path("in_fp32_bf16.bin").read_bytes() == Path("model.bin").read_bytes()
    size = Path("model.bin").stat().st_size
    assert capsys.readouterr().out.splitlines()[:3] == [
        "no tokenizer file: the source has no tokenizer.json, and no vocab.json with merges.txt",
        "writing model.bin",
        f"model.bin: 3 layers, 16 channels, 2 heads, context 24, vocabulary 90, {len(values):,} parameters in fp32, "
        f"{size:,} bytes",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(dtype: torch.dtype) -> None:
    """transformers' own file has the same tensors, and it loads ours without a word about missing ones."""
    model = make_hf(dtype=dtype)
    call("source", "model.bin")
    call("model.bin", "again")
    ours = safetensors_torch.load_file("again/model.safetensors")
    theirs = safetensors_torch.load_file("source/model.safetensors")
    assert ours.keys() == theirs.keys()
    metadata = [safetensors.safe_open(f"{name}/model.safetensors", "pt").metadata() for name in ("again", "source")]
    assert metadata[0] == metadata[1]
    assert all(ours[name].dtype == dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained("again", output_loading_info=True)
    assert type(loaded) is transformers.GPT2LMHeadModel and loaded.dtype == dtype
    assert not any(info.values())
    assert all(torch.equal(values, loaded.state_dict()[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_back_and_there_with_any_bits(dtype: str) -> None:
    """NaNs with their payloads, infinities, negative zeros."""
    make_bin("model.bin", dtype)
    raw = bytearray(Path("model.bin").read_bytes())
    bits = np.frombuffer(raw, "u1")[1024:].reshape(-1, 4 if dtype == "fp32" else 2)
    bits[: V * C] = np.random.default_rng(3).integers(0, 256, bits[: V * C].shape)
    bits[128 * C :] = np.random.default_rng(4).integers(0, 256, bits[128 * C :].shape)
    rewrite("model.bin", raw)
    call("model.bin", "directory")
    call("directory", "again.bin")
    assert Path("again.bin").read_bytes() == Path("model.bin").read_bytes()


def test_from_file_to_directory_in_another_precision() -> None:
    parameters = make_bin("model.bin")
    call("model.bin", "rounded", "--precision", "bf16")
    wte = safetensors_torch.load_file("rounded/model.safetensors")["transformer.wte.weight"]
    assert torch.equal(wte, parameters["wte"][:V].bfloat16())
    assert transformers.GPT2LMHeadModel.from_pretrained("rounded").dtype == torch.bfloat16
    call("rounded", "wide.bin", "--precision", "fp32")
    call("wide.bin", "narrow_bf16.bin")
    call("rounded", "direct.bin")
    assert Path("narrow_bf16.bin").read_bytes() == Path("direct.bin").read_bytes()
    assert read_model_header("direct.bin") == (SHAPE, "bf16")


def test_half_precision_is_kept_in_fp32() -> None:
    model = make_hf(dtype=torch.float16)
    call("source", "model.bin")
    values = values_by_hand({name: values.float() for name, values in model.state_dict().items()})
    assert without_checksum("model.bin") == header_by_hand(3) + values.tobytes()


# ---- the same function


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(attention: str) -> None:
    model = make_hf(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    call("source", "model.bin")
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    ours = core_model("model.bin", batch_size=2)
    ours.forward(tokens)
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.1
    assert (ours.logits(0, 2 * T).view(2, T, V) - expected).abs().max() <= 2e-4


def core_model(path: str, batch_size: int = 1) -> Any:
    model = _C.GPT2(_C.GPT2Config(**asdict(SHAPE)), _C.Options(batch_size=batch_size, seq_len=T))
    load_model(path, model.parameters())
    return model


def test_greedy_tokens() -> None:
    """Of the model with other weights: what transformers writes from our file, and ours from theirs."""
    make_bin("model.bin", seed=5)
    call("model.bin", "directory")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("directory")
    assert theirs.generation_config.eos_token_id is None  # no vocabulary of 90 tokens is known
    start = [3, 1, 4]
    expected = theirs.generate(torch.tensor([start]), max_new_tokens=T - 3, do_sample=False)[0].tolist()
    ours, tokens = core_model("model.bin"), list(start)
    while len(tokens) < T:
        ours.forward(torch.tensor([tokens]))
        tokens.append(int(ours.logits(len(tokens) - 1, len(tokens)).argmax()))
    assert tokens == expected and len(set(tokens)) > 5


# ---- the many forms of one model


def test_shards() -> None:
    make_hf().save_pretrained("sharded", max_shard_size="20KB")
    assert not Path("sharded/model.safetensors").exists() and len(list(Path("sharded").glob("*.safetensors"))) > 2
    call("source", "whole.bin")
    call("sharded", "sharded.bin")
    assert Path("whole.bin").read_bytes() == Path("sharded.bin").read_bytes()


def test_names_of_old_files() -> None:
    """OpenAI's: no prefix, causal masks. Others: a copy of wte as lm_head."""
    make_hf()
    call("source", "model.bin")

    def without_prefix(tensors: Any) -> Any:
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, T, T).tril() for i in range(L)}
        masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(L)}
        return {name.removeprefix("transformer."): values for name, values in tensors.items()} | masks

    edit_weights("source", without_prefix)
    call("source", "old.bin")
    edit_weights("source", lambda tensors: {**tensors, "lm_head.weight": tensors["wte.weight"].clone()})
    edit_config("source", tie_word_embeddings=False)
    call("source", "untied.bin")
    for name in ("old.bin", "untied.bin"):
        assert Path(name).read_bytes() == Path("model.bin").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 4 * C, "reorder_and_upcast_attn": True},
        {"architectures": None},
        {"model_type": None},
    ],
)
def test_configurations_that_mean_the_same(config: dict[str, Any]) -> None:
    make_hf()
    call("source", "plain.bin")
    edit_config("source", **config)
    call("source", "model.bin")
    assert Path("model.bin").read_bytes() == Path("plain.bin").read_bytes()


def test_a_silent_configuration_is_gpt2s() -> None:
    """Read by transformers as GPT2Config()."""
    Path("source").mkdir()
    Path("source/config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}')
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained("source"))
    safetensors_torch.save_file(model.transformer.state_dict(), "source/model.safetensors")
    call("source", "model.bin")
    assert read_model_header("model.bin")[0] == ModelShape(1024, 50257, 50304, 1, 1, 8)


# ---- tokenizers


def test_gpt2s_tokenizer_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    make_bin("model.bin", shape=shape_of(8, 50257, 1, 1, 8))
    Path("models").mkdir()
    write_tokenizer("tokenizer.bin", gpt2().token_bytes(), 50256)
    call("model.bin", "source")
    text = "Zwölf Boxkämpfer  jagen\n\nViktor's 123 \u2603"
    encoder = transformers.AutoTokenizer.from_pretrained("source")
    assert encoder(text)["input_ids"] == gpt2().encode(text).tolist()
    assert (encoder.eos_token_id, encoder.model_max_length) == (50256, 8)
    assert transformers.GenerationConfig.from_pretrained("source").eos_token_id == 50256
    capsys.readouterr()
    call("source", "models/a.bin")
    encoder.save_pretrained("source")  # tokenizer.json
    Path("source/vocab.json").unlink()
    call("source", "models/b.bin")
    assert Path("models/gpt2_tokenizer.bin").read_bytes() == Path("tokenizer.bin").read_bytes()
    size = Path("tokenizer.bin").stat().st_size
    assert [line for line in capsys.readouterr().out.splitlines() if "tokenizer" in line] == [
        f"models/gpt2_tokenizer.bin: vocabulary of 50,257 tokens, {size:,} bytes",
        "models/gpt2_tokenizer.bin: vocabulary of 50,257 tokens (was there already)",
    ]


def test_another_byte_level_vocabulary() -> None:
    """The bytes of every token as the tokenizers package decodes them; added tokens in plain text."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<é und ü>"],  # in its vocabulary, too
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the thin thing they thought the theory\t\n naïve naïveté ☃☃" * 9
    bpe.train_from_iterator([text], trainer)
    size = bpe.get_vocab_size()
    bpe.add_special_tokens(["[ ☃ ]"])
    make_hf(vocab_size=size + 1)
    bpe.save("source/tokenizer.json")
    call("source", "model.bin")
    tokenizer = Tokenizer("tokenizer.bin")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (size + 1, 0)
    assert tokenizer.decode(bpe.encode(text).ids) == text.encode()
    assert tokenizer.tokens[:2] == [b"<|endoftext|>", "<é und ü>".encode()]
    assert tokenizer.tokens[size] == "[ ☃ ]".encode()
    assert sorted(token for token in tokenizer.tokens if len(token) == 1) == [bytes([byte]) for byte in range(256)]
    for id in range(size):
        assert tokenizer.tokens[id].decode("utf-8", "replace") == bpe.decode([id], skip_special_tokens=False)


def write_vocabulary(directory: str, tokens: list[str]) -> None:
    Path(directory, "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    Path(directory, "merges.txt").write_text("#version: 0.2\n")


def test_end_of_text_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(vocab_size=4, eos_token_id=2)
    write_vocabulary("source", ["a", "Ġb", "</s>"])
    Path("source/added_tokens.json").write_text('{"[ ü ]": 3}')
    call("source", "model.bin")
    tokenizer = Tokenizer("tokenizer.bin")
    assert tokenizer.tokens == [b"a", b" b", b"</s>", "[ ü ]".encode()]
    assert tokenizer.end_of_text == 2
    edit_config("source", eos_token_id=[1, 2])
    Path("other").mkdir()
    capsys.readouterr()
    call("source", "other/model.bin")
    assert capsys.readouterr().out.splitlines()[0] == (
        "no tokenizer file: it has no token <|endoftext|> and config.json no eos_token_id"
    )


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (["a", "b", "<|endoftext|>"], "its tokenizer has 3 tokens up to 2, the model 4"),
        (["a", "b", "c", "d", "<|endoftext|>"], "its tokenizer has 5 tokens up to 4, the model 4"),
        (["▁a", "b", "c", "<|endoftext|>"], "the character '▁' in its vocabulary stands for no byte"),
        (["a", "b" * 256, "c", "<|endoftext|>"], "token 1 has 256 bytes, a tokenizer file takes 1 to 255"),
        (["a", "", "c", "<|endoftext|>"], "token 1 has 0 bytes, a tokenizer file takes 1 to 255"),
    ],
)
def test_tokenizers_that_do_not_fit(capsys: pytest.CaptureFixture[str], tokens: list[str], reason: str) -> None:
    make_hf(vocab_size=4)
    write_vocabulary("source", tokens)
    call("source", "model.bin")
    assert capsys.readouterr().out.splitlines()[0] == f"no tokenizer file: {reason}"
    assert Path("model.bin").exists() and not Path("tokenizer.bin").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": {"type": "Metaspace"}, "added_tokens": []},
        {"model": {"type": "BPE", "vocab": {"a": 0}}, "decoder": None, "added_tokens": []},
    ],
)
def test_other_kinds_of_tokenizer(capsys: pytest.CaptureFixture[str], content: dict[str, Any]) -> None:
    make_hf()
    Path("source/tokenizer.json").write_text(json.dumps(content))
    call("source", "model.bin")
    assert capsys.readouterr().out.splitlines()[0] == "no tokenizer file: tokenizer.json describes no byte-level BPE"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"vocab": {"a": "0", "b": 1}}}, "its vocabulary has ids that are no whole numbers"),
        ({"added_tokens": [{"content": "c", "id": None}]}, "its vocabulary has ids that are no whole numbers"),
        ({"added_tokens": [{"content": "\ud83d", "id": 1}]}, "its added token '\\ud83d' is no Unicode text"),
        ({"model": {"vocab": 5}}, "tokenizer.json describes no byte-level BPE"),
        ({"model": {"vocab": ["ab", "cde"]}}, "tokenizer.json describes no byte-level BPE"),
        ({"decoder": {"type": []}}, "tokenizer.json describes no byte-level BPE"),
    ],
)
def test_damaged_tokenizers(capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str) -> None:
    make_hf()
    content = {"model": {"vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}, "added_tokens": [], **changes}
    Path("source/tokenizer.json").write_text(json.dumps(content))
    call("source", "model.bin")
    assert capsys.readouterr().out.splitlines()[0] == f"no tokenizer file: {reason}"


def test_the_chess_vocabulary_is_not_exported(capsys: pytest.CaptureFixture[str]) -> None:
    make_bin("model.bin", shape=shape_of(8, 72, 1, 1, 8))
    Path("tokenizer.bin").write_bytes(b"of something else")
    write_tokenizer("chessGPT_tokenizer.bin", [b"<|pad|>"] * 72, 2)
    call("model.bin", "directory")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no tokenizer files: chessGPT_tokenizer.bin is not GPT-2's vocabulary, and has no merges to encode text with"
    )
    names = sorted(path.name for path in Path("directory").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    assert transformers.GenerationConfig.from_pretrained("directory").eos_token_id == 2


def test_no_tokenizer_beside(capsys: pytest.CaptureFixture[str]) -> None:
    make_bin("model.bin")
    write_tokenizer("gpt2_tokenizer.bin", [b"a"] * 5, 2)
    call("model.bin", "directory")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no tokenizer files: there is no tokenizer file of 90 tokens beside model.bin; "
        "the one of its training data belongs there"
    )


# ---- number of tokens


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_more_tokens(dtype: str, precision: str) -> None:
    parameters = make_bin("model.bin", dtype)
    call("model.bin", "more.bin", "--vocab-size", "200", "--precision", precision)
    shape = ModelShape(T, 200, 256, L, NH, C)
    assert read_model_header("more.bin") == (shape, precision)
    loaded = {name: torch.empty(size) for name, size in shape.parameters()}
    load_model("more.bin", loaded)

    def rounded(values: torch.Tensor, *dtypes: str) -> torch.Tensor:
        return values.bfloat16().float() if "bf16" in dtypes else values

    wte = rounded(parameters.pop("wte")[:V], dtype)
    mean = torch.from_numpy(wte.numpy().astype(np.float64).mean(0).astype(np.float32))
    added = rounded(mean, precision).expand(110, C)
    expected = torch.cat([rounded(wte, precision), added, torch.zeros(56, C)])
    assert torch.equal(loaded.pop("wte"), expected)
    assert all(torch.equal(loaded[name], rounded(parameters[name], dtype, precision)) for name in parameters)


def test_fewer_tokens() -> None:
    """And back: what is cut off and padded keeps the rest, bit by bit."""
    parameters = make_bin("model.bin")
    call("model.bin", "fewer.bin", "--vocab-size", "65")
    shape = shape_of(T, 65, L, NH, C)
    parameters["wte"][65:] = 0
    save_model("expected.bin", shape, "fp32", parameters)
    assert Path("fewer.bin").read_bytes() == Path("expected.bin").read_bytes()
    call("model.bin", "more.bin", "--vocab-size", "130")
    call("more.bin", "again.bin", "--vocab-size", "90")
    assert Path("again.bin").read_bytes() == Path("model.bin").read_bytes()


def test_padding_of_other_programs_is_left_out() -> None:
    """A file without padding; one whose padding is not zero."""
    parameters = make_bin("exact.bin", shape=ModelShape(T, V, V, L, NH, C))
    wte = torch.cat([parameters["wte"], torch.ones(38, C)])
    save_model("ones.bin", SHAPE, "fp32", {**parameters, "wte": wte})
    wte[V:] = 0
    save_model("zeros.bin", SHAPE, "fp32", {**parameters, "wte": wte})
    for name in ("exact", "ones"):
        call(f"{name}.bin", name)
        call(name, f"{name}_again.bin")
        assert Path(f"{name}_again.bin").read_bytes() == Path("zeros.bin").read_bytes()


# ---- the hub


def test_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    make_hf("cache")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    call("gpt2", "model_bf16.bin")
    assert capsys.readouterr().out.splitlines()[0] == "downloading openai-community/gpt2 from the Hugging Face hub"
    assert asked == [("openai-community/gpt2", ["config.json"]), ("openai-community/gpt2", hf_hub.MODEL)]
    call("cache", "expected_bf16.bin")
    assert Path("model_bf16.bin").read_bytes() == Path("expected_bf16.bin").read_bytes()
    edit_config("cache", architectures=["BertModel"], model_type="bert")  # asked for nothing more than that
    asked.clear()
    line = refuse(capsys, 1, "owner/bert.base-1", "x.bin")
    assert line == 'cache/config.json names "BertModel", model_type "bert": only a GPT2LMHeadModel can be converted'
    assert asked == [("owner/bert.base-1", ["config.json"])]
    edit_config("cache", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    Path("cache/model.safetensors").unlink()
    assert refuse(capsys, 1, "owner/old", "x.bin").startswith("owner/old has no model.safetensors; a pickle (pytorch_")


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("owner/name_1.5-x", "owner/name_1.5-x"),
        ("gpt3", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./b", None),
        ("../b", None),
    ],
)
def test_names_of_the_hub(name: str, full: str | None) -> None:
    assert hf_hub.full_name(name) == full


def test_failed_downloads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    not_found = huggingface_hub.errors.RepositoryNotFoundError
    not_found = not_found.__new__(not_found)  # its constructor asks for the answer of a server
    for error, line in (
        (not_found, "owner/name is neither a directory nor a public model of the Hugging Face hub: check the name"),
        (
            RuntimeError("No route to host.\nMore."),
            "cannot download owner/name from the Hugging Face hub (No route to host.): check the network, or download "
            "the model elsewhere and give its directory",
        ),
        (TimeoutError(), "cannot download owner/name from the Hugging Face hub (TimeoutError): check the network"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        assert refuse(capsys, 1, "owner/name", "model.bin").startswith(line)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"activation_function": "relu"},
            'source/config.json: activation_function is "relu", llmc\'s GPT-2 has "gelu_new" or "gelu_pytorch_tanh": '
            "this model cannot be converted",
        ),
        ({"n_inner": 65}, "source/config.json: n_inner is 65, llmc's GPT-2 has null or 64"),
        ({"layer_norm_epsilon": 1e-6}, "source/config.json: layer_norm_epsilon is 1e-06, llmc's GPT-2 has 1e-05"),
        ({"scale_attn_weights": False}, "source/config.json: scale_attn_weights is false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "source/config.json: scale_attn_by_inverse_layer_idx is true"),
        ({"add_cross_attention": True}, "source/config.json: add_cross_attention is true"),
        ({"quantization_config": {"bits": 4}}, 'source/config.json: quantization_config is {"bits": 4}'),
        ({"n_layer": 0}, "source/config.json: n_layer is 0, it must be between 1 and 1048576"),
        ({"n_embd": "16"}, 'source/config.json: n_embd is "16", it must be between 1 and 1048576'),
        ({"n_head": 3}, "source/config.json is damaged: n_head = 3 does not divide n_embd = 16"),
        ({"n_head": 4}, "source/config.json: channels/num_heads is 4: head sizes must be multiples of 8 up to 128"),
        ({"n_layer": 4}, "source: transformer.h.3.ln_1.weight is in none of its model.safetensors files"),
        ({"n_layer": 2}, "source/model.safetensors: transformer.h.2.attn.c_attn.bias is no parameter of a GPT2LMHead"),
        (
            {"n_positions": 23},
            "source/model.safetensors: transformer.wpe.weight has shape (24, 16), by config.json it is (23, 16)",
        ),
        (
            {"tie_word_embeddings": False},
            "source: config.json has tie_word_embeddings = false, but there is no lm_head",
        ),
        (
            {"architectures": ["GPT2DoubleHeadsModel"]},
            'source/config.json names "GPT2DoubleHeadsModel", model_type "gpt2": only a GPT2LMHeadModel can be ',
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, 'source/config.json names "LlamaForCausalLM"'),
        ({"architectures": [], "model_type": "mamba"}, 'source/config.json names no architecture, model_type "mamba"'),
        ({"architectures": 4, "model_type": "gpt2"}, 'source/config.json names 4, model_type "gpt2": '),
        ({"architectures": None, "model_type": None}, "source/config.json names no architecture, model_type null"),
    ],
)
def test_configurations(capsys: pytest.CaptureFixture[str], config: dict[str, Any], message: str) -> None:
    make_hf()
    edit_config("source", **config)
    assert refuse(capsys, 1, "source", "model.bin").startswith(message)


def test_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[Any, str]] = [
        (
            lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] * 1.001},
            "source/model.safetensors: lm_head.weight differs from transformer.wte.weight: a model file has one matrix",
        ),
        (
            lambda t: {**t, "score.weight": torch.zeros(1)},
            "source/model.safetensors: score.weight is no parameter of a GPT2LMHeadModel with 3 layers",
        ),
        (
            lambda t: {**t, "wte.weight": t["transformer.wte.weight"].clone()},
            "source/model.safetensors: wte.weight is also in source/model.safetensors as transformer.wte.weight: ",
        ),
        (
            lambda t: {**t, "transformer.ln_f.bias": t["transformer.ln_f.bias"].double()},
            "source/model.safetensors: transformer.ln_f.bias has dtype F64, known are F32, F16, BF16",
        ),
        (
            lambda t: {**t, "transformer.h.1.mlp.c_fc.weight": t["transformer.h.1.mlp.c_fc.weight"].T.contiguous()},
            "source/model.safetensors: transformer.h.1.mlp.c_fc.weight has shape (64, 16), by config.json it is (",
        ),
        (
            lambda t: {name: t[name] for name in t if name != "transformer.h.2.attn.c_proj.bias"},
            "source: transformer.h.2.attn.c_proj.bias is in none of its model.safetensors files: copy or download them",
        ),
    ]
    for edit, message in cases:
        make_hf()
        edit_weights("source", edit)
        line = refuse(capsys, 1, "source", "model.bin")
        assert line.startswith(message)


@pytest.mark.parametrize("size", [0, 4, 500, -1])
def test_truncated_weights(capsys: pytest.CaptureFixture[str], size: int) -> None:
    make_hf()
    whole = Path("source/model.safetensors").read_bytes()
    Path("source/model.safetensors").write_bytes(whole[:size])
    line = refuse(capsys, 1, "source", "model.bin")
    assert line.startswith("source/model.safetensors is truncated or damaged (")
    assert line.endswith("): copy or download it again")


def test_shards_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf().save_pretrained("sharded", max_shard_size="20KB")
    last = max(Path("sharded").glob("*.safetensors"))
    last.rename("elsewhere")
    assert refuse(capsys, 1, "sharded", "model.bin") == (
        f"sharded/model.safetensors.index.json names {last.name}, which is not beside it: copy or download it, too"
    )
    elsewhere = str(Path("elsewhere").absolute())
    names = (1, "", "..", "../elsewhere", elsewhere, "sharded/../elsewhere")  # never a file of another directory
    for content in ("{}", '{"weight_map": {}}', *(json.dumps({"weight_map": {"a": name}}) for name in names)):
        Path("sharded/model.safetensors.index.json").write_text(content)
        assert refuse(capsys, 1, "sharded", "model.bin").startswith(
            "sharded/model.safetensors.index.json is damaged: its weight_map"
        )
    long = "a" * 300  # the system has an error of its own for it
    Path("sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": long}}))
    assert f"names {long}, which is not beside it" in refuse(capsys, 1, "sharded", "model.bin")


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf()
    with monkeypatch.context() as context:
        context.setattr(json_text, "MAX_BYTES", 99)
        line = "source/config.json is damaged, it is no JSON (it has more than 99 bytes): copy or download it again"
        assert refuse(capsys, 1, "source", "model.bin") == line
    for content, line in (
        ("{", "source/config.json is damaged, it is no JSON ("),
        ("[]", "source/config.json is damag"),
        ("[" * 100_000, "source/config.json is damaged, it is no JSON (its brackets are nested too deeply)"),
        ('{"model_type": "gpt2", "n_inner": ' + "[" * 900 + "]" * 900 + "}", "source/config.json: n_inner is "),
    ):
        Path("source/config.json").write_text(content)
        assert refuse(capsys, 1, "source", "model.bin").startswith(line)
    Path("source/config.json").unlink()
    assert refuse(capsys, 1, "source", "model.bin") == "cannot read source/config.json: No such file or directory"


def test_pickles(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf()
    Path("source/model.safetensors").rename("source/pytorch_model.bin")
    line = refuse(capsys, 1, "source", "model.bin")
    assert line.startswith("source has no model.safetensors; a pickle (pytorch_model.bin) is not read")
    assert "M.from_pretrained('source').save_pretrained('safe')" in line
    assert refuse(capsys, 1, "source/pytorch_model.bin", "model.bin").startswith(
        "source/pytorch_model.bin is no model file of llmc; a pickle (pytorch_model.bin) is not read"
    )


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf()
    make_bin("model.bin", "bf16")
    Path("notes.txt").write_text("x")
    for arguments, message in (
        ([], "the following arguments are required: SOURCE, TARGET (see llmc-convert --help)"),
        (["source", "other"], "TARGET other must be a model file, such as model.bin, if SOURCE is none"),
        (["source", "x.bin", "--vocab-size", "5"], "--vocab-size 5 needs model files (.bin) as SOURCE and as TARGET"),
        (["model.bin", "x", "--vocab-size", "5"], "--vocab-size 5 needs model files (.bin) as SOURCE and as TARGET"),
        (["model.bin", "x.bin"], "model.bin is in bf16 and has 90 tokens already: change something with --precision"),
        (["model.bin", "x.bin", "--vocab-size", "90"], "model.bin is in bf16 and has 90 tokens already"),
        (["model.bin", "x.bin", "--precision", "bf16"], "model.bin is in bf16 and has 90 tokens already"),
        (["model.bin", "x.bin", "--precision", "fp16"], "argument --precision: invalid choice: 'fp16'"),
        (
            ["model.bin", "x.bin", "--vocab-size", "0"],
            "argument --vocab-size: '0' is not a whole number from 1 to 1048",
        ),
        (
            ["model.bin", "x.safetensors"],
            "TARGET x.safetensors: give the name of a directory, model.safetensors is made",
        ),
        (["source", "tokenizer.bin"], "TARGET tokenizer.bin is the name of a tokenizer file: choose another"),
        (["source", "gpt2_tokenizer.bin"], "TARGET gpt2_tokenizer.bin is the name of a tokenizer file"),
        (["notes.txt", "x.bin"], "SOURCE notes.txt is a file, but no model file (.bin): give the directory that it is"),
    ):
        assert refuse(capsys, 2, *arguments).startswith(message)


def test_sources_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf()
    make_bin("model.bin")
    Path("empty").mkdir()
    write_tokenizer("notmodel.bin", [b"a"], 0)
    for arguments, message in (
        (["source", "model.bin"], "model.bin exists: remove it or choose another name"),
        (["model.bin", "source"], "source exists: remove it or choose another name"),
        (["model.bin", "empty"], "empty exists: remove it or choose another name"),
        (["model.bin", "."], ". exists: remove it or choose another name"),
        (["source", "absent/x.bin"], "absent/x.bin: absent is not a directory; make it or choose another one"),
        (["model.bin", "absent/x"], "absent/x: absent is not a directory; make it or choose another one"),
        (["absent.bin", "x"], "cannot read model checkpoint absent.bin: No such file or directory"),
        (["notmodel.bin", "x"], "notmodel.bin is not a model checkpoint: it is a tokenizer"),
        (
            ["./absent", "x.bin"],
            "there is no directory ./absent: give a directory with config.json and model.safetensors, a model file "
            "(.bin), or a model of the Hugging Face hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 or "
            "owner/name",
        ),
    ):
        assert refuse(capsys, 1, *arguments) == message


def test_another_tokenizer_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(vocab_size=2)
    write_vocabulary("source", ["a", "<|endoftext|>"])
    write_tokenizer("tokenizer.bin", [b"b", b"<|endoftext|>"], 1)
    assert refuse(capsys, 1, "source", "model.bin") == (
        "tokenizer.bin exists and is not the tokenizer of this model: remove it or choose another directory"
    )


@pytest.mark.parametrize(
    "arguments", [("source", "x.bin"), ("model.bin", "x"), ("model.bin", "x.bin", "--precision", "bf16")]
)
def test_a_full_disk(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    """No part of the target remains, nor of temporary files. A limit on the size of files stands for the full disk."""
    make_hf()
    make_bin("model.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        line = refuse(capsys, 1, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"cannot write {arguments[1]}: ") and "File too large" in line


def test_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf()
    make_bin("model.bin")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = "Hugging Face's files need the safetensors package: pip install safetensors"
    assert refuse(capsys, 1, "source", "x.bin") == refuse(capsys, 1, "model.bin", "x") == needed
    assert refuse(capsys, 1, "gpt2", "x.bin") == (
        "there is no directory openai-community/gpt2, and a download from the Hugging Face hub needs its package: "
        "pip install huggingface_hub"
    )


def test_help_comes_without_torch() -> None:
    program = "import sys\nfrom llmc.cli.convert import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: llmc-convert [-h] [--precision {bf16,fp32}] [--vocab-size N]")
    assert "llmc-convert gpt2 gpt2_124M_bf16.bin" in result.stdout
