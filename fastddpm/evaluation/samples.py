"""How good a model is: FID, KID and bits per dimension, by the paper's protocol (Ho et al. 2020, section 4).

An evaluation is a folder: settings.json (what was drawn), probe.npy (what the model answers to noise), samples/ (uint8
images), features/, likelihood-*/ and result.json. All of it, and the cache of features beside it, is written in shards, each
whole or not at all, and image i is image i of the seed's sequence: what an interrupted run left is kept, the rest is made, and
no image is drawn or counted twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import data, ops
from ..engine.cache import network
from ..errors import EvaluationError
from ..images import to_uint8
from ..inputs.adopt import adopted
from ..inputs.arguments import device_of, labels_of, output_fault, shape_of
from ..inputs.resolve import schedule_of
from ..models.config import UNetConfig
from ..models.unet import UNet
from ..ops.rng import Stream, check_seed
from ..sampling.api import sample
from ..sampling.plan import PLANNED, plan
from ..utils.files import whole
from ..utils.validation import check_int, clip_bound
from .features import checksum
from .shards import LOT, Shards

SAMPLES, SETTINGS, RESULT, CACHE, PROBE = "samples", "settings.json", "result.json", "evaluation-cache", "probe.npy"
CPU_LOT = 100  # images in one shard on a CPU, where a thousand take hours
OPTIONS = (*PLANNED, "shape", "clip", "class_labels")
NOISE = 8  # images of noise that a probe is the answer to
ALIKE = 0.02  # of a probe's values: three times what bfloat16 costs; TF32 costs far less, and two networks differ by far more


def lot_on(device: torch.device) -> int:
    """Images in one shard, what an interruption can lose."""
    return CPU_LOT if device.type == "cpu" else LOT


# -------------------------------------------------------------------------------------------------- samples
def draw(
    model: nn.Module | Callable,
    folder: str | Path,
    n: int,
    *,
    seed: int = 0,
    shard: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    **options: object,
) -> Shards:
    """Images 0..n-1 of the seed's sequence, uint8 [N, C, H, W], in folder/samples; those that are there already are kept.

    shard: images in one file, what an interruption can lose; default 1000, on a CPU 100. options: shape, schedule, prediction,
    sampler, steps, spacing, eta, variance, clip and class_labels (an int) as `fastddpm.sample` takes them. A network with
    classes and no class_labels draws each in turn: image i is of class i mod classes.
    settings.json says what was drawn. Raises EvaluationError where that is something else, or a file is foreign or broken.
    """
    return _Drawing(adopted(model), folder, n, seed, shard, batch_size, device, dtype, _given(options)).run(progress)


def _given(options: dict) -> dict:
    """The options that are not None; TypeError for what is none."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such option; expected some of {', '.join(OPTIONS)}")
    return {name: value for name, value in options.items() if value is not None}


class _Drawing:
    """`draw` in two parts: made, everything is checked and nothing written; run, it draws."""

    def __init__(self, model, folder, n, seed, shard, batch_size, device, dtype, options) -> None:
        self.model, self.folder, self.n = model, Path(folder), check_int("n", n, 1)
        self.label = options.get("class_labels")
        if self.label is not None:
            self.label = check_int("class_labels", self.label, 0)
        self.settings = drawn(model, seed, dtype, options)
        self.shard = check_int("shard", lot_on(device_of(model, device)) if shard is None else shard, 1)
        if batch_size is not None:
            batch_size = check_int("batch_size", batch_size, 1)
        self.options = {"seed": seed, "batch_size": batch_size, "device": device, "dtype": dtype, **options}
        self.options.pop("class_labels", None)
        schedule = schedule_of(model, options.get("schedule"))
        self.probe = _Probe(
            self.folder,
            _answer(model, self.settings["shape"], len(schedule), device, dtype, self.label),
            f"{self.folder}: its samples are another model's; name another folder, or delete this",
        )
        self._look()

    def _look(self) -> None:
        """Find the samples that there are; EvaluationError where they are other ones."""
        if (self.folder / SETTINGS).is_file():
            _same(self.folder, self.settings)
        elif (self.folder / SAMPLES).exists():
            raise EvaluationError(
                f"{self.folder}: holds {SAMPLES}, but no {SETTINGS} to say what they are; name another folder, or delete this"
            )
        self.probe.check()
        self.shards = Shards(self.folder / SAMPLES, self.settings["shape"], np.uint8)

    def run(self, progress: bool | None) -> Shards:
        self.folder.mkdir(parents=True, exist_ok=True)
        _once(self.folder / SETTINGS, lambda aside: aside.write_text(_json(self.settings), encoding="utf-8"))
        self._look()  # again: hours may have passed, and another process begun
        self.probe.keep()
        self.shards.fill(self.n, self.shard, lambda span: self._images(span, progress), progress, "samples")
        return self.shards

    def _images(self, span: range, progress: bool | None) -> np.ndarray:
        images = sample(
            self.model,
            len(span),
            first=span.start,
            class_labels=_labels(self.model, self.label, span),
            progress=None if progress else progress,  # on a terminal, and gone when its shard is done
            **self.options,
        )
        return to_uint8(images).cpu().numpy()


def _labels(model, label: int | None, span: range) -> torch.Tensor | int | None:
    classes = model.config.classes if isinstance(model, UNet) else None
    if label is not None or classes is None:
        return label
    return torch.arange(span.start, span.stop) % classes


def drawn(model: object, seed: int, dtype: torch.dtype | None, options: dict) -> dict:
    """What settings.json says: all that the images depend on, for JSON."""
    label = options.get("class_labels")
    if label is not None:
        label = check_int("class_labels", label, 0)
    turn = _labels(model, label, range(1))
    chosen = plan(model, **{name: options[name] for name in PLANNED if name in options})
    table = chosen.table
    return {
        **_told_by(model, dtype),
        "shape": list(shape_of(model, options.get("shape"))),
        "seed": check_seed(seed),
        "sampler": chosen.sampler,
        "steps": len(table.timesteps),
        "spacing": chosen.spacing,
        "eta": float(chosen.eta),
        "variance": chosen.variance,
        "chain": _hash(_rounded(table.rows) + str(table.timesteps.tolist())),
        "clip": clip_bound(chosen.clip),
        "class_labels": "each in turn" if isinstance(turn, torch.Tensor) else label,
    }


LATER = list(itertools.dropwhile(lambda field: field.name != "eps", dataclasses.fields(UNetConfig)))


def _told_by(model: object, dtype: torch.dtype | None) -> dict:
    """What tells a model, for JSON; a bare callable has no weights, and its `_answer` has to do."""
    module = isinstance(model, nn.Module)
    own = next((p.dtype for p in model.parameters()), torch.float32) if module else torch.float32
    config = dataclasses.asdict(model.config) if isinstance(model, UNet) else {}
    for field in LATER:  # left out where they change nothing, so that folders of before are this model's still
        if config.get(field.name) == field.default:
            config.pop(field.name, None)
    return {
        "weights": checksum(model) if module else None,
        **{f"config.{k}": list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "dtype": str(dtype or own).removeprefix("torch."),
    }


def _same(folder: Path, wanted: dict) -> None:
    """Raise EvaluationError where the folder's samples are other ones than these."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvaluationError(f"{folder}: its {SETTINGS} is not a JSON object; name another folder, or delete this")
    said = "; ".join(
        f"{name} {_short(found.get(name))}, now {_short(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    )
    if said:
        raise EvaluationError(
            f"{folder}: its samples were drawn otherwise ({said}); name another folder, or delete this"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _once(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written whole, unless there is one, be it since a moment, from another process."""
    if path.exists():
        return
    with contextlib.suppress(FileExistsError), whole(path) as aside:
        write(aside)
        try:
            os.link(aside, path)
        except FileExistsError:
            raise
        except OSError:  # a disk without links, where the later one stays
            pass


# --------------------------------------------------------------------------------------------------- probes
class _Probe:
    """A network's answer to some noise, in the folder of what is made with it: its name and weights may stay while it changes."""

    def __init__(self, folder: Path, answer: np.ndarray, says: str) -> None:
        """answer: [values, groups], each group of a magnitude of its own. says: what is said where it is another one."""
        self.path, self.answer, self.says = folder / PROBE, answer, says

    def check(self) -> None:
        """Raise EvaluationError where the folder holds another network's."""
        if not self.path.is_file():
            return
        (kept,) = _load(self.path, ...)
        scale = np.abs(self.answer).max(0)
        # A group that is nearly 0 has the roundings of the others that it comes from.
        scale = np.maximum(scale, np.quantile(scale, 0.5, method="lower") / 10)
        if kept.shape != self.answer.shape or not (np.abs(kept - self.answer) <= ALIKE * scale).all():
            raise EvaluationError(self.says)

    def keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _once(self.path, lambda aside: np.save(aside, self.answer))
        self.check()


def _answer(model, shape, T: int, device, dtype, label: int | None = None) -> np.ndarray:
    """What the model says of noise at two of T timesteps, [values, channels].

    Not at T - 1, where any good network answers with the noise itself.
    """
    device = device_of(model, device)
    labels = labels_of(_labels(model, label, range(NOISE)), NOISE, model)
    labels = None if labels is None else labels.to(device)
    x = ops.philox_normal((NOISE, *shape), seed=0, t=0, stream=Stream.X_T, device=device)
    parts = []
    with torch.inference_mode(False), torch.no_grad(), network(model, device, dtype, tuple(x.shape)) as net:
        for t in (0, T // 2):
            at = net.at(torch.full((NOISE,), t, device=device))
            with net.settings():
                o = net.predict(x.to(net.dtype, memory_format=net.memory_format), at, labels)
            fault = output_fault(o, list(x.shape), learned=False)
            if fault is not None:
                raise EvaluationError(f"model: {fault}")
            parts.append(o.float().transpose(0, 1).flatten(1))
    return np.nan_to_num(torch.cat(parts).T.cpu().numpy())  # that noise gives a NaN needn't mean that the chain does


def _load(path: Path, *members: object) -> list[np.ndarray]:
    """These members of a .npz, or with `...` the array of a .npy."""
    try:
        loaded = np.load(path)
        return [loaded[member] for member in members]
    except (IndexError, *data.UNREADABLE) as error:  # IndexError: of an array where there should be members
        raise EvaluationError(f"{path}: not readable ({error}); delete it, and it is made anew") from error


# ------------------------------------------------------------------------------------------------- evaluate


def _rounded(values: torch.Tensor) -> str:
    """For checksums: a last digit may differ from machine to machine, and means nothing."""
    return " ".join(f"{value:.5e}" for value in values.flatten().tolist())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
