"""The licence of the tokens published with the DefensiveTokens paper, and which tokens come under it."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

from dtt_plugin.data.records import ASSETS
from dtt_plugin.files.digests import sha256_bytes
from dtt_plugin.prompt.formats import FORMAT_OF_PUBLISHED_MODEL
from dtt_plugin.tokens.methods import METHODS

if TYPE_CHECKING:
    from dtt_plugin.tokens.files import DefensiveTokens

NON_COMMERCIAL = "cc-by-nc-4.0"
LICENCE = "licence"
"""The metadata of tokens that come from others says their licence under this name."""
_FROM_PUBLISHED = tuple(method for method in METHODS if method != "trained")


def licence_of(tokens: DefensiveTokens) -> str:
    """Return the licence that comes with tokens made from the published ones, CC BY-NC 4.0; else nothing.

    They are known by what their metadata says, by the model they were first made for, or by their values: one
    published row among them is enough, whatever the rest of the file says.
    """
    published = {name.rpartition("/")[2] for name in FORMAT_OF_PUBLISHED_MODEL}
    origin = origin_of(tokens).rstrip("/").rpartition("/")[2]
    if (
        tokens.metadata.get(LICENCE) == NON_COMMERCIAL
        or (tokens.method in _FROM_PUBLISHED and origin in published)
        or not _published_rows().isdisjoint(sha256_bytes(row.astype("<f4").tobytes())[:32] for row in tokens.rows)
    ):
        return NON_COMMERCIAL
    return ""


def origin_of(tokens: DefensiveTokens) -> str:
    """Return the model whose tokens they were before any transfer."""
    return tokens.source_model or tokens.model


def inherited(tokens: DefensiveTokens) -> dict[str, str]:
    """Return the metadata that tokens made from `tokens` take over."""
    licence = licence_of(tokens)
    return {LICENCE: licence} if licence else {}


@cache
def _published_rows() -> frozenset[str]:
    digests = json.loads((ASSETS / "published_token_digests.json").read_text(encoding="utf-8"))
    return frozenset(digests["rows"])
