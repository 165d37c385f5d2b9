"""The tokenizer of an engine that serves token files: every file's tokens by name, and a template that chooses.

It is the tokenizer of a defended checkpoint, without the checkpoint. A request chooses by
`chat_template_kwargs={"defensive_tokens": NAME}`; left out, the default stands there; null is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtt_plugin.bake.check_tokenizer import check_tokenizer
from dtt_plugin.bake.template import defended_templates
from dtt_plugin.bake.tokenizer import TokenizerFiles
from dtt_plugin.checkpoint.opening import open_checkpoint
from dtt_plugin.errors import DttError
from dtt_plugin.prompt.formats import CHOICE, TOKENS_SWITCH, check_format, defensive_token_names
from dtt_plugin.serving.placing import Placement


def names_of(placement: Placement) -> dict[str, list[str]]:
    """Return each file's token names as the tokenizer knows them, by what requests call the file.

    Raises:
        DttError: two files have one name.
    """
    names: dict[str, list[str]] = {}
    every = iter(defensive_token_names(len(placement.ids)))
    for placed in placement.placed:
        name = placed.source.name
        if name in names:
            raise DttError(f"Two token files are called {name!r}, by which requests choose; rename one of them.")
        names[name] = [next(every) for _ in placed.ids]
    return names


def chosen(variables: Mapping[str, Any], default: str | None) -> Any:
    """Return what a request's template variables choose: a name, or None for no tokens (`CHOICE`, `TOKENS_SWITCH`)."""
    return variables.get(CHOICE, default if variables.get(TOKENS_SWITCH, True) else None)


def write_tokenizer(
    model: str,
    placement: Placement,
    folder: Path,
    *,
    default: str | None,
    revision: str | None = None,
    prompt_format: str | None = None,
) -> list[int]:
    """Write the tokenizer files and chat templates of an engine that serves `placement` into `folder`.

    Args:
        model: the base model.
        placement: of the token files.
        folder: an empty folder.
        default: the name of the tokens in requests that name none; None: no tokens.
        revision: of a hub id.
        prompt_format: by default the one that all token files were made for.

    Returns:
        The BOS that the model's own tokenizer puts in front of plain text, as a list of at most one id.

    Raises:
        DttError: the files are for several prompt formats, or `dtt bake` would refuse tokenizer or template.
    """
    names = names_of(placement)
    if default is not None and default not in names:
        raise DttError(f"default: there are no tokens called {default!r}; there are: {', '.join(names)}.")
    formats = {placed.tokens.prompt_format for placed in placement.placed}
    if prompt_format is None and len(formats) > 1:
        raise DttError(
            f"The token files are for several prompt formats ({', '.join(sorted(formats))}), and a server has one; "
            "serve those of one format, or choose it with prompt_format."
        )
    prompt_format = check_format(prompt_format or formats.pop())
    source = TokenizerFiles(open_checkpoint(model, revision=revision, need="tokenizer").folder)
    templates = defended_templates(
        source, prompt_format, k=0, default_on=True, system_in_user=False, choices=names, choice=default
    )
    texts, ids = tuple(text for part in names.values() for text in part), tuple(placement.ids)
    source.write_defended(folder, texts, ids, templates, keep_bos=False)
    choices = {placed.source.name: placed.ids for placed in placement.placed}
    check_tokenizer(source, folder, names=texts, token_ids=ids, templates=templates, keep_bos=False, choices=choices)
    bos = source.backend.token_to_id(source.bos) if source.adds_bos() else None
    return [] if bos is None else [bos]
