"""`llmc-sample`: text from a trained model; from a chess model games, with the first illegal move marked."""

import argparse
from collections.abc import Iterator
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from llmc.cli import Parser, run
from llmc.cli.numbers import real, whole
from llmc.errors import RunError, UsageError

if TYPE_CHECKING:
    from llmc.inference import ModelFile
    from llmc.tokenizer import Tokenizer

DEFAULT_TOKENS = 256  # of a text; a game takes what the context has


def main() -> None:
    run("llmc-sample", _main)


def _main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.temperature == 0 and (arguments.top_k > 0 or arguments.top_p < 1):
        raise UsageError("--top-k and --top-p have no effect with --temperature 0, the likeliest token: drop them")
    if "" in arguments.stop:
        raise UsageError("--stop '': give the text to end before, such as --stop 'Q:'")
    prompt = _prompt(arguments)
    # Only now: --help and a wrong flag are answered without waiting for torch.
    from llmc.inference import open_model, tokenizer_of

    file = open_model(arguments.model)
    tokenizer = tokenizer_of(file, arguments.tokenizer)
    if _is_chess(arguments.board, file, tokenizer):
        _games(arguments, file, prompt)
    else:
        _texts(arguments, file, tokenizer, prompt)


def _parser() -> Parser:
    parser = Parser(
        prog="llmc-sample",
        description="Print a prompt and what the model writes after it, as it comes. The prompt of a chess model is "
        "moves such as 'e2e4 e7e5'; its games are printed with the board, and with the first illegal move marked.",
    )
    parser.add_argument("-e", "--model", required=True, metavar="MODEL.bin", help="the model file")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer file (default: the one beside the model, or of the data it was trained on, or llm.c's here)",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: the beginning of a document)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with that text")
    parser.add_argument(
        "--temperature",
        type=real(0, 100, 0.8),
        default=1.0,
        metavar="X",
        help="divides the logits: below 1 likely tokens become likelier, 0 takes the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k", type=whole(0, 40), default=0, metavar="N", help="draw from the N likeliest tokens (default 0: all)"
    )
    parser.add_argument(
        "--top-p",
        type=real(0, 1, 0.9),
        default=1.0,
        metavar="P",
        help="draw from the fewest tokens, likeliest first, that have this probability together (default 1: all)",
    )
    parser.add_argument(
        "--seed",
        type=whole(1, 42, 2**64 - 1),
        default=1337,
        metavar="N",
        help="of the draws (default: %(default)s, as in the trainer)",
    )
    parser.add_argument("--num-samples", type=whole(1, 3), default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--max-tokens",
        type=whole(1, 100),
        metavar="N",
        help=f"new tokens of a sample (default: {DEFAULT_TOKENS}, in chess what the context has room for)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--ignore-eot", action="store_true", help="do not end at an end-of-text token")
    parser.add_argument("--board", action="store_true", help="chess, whatever the tokenizer of 72 tokens is called")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)"
    )
    return parser


def _prompt(arguments: argparse.Namespace) -> str:
    """The text to begin with, "" if none is given."""
    if arguments.prompt_file is None:
        text: str = arguments.prompt or ""
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python shows bytes that are no text
            raise UsageError("--prompt is not UTF-8: put it into a file, convert that, and give it as --prompt-file")
        return text
    try:
        return str(arguments.prompt_file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise RunError(f"--prompt-file {arguments.prompt_file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RunError(
            f"--prompt-file {arguments.prompt_file} is not UTF-8 text (byte {error.start}): convert it"
        ) from error


def _is_chess(asked: bool, file: "ModelFile", tokenizer: "Tokenizer | None") -> bool:
    from llmc.models import CHESS_VOCAB_SIZE
    from llmc.prompt import is_chess

    if asked and file.shape.vocab_size != CHESS_VOCAB_SIZE:
        raise UsageError(
            f"--board is for models of chess, which have {CHESS_VOCAB_SIZE} tokens, {file.path} has "
            f"{file.shape.vocab_size}: drop it"
        )
    if tokenizer and not asked:
        return is_chess(tokenizer)
    return file.shape.vocab_size == CHESS_VOCAB_SIZE


def _texts(arguments: argparse.Namespace, file: "ModelFile", tokenizer: "Tokenizer | None", prompt: str) -> None:
    from llmc.models import END_OF_TEXT_IDS
    from llmc.prompt import encode_prompt
    from llmc.sample import text_of, until

    if not tokenizer and (prompt or arguments.stop):
        raise RunError(f"a prompt and --stop need the tokenizer of {file.path}: give its file with --tokenizer")
    end_of_text = tokenizer.end_of_text if tokenizer else END_OF_TEXT_IDS.get(file.shape.vocab_size, 0)
    tokens = encode_prompt(tokenizer, prompt) if tokenizer and prompt else [end_of_text]
    for number, sample in enumerate(_samples(arguments, file, tokens, DEFAULT_TOKENS)):
        if number > 0:
            print("---")
        print(prompt, end="", flush=True)
        if not arguments.ignore_eot:
            sample = takewhile(lambda token: token != end_of_text, sample)
        for piece in until(arguments.stop, text_of(sample, tokenizer)):
            print(piece, end="", flush=True)
        print(flush=True)


def _games(arguments: argparse.Namespace, file: "ModelFile", prompt: str) -> None:
    from llmc.chess_eval import END_OF_TEXT, read_game
    from llmc.prompt import encode_moves

    if arguments.stop or arguments.ignore_eot:
        raise UsageError("--stop and --ignore-eot are for text, a game ends with its end-of-text token: drop them")
    moves = encode_moves(prompt.split())
    for number, sample in enumerate(_samples(arguments, file, [END_OF_TEXT, *moves], file.shape.max_seq_len)):
        if number > 0:
            print("---")
        game, has_end = read_game(chain(moves, sample))
        print(_report(game, has_end), flush=True)


def _report(game: list[int], has_end: bool) -> str:
    """The legal moves, what comes then, and the board."""
    from llmc.chess.judge import judge, render

    judged = judge(game)
    numbered = [move if i % 2 else f"{i // 2 + 1}. {move}" for i, move in enumerate(judged.moves)]
    count = len(numbered)
    if judged.illegal is not None:
        number = f"{count // 2 + 1}{'...' if count % 2 else '.'}"
        verdict = f"illegal: {number} {judged.illegal}, after {count} legal move{'s' * (count != 1)}"
    else:
        end = judged.result or ("the game ends here" if has_end else "cut off here")
        verdict = f"{count} move{'s' * (count != 1)}, all legal; {end}"
    return "\n".join([" ".join(numbered), verdict, render(judged.board, judged.illegal)])


def _samples(
    arguments: argparse.Namespace, file: "ModelFile", prompt: list[int], default_tokens: int
) -> Iterator[Iterator[int]]:
    """The tokens of one sample after the other, as they come."""
    from llmc.ranks import Ranks
    from llmc.sample import Sampling, XorShift, tokens_after

    context = file.shape.max_seq_len
    room = context - len(prompt)
    if room < 1:
        raise RunError(
            f"the prompt has {len(prompt)} tokens, the context of {file.path} is {context}: shorten it to {context - 1}"
        )
    limit = arguments.max_tokens or min(room, default_tokens)
    if limit > room:
        raise UsageError(
            f"--max-tokens {limit}: after {len(prompt)} of the prompt the context of {file.path} has room for {room}: "
            f"use --max-tokens {room} or less"
        )
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    coins = XorShift(arguments.seed)
    model = file.load(1, len(prompt) + limit, arguments.device, Ranks(), "lower --max-tokens, or use a smaller model")
    for _ in range(arguments.num_samples):
        yield islice(tokens_after(model, prompt, lambda logits: sampling.choose(logits, coins.uniform())), limit)
