"""`llmc-eval`: a trained model in numbers; on one process, or on several that mpirun or torchrun starts."""

import argparse

from llmc.cli import Parser, run
from llmc.cli.numbers import whole
from llmc.errors import UsageError

MEASURES = ("hellaswag", "mmlu", "choices", "shards", "chess_shards", "chess_positions")


def main() -> None:
    run("llmc-eval", _main)


def _main(argv: list[str]) -> None:
    arguments = vars(_parser().parse_args(argv))
    if not any(name in arguments for name in MEASURES):
        flags = ", ".join("--" + name.replace("_", "-") for name in MEASURES)
        raise UsageError(f"nothing to measure: give one or more of {flags}")
    needs = {
        "max_batches": ("shards",),
        "min_plies": ("chess_shards",),
        "games": ("chess_shards",),
        "batch_size": MEASURES[:4],
        "seq_len": MEASURES[:4],
    }
    for name, measures in needs.items():
        if name in arguments and not any(measure in arguments for measure in measures):
            flag = {"batch_size": "-b", "seq_len": "-t"}.get(name, "--" + name.replace("_", "-"))
            raise UsageError(f"{flag} {arguments[name]} has no effect here: drop it")
    # Only now: --help and a wrong flag are answered without waiting for torch.
    from llmc.config import TrainConfig
    from llmc.evaluate import Settings, evaluate
    from llmc.launch import launch

    settings = Settings(**arguments)
    with launch(TrainConfig(model=settings.model, device=settings.device), "llmc-eval") as ranks:
        evaluate(settings, ranks)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llmc-eval",
        description="Measure a model. Several processes, started by mpirun, torchrun or srun, share the work, and the "
        "numbers stay the same.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("-e", "--model", required=True, metavar="MODEL.bin", help="the model file")
    parser.add_argument("--hellaswag", metavar="FILE", help="accuracy on HellaSwag; llmc-data hellaswag makes the file")
    parser.add_argument("--mmlu", metavar="FILE", help="accuracy on MMLU; llmc-data mmlu makes the file")
    parser.add_argument("--choices", metavar="FILE", help="accuracy on four-choice questions; llmc-data choices")
    parser.add_argument("--shards", metavar="PATTERN", help="loss and perplexity on token shards: quote the pattern")
    parser.add_argument(
        "--max-batches", type=whole(1, 20), metavar="N", help="of the shards the first N batches (default: all)"
    )
    parser.add_argument("-b", "--batch-size", type=whole(1, 16), metavar="N", help="rows of a batch (default: 4)")
    parser.add_argument(
        "-t", "--seq-len", type=whole(1, 1024), metavar="N", help="tokens of a row (default: the context)"
    )
    parser.add_argument(
        "--chess-shards",
        metavar="PATTERN",
        help="how often a chess model's moves are legal: the likeliest and a drawn one after a part of each of these "
        "games, and all moves of games that it plays alone",
    )
    parser.add_argument("--min-plies", type=whole(0, 10), metavar="N", help="least plies of such a part (default: 10)")
    parser.add_argument("--games", type=whole(1, 200), metavar="N", help="parts, and whole games (default: 200)")
    parser.add_argument(
        "--chess-positions",
        metavar="FILE",
        help="how often a chess model's likeliest move is the best; a line has the moves so far in UCI's notation, "
        "then the best one",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to run (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    return parser
