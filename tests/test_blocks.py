"""Documents cut into blocks that begin with one: by hand, and by following each document through the blocks."""

import numpy as np
import pytest

from llmc.data.blocks import into_blocks

END = 2


@pytest.mark.parametrize(
    ("documents", "length", "expected"),
    [
        # Two fit exactly.
        ("2 5 6 | 2 7", 5, ["2 5 6 2 7"]),
        # The second is cut and begins the next block, which the first one fills up.
        ("2 5 6 | 2 7 8 9", 5, ["2 5 6 2 7", "2 7 8 9 2"]),
        # One longer than a block: the rest is left out.
        ("2 5 6 7 8 9 | 2 3", 4, ["2 5 6 7", "2 3 2 5"]),
        # One as long as a block.
        ("2 5 6 7 | 2 3 4 5", 4, ["2 5 6 7", "2 3 4 5"]),
        # The cut one is longer than a block itself.
        ("2 5 | 2 6 7 8 9 1", 4, ["2 5 2 6", "2 6 7 8"]),
        # All together shorter than a block.
        ("2 5 | 2 6", 9, ["2 5 2 6 2 5 2 6 2"]),
        ("", 4, []),
    ],
)
def test_by_hand(documents: str, length: int, expected: list[str]) -> None:
    tokens = np.array([int(word) for word in documents.replace("|", " ").split()], np.uint16)
    blocks = into_blocks(tokens, END, length)
    assert blocks.dtype == np.uint16
    assert [" ".join(map(str, block)) for block in blocks.reshape(-1, length)] == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_document_is_lost(seed: int) -> None:
    generator = np.random.default_rng(seed)
    length = 50
    documents = [[END, *generator.integers(3, 70, generator.integers(0, 80))] for _ in range(200)]
    blocks = into_blocks(np.concatenate(documents).astype(np.uint16), END, length).reshape(-1, length).tolist()
    seen: list[int] = []
    rest = documents
    for block in blocks:
        assert block[0] == END
        whole: list[int] = []
        count = 0
        while count < len(rest) and len(whole) + len(rest[count]) <= length:
            whole += rest[count]
            count += 1
        assert block[: len(whole)] == whole
        if count < len(rest):
            assert block[len(whole) :] == rest[count][: length - len(whole)]
            if count == 0:  # too long for any block
                count = 1
        seen.append(count)
        rest = rest[count:]
    assert sum(seen) == len(documents) and rest == []
