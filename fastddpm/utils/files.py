"""Write files and create folders so that they appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. Rename it to `path` after the block, or remove it if the block fails."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_if_missing(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path and move the result to `path`, unless a file exists there.

    If another process writes the file in the meantime, that process's file stays.
    """
    if path.exists():
        return
    with contextlib.suppress(FileExistsError), atomic_write(path) as temporary:
        write(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system: the file written last stays
            pass


@contextlib.contextmanager
def created_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and its missing parents. If the block fails, remove the created folders that are empty."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
