"""`llmc-plot`: a picture of one or more runs."""

from pathlib import Path

from llmc.cli import Parser, run
from llmc.references import REFERENCES


def main() -> None:
    run("llmc-plot", _main)


def _main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    from llmc.plot import plot  # needs torch, which takes a while: not for --help

    print(*plot(arguments.runs, arguments.out, arguments.title, arguments.x, arguments.reference), sep="\n")


def _parser() -> Parser:
    parser = Parser(
        prog="llmc-plot",
        description="Draw training and validation loss, HellaSwag, gradient norm, learning rate and, where there is a "
        "JSON log, tokens/s of runs of llmc-train or llm.c.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="output directory (-o), main.log or JSON log (.jsonl) of a run",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("plot.png"), metavar="FILE", help=".png, .pdf or .svg (default: plot.png)"
    )
    parser.add_argument("--title", default="", metavar="TEXT", help="above the figure (default: none)")
    parser.add_argument("--x", choices=("steps", "tokens"), default="steps", help="along the axis (default: steps)")
    parser.add_argument(
        "--reference",
        action="append",
        choices=(*REFERENCES, "none"),
        default=[],
        metavar="NAME",
        help=f"what OpenAI's model reaches, as a line: {', '.join(REFERENCES)}, or none; may be repeated (default: "
        "those of the runs' sizes; losses only for runs that validate on FineWeb)",
    )
    return parser
