"""Changes of JSON that leave it JSON: another value in some place, of whatever type."""

import json
import random
from typing import Any

ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 0.5, -1e308, float("nan")]
ODD += ["", "a", "0", "\ud800", "../a", [], {}, [[]], [0], {"": 0}, {"type": "a"}, "a" * 300]


def mutate(text: bytes, seed: int) -> bytes | None:
    """One line of `text`, changed in one place; None if that is no JSON."""
    generator = random.Random(seed)
    lines = text.split(b"\n")
    number = generator.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return None
    lines[number] = json.dumps(changed(value, generator)).encode()
    return b"\n".join(lines)


def changed(value: Any, generator: random.Random) -> Any:
    """In its place something odd; or, more often, one of the values inside is changed, left out or doubled."""
    if not isinstance(value, list | dict) or not value or generator.random() < 0.1:
        return generator.choice(ODD)
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    place = generator.randrange(len(pairs))
    key, inner = pairs[place]
    what = generator.random()
    if what < 0.1:
        pairs[place : place + 1] = []
    elif what < 0.2:
        pairs.append((f"{key}2", inner))
    else:
        pairs[place] = (key, changed(inner, generator))
    return dict(pairs) if isinstance(value, dict) else [inner for _, inner in pairs]
