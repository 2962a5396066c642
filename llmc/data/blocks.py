"""Blocks of equal length that each begin with a document, so that every row of a batch can begin with one."""

import numpy as np


def into_blocks(tokens: np.ndarray, end_of_text: int, length: int) -> np.ndarray:
    """Cut documents (n,), end-of-text before each, into blocks of `length` tokens, one after the other.

    Each block begins with a document; others follow while there is room. The one that does not fit is cut there and
    begins the next block, so that all of it is seen; only what a document has beyond a whole block is left out. The
    last block goes on with the first documents again.
    """
    starts = np.flatnonzero(tokens == end_of_text)
    ends = np.append(starts[1:], len(tokens))
    circle = np.concatenate([tokens, np.resize(tokens, length)])
    blocks = []
    document = 0
    while document < len(starts):
        begin = starts[document]
        blocks.append(circle[begin : begin + length])
        last = int(np.searchsorted(starts, begin + length)) - 1  # of the documents that begin in the block
        document = last if last > document and ends[last] > begin + length else last + 1
    return np.concatenate(blocks) if blocks else tokens
