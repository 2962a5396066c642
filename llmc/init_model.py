"""llmc-init: a model file with seeded random weights, and the tokenizer that belongs to it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from llmc import models
from llmc.errors import RunError, UsageError
from llmc.machine import memory_bytes
from llmc.model_file import FileDtype, ModelShape, save_model
from llmc.tokenizer import LLMC_FILES, Tokenizer, chess_token_bytes, gpt2, tokenizer_bytes


@dataclass(frozen=True)
class TokenizerFile:
    path: Path
    content: bytes


def init_model(
    descriptor: str, out: Path | None, precision: FileDtype, seed: int, tokenizer_source: Path | None
) -> list[str]:
    """Write both files and return a line for each. An existing file is never replaced: RunError before the first write."""
    from llmc import _C

    source = Tokenizer(tokenizer_source) if tokenizer_source else None
    shape = models.resolve(descriptor, source.vocab_size if source else None)
    path = out or Path(file_name(descriptor, shape, precision))
    tokenizer = tokenizer_file(path.parent, shape, source)
    if path.exists():
        raise RunError(f"{path} exists already: remove it, or choose another name with --out")
    if tokenizer and tokenizer.path.exists() and tokenizer.path.read_bytes() != tokenizer.content:
        raise RunError(f"{tokenizer.path} exists already, and is another tokenizer: remove it, or choose another --out")
    try:
        config = _C.GPT2Config(**asdict(shape))
    except _C.Error as error:
        raise UsageError(f"{descriptor}: {error}") from error
    options = _C.Options(batch_size=1, seq_len=1, precision=precision)
    needed = sum(
        size for _, lifetime, *_, size in _C.plan(config, options) if lifetime in ("parameters", "activations")
    )
    if needed > memory_bytes():
        raise RunError(
            f"{descriptor} needs {needed // 2**20} MiB of memory, this machine has {memory_bytes() // 2**20} MiB: "
            "choose a smaller model"
        )
    model = _C.GPT2(config, options)
    model.init_random(seed)
    save_model(path, shape, precision, model.parameters())
    lines = [
        f"{path}: {descriptor}, {shape.num_parameters} parameters in {precision}, random with seed {seed}, "
        f"{path.stat().st_size} bytes"
    ]
    if tokenizer is None:
        return [
            *lines,
            f"no tokenizer is known for {shape.vocab_size} tokens: one given with --tokenizer is copied here",
        ]
    if not tokenizer.path.exists():
        try:
            tokenizer.path.write_bytes(tokenizer.content)
        except OSError as error:
            raise RunError(f"cannot write {tokenizer.path}: {error.strerror or error}") from error
    return [*lines, f"{tokenizer.path}: its tokenizer of {shape.vocab_size} tokens"]


def file_name(descriptor: str, shape: ModelShape, precision: FileDtype) -> str:
    """llm.c's name for it, as chessGPT_d8_bf16.bin and gpt2_d12.bin; custom_l4_c128_h4_t64_v65_bf16.bin."""
    family, _, size = descriptor.rpartition(":")
    if family == "custom" and "v=" not in size:
        size += f",v={shape.vocab_size}"
    name = {"": "gpt2", "chess": "chessGPT"}.get(family, family)
    size = size.replace("=", "").replace(",", "_")
    return f"{name}_{size}{'_bf16' if precision == 'bf16' else ''}.bin"


def tokenizer_file(directory: Path, shape: ModelShape, source: Tokenizer | None) -> TokenizerFile | None:
    """What belongs beside the model: a copy of the given tokenizer, or the one that the vocabulary size stands for."""
    V = shape.vocab_size
    if source:
        if source.vocab_size != V:
            raise UsageError(
                f"--tokenizer {source.path} has {source.vocab_size} tokens, the model {V}: they must agree"
            )
        return TokenizerFile(directory / "tokenizer.bin", source.path.read_bytes())
    if V == models.CHESS_VOCAB_SIZE:
        content = tokenizer_bytes(chess_token_bytes(), models.END_OF_TEXT_IDS[V])
    elif V == models.GPT2_VOCAB_SIZE:
        content = tokenizer_bytes(gpt2().token_bytes(), models.END_OF_TEXT_IDS[V])
    else:
        return None
    return TokenizerFile(directory / LLMC_FILES[V], content)
