"""MMLU: 14,042 exam questions of 57 subjects with four answers (`llmc-data mmlu`).

The published data.tar has a CSV file for each subject, without a header: question, four answers, and the right one's
letter. Evaluated without examples: the answers' texts are the completions of "Question: ...\\n\\nAnswer:".
"""

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from llmc.data.choices import Question, write_questions
from llmc.data.command import Commands
from llmc.data.download import download
from llmc.data.eval_file import NUM_COMPLETIONS
from llmc.data.source import read_files
from llmc.errors import RunError

URL = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
LETTERS = "ABCD"


def read_mmlu(source: Path) -> Iterator[Question]:
    """The questions of the test set, subject by subject in the order of the file names.

    source: data.tar, the directory it unpacks to, or the one of the test set. RunError for anything else.
    """
    files = read_files(source, "*_test.csv", "MMLU's data.tar")
    if not files:
        raise RunError(f"{source} holds no *_test.csv, expected MMLU's data.tar or its directory data/test")
    for name, raw in sorted(files.items()):
        try:
            rows = list(csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise RunError(f"{source}: {name} is not CSV in UTF-8: {error}") from error
        for number, row in enumerate(rows, 1):
            where = f"{source}: {name}, question {number}"
            if len(row) != NUM_COMPLETIONS + 2 or row[-1] not in LETTERS or len(row[-1]) != 1:
                raise RunError(f"{where}: expected a question, {NUM_COMPLETIONS} answers and a letter A to D")
            question, *answers, letter = row
            yield Question(where, f"Question: {question}\n\nAnswer:", answers, LETTERS.index(letter))


def add_command(commands: Commands) -> None:
    mmlu = commands.add_parser(
        "mmlu",
        help="evaluation file: MMLU, 14,042 exam questions",
        description="Make the evaluation file of MMLU's test set, for llmc-eval --mmlu, in GPT-2's tokens.",
    )
    mmlu.add_argument(
        "--input", type=Path, metavar="FILE", help="a copy of data.tar, or its directory (default: download it)"
    )
    mmlu.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("dev/data/mmlu"), help="directory (default: %(default)s)"
    )
    mmlu.set_defaults(command=_mmlu)


def _mmlu(arguments: argparse.Namespace) -> None:
    source = arguments.input or download(URL, arguments.out / "data.tar", "llmc-data mmlu --input FILE")
    print(write_questions(read_mmlu(source), arguments.out / "mmlu_test.bin"))
