"""Read tensors from safetensors files and pickles, whose code is never run, and find the network's state dict among them."""

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

# Keys of the averaged weights, and of the raw ones, in the dicts that training scripts save.
AVERAGED_KEYS = ("averaged", "shadow")  # and every key with "ema" in it as a word
RAW_KEYS = ("model", "state_dict", "model_state_dict", "net", "network", "unet", "module", "params")
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HARMLESS_GLOBALS = ("collections.OrderedDict",)  # classes that a pickle of tensors may refer to
EMA_WORD = re.compile(r"(?<![a-z])(?<!no[-_ ])(?<!non[-_ ])ema(?![a-z])")


def averaged_by_name(*names: str) -> bool | None:
    """Return True if one of the names has "ema" in it as a word, else None: raw weights are seldom named so."""
    return True if any(EMA_WORD.search(name.lower()) for name in names) else None


def load_file(path: Path) -> object:
    """Return the file's contents, whose tensors may lie in the mapped file until they are copied."""
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
            raise _damaged_file(path, "torch checkpoint", "no pickle of tensors") from error
        raise CheckpointError(
            f"{path}: it holds more than tensors ({refused}), and reading that could run code of whoever made the file; "
            "nothing was read. Who made it can save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # torch.load raises many kinds, and only some of them say what is wrong
        reason = str(error).split(".")[0] if isinstance(error, (RuntimeError, OSError)) else "no pickle of tensors"
        raise _damaged_file(path, "torch checkpoint", reason) from error


def _first_global(path: Path) -> str | None:
    """Return the first class or function that the pickle refers to, without unpickling it; None if it isn't a whole pickle.

    torch's error names it for pickles in the protocol that torch writes, and nothing for those of a later protocol.
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
    except Exception:  # pickletools raises many kinds for a file that is no pickle
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
                f"{path}: not the file but a pointer to it, as git leaves it without LFS; get it with  git lfs pull"
            )
    return CheckpointError(f"{path}: not a whole {kind} ({why}); it may be truncated: copy it again")


class TensorReader:
    """Allocate the tensors of safetensors files; a call reads their values, and several threads may call at the same time.

    state: the tensors by name. Reading a file into memory takes less than mapping and copying it, and holds Python's lock
    for a few calls only.
    """

    PIECE_BYTES = 8 << 20  # that one system call reads; the first one reads half of the file
    MAX_PIECE_BYTES = 1 << 30  # a system may refuse 2^31
    MAX_PIECE_TENSORS = 1000  # IOV_MAX

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raise ValueError for a file with other content, or a truncated one."""
        self.state: dict[str, torch.Tensor] = {}
        self._pieces: deque[tuple[Path, int, int, list[np.ndarray]]] = deque()
        for path in paths:
            self._add_file(path)

    @classmethod
    def open(cls, paths: Collection[Path]) -> TensorReader | None:
        """Return a reader, or None for files that `load_file` has to read: of another format, on a system without preadv, or
        broken, since its error says what is wrong."""
        if not hasattr(os, "preadv") or any(path.suffix != ".safetensors" for path in paths):
            return None
        try:
            return cls(paths)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError):
            return None

    def _add_file(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY)  # kept open: another file may be renamed onto the path meanwhile
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
                    f"{name} doesn't begin where the tensor before it ends, or its size isn't that of its shape"
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
            raise ValueError("its tensors end elsewhere than the file")

    def __call__(self) -> None:
        while True:
            try:
                path, file, offset, views = self._pieces.popleft()
            except IndexError:  # all are read, or being read by other threads
                return
            while views:
                try:
                    got = os.preadv(file, views, offset)
                except OSError as error:
                    raise _damaged_file(path, "safetensors file", str(error)) from error
                if not got:
                    raise _damaged_file(path, "safetensors file", "it was cut short while it was read")
                offset += got
                while views and got >= views[0].nbytes:
                    got -= views.pop(0).nbytes
                if views:  # a part of one
                    views[0] = views[0].reshape(-1).view("u1")[got:]


def open_tensors(paths: Collection[Path]) -> tuple[object, TensorReader | None]:
    """Return (the contents of the files together, the reader of their tensors or None if these are read already)."""
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
    """Return (the network's tensors by name, whether they are averaged ones or None) of a file's contents.

    Searches the containers that training scripts write, averaged weights before raw ones, and removes a prefix that such a
    script adds to every name ("module."). marker_keys: for each format a name that every network of this format has.
    """
    state, averaged = _search(contents)
    if state is None:
        entries = isinstance(contents, dict)
        what = f"the entries {', '.join(map(str, contents))[:200]}" if entries else type(contents).__name__
        raise CheckpointError(f"{path}: no network's tensors in it; it holds {what}")
    prefixes = {name.removesuffix(key) for name in state for key in marker_keys if name.endswith(key)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    chosen = prefixes if len(prefixes) == 1 else {prefix for prefix in prefixes if averaged_by_name(prefix)}
    if len(chosen) > 1 or (prefixes and not chosen):
        raise CheckpointError(
            f"{path}: several networks in it ({', '.join(sorted(map(repr, prefixes)))}); expected one"
        )
    prefix = chosen.pop() if chosen else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return own, averaged or averaged_by_name(prefix)


def _search(contents: object, depth: int = 0) -> tuple[dict[str, torch.Tensor] | None, bool | None]:
    """Return (the first state dict found, whether it is an averaged one or None), or (None, None)."""
    if depth > 4:  # a container may contain itself
        return None, None
    if isinstance(contents, (list, tuple)):  # of the DDIM authors' scripts, with the averages ("shadow") last
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
            is_setting = averaged and state is not None and len(state) == 1  # of the averaging, such as its decay
            if state is not None and not is_setting:
                return state, averaged or inner
    return None, None
