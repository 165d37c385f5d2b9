"""The options of baking, with their defaults; the command line reads them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BakeOptions:
    """How a base model and DefensiveTokens become a defended checkpoint."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompt_format: str | None = None
    """See `dtt_plugin.prompt.formats`; None: the tokens' own."""
    default_on: bool = True
    """Whether the tokens stand in prompts of requests that leave `add_defensive_tokens` out."""
    reuse_reserved: bool = False
    """Overwrite unused reserved tokens, so that no tensor changes its shape."""
    system_in_user: bool = False
    """For templates without a system role: put the system message in front of the user's."""
    trust_assistant: bool = False
    """Leave control tokens in assistant messages as they are."""
    keep_bos: bool = False
    """Let the tokenizer go on adding a BOS to plain text by itself."""
    overlay: bool = False
    """Write the changed tensors alone, for loaders that read files in the order of their names (transformers,
    vLLM's default); no tensor may grow."""
    copy: bool = False
    """Copy what does not change instead of linking it."""
    verify: bool = True
    """Read everything back and compare before the folder gets its name."""
