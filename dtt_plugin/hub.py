"""Downloading the needed files of a hub model, and saying in one sentence why that failed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dtt_plugin.checkpoint_folder import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILES, shards_of_index
from dtt_plugin.errors import DttError


def download_checkpoint(
    model: str, *, revision: str | None, need: Literal["tokenizer", "embeddings", "all"]
) -> tuple[Path, str | None]:
    """Download what is needed of the hub model `model`.

    Returns:
        The local snapshot's folder and the commit.

    Raises:
        DttError: unknown, gated or offline, or without safetensors weights.
    """
    import httpx
    from huggingface_hub import errors

    try:
        return _download(model, revision, need)
    except errors.GatedRepoError as error:
        raise DttError(
            f"{model} is gated: accept its licence at https://huggingface.co/{model}, then `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DttError(f"{model} has no revision {revision!r}; check the name on the hub.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise DttError(
            f"There is no folder and no public hub model {model!r}; check the spelling, or log in with "
            "`hf auth login` if it is private."
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        httpx.HTTPError,
        ConnectionError,
    ) as error:
        raise DttError(
            f"There is no folder {model!r} and the hub can't be reached; give a local folder, or go online."
        ) from error
    except OSError as error:
        raise DttError(f"{model} can't be downloaded: {error.strerror or error}.") from error


def _download(model: str, revision: str | None, need: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str, commit: str | None = revision) -> Path:
        return Path(snapshot_download(model, revision=commit, allow_patterns=list(patterns)))

    small = ("config.json", "generation_config.json", *TOKENIZER_FILES, INDEX_FILE)
    folder = fetch(*small)
    # A snapshot's folder is named after its commit; everything else must come from the same one.
    commit = folder.name if folder.parent.name == "snapshots" else revision
    if need == "all":
        weights = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
        return fetch(*weights, commit=commit), commit
    if need == "embeddings":
        index = folder / INDEX_FILE
        shards = shards_of_index(index, need_embedding_only=True) if index.is_file() else [SINGLE_FILE]
        fetch(*shards, commit=commit)
    return folder, commit
