"""llmc-init: a model file with seeded random weights, and the tokenizer that belongs to it."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmc import models
from llmc.build import bytes_by_lifetime, core_config, memory_plan
from llmc.errors import RunError, UsageError
from llmc.machine import memory_bytes
from llmc.model_file import ITEM_BYTES, FileDtype, ModelShape, described, save_model
from llmc.tokenizer import FILE_NAMES, LLMC_FILES, Tokenizer, chess_token_bytes, gpt2, tokenizer_bytes, write_beside

if TYPE_CHECKING:
    from llmc import _C


def init_model(
    descriptor: str, out: Path | None, precision: FileDtype, seed: int, tokenizer: Path | None
) -> tuple[str, str]:
    """Write both files, and return a line for each. RunError or UsageError, before the first write, if that cannot be.

    descriptor: as of llmc-train -e; out: name of the model file, None for llm.c's; tokenizer: file to take the
    vocabulary size from and to copy. No file is ever replaced.
    """
    source = Tokenizer(tokenizer) if tokenizer else None
    shape = resolve(descriptor, source)
    path = out or Path(f"{models.file_stem(descriptor, shape)}{'_bf16' if precision == 'bf16' else ''}.bin")
    beside = tokenizer_of(shape, source)
    check_paths(path, beside)
    model = random_model(descriptor, shape, precision, seed)
    vocabulary = f"no tokenizer is known for a vocabulary of {shape.vocab_size} tokens: "
    vocabulary += "give its file with --tokenizer, or copy it to tokenizer.bin"
    if beside:
        name, content = beside
        vocabulary = write_beside(path.with_name(name), content, shape.vocab_size)
    save_model(path, shape, precision, model.parameters())  # last: a model without its tokenizer would bar a new try
    return f"{path}: {described(shape)} parameters in {precision}, {path.stat().st_size:,} bytes", vocabulary


def resolve(descriptor: str, source: Tokenizer | None) -> ModelShape:
    """The sizes of the model, whose vocabulary must be that of `source`."""
    if not descriptor.startswith("custom:") and descriptor not in models.named_models():
        raise UsageError(f"{descriptor} is no model: use one of " + "; ".join(models.DESCRIPTORS))
    if source is None and models.takes_vocabulary_of_data(descriptor) and "t=" in descriptor:
        raise UsageError(f"{descriptor} has no vocabulary size: add ,v=SIZE or give a tokenizer file with --tokenizer")
    try:
        shape = models.resolve(descriptor, source.vocab_size if source else None)
    except UsageError as error:
        raise UsageError(str(error).removeprefix("-e ")) from None
    if source and source.vocab_size != shape.vocab_size:
        raise RunError(
            f"--tokenizer {source.path} has {source.vocab_size} tokens, the model {descriptor} {shape.vocab_size}: "
            f"give a tokenizer of {shape.vocab_size} tokens or another model"
        )
    return shape


def tokenizer_of(shape: ModelShape, source: Tokenizer | None) -> tuple[str, bytes] | None:
    """Name and content of the file that belongs beside the model: `source`, or what the vocabulary size stands for."""
    V = shape.vocab_size
    if source:
        return "tokenizer.bin", source.path.read_bytes()
    if V == models.CHESS_VOCAB_SIZE:
        return LLMC_FILES[V], tokenizer_bytes(chess_token_bytes(), models.END_OF_TEXT_IDS[V])
    if V == models.GPT2_VOCAB_SIZE:
        return LLMC_FILES[V], tokenizer_bytes(gpt2().token_bytes(), models.END_OF_TEXT_IDS[V])
    return None


def check_paths(path: Path, beside: tuple[str, bytes] | None) -> None:
    if path.suffix != ".bin":
        raise UsageError(f"--out {path}: the name of a model file ends in .bin, such as model.bin")
    if path.name in FILE_NAMES:
        raise UsageError(f"--out {path} is the name of the tokenizer file: choose another")
    if not path.parent.is_dir():
        raise RunError(f"--out {path}: {path.parent} is not a directory; make it or choose another one")
    if path.exists():
        raise RunError(f"{path} exists: remove it or choose another name with --out")
    if beside and (tokenizer := path.with_name(beside[0])).exists() and tokenizer.read_bytes() != beside[1]:
        raise RunError(
            f"{tokenizer} exists and is not the tokenizer of this model: "
            "remove it or choose another directory with --out"
        )


def random_model(descriptor: str, shape: ModelShape, precision: FileDtype, seed: int) -> "_C.GPT2":
    from llmc import _C

    config = core_config(descriptor, shape)
    options = _C.Options(batch_size=1, seq_len=1, precision=precision)
    lifetimes = bytes_by_lifetime(memory_plan(config, options))
    draws = max(shape.padded_vocab_size, shape.max_seq_len, 4 * shape.channels) * shape.channels  # in fp32, and rounded
    needed = lifetimes["parameters"] + lifetimes["activations"] + (4 + ITEM_BYTES[precision]) * draws
    available = memory_bytes()
    if needed > available:
        raise RunError(
            f"{descriptor} needs {needed // 2**20} MiB of memory to be made, this machine has "
            f"{available // 2**20} MiB: use a smaller model"
        )
    model = _C.GPT2(config, options)
    model.init_random(seed)
    return model
