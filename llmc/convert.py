"""llmc-convert: model files from Hugging Face's directories and back, and into another precision or vocabulary size."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmc import hf, hf_hub, models
from llmc.checksum import verify
from llmc.errors import RunError, UsageError
from llmc.hf_tokenizer import NoTokenizer, read_tokenizer, write_gpt2
from llmc.model_file import FileDtype, ModelShape, described, mapped_parameters, read_model_header, save_units
from llmc.tokenizer import FILE_NAMES, Tokenizer, is_gpt2, working_directory_tokenizer, write_beside

if TYPE_CHECKING:
    import torch


def convert(source: str, target: Path, precision: FileDtype | None, vocab_size: int | None) -> Iterator[str]:
    """Make `target`, which must not exist, of `source`; yield a line before and after what takes time.

    Names that end in .bin are model files, other targets directories to be, other sources directories or names of the
    hub. precision None: bf16 for a target named *_bf16.bin, else what keeps the values of the source. vocab_size: of a
    model file made from another. UsageError or RunError, without a trace of the target, if that cannot be.
    """
    from_file, to_file = source.endswith(".bin"), target.suffix == ".bin"
    if vocab_size is not None and not (from_file and to_file):
        raise UsageError(f"--vocab-size {vocab_size} needs model files (.bin) as SOURCE and as TARGET: drop it")
    if not from_file and not to_file:
        raise UsageError(f"TARGET {target} must be a model file, such as model.bin, if SOURCE is none")
    check_target(target)
    if precision is None and target.name.endswith("_bf16.bin"):
        precision = "bf16"
    if not from_file:
        return import_model(source, target, precision)
    if Path(source).name.startswith("pytorch_model"):
        raise RunError(f"{source} is no model file of llmc; {hf.way_out_of_pickle(str(Path(source).parent))}")
    if to_file:
        return change_file(Path(source), target, precision, vocab_size)
    return export_model(Path(source), target, precision)


def check_target(target: Path) -> None:
    if target.suffix == ".safetensors":
        raise UsageError(f"TARGET {target}: give the name of a directory, model.safetensors is made in it")
    if target.name in FILE_NAMES:
        raise UsageError(f"TARGET {target} is the name of a tokenizer file: choose another, such as model.bin")
    if os.path.lexists(target):
        raise RunError(f"{target} exists: remove it or choose another name")
    if not target.parent.is_dir():
        raise RunError(f"{target}: {target.parent} is not a directory; make it or choose another one")


# ---- the three ways


def import_model(source: str, target: Path, precision: FileDtype | None) -> Iterator[str]:
    """From Hugging Face to a model file, and its tokenizer beside it."""
    directory, origin = Path(source), source
    if not directory.is_dir():
        origin = hub_name(source)
        yield f"downloading {origin} from the Hugging Face hub"
        hf.read_config(hf_hub.download(origin, hf_hub.CONFIG_ONLY) / hf.CONFIG)  # before gigabytes of another model
        directory = hf_hub.download(origin, hf_hub.MODEL)
    model = hf.open_model(directory, origin)
    try:
        name, content = read_tokenizer(directory, model.shape.vocab_size, model.end_of_text)
    except NoTokenizer as error:
        yield f"no tokenizer file: {error}"
    else:
        yield write_beside(target.with_name(name), content, model.shape.vocab_size)
    yield from write_file(target, model.shape, precision or model.dtype, hf.parameters(model))


def export_model(source: Path, target: Path, precision: FileDtype | None) -> Iterator[str]:
    """From a model file to a directory for Hugging Face, with GPT-2's tokenizer if the model has it."""
    shape, stored = read_model_header(source)
    verify(source)
    dtype = precision or stored
    tokenizer = tokenizer_of(source, shape.vocab_size)
    end_of_text = tokenizer.end_of_text if tokenizer else models.END_OF_TEXT_IDS.get(shape.vocab_size)
    yield f"writing {target}"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        hf.write_model(temporary, shape, dtype, mapped_parameters(source, shape, stored), end_of_text)
        if tokenizer and is_gpt2(tokenizer.tokens):
            write_gpt2(temporary, shape.max_seq_len)
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave names on empty files
        os.rename(temporary, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = (target / hf.WEIGHTS).stat().st_size
    yield f"{target / hf.WEIGHTS}: {described(shape)} parameters in {dtype}, {size:,} bytes"
    if tokenizer is None:
        yield (
            f"no tokenizer files: there is no tokenizer file of {shape.vocab_size} tokens beside {source}; "
            "the one of its training data belongs there"
        )
    elif not (target / "vocab.json").exists():
        yield f"no tokenizer files: {tokenizer.path} is not GPT-2's vocabulary, and has no merges to encode text with"
    else:
        yield f"{target / 'vocab.json'}, merges.txt, tokenizer_config.json: GPT-2's tokenizer"


def change_file(source: Path, target: Path, precision: FileDtype | None, vocab_size: int | None) -> Iterator[str]:
    """From a model file to another, in another precision or with another vocabulary size."""
    shape, stored = read_model_header(source)
    verify(source)
    dtype, V = precision or stored, vocab_size or shape.vocab_size
    if dtype == stored and shape.vocab_size == V:
        raise UsageError(
            f"{source} is in {stored} and has {V} tokens already: change something with --precision or --vocab-size"
        )
    parameters = mapped_parameters(source, shape, stored)
    if shape.vocab_size != V:
        known = parameters["wte"][: shape.vocab_size]
        shape = models.shape(shape.max_seq_len, V, shape.num_layers, shape.num_heads, shape.channels)
        parameters["wte"] = resized(known, V, shape.padded_vocab_size)
    yield from write_file(target, shape, dtype, ({name: values} for name, values in parameters.items()))


# ---- parts


def hub_name(source: str) -> str:
    name = hf_hub.full_name(source)
    if Path(source).exists():
        raise UsageError(f"SOURCE {source} is a file, but no model file (.bin): give the directory that it is in")
    if not name:
        raise RunError(
            f"there is no directory {source}: give a directory with {hf.CONFIG} and {hf.WEIGHTS}, a model file (.bin), "
            f"or a model of the Hugging Face hub: {', '.join(hf_hub.SHORT_NAMES)} or owner/name"
        )
    return name


def write_file(
    target: Path, shape: ModelShape, dtype: FileDtype, units: Iterator[Mapping[str, "torch.Tensor"]]
) -> Iterator[str]:
    yield f"writing {target}"
    save_units(target, shape, dtype, units)
    if read_model_header(target) != (shape, dtype):
        raise RunError(f"{target} does not hold what was written into it: check the disk")
    yield f"{target}: {described(shape)} parameters in {dtype}, {target.stat().st_size:,} bytes"


def resized(wte: "torch.Tensor", vocab_size: int, padded_vocab_size: int) -> "torch.Tensor":
    """Of embeddings (V, C) the first `vocab_size`, then as many as are missing, then rows of zeros as padding.

    What is missing is the mean of all (V, C), in fp32, which makes a new token at most as probable as the average one.
    Zeros would not do: their logit is 0, those of a trained GPT-2 are far below it, so hardly any other would be drawn.
    """
    import torch

    kept, missing = wte[:vocab_size], vocab_size - len(wte)
    if missing > 0:
        mean = wte.mean(0, dtype=torch.float64).float()
        kept = torch.cat([kept.float(), mean.expand(missing, -1)])
    return torch.nn.functional.pad(kept, (0, 0, 0, padded_vocab_size - vocab_size))


def tokenizer_of(model: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of the model: a file beside it, or in the working directory by llm.c's name."""
    for path in (model.with_name(name) for name in FILE_NAMES):
        with contextlib.suppress(RunError):  # one that is damaged, or another model's, is not this one's
            if path.is_file() and (tokenizer := Tokenizer(path)).vocab_size == vocab_size:
                return tokenizer
    return working_directory_tokenizer(vocab_size)
