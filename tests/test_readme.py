"""The documents say what the program does: the tables of flags, the links and the command lines."""

import re
import shlex
from pathlib import Path

import pytest

from llmc.command_line import build_parser, parse_args
from llmc.config import flag_fields, names, show

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "scripts/README.md",
    ROOT / "examples/layernorm/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def flag_rows():
    """(names, default) of each row in the section Flags, all of them in backticks."""
    section = (ROOT / "README.md").read_text().split("\n## Flags\n")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[2].startswith("`--"):
            yield re.findall("`(.*?)`", cells[1] + cells[2]), cells[3].strip("`")


def test_the_tables_name_exactly_the_flags():
    rows = list(flag_rows())
    assert rows[: len(flag_fields())] == [(names(entry), show(entry.default)) for entry in flag_fields()]
    table = {name for flags, _ in rows for name in flags}
    assert table == {name for action in build_parser()._actions for name in action.option_strings}
    assert all(default == "" for _, default in rows[len(flag_fields()) :])


def anchors(document):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@documents
def test_command_lines_are_understood(document):
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "llmc-train" and "--config" not in arguments:  # which file is not there
                parse_args(arguments)
