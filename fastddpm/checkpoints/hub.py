"""Download the files of a model from the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import CheckpointError

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
TIMEOUT = 10.0  # seconds to wait for the Hub


def is_id(name: str) -> bool:
    """Return whether the name has the form "owner/name", without the suffix of a checkpoint file."""
    return (
        Path(name).suffix not in FILE_SUFFIXES
        and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    )


def fetch(name: str, revision: str | None, choose_files: Callable[[Collection[str]], list[str] | None]) -> Path:
    """Download files of a model and return their folder, in the cache of huggingface_hub.

    If the Hub cannot be reached, or HF_HUB_OFFLINE is set, the files in the cache are used.

    Args:
        name: "owner/name".
        revision: branch, tag or commit; None means the default branch.
        choose_files: function from all file names of the repository to those to download, or None if it has no model.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"model: {name!r} is no local folder or file, and loading it from the Hugging Face Hub requires huggingface_hub: "
            'pip install "fastddpm[hub]"'
        ) from error
    try:
        # A single request: list_repo_files retries for half a minute if there is no network.
        siblings = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT).siblings
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"model: {name!r} on the Hugging Face Hub requires accepting its terms: accept them at "
            f"https://huggingface.co/{name}, then  hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"revision: {revision!r} is not a branch, tag or commit of {name!r} on the Hub"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"model: {name!r} is no local folder or file, and no model on the Hugging Face Hub (or a private one: hf auth login)"
        ) from error
    except Exception as error:  # versions of huggingface_hub use different HTTP libraries, with different errors
        folder = _cached(name, revision, error)
        if choose_files([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]) is None:
            raise _unreachable(name, revision, error) from error
        return folder
    files = [sibling.rfilename for sibling in siblings or []]
    chosen = choose_files(files)
    if chosen is None:
        raise CheckpointError(
            f"model: {name!r} on the Hub has no diffusers or fastddpm model; its files are {_first_names(files)}"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=chosen))
    except Exception as error:
        raise CheckpointError(f"model: {name!r} could not be downloaded from the Hub ({error})") from error


def _cached(name: str, revision: str | None, reason: Exception) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # No patterns: a cache without files that were never requested is complete.
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
        )
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, revision, reason) from error


def _unreachable(name: str, revision: str | None, reason: Exception) -> CheckpointError:
    why = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return CheckpointError(
        f"model: {name!r} is no local folder or file, the Hugging Face Hub cannot be reached ({why}), and its cache has no "
        f"{'such model' if revision is None else f'revision {revision!r} of it'}. Run  hf download {name} "
        "--local-dir FOLDER  on a machine with a network, copy the folder here and pass its path instead"
    )


def _first_names(files: Collection[str]) -> str:
    return ", ".join(sorted(files)[:8]) + (", ..." if len(files) > 8 else "")
