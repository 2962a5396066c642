"""What any of the program's files holds: header, figures, checks, and text where there is text.

Every kind has a function that yields lines. The results of checks begin with "ok: " or "problem: ", other lines do not.
A damaged file is a RunError before the first line.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llmc import binfile, debug_state
from llmc.checksum import verify
from llmc.data import eval_file, shards
from llmc.errors import RunError
from llmc.model_file import VERSIONS, ModelShape, read_model_header
from llmc.tokenizer import Tokenizer, dataset_tokenizer

BF16 = np.dtype([("bits", "<u2")])  # numpy has no type of its own for it
CHUNK = 2**21  # values worked on at a time: files may be larger than the memory
EDGE_TOKENS = 4  # printed at each end of a vocabulary
# PyTorch adds the loss up in fp32, where a logit near 100 is known to 8e-6. Other logits or targets are far off.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Options:
    """What the file itself does not tell."""

    model: Path | None = None  # the model that a state belongs to; None: the one beside it by llm.c's names
    tokenizer: Path | None = None  # None: the one beside the file
    max_tokens: int = 64  # shown of each run of tokens


def inspect_file(path: Path, options: Options) -> Iterator[str]:
    """Yield the description of `path`, line by line. RunError when it is damaged or none of the kinds known."""
    return INSPECTORS[read_magic(path)](path, options)


def read_magic(path: Path) -> int:
    """Return the magic number of `path`. RunError unless it is one of `INSPECTORS`."""
    known = f"known are {', '.join(binfile.KINDS[magic] for magic in INSPECTORS)}"
    try:
        with open(path, "rb") as file:
            raw = file.read(binfile.HEADER_BYTES)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error} ({known})") from error
    if len(raw) < binfile.HEADER_BYTES:
        short = f"it has {len(raw)} bytes, a header alone takes {binfile.HEADER_BYTES}"
        raise RunError(f"{path} is of no known kind: {short} ({known})")
    magic = int.from_bytes(raw[:4], "little", signed=True)
    if magic not in INSPECTORS:
        raise RunError(f"{path} is of no known kind: its magic number is {magic} ({known})")
    return magic


# ---- the kinds


def inspect_model(path: Path, options: Options) -> Iterator[str]:
    shape, dtype = read_model_header(path)
    values = np.memmap(path, "<f4" if dtype == "fp32" else BF16, "r", binfile.HEADER_BYTES)
    tensors = split(values, shape)
    yield from title(path, binfile.MAGIC_MODEL, VERSIONS[dtype])
    yield f"dtype: {dtype}"
    yield from fields(asdict(shape))
    yield f"parameters: {shape.num_parameters}"
    yield from statistics_table(tensors)
    yield COMPLETE
    yield from checksum_check(path)
    yield from finite_checks(tensors)
    yield padding_check(tensors["wte"], shape)


def inspect_shard(path: Path, options: Options) -> Iterator[str]:
    return describe_shard(path, options, shards.read_shard(path))


def describe_shard(path: Path, options: Options, tokens: np.ndarray) -> Iterator[str]:
    format = shards.shard_format(path)
    decoder = Decoder(path, options)
    yield from title(path, format.magic, format.version)
    yield from fields({"tokens": len(tokens), "smallest": int(tokens.min()), "largest": int(tokens.max())})
    yield decoder.source
    if decoder.tokenizer is not None:
        end_of_text = decoder.tokenizer.end_of_text
        yield f"documents: {count(tokens, lambda piece: piece == end_of_text)} (end-of-text tokens, {end_of_text})"
    yield from decoder.show("first tokens", tokens)
    yield COMPLETE
    yield from decoder.checks(tokens)


def inspect_tokenizer(path: Path, options: Options) -> Iterator[str]:
    tokenizer = Tokenizer(path)
    tokens = tokenizer.tokens
    version = int(binfile.read_header(path, binfile.MAGIC_TOKENIZER, (1, 2))[1])
    longest = max(range(len(tokens)), key=lambda id: len(tokens[id]))
    yield from title(path, binfile.MAGIC_TOKENIZER, version)
    yield f"vocabulary: {len(tokens)} tokens"
    yield f"end of text: {tokenizer.end_of_text} {tokens[tokenizer.end_of_text]!r}"
    yield f"longest: {longest} {tokens[longest]!r} ({len(tokens[longest])} bytes)"
    yield f"duplicates: {len(tokens) - len(set(tokens))}"
    for id in sorted({*range(len(tokens))[:EDGE_TOKENS], *range(len(tokens))[-EDGE_TOKENS:]}):
        yield f"token {id}: {tokens[id]!r}"
    yield COMPLETE


def inspect_eval(path: Path, options: Options) -> Iterator[str]:
    examples = eval_file.read_eval(path)
    header = binfile.read_header(path, binfile.MAGIC_EVAL, (eval_file.VERSION,))
    decoder = Decoder(path, options)
    labels = [example.label for example in examples]
    yield from title(path, binfile.MAGIC_EVAL, eval_file.VERSION)
    yield f"examples: {len(examples)}"
    yield f"longest example: {int(header[3])} bytes"
    yield f"labels: {', '.join(f'{labels.count(i)} times {i}' for i in range(eval_file.NUM_COMPLETIONS))}"
    yield decoder.source
    yield f"label of example 0: {labels[0]}"
    yield from decoder.show("context", examples[0].context)
    for i, completion in enumerate(examples[0].completions):
        yield from decoder.show(f"completion {i}", completion)
    yield COMPLETE
    yield from decoder.checks(np.concatenate([run for e in examples for run in (e.context, *e.completions)]))


def inspect_state(path: Path, options: Options) -> Iterator[str]:
    from llmc import state_file  # imports torch, which takes seconds

    state = state_file.read_state(path, state_parameters(path, options))
    arrays, loader = state_file.map_arrays(path, state), state.loader
    yield from title(path, binfile.MAGIC_STATE, state.version)
    names = ("step", "world_size", "rank", "zero_stage", "has_master", "num_parameters", "array_size")
    yield from fields({name: getattr(state, name) for name in (*names, "rng_state", "last_update_rng_state")})
    position = ("B", "T", "epoch", "shuffle", "shard_index", "next_sample")
    yield from fields({name: getattr(loader, name) for name in position})
    if loader.shuffle:
        yield from fields({"shard_order": len(loader.shard_order), "sample_order": len(loader.sample_order)})
        yield f"generator position: {loader.position}"
    for epoch, consumed in loader.consumed.items():
        tokens = sum(int(np.diff(intervals).sum()) for intervals in consumed.values())
        yield f"consumed before in epoch {epoch}: {tokens} tokens, in {len(consumed)} shards"
    yield from fields({"loss_window": len(state.loss_window), "norm_window": len(state.norm_window)})
    yield from statistics_table(arrays)
    yield COMPLETE
    yield from checksum_check(path)
    yield from finite_checks(arrays)
    negative = count(arrays["v"], lambda piece: piece < 0)
    yield check(negative == 0, "no value of v is negative", f"v, a mean of squares, has {negative} negative values")
    yield check(
        0 <= state.rank < state.world_size,
        "the rank is one of world_size",
        f"rank {state.rank} is none of {state.world_size} ranks",
    )
    if loader.shuffle:
        yield from order_checks("shard_order", loader.shard_order, loader.shard_index, len(loader.shard_order) - 1)
        yield from order_checks("sample_order", loader.sample_order, loader.next_sample, len(loader.sample_order))


def inspect_debug_state(path: Path, options: Options) -> Iterator[str]:
    header = binfile.read_header(path, binfile.MAGIC_DEBUG_STATE, (debug_state.VERSION,))
    B, T = int(header[2]), int(header[3])
    decoder = Decoder(path, options)
    model = options.model or beside(path, r"(.+)_debug_state\.bin", r"\1.bin")
    if model is None:
        x, details = debug_inputs(path, B, T), iter(["model: none beside the file, give one with --model to see more"])
    else:
        shape, _ = read_model_header(model)
        state = debug_state.read_debug_state(path, shape)
        x, details = state.x, describe_debug_state(model, shape, state)
    yield from title(path, binfile.MAGIC_DEBUG_STATE, debug_state.VERSION)
    yield from fields({"B": B, "T": T})
    yield decoder.source
    yield from decoder.show("first inputs x", x.reshape(-1))
    yield from details


def describe_debug_state(model: Path, shape: ModelShape, state: debug_state.DebugState) -> Iterator[str]:
    tensors = {"logits": state.logits, **state.gradients}
    tokens = {"inputs x": state.x, "targets y": state.y}
    token_lines = [vocabulary_check(name, array, shape.vocab_size, str(model)) for name, array in tokens.items()]
    yield f"model: {model}"
    yield f"loss: {state.loss:.6f}"
    yield from statistics_table(tensors)
    yield COMPLETE
    yield from token_lines
    yield from finite_checks(tensors)
    yield padding_check(state.gradients["wte"], shape)
    if not any(line.startswith(PROBLEM) for line in token_lines):
        loss = cross_entropy(state.logits, state.y)
        difference = f"the loss of the logits in fp64 is {loss:.6f}, {abs(loss - state.loss):.1e} from the loss"
        yield check(abs(loss - state.loss) <= LOSS_TOLERANCE * max(1, loss), difference, difference)


INSPECTORS: dict[int, Callable[[Path, Options], Iterator[str]]] = {
    binfile.MAGIC_MODEL: inspect_model,
    binfile.MAGIC_DEBUG_STATE: inspect_debug_state,
    binfile.MAGIC_TOKENIZER: inspect_tokenizer,
    binfile.MAGIC_TOKENS: inspect_shard,
    binfile.MAGIC_EVAL: inspect_eval,
    binfile.MAGIC_STATE: inspect_state,
    binfile.MAGIC_TOKENS_32: inspect_shard,
}


# ---- lines

PROBLEM = "problem: "
COMPLETE = "ok: header, contents and file size agree"


def checksum_check(path: Path) -> Iterator[str]:
    """Nothing for a file without one, such as llm.c's."""
    try:
        if verify(path):
            yield "ok: the checksum is right"
    except RunError as error:
        yield f"problem: {error}"


def title(path: Path, magic: int, version: int) -> Iterator[str]:
    yield f"file: {path} ({os.path.getsize(path)} bytes)"
    yield f"kind: {binfile.KINDS[magic]}, version {version}"


def fields(values: Mapping[str, object]) -> Iterator[str]:
    for name, value in values.items():
        yield f"{name}: {value}"


def check(passed: bool, claim: str, problem: str) -> str:
    return f"ok: {claim}" if passed else f"{PROBLEM}{problem}"


class Decoder:
    """Shows tokens of a file, as text where a tokenizer is known."""

    def __init__(self, path: Path, options: Options) -> None:
        self.tokenizer, self.source = find_tokenizer(path, options.tokenizer)
        self.max_tokens = options.max_tokens

    def show(self, name: str, tokens: np.ndarray) -> Iterator[str]:
        """The first tokens (n,): their numbers, then the text, in which a token without bytes is <its number>."""
        first = tokens[: self.max_tokens].tolist()
        more = " ..." if len(tokens) > len(first) else ""
        yield f"{name}: {' '.join(map(str, first))}{more}"
        if self.tokenizer is not None:
            known = self.tokenizer.tokens
            text = b"".join(known[token] if 0 <= token < len(known) else b"<%d>" % token for token in first)
            yield f"{name} as text: {text.decode(errors='replace')!r}{more}"

    def checks(self, tokens: np.ndarray) -> Iterator[str]:
        if self.tokenizer is not None:
            yield vocabulary_check("tokens", tokens, self.tokenizer.vocab_size, str(self.tokenizer.path))


def find_tokenizer(path: Path, given: Path | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer for `path` and a line about it. One that is damaged is a RunError only if it was given."""
    if given is not None:
        tokenizer: Tokenizer | None = Tokenizer(given)
    else:
        try:
            tokenizer = dataset_tokenizer(path)
        except RunError as error:
            return None, f"{PROBLEM}{error}"
    if tokenizer is None:
        return None, "tokenizer: none beside the file, give one with --tokenizer to see text"
    return tokenizer, f"tokenizer: {tokenizer.path} ({tokenizer.vocab_size} tokens)"


def vocabulary_check(name: str, tokens: np.ndarray, vocab_size: int, owner: str) -> str:
    outside = count(tokens, lambda piece: (piece < 0) | (piece >= vocab_size))
    vocabulary = f"the vocabulary of {owner} ({vocab_size} tokens)"
    return check(outside == 0, f"all {name} are in {vocabulary}", f"{outside} {name} are outside {vocabulary}")


def statistics_table(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line of figures for each tensor; values that are not finite do not count."""
    names = max(map(len, tensors))
    shapes = max(len(str(tensor.shape)) for tensor in tensors.values())
    columns = ("mean", "std", "min", "max", "norm")
    yield f"{'tensor':{names}}  {'shape':{shapes}}" + "".join(f"{column:>12}" for column in columns)
    for name, tensor in tensors.items():
        figures = "".join(f"{value:12.4g}" for value in statistics(tensor))
        yield f"{name:{names}}  {tensor.shape!s:{shapes}}{figures}"


def finite_checks(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """One line when all is well, otherwise one for each tensor that is not."""
    sizes = {name: (count(tensor, np.isnan), count(tensor, np.isinf)) for name, tensor in tensors.items()}
    bad = {name: (nans, infinities) for name, (nans, infinities) in sizes.items() if nans or infinities}
    for name, (nans, infinities) in bad.items():
        yield f"{PROBLEM}{name} has {nans} NaN and {infinities} infinite values"
    if not bad:
        yield "ok: all values are finite"


def padding_check(wte: np.ndarray, shape: ModelShape) -> str:
    rows = f"{shape.padded_vocab_size - shape.vocab_size} padding rows of wte"
    wrong = count(wte[shape.vocab_size :], lambda piece: piece != 0)
    return check(wrong == 0, f"the {rows} are zero", f"the {rows} have {wrong} values that are not zero")


def order_checks(name: str, order: np.ndarray, position: int, last: int) -> Iterator[str]:
    permutation = np.array_equal(np.sort(order), np.arange(len(order)))
    yield check(permutation, f"{name} is a permutation", f"{name} is no permutation of {len(order)} numbers")
    yield check(position <= last, f"the loader is inside {name}", f"the loader is at {position}, {name} ends at {last}")


# ---- figures


def pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """`values`, flat, a part at a time; bf16 as fp32."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        piece = flat[start : start + CHUNK]
        yield (piece["bits"].astype(np.uint32) << 16).view(np.float32) if values.dtype == BF16 else piece


def count(values: np.ndarray, wanted: Callable[[np.ndarray], np.ndarray]) -> int:
    return sum(int(np.count_nonzero(wanted(piece))) for piece in pieces(values))


def statistics(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Mean, standard deviation, smallest, largest and L2 norm of the finite values, in fp64. NaN if there are none."""
    n, total, squares, smallest, largest = 0, 0.0, 0.0, math.inf, -math.inf
    shift = None  # sums around a value of theirs keep the deviation exact when it is much smaller than the mean
    for piece in pieces(values):
        finite = piece[np.isfinite(piece)].astype(np.float64)
        if finite.size == 0:
            continue
        if shift is None:
            shift = float(finite[0])
        smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
        finite -= shift
        n += finite.size
        total += float(finite.sum())
        squares += float(finite @ finite)
    if shift is None:
        return math.nan, math.nan, math.nan, math.nan, math.nan
    mean = shift + total / n
    variance = max(0.0, squares / n - (total / n) ** 2)
    return mean, math.sqrt(variance), smallest, largest, math.sqrt(n * (variance + mean**2))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """The mean over (B, T) in fp64 of logits (B, T, V); NaN where they are."""
    V = logits.shape[-1]
    rows, columns = logits.reshape(-1, V), targets.reshape(-1)
    step = max(1, CHUNK // V)
    total = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            block = rows[start : start + step].astype(np.float64)
            block -= block.max(axis=1, keepdims=True)
            chosen = block[np.arange(len(block)), columns[start : start + step]]
            total += float((np.log(np.exp(block).sum(axis=1)) - chosen).sum())
    return total / len(rows)


# ---- files and what is beside them


def split(values: np.ndarray, shape: ModelShape) -> dict[str, np.ndarray]:
    """The flat contents of a model file by tensor, all layers together."""
    tensors, position = {}, 0
    for name, size in shape.tensors():
        tensors[name] = values[position : position + math.prod(size)].reshape(size)
        position += math.prod(size)
    return tensors


def beside(path: Path, pattern: str, name: str) -> Path | None:
    """The file of that name beside `path`, if there is one; `name` may refer to groups of `pattern`."""
    match = re.fullmatch(pattern, path.name)
    found = path.with_name(match.expand(name)) if match else None
    return found if found and found.is_file() else None


def debug_inputs(path: Path, B: int, T: int) -> np.ndarray:
    """The inputs (B, T) of a debug state, which alone can be read without its model."""
    if B <= 0 or T <= 0:
        raise RunError(f"{path} is damaged: its header says B = {B}, T = {T}, which must be positive")
    need, size = binfile.HEADER_BYTES + 4 * B * T, os.path.getsize(path)
    if size < need:
        raise RunError(f"{path} is truncated: it has {size} bytes, the inputs of B = {B}, T = {T} end at {need}")
    return np.memmap(path, "<i4", "r", binfile.HEADER_BYTES, (B, T))


def state_parameters(path: Path, options: Options) -> int | None:
    """The parameters of a state's model, None without a model file: llm.c's states do not say it themselves."""
    from llmc.state_file import VERSIONS, word

    stated = word(binfile.read_header(path, binfile.MAGIC_STATE, VERSIONS), 12)
    model = options.model or (None if stated else beside(path, r"state_(\d+)_\d+\.bin", r"model_\1.bin"))
    return read_model_header(model)[0].num_parameters if model else None
