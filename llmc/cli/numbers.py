"""Types of numbers for argparse, whose errors say what is accepted."""

import argparse
from collections.abc import Callable

from llmc.config import read_float


def whole(minimum: int, example: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number from `minimum` (0 or more) to `maximum`."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or not minimum <= int(text[:30]) <= maximum:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {minimum} to {maximum}, such as {example}"
            )
        return int(text)

    return read


def real(minimum: float, maximum: float, example: float) -> Callable[[str], float]:
    """A number from `minimum` to `maximum`."""

    def read(text: str) -> float:
        value = read_float(text)
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number from {minimum:g} to {maximum:g}, such as {example}"
            )
        return value

    return read
