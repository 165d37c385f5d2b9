"""Spoiling files: bytes, JSON values and safetensors headers, each by a seeded generator."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

_DEEP: list[Any] = []
for _ in range(300):
    _DEEP = [_DEEP]

# What a reader may not expect in the place of a value.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"),
    "", " ", "x", "1", "\0", "\ud800", "é" * 200, "x" * 5000, "../../outside", "/", "\n\x1b[2J", "{{ x", "%s{0}",
    [], {}, [None], [[]], [1], ["x"], [{}], {"": None}, {"x": {}}, {"id": 1}, _DEEP,
)  # fmt: skip


def spoilt(content: bytes, random: Random) -> bytes:
    """Return `content` with one to three mutations: of its JSON or its safetensors header, or of its bytes."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        ways = [_bytes_spoilt]
        if content[8:9] == b"{":
            ways += [_header_spoilt] * 3
        elif content[:1] in (b"{", b"["):
            ways += [_json_spoilt] * 3
        content = random.choice(ways)(content, random)
    return content


def _bytes_spoilt(content: bytes, random: Random) -> bytes:
    start, stop = sorted(random.randrange(len(content) + 1) for _ in range(2))
    stop = min(stop, start + random.choice((1, 8, 1 << 20)))
    flipped = bytearray(content)
    for _ in range(random.choice((1, 1, 16)) if content else 0):
        flipped[random.randrange(min(len(content), random.choice((16, 4096, 1 << 30))))] ^= 1 << random.randrange(8)
    return random.choice(
        (
            bytes(flipped),
            content[:start],
            content[:start] + content[stop:],
            content[:stop] + content[start:],
            content[:start] + random.randbytes(8) + content[start:],
            content[:start] + bytes(stop - start) + content[stop:],
            content[:start] + random.choice((b"[", b"{", b'"', b"\\", b"\xff", b"\xed\xa0\x80", b"-", b":", b"&")) * 9
            + content[start:],
            b"",
            b"\xef\xbb\xbf" + content,
            content.decode("latin-1").encode("utf-16"),
        )
    )  # fmt: skip


def _json_spoilt(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True) if content.count(b"\n{") else [content]
    number = random.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except (ValueError, RecursionError):
        return _bytes_spoilt(content, random)
    lines[number] = json.dumps(_value_spoilt(value, random)).encode() + b"\n"
    return b"".join(lines)


def _header_spoilt(content: bytes, random: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return _bytes_spoilt(content, random)
    text = json.dumps(_value_spoilt(header, random)).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _value_spoilt(value: Any, random: Random) -> Any:
    """Return a JSON value in which one entry is another, gone, renamed, or there twice."""
    value = copy.deepcopy(value)
    places = _places(value)
    if not places:
        return random.choice(VALUES)
    depth = random.choice(sorted({depth for depth, *_ in places}))  # as likely at the top as in a large table
    _, owner, key = random.choice([place for place in places if place[0] == depth])
    way = random.randrange(8)
    if way == 0:
        del owner[key]
    elif way == 1 and isinstance(owner, dict):
        owner[random.choice(("x", "", "\ud800", "metadata", "__metadata__"))] = owner.pop(key)
    elif way == 2 and isinstance(owner, list):
        owner.append(owner[key])
    elif way == 3 and isinstance(owner[key], int | float):
        owner[key] = random.choice((owner[key] + 1, -owner[key], owner[key] * 2**40, str(owner[key])))
    elif way == 4:
        owner[key] = owner[random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))]
    else:
        owner[key] = random.choice(VALUES)
    return value


def _places(value: Any, depth: int = 0) -> list[tuple[int, Any, Any]]:
    if depth > 20 or not isinstance(value, dict | list):
        return []
    keys: Any = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in ((depth, value, key), *_places(value[key], depth + 1))]
