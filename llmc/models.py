"""Model descriptors: names for the sizes of the GPT-2, GPT-3 and chess families, and a free form for small models."""

import re

from llmc.errors import UsageError
from llmc.model_file import ModelShape

GPT2_VOCAB_SIZE = 50257
CHESS_VOCAB_SIZE = 72
END_OF_TEXT_IDS = {GPT2_VOCAB_SIZE: 50256, CHESS_VOCAB_SIZE: 2}  # by vocabulary size

GPT2_SIZES = {  # layers: (channels, heads)
    6: (384, 6),
    12: (768, 12),
    24: (1024, 16),
    36: (1280, 20),
    48: (1600, 25),
    60: (1920, 30),
    72: (2880, 30),
    84: (3456, 36),
}
CHESS_SIZES = {8: (512, 8), **GPT2_SIZES}
GPT3_SIZES = {  # channels: (layers, head size)
    384: (6, 64),
    768: (12, 64),
    1024: (24, 64),
    1536: (24, 96),
    2048: (24, 128),
    2560: (32, 80),
    4096: (32, 128),
    5120: (40, 128),
    12288: (96, 128),
}

FILE_FAMILIES = {"": "gpt2", "gpt2": "gpt2", "gpt3": "gpt3", "chess": "chessGPT"}  # in llm.c's names of files
VOCAB_MULTIPLE = 128
HEAD_SIZE_MULTIPLE = 8
MAX_HEAD_SIZE = 128
MAX_SIZE = 2**20  # of any size in the free form: more is a typing error


def shape(max_seq_len: int, vocab_size: int, num_layers: int, num_heads: int, channels: int) -> ModelShape:
    padded_vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return ModelShape(max_seq_len, vocab_size, padded_vocab_size, num_layers, num_heads, channels)


def named_models() -> dict[str, ModelShape]:
    """Every descriptor with a fixed size."""
    models = {}
    for L, (C, NH) in GPT2_SIZES.items():
        models[f"d{L}"] = models[f"gpt2:d{L}"] = shape(1024, GPT2_VOCAB_SIZE, L, NH, C)
    for C, (L, HS) in GPT3_SIZES.items():
        models[f"gpt3:c{C}"] = shape(2048, GPT2_VOCAB_SIZE, L, C // HS, C)
    for L, (C, NH) in CHESS_SIZES.items():
        models[f"chess:d{L}"] = shape(1024, CHESS_VOCAB_SIZE, L, NH, C)
    return models


def alternatives(numbers: dict[int, tuple[int, int]]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))


DESCRIPTORS = (
    f"dN or gpt2:dN with N = {alternatives(GPT2_SIZES)}",
    f"gpt3:cN with N = {alternatives(GPT3_SIZES)}",
    f"chess:dN with N = {alternatives(CHESS_SIZES)}",
    "custom:l=4,c=128,h=4,t=64 (layers, channels, heads, context; v=65 for another vocabulary than the data's)",
)


def takes_vocabulary_of_data(descriptor: str) -> bool:
    """True for a free form without v=."""
    return descriptor.startswith("custom:") and "v=" not in descriptor


def resolve(descriptor: str, vocab_size_of_data: int | None) -> ModelShape:
    """The sizes that `descriptor` stands for.

    vocab_size_of_data: vocabulary of the data set's tokenizer, the default of the free form; None if it is not known.
    Raises UsageError, which lists what is accepted, for anything else than an exact descriptor.
    """
    if descriptor.startswith("custom:"):
        return custom(descriptor, vocab_size_of_data)
    models = named_models()
    if descriptor not in models:
        raise UsageError(f"-e {descriptor} is no model: use a .bin file or one of " + "; ".join(DESCRIPTORS))
    return models[descriptor]


def custom(descriptor: str, vocab_size_of_data: int | None) -> ModelShape:
    sizes: dict[str, int] = {}
    for part in descriptor.removeprefix("custom:").split(","):
        match = re.fullmatch(r"([lchtv])=([0-9]{1,7})", part)
        if not match or not 1 <= int(match[2]) <= MAX_SIZE:
            raise UsageError(f"-e {descriptor}: '{part}' is not understood, write it like {DESCRIPTORS[-1]}")
        if match[1] in sizes:
            raise UsageError(f"-e {descriptor}: {match[1]} is given twice")
        sizes[match[1]] = int(match[2])
    missing = [name for name in "lcht" if name not in sizes]
    if missing:
        raise UsageError(f"-e {descriptor}: {missing[0]}= is missing, write it like {DESCRIPTORS[-1]}")
    vocab_size = sizes.get("v", vocab_size_of_data)
    if vocab_size is None:
        raise UsageError(f"-e {descriptor}: the data has no tokenizer to give the vocabulary size, so add ,v=SIZE")
    C, NH = sizes["c"], sizes["h"]
    if C % NH != 0 or (C // NH) % HEAD_SIZE_MULTIPLE != 0 or C // NH > MAX_HEAD_SIZE:
        raise UsageError(
            f"-e {descriptor}: {C} channels in {NH} heads is {C / NH:g} per head, "
            f"it must be a multiple of {HEAD_SIZE_MULTIPLE} up to {MAX_HEAD_SIZE}"
        )
    return shape(sizes["t"], vocab_size, sizes["l"], NH, C)


def file_stem(descriptor: str, shape: ModelShape) -> str:
    """How the name of a file of that model starts: gpt2_d12, chessGPT_d8, custom_l4_c128_h4_t64_v65."""
    family, _, size = descriptor.rpartition(":")
    if family == "custom":
        C, NH = shape.channels, shape.num_heads
        return f"custom_l{shape.num_layers}_c{C}_h{NH}_t{shape.max_seq_len}_v{shape.vocab_size}"
    return f"{FILE_FAMILIES[family]}_{size}"
