"""Tokenizers of Hugging Face's directories: to a tokenizer file from any byte-level BPE, and back for GPT-2's own."""

import shutil
from pathlib import Path

from llmc.hf import read_json, write_json
from llmc.models import GPT2_VOCAB_SIZE
from llmc.tokenizer import END_OF_TEXT, LLMC_FILES, byte_of_character, gpt2, gpt2_directory, is_gpt2, tokenizer_bytes


class NoTokenizer(Exception):
    """Why a directory has no tokenizer that a tokenizer file can hold."""


def read_tokenizer(directory: Path, vocab_size: int, end_of_text: int | None) -> tuple[str, bytes]:
    """Name and content of the tokenizer file of the model in `directory`, by llm.c's name if it is GPT-2's vocabulary.

    end_of_text: its id if no token is called <|endoftext|>. Raises NoTokenizer, and RunError for a damaged file.
    """
    tokens = read_tokens(directory)
    if sorted(tokens) != list(range(vocab_size)):
        raise NoTokenizer(
            f"its tokenizer has {len(tokens)} tokens up to {max(tokens, default=0)}, the model {vocab_size}"
        )
    vocabulary = [tokens[id] for id in range(vocab_size)]
    odd = next((id for id, token in enumerate(vocabulary) if not 1 <= len(token) <= 255), None)
    if odd is not None:
        raise NoTokenizer(f"token {odd} has {len(vocabulary[odd])} bytes, a tokenizer file takes 1 to 255")
    if END_OF_TEXT.encode() in vocabulary:
        end_of_text = vocabulary.index(END_OF_TEXT.encode())
    if end_of_text is None:
        raise NoTokenizer(f"it has no token {END_OF_TEXT} and config.json no eos_token_id")
    name = LLMC_FILES[GPT2_VOCAB_SIZE] if is_gpt2(vocabulary) else "tokenizer.bin"
    return name, tokenizer_bytes(vocabulary, end_of_text)


def read_tokens(directory: Path) -> dict[int, bytes]:
    """The bytes of every id."""
    whole, vocabulary, added = (directory / name for name in ("tokenizer.json", "vocab.json", "added_tokens.json"))
    if whole.is_file():
        ids, literal = byte_level(whole)
    elif vocabulary.is_file() and (directory / "merges.txt").is_file():
        ids, literal = read_json(vocabulary), read_json(added) if added.is_file() else {}
    else:
        raise NoTokenizer("the source has no tokenizer.json, and no vocab.json with merges.txt")
    if not all(type(id) is int for id in (*ids.values(), *literal.values())):
        raise NoTokenizer("its vocabulary has ids that are no whole numbers")
    try:
        # What was added is looked for in the text itself, before its bytes become characters.
        bytes_of = byte_of_character()
        tokens = {id: bytes(bytes_of[sign] for sign in token) for token, id in ids.items() if token not in literal}
        return {**tokens, **{id: token.encode() for token, id in literal.items()}}
    except KeyError as error:
        raise NoTokenizer(f"the character {error.args[0]!r} in its vocabulary stands for no byte") from None
    except UnicodeEncodeError as error:
        raise NoTokenizer(f"its added token {error.object!r} is no Unicode text") from None


def byte_level(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The ids in the tokenizer.json `path`: of tokens in characters for bytes, and of added tokens in plain text.

    NoTokenizer unless it is a BPE whose decoder turns such characters into bytes.
    """
    content = read_json(path)
    try:
        decoder, model = content["decoder"], content["model"]
        steps = {step["type"] for step in (decoder, *decoder.get("decoders", ()))}
        if model.get("type", "BPE") == "BPE" and "ByteLevel" in steps:
            return dict(model["vocab"]), {str(entry["content"]): entry["id"] for entry in content["added_tokens"]}
    except (AttributeError, KeyError, TypeError, ValueError):  # another tokenizer's file, or none at all
        pass
    raise NoTokenizer(f"{path.name} describes no byte-level BPE")


def write_gpt2(directory: Path, max_seq_len: int) -> None:
    """Write the files of GPT-2's tokenizer into `directory`."""
    gpt2()  # raises for files that are not OpenAI's
    data = gpt2_directory()
    shutil.copyfile(data / "encoder.json", directory / "vocab.json")
    shutil.copyfile(data / "vocab.bpe", directory / "merges.txt")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "model_max_length": max_seq_len,
    }
    write_json(directory / "tokenizer_config.json", config)
