"""Tensors from a file: safetensors, or a pickle that is not allowed to run anything; and which of them are the network's."""

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
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from ..errors import CheckpointError

# Under which names people keep the averaged weights, and the raw ones, in a file with more beside them.
AVERAGED = ("averaged", "shadow")  # and whatever has "ema" in it as a word
RAW = ("model", "state_dict", "model_state_dict", "net", "network", "unet", "module", "params")
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
HARMLESS = ("collections.OrderedDict",)  # of what a pickle may ask for
EMA = re.compile(r"(?<![a-z])(?<!no[-_ ])(?<!non[-_ ])ema(?![a-z])")


def says_averaged(*names: str) -> bool | None:
    """True where "ema" stands in one of the names as a word; None where nothing is said."""
    return True if any(EMA.search(name.lower()) for name in names) else None


def read(path: Path) -> object:
    """What the file holds, in memory that may be the file's own until it is copied."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise _damaged(path, "safetensors file", str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        said = re.search(r"GLOBAL (\w\S*)", str(error))
        held = said[1] if said else _asked_for(path)
        if held is None:
            raise _damaged(path, "torch checkpoint", "no pickle of tensors") from error
        raise CheckpointError(
            f"{path}: it holds more than tensors ({held}), and reading that could run code of whoever made the file; "
            "nothing was read. Who made it can save the weights alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # torch.load raises many kinds, and only some of them say what is wrong
        told = str(error).split(".")[0] if isinstance(error, (RuntimeError, OSError)) else "no pickle of tensors"
        raise _damaged(path, "torch checkpoint", told) from error


def _asked_for(path: Path) -> str | None:
    """What a pickle that torch doesn't read asks for, found without running it; None: it is not a whole pickle.

    torch says so itself of pickles in the protocol that it writes; it stops at the first word of a later one.
    """
    pushed, memo = [None, None], {}
    try:
        with contextlib.ExitStack() as stack:
            if zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                file = stack.enter_context(archive.open(inside))
            else:
                file = stack.enter_context(path.open("rb"))
            for opcode, value, _ in pickletools.genops(file):
                if "PUT" in opcode.name or opcode.name == "MEMOIZE":
                    memo[len(memo) if value is None else int(value)] = pushed[-1]
                    continue
                if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    name = value.replace(" ", ".") if value else ".".join(map(str, pushed[-2:]))
                    if name not in HARMLESS:
                        return name if re.fullmatch(r"\w.*\.\w+", name) else None
                pushed.append(memo.get(int(value)) if opcode.name.endswith("GET") else value)
    except Exception:  # of many kinds, for what is no pickle
        return None
    return "a pickle in another protocol than torch.save's"


def _damaged(path: Path, kind: str, why: str) -> CheckpointError:
    with path.open("rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return CheckpointError(
                f"{path}: not the file but a pointer to it, as git leaves it without LFS; get it with  git lfs pull"
            )
    return CheckpointError(f"{path}: not a whole {kind} ({why}); it may be truncated: copy it again")


class Unread:
    """Tensors of safetensors files, allocated but not filled; a call fills them, in as many threads as call it at a time.

    state: by name. Reading a file into memory takes less than mapping and copying it, and holds Python's lock for a few calls.
    """

    PIECE = 8 << 20  # bytes of the tensors that one call of the system fills; the first one fills half of the file's
    LARGEST = 1 << 30  # bytes of any of them; a system may refuse 2^31
    MOST = 1000  # tensors that it takes at most (IOV_MAX)

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises ValueError for a file with other content, or that is not whole."""
        self.state: dict[str, torch.Tensor] = {}
        self._pieces: deque[tuple[Path, int, int, list[np.ndarray]]] = deque()
        for path in paths:
            self._add(path)

    @classmethod
    def of(cls, paths: Collection[Path]) -> Unread | None:
        """None for what `read` has to read: another format, another system, or a broken file, as it says what is wrong."""
        if not hasattr(os, "preadv") or any(path.suffix != ".safetensors" for path in paths):
            return None
        try:
            return cls(paths)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, OSError):
            return None

    def _add(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY)  # until the end: what is renamed onto the path meanwhile is another file
        weakref.finalize(self, os.close, file)
        size = os.fstat(file).st_size
        at = 8 + int.from_bytes(os.pread(file, 8, 0), "little")
        if at > size:
            raise ValueError("its header is longer than the file")
        entries = json.loads(os.pread(file, at - 8, 8))
        entries.pop("__metadata__", None)
        start, piece, left, views = at, min(size // 2, self.LARGEST), 0, []
        for name, entry in sorted(entries.items(), key=lambda named: named[1]["data_offsets"]):
            value = torch.empty(entry["shape"], dtype=KINDS[entry["dtype"]], device="cpu")
            if entry["data_offsets"] != [at - start, at - start + value.nbytes]:
                raise ValueError(f"{name} isn't where the one in front of it ends, or has another size than its shape")
            self.state[name] = value
            if not value.nbytes:
                continue
            if left <= 0 or len(views) == self.MOST:
                left, piece, views = piece, self.PIECE, []
                self._pieces.append((path, file, at, views))
            views.append((value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy())
            at, left = at + value.nbytes, left - value.nbytes
        if at != size:
            raise ValueError("its tensors end elsewhere than the file")

    def __call__(self) -> None:
        while True:
            try:
                path, file, offset, views = self._pieces.popleft()
            except IndexError:  # the last one is taken
                return
            while views:
                try:
                    got = os.preadv(file, views, offset)
                except OSError as error:
                    raise _damaged(path, "safetensors file", str(error)) from error
                if not got:
                    raise _damaged(path, "safetensors file", "it was cut short while it was read")
                offset += got
                while views and got >= views[0].nbytes:
                    got -= views.pop(0).nbytes
                if views:  # a part of one
                    views[0] = views[0].reshape(-1).view("u1")[got:]


def begin(paths: Collection[Path]) -> tuple[object, Unread | None]:
    """(what the files hold together, what fills the tensors of it, None where that isn't needed)."""
    unread = Unread.of(paths)
    if unread is not None:
        return unread.state, unread
    held = [read(path) for path in paths]
    return held[0] if len(held) == 1 else {name: value for part in held for name, value in part.items()}, None


def network_in(held: object, path: Path, anchors: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], bool | None]:
    """(its tensors by name, whether they are averaged ones or None) of the network in what a file holds.

    anchors: names of which each format's network has one. Looks into the containers that training scripts write (averaged
    weights before raw ones) and takes off what such a script puts in front of every name ("module.").
    """
    state, averaged = _contained(held)
    if state is None:
        what = f"the entries {', '.join(map(str, held))[:200]}" if isinstance(held, dict) else type(held).__name__
        raise CheckpointError(f"{path}: no network's tensors in it; it holds {what}")
    prefixes = {name.removesuffix(anchor) for name in state for anchor in anchors if name.endswith(anchor)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    chosen = prefixes if len(prefixes) == 1 else {prefix for prefix in prefixes if says_averaged(prefix)}
    if len(chosen) > 1 or (prefixes and not chosen):
        raise CheckpointError(
            f"{path}: several networks in it ({', '.join(sorted(map(repr, prefixes)))}); expected one"
        )
    prefix = chosen.pop() if chosen else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return own, averaged or says_averaged(prefix)


def _contained(held: object, depth: int = 0) -> tuple[dict[str, torch.Tensor] | None, bool | None]:
    if depth > 4:  # of a container that holds itself
        return None, None
    if isinstance(held, (list, tuple)):  # of the DDIM authors' scripts: the averages ("shadow") come last
        found = [_contained(entry, depth + 1) for entry in held if isinstance(entry, dict)]
        found = [entry for entry in found if entry[0] is not None]
        return (found[-1][0], True if len(found) > 1 else None) if found else (None, None)
    if not isinstance(held, dict):
        return None, None
    if held and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in held.items()):
        return held, None
    ema = [name for name in held if isinstance(name, str) and (name in AVERAGED or says_averaged(name))]
    for names, averaged in ((ema, True), (RAW, None)):
        for name in names:
            state, inner = _contained(held.get(name), depth + 1)
            numbers = averaged and state is not None and len(state) == 1  # an average's own, such as its decay
            if state is not None and not numbers:
                return state, averaged or inner
    return None, None
