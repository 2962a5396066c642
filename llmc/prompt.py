"""From the text of a prompt to tokens, with no more than the tokenizer file that decodes them.

There are two kinds of vocabularies for which that has one right answer. GPT-2's is known, and its own encoder is used.
And where no token is the beginning of another, as with characters or bytes, a text has one way to be cut at most.
"""

import re
from itertools import pairwise

from llmc.errors import RunError
from llmc.tokenizer import Tokenizer, chess_token_bytes, gpt2, is_gpt2

CHESS_IDS = {token.decode(): id for id, token in enumerate(chess_token_bytes())}
MOVE = re.compile("([a-h][1-8])([a-h][1-8])([qrbnQRBN]?)")


def is_chess(tokenizer: Tokenizer) -> bool:
    return tokenizer.tokens == chess_token_bytes()


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text`, as the data set of that tokenizer would have them. RunError if that is not known."""
    if is_chess(tokenizer):
        return encode_moves(text.split())
    if is_gpt2(tokenizer.tokens):
        return [int(token) for token in gpt2().encode(text)]
    return encode_uniquely(tokenizer, text)


def encode_moves(moves: list[str]) -> list[int]:
    """The tokens of chess moves in UCI's notation. RunError for anything else; whether they are legal is not asked."""
    tokens: list[int] = []
    for move in moves:
        match = MOVE.fullmatch(move)
        if not match:
            raise RunError(
                f"{move!r} is no move: write moves such as e2e4, e1g1 for castling, e7e8q, with spaces between"
            )
        tokens += (CHESS_IDS[part.upper() if len(part) == 1 else part] for part in match.groups() if part)
    return tokens


def encode_uniquely(tokenizer: Tokenizer, text: str) -> list[int]:
    """The only tokens that make up the UTF-8 of `text`; end-of-text is none of them."""
    ids = {token: id for id, token in enumerate(tokenizer.tokens) if id != tokenizer.end_of_text}
    if len(ids) < tokenizer.vocab_size - 1:
        raise RunError(f"{tokenizer.path} cannot encode a prompt: two of its tokens are the same")
    for token, following in pairwise(sorted(ids)):  # sorted, a beginning comes right before a token that goes on
        if following.startswith(token):
            raise RunError(
                f"{tokenizer.path} cannot encode a prompt: its tokens {token!r} and {following!r} leave a choice, and "
                "only that of GPT-2's vocabulary is known; leave the prompt away"
            )
    lengths = sorted({len(token) for token in ids})
    raw, tokens, at = text.encode(), list[int](), 0
    while at < len(raw):
        length = next((n for n in lengths if raw[at : at + n] in ids), None)
        if length is None:
            character = raw[at:].decode(errors="replace")[0]
            raise RunError(f"the prompt has {character!r}, which no token of {tokenizer.path} stands for: change it")
        tokens.append(ids[raw[at : at + length]])
        at += length
    return tokens
