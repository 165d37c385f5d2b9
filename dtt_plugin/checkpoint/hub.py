"""Downloading the needed files of a hub model, and saying in one sentence why that failed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

from dtt_plugin.checkpoint.folder import INDEX_FILE, SETTINGS_FILES, SINGLE_FILE, shards_of_index
from dtt_plugin.errors import DttError

# What an engine may read besides weights and the usual tokenizer files.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE", "USE_POLICY.md")


def cached_commit(model: str, revision: str | None = None, *, cache_dir: str | None = None) -> str | None:
    """Return the commit of a hub model that the cache holds as `revision`, without asking the hub; None: none.

    Args:
        model: the hub id.
        revision: branch, tag or commit.
        cache_dir: of the hub's client, where it is not the usual one.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(str(cache_dir or constants.HF_HUB_CACHE)) / repo_folder_name(repo_id=model, repo_type="model")
    except ValueError:  # no hub id
        return None
    try:
        commit = (folder / "refs" / str(revision or constants.DEFAULT_REVISION)).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = str(revision or "")
    return commit if commit and os.path.isdir(folder / "snapshots" / commit) else None


def download_checkpoint(
    model: str, *, revision: str | None, need: Literal["tokenizer", "embeddings", "all"]
) -> tuple[Path, str | None]:
    """Download what is needed of the hub model `model`.

    Returns:
        The local snapshot's folder and the commit.

    Raises:
        DttError: unknown, gated or offline, or without safetensors weights.
    """
    with hub_errors_in_words(model, revision):
        return _download(model, revision, need)


@contextmanager
def hub_errors_in_words(repo: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence about the model repository `repo`.

    Raises:
        DttError: unknown, gated, offline, or no right to write.
    """
    from huggingface_hub import errors

    # The client library's own base error: httpx up to hub 1, httpx2 since.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    try:
        yield
    except errors.GatedRepoError as error:
        raise DttError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DttError(f"{repo} has no revision {revision!r}; check the name on the hub.") from error
    except errors.RemoteEntryNotFoundError as error:
        raise DttError(f"{repo} is on the hub and lacks the file that is needed; check the name.") from error
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, errors.HFValidationError) as error:
        if writing:
            raise DttError(
                f"{repo} could not be written on the hub; check that it is called owner/name, and log in with "
                "`hf auth login` and a token that may write there."
            ) from error
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            raise DttError(
                f"There is no folder and no public hub model {repo!r}; check the spelling, or log in with "
                "`hf auth login` if it is private."
            ) from error
        raise _unreachable(repo) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, transport_error, ConnectionError) as error:
        raise _unreachable(repo) from error
    except OSError as error:
        raise DttError(f"{repo} can't be downloaded: {error.strerror or error}.") from error


def _unreachable(repo: str) -> DttError:
    return DttError(f"There is no folder {repo!r} and the hub can't be reached; give a local folder, or go online.")


def _download(model: str, revision: str | None, need: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, commit: str | None = revision) -> Path:
        return Path(snapshot_download(model, revision=commit, allow_patterns=list(patterns)))

    small = (*SETTINGS_FILES, INDEX_FILE)
    folder = fetch(*small)
    # A snapshot's folder is named after its commit; everything else must come from the same one.
    commit = folder.name if folder.parent.name == "snapshots" else revision
    if need == "tokenizer":
        return folder, commit
    index = folder / INDEX_FILE
    # By name: repositories hold the same weights in other files too (consolidated.safetensors, onnx/ ...).
    shards = shards_of_index(index, need_embedding_only=need == "embeddings") if index.is_file() else [SINGLE_FILE]
    fetch(*shards, *(_SMALL_FILES if need == "all" else ()), commit=commit)
    return folder, commit
