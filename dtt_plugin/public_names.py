"""What a model is called where others read it: never by a path of this machine."""

from __future__ import annotations

import os.path
import re

from dtt_plugin.safe_text import one_line

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# A hub model's folder in the cache of huggingface_hub.
_SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")
_PATH = re.compile(r"~|\.{0,2}/|\.{1,2}$|file:|[A-Za-z]:[/\\]|\\\\")


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form of a hub id, owner/name; a folder may have such a path, too."""
    return _HUB_ID.fullmatch(name) is not None


def is_hub_model(name: str) -> bool:
    """Return whether `name` means a model on the hub: a hub id, and no path of this machine."""
    return is_hub_id(name) and not os.path.exists(name)


def public_name(model: str) -> str:
    """Return the name under which `model` may be published: a hub id as it is, of a path the last part."""
    if not model or is_hub_model(model):
        return model
    path = model.replace("\\", "/")
    if snapshot := _SNAPSHOT.search(path):
        return snapshot[1].replace("--", "/", 1)
    path = os.path.normpath(os.path.expanduser(path))
    at_home = path == os.path.expanduser("~")  # whose last part is a user's name
    return "model" if at_home else os.path.basename(path).lstrip(".") or "model"


def card_name(model: str) -> str:
    """Return the public name for a card in Markdown, without what would end a line or a code span there."""
    return one_line(public_name(model)).replace("`", "'")


def public_text(text: str) -> str:
    """Return `text`, or the last part of it where it is a path."""
    return public_name(text) if _PATH.match(text) else text
