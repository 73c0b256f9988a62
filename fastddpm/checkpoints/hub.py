"""The Hugging Face Hub: the files of a model that are needed, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import CheckpointError

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
PATIENCE = 10.0  # seconds for the Hub to answer


def is_id(name: str) -> bool:
    """Whether it could be "owner/name", and isn't called as files are."""
    return (
        Path(name).suffix not in SUFFIXES and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    )


def fetch(name: str, revision: str | None, needed: Callable[[Collection[str]], list[str] | None]) -> Path:
    """The folder in huggingface_hub's cache with the files that `needed` chooses of all in the repository.

    Where the Hub cannot be reached, or HF_HUB_OFFLINE is set, what the cache has of it.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"model: {name!r} is no folder or file here, and to look for it on the Hugging Face Hub takes huggingface_hub: "
            'pip install "fastddpm[hub]"'
        ) from error
    try:
        # Asked once: list_repo_files goes on trying for half a minute where there is no network.
        siblings = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=PATIENCE).siblings
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"model: {name!r} on the Hugging Face Hub asks for its terms to be accepted: do so at "
            f"https://huggingface.co/{name}, then  hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"revision: {revision!r} is no branch, tag or commit of {name!r} on the Hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"model: {name!r} is no folder or file here and no model on the Hugging Face Hub (or a private one: hf auth login)"
        ) from error
    except Exception as error:  # each version of huggingface_hub has another HTTP library, with errors of its own
        folder = _cached(name, revision, error)
        if needed([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]) is None:
            raise _unreached(name, revision, error) from error
        return folder
    files = [sibling.rfilename for sibling in siblings or []]
    chosen = needed(files)
    if chosen is None:
        raise CheckpointError(
            f"model: {name!r} on the Hub holds no diffusers or fastddpm model; it has {_first(files)}"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=chosen))
    except Exception as error:
        raise CheckpointError(f"model: {name!r} could not be fetched from the Hub ({error})") from error


def _cached(name: str, revision: str | None, reason: Exception) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        # No patterns: a cache that lacks files which were never asked for is a whole one.
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True)
        )
    except errors.LocalEntryNotFoundError as error:
        raise _unreached(name, revision, reason) from error


def _unreached(name: str, revision: str | None, reason: Exception) -> CheckpointError:
    why = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    return CheckpointError(
        f"model: {name!r} is no folder or file here, the Hugging Face Hub cannot be reached ({why}), and its cache hasn't "
        f"{'that model' if revision is None else f'revision {revision!r} of it'}. On a machine with a network,  hf download "
        f"{name} --local-dir FOLDER  makes a folder to copy here and name instead"
    )


def _first(files: Collection[str]) -> str:
    return ", ".join(sorted(files)[:8]) + (", ..." if len(files) > 8 else "")
