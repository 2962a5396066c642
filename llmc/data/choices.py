"""From questions with four answers to an evaluation file; `llmc-data choices` makes one of any JSONL file of them.

Context and completions are encoded apart, in GPT-2's tokens, a space before each completion.
"""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llmc import json_text
from llmc.data.command import Commands
from llmc.data.eval_file import NUM_COMPLETIONS, Example, write_eval
from llmc.data.text import without_surrogates
from llmc.errors import RunError
from llmc.tokenizer import Encoder, gpt2


class Question(NamedTuple):
    where: str  # it comes from, for errors
    context: str
    completions: Sequence[str]  # 4
    label: int  # of the right one


def write_questions(questions: Iterable[Question], out: Path) -> str:
    """Write the evaluation file `out` and return a line about it. RunError, naming the question, if that cannot be."""
    encoder = gpt2()
    progress = tqdm(questions, unit="question", disable=None)
    examples = [encode(encoder, index, question) for index, question in enumerate(progress)]
    replaced = " (replaced)" if out.exists() else ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to directory {out.parent}: {error.strerror or error}") from error
    write_eval(out, examples)
    longest = max(len(example.context) + max(map(len, example.completions)) for example in examples)
    return f"{out}: {len(examples):,} questions, up to {longest} tokens with an answer{replaced}"


def encode(encoder: Encoder, index: int, question: Question) -> Example:
    context = encoder.encode(question.context)
    if len(context) == 0:
        raise RunError(f"{question.where}: the context is empty: a completion's first token needs one before it")
    completions = [encoder.encode(f" {completion}") for completion in question.completions]
    return Example(index, question.label, context.astype(np.uint16), completions)


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Question]:
    """The questions of a file of JSON objects, one a line, with ctx, endings (4 texts) and label (0 to 3).

    RunError, with the line, for anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield question_of(f"{path}, line {number}", line)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x}; convert it") from error


def question_of(where: str, line: str) -> Question:
    try:
        fields: Any = json_text.parse(line)
    except ValueError as error:
        raise RunError(f"{where} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RunError(f'{where}: expected an object such as {{"ctx": ..., "endings": [...], "label": 0}}')
    context, completions, label = (fields.get(name) for name in ("ctx", "endings", "label"))
    if not isinstance(context, str):
        raise RunError(f"{where}: ctx is {json_text.shown(context)}, expected the text before the endings")
    if (
        not isinstance(completions, list)
        or len(completions) != NUM_COMPLETIONS
        or not all(isinstance(completion, str) for completion in completions)
    ):
        raise RunError(f"{where}: endings must be a list of {NUM_COMPLETIONS} texts")
    if isinstance(label, bool) or str(label) not in map(str, range(NUM_COMPLETIONS)):
        raise RunError(
            f"{where}: label is {json_text.shown(label)}, expected the right ending, 0 to {NUM_COMPLETIONS - 1}"
        )
    completions = [without_surrogates(completion) for completion in completions]
    return Question(where, without_surrogates(context), completions, int(str(label)))


def add_command(commands: Commands) -> None:
    choices = commands.add_parser(
        "choices",
        help="evaluation file: your own four-choice questions",
        description="Make an evaluation file, for llmc-eval --choices, in GPT-2's tokens, of a JSONL file with "
        "HellaSwag's fields: ctx, the text before the endings; endings, a list of 4; label, 0 to 3. A space is put "
        "before each ending.",
    )
    choices.add_argument("file", type=Path, metavar="FILE.jsonl", help="the questions")
    choices.add_argument("--out", type=Path, metavar="FILE.bin", help="evaluation file (default: FILE.bin)")
    choices.set_defaults(command=_choices)


def _choices(arguments: argparse.Namespace) -> None:
    if arguments.file.is_dir():
        raise RunError(f"cannot read {arguments.file}: it is a directory, give a file of questions")
    out = arguments.out or arguments.file.with_suffix(".bin")
    if out.resolve() == arguments.file.resolve():
        raise RunError(f"{out} would replace the questions: name another file with --out")
    print(write_questions(read_jsonl(arguments.file), out))
