"""HellaSwag: 10,042 beginnings of everyday stories and four ways to go on, one of them real (`llmc-data hellaswag`)."""

import argparse
from pathlib import Path

from llmc.data.choices import read_jsonl, write_questions
from llmc.data.command import Commands
from llmc.data.download import download

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


def add_command(commands: Commands) -> None:
    hellaswag = commands.add_parser(
        "hellaswag",
        help="evaluation file: HellaSwag, 10,042 stories to go on with",
        description="Make the evaluation file of HellaSwag's validation set, for llmc-train -h 1 and llmc-eval "
        "--hellaswag, in GPT-2's tokens.",
    )
    hellaswag.add_argument(
        "--input", type=Path, metavar="FILE", help="a copy of hellaswag_val.jsonl (default: download it)"
    )
    hellaswag.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("dev/data/hellaswag"), help="directory (default: %(default)s)"
    )
    hellaswag.set_defaults(command=_hellaswag)


def _hellaswag(arguments: argparse.Namespace) -> None:
    source = arguments.input or download(URL, arguments.out / "hellaswag_val.jsonl", "llmc-data hellaswag --input FILE")
    print(write_questions(read_jsonl(source), arguments.out / "hellaswag_val.bin"))
