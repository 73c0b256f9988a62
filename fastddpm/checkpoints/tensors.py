"""Read tensors from safetensors files and pickles, without running code in them, and find the network's state dict."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import re
import warnings
import weakref
import zipfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch

from ..errors import CheckpointError

# Keys of averaged weights, and of raw weights, in the dicts that training scripts save.
AVERAGED_KEYS = ("averaged", "shadow")  # and every key that contains the word "ema"
RAW_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "unet", "module", "params")
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HARMLESS_GLOBALS = ("collections.OrderedDict",)  # classes that a pickle of tensors may refer to
EMA_WORD = re.compile(r"(?<![a-z])(?<!no[-_ ])(?<!non[-_ ])ema(?![a-z])")


def averaged_by_name(*names: str) -> bool | None:
    """Return True if a name contains the word "ema", else None: raw weights seldom have a special name."""
    return True if any(EMA_WORD.search(name.lower()) for name in names) else None


def load_file(path: Path) -> object:
    """Return the contents of the file. Tensors may be mapped from the file."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged_file(path, "safetensors file", str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\w\S*)", str(error))
        refused = match[1] if match else _first_global(path)
        if refused is None:
            raise _damaged_file(path, "torch checkpoint", "not a pickle of tensors") from error
        raise CheckpointError(
            f"{path}: contains more than tensors ({refused}), and reading it could run code from the file, so "
            "nothing was read. The file's author can save only the weights: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # torch.load raises many types, and only some of their messages give the reason
        reason = str(error).split(".")[0] if isinstance(error, (RuntimeError, OSError)) else "not a pickle of tensors"
        raise _damaged_file(path, "torch checkpoint", reason) from error


def _first_global(path: Path) -> str | None:
    """Return the first class or function that a pickle refers to, without unpickling it; None if the pickle is incomplete.

    torch's error names it only for pickles in the protocol that torch writes.
    """
    try:
        with contextlib.ExitStack() as stack:
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                file = stack.enter_context(archive.open(name))
            else:
                file = stack.enter_context(path.open("rb"))
            for name in _globals(file):
                if name not in HARMLESS_GLOBALS:
                    return name if re.fullmatch(r"\w.*\.\w+", name) else None
    except Exception:  # pickletools raises many types for a file that is not a pickle
        return None
    return "a pickle in another protocol than torch.save's"


def _globals(pickled: BinaryIO) -> Iterator[str]:
    """Yield the classes and functions that a pickle refers to."""
    pushed, memo = [None, None], {}
    for opcode, value, _ in pickletools.genops(pickled):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            memo[len(memo) if value is None else int(value)] = pushed[-1]
            continue
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            yield value.replace(" ", ".") if value else ".".join(map(str, pushed[-2:]))
        pushed.append(memo.get(int(value)) if opcode.name.endswith("GET") else value)


def _damaged_file(path: Path, kind: str, why: str) -> CheckpointError:
    with path.open("rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return CheckpointError(
                f"{path}: not the file but a git LFS pointer to it; download the file with  git lfs pull"
            )
    return CheckpointError(f"{path}: not a complete {kind} ({why}); it may be truncated: copy it again")


class TensorReader:
    """A reader of safetensors files. The constructor allocates the tensors; a call reads their values.

    Several threads may call it at the same time; they share the work. Reading into memory is faster than mapping and copying,
    and seldom holds Python's global lock.

    Args:
        paths: the files.

    Attributes:
        state: the tensors by name.

    Raises:
        ValueError: a file is truncated or has other content.
    """

    PIECE_BYTES = 8 << 20  # bytes per system call, except the first, which reads half of the file
    MAX_PIECE_BYTES = 1 << 30  # some systems refuse 2^31
    MAX_PIECE_TENSORS = 1000  # IOV_MAX

    def __init__(self, paths: Iterable[Path]) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self._pieces: deque[tuple[Path, int, int, list[np.ndarray]]] = deque()
        for path in paths:
            self._add_file(path)

    @classmethod
    def open(cls, paths: Collection[Path]) -> TensorReader | None:
        """Return a reader, or None if `load_file` must read the files.

        That is the case for files of another format, on systems without preadv, and for damaged files, because the errors of
        `load_file` give the reason.
        """
        if not hasattr(os, "preadv") or any(path.suffix != ".safetensors" for path in paths):
            return None
        try:
            return cls(paths)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError):
            return None

    def _add_file(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY)  # stays open, because another file may be renamed to the path in the meantime
        weakref.finalize(self, os.close, file)
        size = os.fstat(file).st_size
        offset = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
        if offset > size:
            raise ValueError("its header is longer than the file")
        entries = json.loads(os.pread(file, offset - 8, 8))
        entries.pop("__metadata__", None)
        data_start, piece, left, views = offset, min(size // 2, self.MAX_PIECE_BYTES), 0, []
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            value = torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]], device="cpu")
            if entry["data_offsets"] != [offset - data_start, offset - data_start + value.nbytes]:
                raise ValueError(
                    f"{name} doesn't begin at the end of the previous tensor, or its size doesn't match its shape"
                )
            self.state[name] = value
            if not value.nbytes:
                continue
            if left <= 0 or len(views) == self.MAX_PIECE_TENSORS:
                left, piece, views = piece, self.PIECE_BYTES, []
                self._pieces.append((path, file, offset, views))
            views.append((value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy())
            offset, left = offset + value.nbytes, left - value.nbytes
        if offset != size:
            raise ValueError("its tensors don't end at the end of the file")

    def __call__(self) -> None:
        while True:
            try:
                path, file, offset, views = self._pieces.popleft()
            except IndexError:  # all pieces have been read, or are being read by other threads
                return
            while views:
                try:
                    got = os.preadv(file, views, offset)
                except OSError as error:
                    raise _damaged_file(path, "safetensors file", str(error)) from error
                if not got:
                    raise _damaged_file(path, "safetensors file", "it was truncated while it was being read")
                offset += got
                while views and got >= views[0].nbytes:
                    got -= views.pop(0).nbytes
                if views:  # a tensor was read in part
                    views[0] = views[0].reshape(-1).view("u1")[got:]


def open_tensors(paths: Collection[Path]) -> tuple[object, TensorReader | None]:
    """Return (the combined contents of the files, the reader of their tensors or None if the tensors have been read)."""
    reader = TensorReader.open(paths)
    if reader is not None:
        return reader.state, reader
    contents = [load_file(path) for path in paths]
    if len(contents) == 1:
        return contents[0], None
    return {name: value for part in contents for name, value in part.items()}, None


def find_state_dict(
    contents: object, path: Path, marker_keys: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], bool | None]:
    """Return (the network's tensors by name, True if they are averages or None) from a file's contents.

    Searches the containers that training scripts write, and prefers averaged weights to raw weights. Removes a prefix of all
    names, such as "module.".

    Args:
        contents: the contents of the file.
        path: the file, for messages.
        marker_keys: for each format, a name that every network of the format has.
    """
    state, averaged = _search(contents)
    if state is None:
        entries = isinstance(contents, dict)
        what = f"the entries {', '.join(map(str, contents))[:200]}" if entries else type(contents).__name__
        raise CheckpointError(f"{path}: has no tensors of a network; it contains {what}")
    prefixes = {name.removesuffix(key) for name in state for key in marker_keys if name.endswith(key)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    chosen = prefixes if len(prefixes) == 1 else {prefix for prefix in prefixes if averaged_by_name(prefix)}
    if len(chosen) > 1 or (prefixes and not chosen):
        raise CheckpointError(
            f"{path}: contains several networks ({', '.join(sorted(map(repr, prefixes)))}); expected one"
        )
    prefix = chosen.pop() if chosen else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return own, averaged or averaged_by_name(prefix)


def _search(contents: object, depth: int = 0) -> tuple[dict[str, torch.Tensor] | None, bool | None]:
    """Return (the first state dict found, True if it is averaged or None), or (None, None)."""
    if depth > 4:  # a container may contain itself
        return None, None
    if isinstance(contents, (list, tuple)):  # as the DDIM authors' scripts save, with the averages ("shadow") last
        states = [_search(entry, depth + 1)[0] for entry in contents if isinstance(entry, dict)]
        states = [state for state in states if state is not None]
        return (states[-1], True if len(states) > 1 else None) if states else (None, None)
    if not isinstance(contents, dict):
        return None, None
    if contents and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in contents.items()):
        return contents, None
    ema = [name for name in contents if isinstance(name, str) and (name in AVERAGED_KEYS or averaged_by_name(name))]
    for names, averaged in ((ema, True), (RAW_KEYS, None)):
        for name in names:
            state, inner = _search(contents.get(name), depth + 1)
            # A single tensor is a setting of the averaging, such as its decay.
            is_setting = averaged and state is not None and len(state) == 1
            if state is not None and not is_setting:
                return state, averaged or inner
    return None, None
