"""What `llmc-eval` measures of a trained model, on any number of ranks: the numbers do not depend on it."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llmc import chess_eval
from llmc.binfile import atomic_write
from llmc.data.eval_file import NUM_COMPLETIONS
from llmc.data.shards import find_shards, read_shard
from llmc.errors import RunError, UsageError
from llmc.inference import ModelFile, open_model
from llmc.models import CHESS_VOCAB_SIZE
from llmc.multiple_choice import Model, Source, load_examples, score, turns
from llmc.ranks import Ranks
from llmc.tokenizer import dataset_tokenizer

if TYPE_CHECKING:
    from llmc import _C

CHOICES = {  # field of Settings: name, command that makes the file
    "hellaswag": ("HellaSwag", "llmc-data hellaswag"),
    "mmlu": ("MMLU", "llmc-data mmlu"),
    "choices": ("choices", "llmc-data choices"),
}
MAX_EXP = 700.0  # the largest loss whose perplexity an fp64 number holds, about


@dataclass(frozen=True)
class Settings:
    """What is to be measured; None: not this."""

    model: str
    hellaswag: str | None = None
    mmlu: str | None = None
    choices: str | None = None
    shards: str | None = None  # pattern
    max_batches: int | None = None  # of the shards; None: all of them
    chess_shards: str | None = None  # pattern
    chess_positions: str | None = None
    min_plies: int = 10  # of a held-out beginning of a game
    games: int = 200  # of the chess shards, and to be played
    batch_size: int = 4  # rows
    seq_len: int | None = None  # None: the model's context
    device: str = "auto"
    json: str | None = None  # file for the result


class Row(NamedTuple):
    """Tokens begin to end of a shard, which are inputs; each one's target is the next token."""

    shard: int
    begin: int
    end: int


def evaluate(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Measure, print a line for each result, and return them as they are in the JSON file.

    All that can be checked is checked before the first measurement. Raises UsageError or RunError.
    """
    file = open_model(settings.model)
    B, T = settings.batch_size, sequence_length(settings, file)
    ranks.agree("the settings", asdict(settings))
    asked = [name for name in CHOICES if getattr(settings, name) is not None]
    if asked and B < NUM_COMPLETIONS:
        raise UsageError(
            f"-b {B} is too small for --{asked[0]}, where a question takes {NUM_COMPLETIONS} rows: "
            f"use -b {NUM_COMPLETIONS} or more"
        )
    check_json(settings.json)
    questions = {}
    for name in asked:
        source = Source(f"--{name}", f"--{name}", CHOICES[name][1])
        questions[name] = load_examples(
            getattr(settings, name), T, file.shape.max_seq_len, file.shape.vocab_size, source
        )
    max_rows = settings.max_batches and settings.max_batches * B
    shards = Shards(settings.shards, T, file, max_rows) if settings.shards else None
    chess = chess_of(settings, file)
    ranks.agree("the number of questions", {name: len(examples) for name, examples in questions.items()})
    ranks.agree("the tokens of the shards", shards.num_targets if shards else 0)
    ranks.agree("the number of chess positions", [len(positions) for positions in chess.values()])

    by_losses = bool(shards or questions)  # in batches; chess takes one game at a time
    rows, longest = (B if by_losses else 1), (file.shape.max_seq_len if chess else T)
    model = file.load(rows, longest, settings.device, ranks, "lower -b or -t")
    result: dict[str, Any] = {"model": settings.model}
    if shards:
        result["shards"] = {"pattern": settings.shards, **shards.evaluate(model, B, ranks)}
        show = result["shards"]
        print(f"loss {show['loss']:f} | perplexity {show['perplexity']:.4f} | {show['tokens']:,} tokens", flush=True)
    for name, examples in questions.items():
        title = CHOICES[name][0]
        found = score(model, examples, B, ranks, title)
        result[name] = {
            "file": getattr(settings, name),
            "questions": found.examples,
            "acc": found.acc,
            "acc_norm": found.acc_norm,
        }
        print(
            f"{title}: acc {found.by_sum}/{found.examples} = {found.acc:f} | "
            f"acc_norm {found.by_mean}/{found.examples} = {found.acc_norm:f}",
            flush=True,
        )
    if chess:
        result["chess"] = evaluate_chess(settings, model, chess, file.shape.max_seq_len, ranks)
    if settings.json and ranks.rank == 0:
        with atomic_write(settings.json) as output:
            output.write((json.dumps(result, indent=2) + "\n").encode())
    return result


def sequence_length(settings: Settings, file: ModelFile) -> int:
    context = file.shape.max_seq_len
    if (settings.seq_len or 1) > context:
        raise UsageError(f"-t {settings.seq_len} is longer than the context of {file.path}: use -t {context} or less")
    return settings.seq_len or context


def check_json(path: str | None) -> None:
    """Now: not after hours of measuring."""
    if path is None:
        return
    directory = Path(path).parent
    if not directory.is_dir() or not os.access(directory, os.W_OK) or Path(path).is_dir():
        raise RunError(f"--json {path} cannot be written: give a file name in a directory that is there and writable")


class Shards:
    """The token shards that match a pattern, cut into rows: the loss is over every token but the first of each.

    max_rows: only the first so many; None: all.
    """

    def __init__(self, pattern: str, seq_len: int, file: ModelFile, max_rows: int | None) -> None:
        self.paths = find_shards(pattern)
        self.vocab_size = file.shape.vocab_size
        tokenizer = dataset_tokenizer(self.paths[0])
        if tokenizer and tokenizer.vocab_size != self.vocab_size:
            raise RunError(
                f"the tokenizer of --shards {pattern}, {tokenizer.path}, has {tokenizer.vocab_size} tokens, the model "
                f"{file.path} {self.vocab_size}: give shards made with the model's tokenizer"
            )
        self.tokens = [read_shard(path) for path in self.paths]
        rows = (
            Row(shard, begin, min(begin + seq_len, len(tokens) - 1))
            for shard, tokens in enumerate(self.tokens)
            for begin in range(0, len(tokens) - 1, seq_len)
        )
        self.rows = list(islice(rows, max_rows))
        self.num_targets = sum(len(tokens) - 1 for tokens in self.tokens)
        if not self.rows:
            raise RunError(f"the shards of --shards {pattern} have one token each, a loss takes two: give longer ones")

    def evaluate(self, model: Model, batch_size: int, ranks: Ranks) -> dict[str, float]:
        """Mean loss and perplexity, in batches of `batch_size` consecutive rows."""
        batches = [self.rows[first : first + batch_size] for first in range(0, len(self.rows), batch_size)]
        sums: list[float] = []
        for number, counts in turns(len(batches), ranks, "shards"):
            total = self.evaluate_batch(model, batches[number])
            if counts:
                sums.append(total)
        gathered = ranks.gather(sums, "the loss of the shards")
        tokens = sum(row.end - row.begin for batch in batches for row in batch)
        # Exactly rounded, so that the ranks' order does not show.
        loss = math.fsum(total for of_rank in gathered for total in of_rank) / tokens
        if not math.isfinite(loss):
            raise RunError(f"the loss of the shards is {loss}: the model's weights are of no use")
        return {"tokens": tokens, "loss": loss, "perplexity": math.exp(min(loss, MAX_EXP))}

    def evaluate_batch(self, model: Model, rows: Sequence[Row]) -> float:
        """Sum of the losses of a batch, whose shorter rows are filled up with zeros."""
        shape = (len(rows), max(row.end - row.begin for row in rows))
        inputs, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for i, row in enumerate(rows):
            tokens = self.tokens[row.shard][row.begin : row.end + 1].astype(np.int32)
            if tokens.max() >= self.vocab_size:
                at = int(np.argmax(tokens >= self.vocab_size))
                raise RunError(
                    f"{self.paths[row.shard]}: token {tokens[at]} at offset {row.begin + at} is outside the model's "
                    f"vocabulary of {self.vocab_size}: give shards made with the model's tokenizer"
                )
            n = len(tokens) - 1
            inputs[i, :n], targets[i, :n], mask[i, :n] = tokens[:-1], tokens[1:], True
        losses = model.evaluate(torch.from_numpy(inputs), torch.from_numpy(targets)).numpy()
        return float(losses.sum(where=mask, dtype=np.float64))


def chess_of(settings: Settings, file: ModelFile) -> dict[str, list[chess_eval.Position]]:
    """The positions of the chess flags that are given."""
    positions: dict[str, list[chess_eval.Position]] = {}
    flags = {"--chess-shards": settings.chess_shards, "--chess-positions": settings.chess_positions}
    for flag, value in flags.items():
        if value is not None and file.shape.vocab_size != CHESS_VOCAB_SIZE:
            raise UsageError(
                f"{flag} {value}: {file.path} has a vocabulary of {file.shape.vocab_size} tokens, chess has "
                f"{CHESS_VOCAB_SIZE}: drop it"
            )
    context = file.shape.max_seq_len
    if settings.chess_shards is not None:
        paths = find_shards(settings.chess_shards)
        positions["legal"] = chess_eval.held_out_positions(paths, settings.min_plies, settings.games, context)
    if settings.chess_positions is not None:
        positions["best"] = chess_eval.read_positions(settings.chess_positions, context)
    return positions


def evaluate_chess(
    settings: Settings,
    model: "_C.GPT2",
    positions: dict[str, list[chess_eval.Position]],
    context: int,
    ranks: Ranks,
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "legal" in positions:
        asked = positions["legal"]
        greedy, sampled = chess_eval.legal_rates(model, asked, ranks)
        result.update(positions=len(asked), legal_moves_greedy=greedy, legal_moves_sampled=sampled)
        print(
            f"legal moves, after {settings.min_plies} plies or more of {len(asked)} games: "
            f"likeliest {greedy:f} | sampled {sampled:f}",
            flush=True,
        )
        games = chess_eval.legal_game_rate(model, settings.games, context, ranks)
        result.update(games=settings.games, legal_games=games)
        print(f"legal games, of {settings.games} sampled: {games:f}", flush=True)
    if "best" in positions:
        asked = positions["best"]
        rate = chess_eval.best_move_rate(model, asked, ranks)
        result.update(best_move_positions=len(asked), best_moves=rate)
        print(f"best moves, of {len(asked)} positions: {rate:f}", flush=True)
    return result
