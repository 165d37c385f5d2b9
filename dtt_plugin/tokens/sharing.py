"""A token file on the hub: 80 KB beside a card that says what it is and under which licence."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtt_plugin import __version__
from dtt_plugin.checkpoint.hub import hub_errors_in_words
from dtt_plugin.errors import DttError
from dtt_plugin.public_names import card_name, is_hub_model
from dtt_plugin.tokens.files import DefensiveTokens, load_tokens, save_tokens
from dtt_plugin.tokens.licence import licence_of

TOKENS_ON_HUB = "defensive_tokens.safetensors"


@dataclass(frozen=True)
class Shared:
    """Where a token file is on the hub."""

    repo: str
    commit: str
    url: str
    licence: str
    """As the card spells it; empty where the tokens come from no published ones."""


def push_tokens(tokens: DefensiveTokens, repo: str, *, accept_licence: bool = False, private: bool = False) -> Shared:
    """Upload `tokens` and a generated card to the hub model repository `repo`, which is made where it is missing.

    Args:
        tokens: what to upload.
        repo: owner/name.
        accept_licence: the user keeps to the licence of the published tokens that these come from.
        private: of a repository that is made.

    Raises:
        DttError: the licence was not accepted, or the hub refuses or can't be reached.
    """
    licence = licence_of(tokens)
    if licence and not accept_licence:
        raise DttError(
            f"These tokens come from the published ones, which are {licence} (no commercial use, credit to their "
            "authors): pass --accept-license to share them under the same licence."
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as folder, hub_errors_in_words(repo, writing=True):
        file = Path(folder) / TOKENS_ON_HUB
        save_tokens(file, tokens)
        api.create_repo(repo, private=private, exist_ok=True)
        operations: list[Any] = [
            CommitOperationAdd(TOKENS_ON_HUB, file),
            CommitOperationAdd("README.md", card(tokens, repo).encode()),
        ]
        commit = api.create_commit(repo, operations, commit_message=f"DefensiveTokens for {card_name(tokens.model)}")
    return Shared(repo, commit.oid, f"{api.endpoint}/{repo}", licence)


def pull_tokens(repo: str, out: Path, *, revision: str | None = None) -> DefensiveTokens:
    """Download the token file of the hub repository `repo`, check it, and write it to `out`.

    Raises:
        DttError: there is none, it is damaged, or `out` exists.
    """
    if out.exists():
        raise DttError(f"{out} already exists; choose another --out.")
    from huggingface_hub import hf_hub_download

    with hub_errors_in_words(repo, revision):
        file = hf_hub_download(repo, TOKENS_ON_HUB, revision=revision)
    tokens = load_tokens(file)
    save_tokens(out, tokens)
    return tokens


def card(tokens: DefensiveTokens, repo: str) -> str:
    """Return the model card: front matter for the hub, then what the tokens are and how to use them."""
    from huggingface_hub import ModelCardData

    licence = licence_of(tokens)
    model = card_name(tokens.model)
    data = ModelCardData(
        base_model=model if is_hub_model(tokens.model) else None,
        license=licence or None,
        tags=["defensive-tokens", "prompt-injection", "dtt-plugin"],
    )
    source = f", from those of `{card_name(tokens.source_model)}`" if tokens.source_model else ""
    terms = (
        f"Made from the tokens published with the DefensiveTokens paper (arXiv 2507.07974), which are {licence}:\n"
        "no commercial use. "
        if licence
        else ""
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# DefensiveTokens for {model}\n\n"
        f"{tokens.k} vectors of width {tokens.width} ({tokens.method}{source}) that defend `{model}` against\n"
        "prompt injection when they stand in front of a prompt.\n\n"
        f"    dtt pull {repo} --out tokens.safetensors\n"
        f"    dtt bake {model} --tokens tokens.safetensors --out defended\n\n"
        f"- Prompt format: {tokens.prompt_format}\n- SHA-256 of the values: {tokens.digest}\n\n"
        f"{terms}The model's own licence applies to what is made with it.\n\nMade by dtt-plugin {__version__}.\n"
    )
