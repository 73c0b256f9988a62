"""Images of a seed's sequence, stored in a folder that an interrupted call leaves usable.

An evaluation's folder has settings.json (what the samples depend on), probe.npy (the model's outputs for noise), samples/
(uint8 images), features/, likelihood-*/ and result.json. Arrays, including the cache of features next to the folder, are
written in shards, each atomically. Image i of the array is image i of the seed's sequence. A later call uses the shards that
exist and computes the rest, so no image is drawn or counted twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import EvaluationError
from ..images import to_uint8
from ..inputs.arguments import device_of, image_shape
from ..inputs.resolve import ResolvedModel, warn_signal_left
from ..ops.rng import check_seed
from ..sampling.api import RunOptions, run
from ..sampling.plan import ChainArguments, Plan, make_plan, resolve_for
from ..utils.files import write_if_missing
from ..utils.validation import check_int, clip_bound
from .identity import Probe, labels_in_turn, model_identity, probe_outputs, sha256, to_digits, to_json
from .shards import Shards

SAMPLES, SETTINGS = "samples", "settings.json"
SHARD_SIZE, CPU_SHARD_SIZE = 1000, 100  # images in one file; 1000 would take hours on a CPU
CHAIN_OPTIONS = (*ChainArguments._fields, "shape", "class_labels")


def shard_size(device: torch.device) -> int:
    """Return the default number of images in one file. An interruption loses at most one file."""
    return CPU_SHARD_SIZE if device.type == "cpu" else SHARD_SIZE


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
    """Draw images 0..n-1 of a seed's sequence to files in folder/samples. Images that exist are not drawn again.

    settings.json in `folder` records everything that the images depend on.

    Args:
        model: a `UNet`, a diffusers UNet2DModel, or any callable model(x, t), as for `fastddpm.sample`.
        folder: folder for the images and settings.json.
        n: number of images, at least 1.
        seed: seed of the sequence, in [0, 2^64).
        shard: number of images in one file. An interruption loses at most one file. Default: 1000, or 100 on a CPU.
        batch_size: images per forward. Default: what fits in memory.
        device: device of the computation. Default: the model's device.
        dtype: dtype of the network's arithmetic. Default: the model's own.
        progress: whether to show progress bars. Default: on a terminal or in a notebook.
        **options: shape, schedule, prediction, sampler, steps, spacing, eta, variance, clip and class_labels (an int),
            as for `fastddpm.sample`. Without class_labels, a network with classes draws each class in turn: image i has
            class i mod classes.

    Returns:
        The images, uint8 [N, C, H, W], as a `Shards`. `load` returns the images of a range, and `batches` iterates over
        all of them.

    Raises:
        EvaluationError: the folder's images were drawn with other settings or another model, or a file is damaged or
            was not written by an evaluation.
    """
    options = checked_chain_options(options)
    resolved = resolve_for(model, chain_arguments(options))
    return Drawing(resolved, folder, DrawingOptions(n, seed, shard, batch_size, device, dtype, options)).run(progress)


def checked_chain_options(options: dict) -> dict:
    """Return the options that are not None; raise TypeError for unknown names."""
    unknown = sorted(options.keys() - set(CHAIN_OPTIONS))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such option; expected some of {', '.join(CHAIN_OPTIONS)}")
    return {name: value for name, value in options.items() if value is not None}


def chain_arguments(options: dict) -> ChainArguments:
    return ChainArguments(**{name: options[name] for name in ChainArguments._fields if name in options})


class DrawingOptions(NamedTuple):
    """The arguments of `draw` except model and folder."""

    n: int
    seed: int
    shard: int | None
    batch_size: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    chain_options: dict  # some of CHAIN_OPTIONS


class Drawing:
    """A call of `draw`, in two parts. The constructor checks everything and writes nothing; `run` draws."""

    def __init__(self, model: ResolvedModel, folder: str | Path, options: DrawingOptions) -> None:
        n, seed, shard, batch_size, device, dtype, chain_options = options
        self.folder, self.n = Path(folder), check_int("n", n, 1)
        label = chain_options.get("class_labels")
        self.label = None if label is None else check_int("class_labels", label, 0)
        self.plan = make_plan(model, chain_arguments(chain_options))
        warn_signal_left(model.network, model.settings.schedule)
        shape = image_shape(model, chain_options.get("shape"))
        self.settings = sample_settings(self.plan, shape, seed, dtype, self.label)
        self.shard = check_int("shard", shard_size(device_of(model.network, device)) if shard is None else shard, 1)
        if batch_size is not None:
            batch_size = check_int("batch_size", batch_size, 1)
        self.options = RunOptions(shape, seed=seed, batch_size=batch_size, device=device, dtype=dtype)
        self.probe = Probe(
            self.folder,
            probe_outputs(model, shape, device, dtype, self.label),
            f"{self.folder}: its samples are another model's; pass another folder, or delete this one",
        )
        self._open()

    def _open(self) -> None:
        """Open the samples that exist; raise EvaluationError if they were drawn with other settings or another model."""
        if (self.folder / SETTINGS).is_file():
            _check_settings(self.folder, self.settings)
        elif (self.folder / SAMPLES).exists():
            raise EvaluationError(
                f"{self.folder}: contains {SAMPLES}, but no {SETTINGS} that describes them; pass another folder, or "
                "delete this one"
            )
        self.probe.check()
        self.shards = Shards(self.folder / SAMPLES, self.settings["shape"], np.uint8)

    def run(self, progress: bool | None) -> Shards:
        """Draw the missing images and return all images."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_if_missing(
            self.folder / SETTINGS,
            lambda temporary: temporary.write_text(to_json(self.settings), encoding="utf-8"),
        )
        self._open()  # again, because another process may have begun after the constructor ran
        self.probe.save()
        self.shards.fill(self.n, self.shard, lambda span: self._images(span, progress), progress, "samples")
        return self.shards

    def _images(self, span: range, progress: bool | None) -> np.ndarray:
        options = dataclasses.replace(
            self.options,
            first=span.start,
            class_labels=labels_in_turn(self.plan.model, self.label, span),
            # With None, the bar of a shard shows only on a terminal, and is removed at its end.
            progress=None if progress else progress,
        )
        return to_uint8(run(self.plan, len(span), options)).cpu().numpy()


def sample_settings(
    plan: Plan, shape: tuple[int, ...], seed: int, dtype: torch.dtype | None, label: int | None
) -> dict:
    """Return the content of settings.json: everything that the images depend on."""
    in_turn = isinstance(labels_in_turn(plan.model, label, range(1)), torch.Tensor)
    table = plan.table
    return {
        **model_identity(plan.model, dtype),
        "shape": list(shape),
        "seed": check_seed(seed),
        "sampler": plan.sampler,
        "steps": len(table.timesteps),
        "spacing": plan.spacing,
        "eta": float(plan.eta),
        "variance": plan.variance,
        "chain": sha256(to_digits(table.rows) + str(table.timesteps.tolist())),
        "clip": clip_bound(plan.model.settings.clip),
        "class_labels": "each in turn" if in_turn else label,
    }


def _check_settings(folder: Path, expected: dict) -> None:
    """Raise EvaluationError if the folder's samples were drawn with other settings."""
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise EvaluationError(f"{folder}: its {SETTINGS} is not a JSON object; pass another folder, or delete this one")
    differences = "; ".join(
        f"{name} {_short(stored.get(name))}, now {_short(value)}"
        for name, value in expected.items()
        if stored.get(name) != value
    )
    if differences:
        raise EvaluationError(
            f"{folder}: its samples were drawn with other settings ({differences}); pass another folder, or delete this one"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
