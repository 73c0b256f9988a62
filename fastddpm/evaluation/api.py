"""`evaluate`: FID, KID and bits per dimension of a model, by the paper's protocol (Ho et al. 2020, section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from .. import data
from ..inputs.arguments import device_of, image_shape
from ..inputs.resolve import ResolvedModel, resolve
from ..sampling.plan import resolve_for
from ..utils.files import atomic_write
from .features import Features, inception
from .identity import to_json
from .likelihood import LikelihoodOptions
from .metrics import DistanceMetrics, LikelihoodMetric, Metric
from .samples import Drawing, DrawingOptions, chain_arguments, checked_chain_options

METRICS = ("fid", "kid", "bpd")
RESULT, CACHE = "result.json", "evaluation-cache"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of `evaluate`; str() returns it as a table.

    Attributes:
        metrics: the measured values.
        settings: everything that the values depend on, ready for JSON.
    """

    metrics: list[Metric]
    settings: dict

    def __str__(self) -> str:
        lines = [("metric", "value", "uncertainty", "protocol"), *(metric.cells() for metric in self.metrics)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def evaluate(
    model: nn.Module | Callable,
    source: str | Path,
    folder: str | Path,
    *,
    metrics: Iterable[str] = METRICS,
    n: int = 50_000,
    seed: int = 0,
    features: Features | None = None,
    cache: str | Path | None = None,
    shard: int | None = None,
    subsample: int | None = None,
    likelihood_images: int | None = None,
    size: int | None = None,
    alpha: str = "black",
    skip_damaged: bool = False,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    **options: object,
) -> Result:
    """Measure FID, KID and bits per dimension of a model by the protocol of Ho et al. 2020, section 4.

    By default, 50,000 samples are drawn with the full chain. A run's folder holds the averaged weights, as the paper
    uses. An interrupted call can be repeated with the same arguments; it continues from the files in `folder`. All
    arguments and files are checked before the first image is drawn.

    Args:
        model: a `UNet`, a diffusers UNet2DModel, or any callable model(x, t), as for `fastddpm.sample`.
        source: the reference images, a path that `fastddpm.data.load` reads.
        folder: the evaluation's folder. Samples, features, bounds and result.json are written to it.
        metrics: some of "fid", "kid" and "bpd". "fid" and "kid" compare the first n images of the seed's sequence, as
            uint8, with all training images. "bpd" is the bits per dimension of the .npz's x_test, or of the training
            images if it has none.
        n: number of samples for "fid" and "kid".
        seed: seed of the samples and of the bound's noise, in [0, 2^64).
        features: network of the features. Default: `inception()`, the only network whose metrics are named FID and KID.
        cache: folder for the features and statistics of the reference. Default: evaluation-cache, next to `folder`.
        shard: number of images in one file, as for `draw`.
        subsample: number of timesteps drawn for each image's bits per dimension, as for `fastddpm.likelihood`. Default:
            all T timesteps.
        likelihood_images: number of images whose bits per dimension are measured. Default: all.
        size: as for `fastddpm.data.load`.
        alpha: as for `fastddpm.data.load`.
        skip_damaged: as for `fastddpm.data.load`.
        batch_size: images per forward. Default: what fits in memory.
        device: device of the computation. Default: the model's device.
        dtype: dtype of the network's arithmetic. Default: the model's own.
        progress: whether to show progress bars. Default: on a terminal or in a notebook.
        **options: as for `draw`.

    Returns:
        A `Result`.

    Raises:
        ValueError: an argument is invalid. The message names it.
        DataError: the images at `source` cannot be used.
        EvaluationError: `folder` or `cache` belongs to another model or other settings, or has a damaged file.
        LikelihoodError: the network's output for the bound has the wrong shape or is not finite.
    """
    metrics = _checked_metrics(metrics)
    options = checked_chain_options(options)
    arguments = chain_arguments(options)
    if "bpd" in metrics:  # the bound needs a variance, whatever the sampler
        model = resolve(model, arguments.schedule, arguments.prediction, arguments.variance, arguments.clip)
    else:
        model = resolve_for(model, arguments)
    folder, shape = Path(folder), image_shape(model, options.get("shape"))
    reading = {"size": size, "alpha": alpha, "skip_damaged": skip_damaged}
    reference, held_out = _load_images(model, source, shape, "bpd" in metrics, **reading)
    settings = {"versions": {name: version(name) for name in ("fastddpm", "torch", "numpy")}}
    settings["reference"] = {"source": reference.source, "images": len(reference), "sha256": reference.digest()}

    distances = bits_per_dim = None
    if "fid" in metrics or "kid" in metrics:
        drawing = Drawing(model, folder, DrawingOptions(n, seed, shard, batch_size, device, dtype, options))
        features = inception(device=device_of(model.network, device)) if features is None else features
        distances = DistanceMetrics(features, reference, drawing, Path(cache or folder.parent / CACHE))
        settings["samples"] = {"n": drawing.n, **drawing.settings}
        settings["features"] = {"name": features.name, "dim": distances.dim, "sha256": features.checksum}
    if "bpd" in metrics:
        images = reference if held_out is None else held_out
        description = f"the {'training images' if held_out is None else 'x_test'} of {images.source}"
        likelihood_options = LikelihoodOptions(
            subsample=subsample, seed=seed, batch_size=batch_size, device=device, dtype=dtype
        )
        bits_per_dim = LikelihoodMetric(model, images, description, likelihood_images, folder, likelihood_options)
        settings["likelihood"] = {"n": bits_per_dim.n, **bits_per_dim.settings}

    measured = _measure(distances, bits_per_dim, metrics, progress)
    with atomic_write(folder / RESULT) as temporary:
        content = {"metrics": [dataclasses.asdict(metric) for metric in measured], **settings}
        temporary.write_text(to_json(content), encoding="utf-8")
    return Result(measured, settings)


def _measure(
    distances: DistanceMetrics | None, bits_per_dim: LikelihoodMetric | None, metrics: list[str], progress: bool | None
) -> list[Metric]:
    measured = []
    if distances is not None:
        distances.warn(metrics)
    if bits_per_dim is not None:  # first, because `measure` checks the remaining arguments
        measured.append(bits_per_dim.measure(progress))
    if distances is not None:
        measured[:0] = distances.measure(metrics, progress)
    return measured


def _checked_metrics(metrics: Iterable[str]) -> list[str]:
    metrics = list(metrics)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics: got {', '.join(unknown) or 'none'}; expected some of {', '.join(METRICS)}")
    return metrics


def _load_images(
    model: ResolvedModel,
    source: str | Path,
    shape: tuple[int, ...],
    bits_per_dim: bool,
    *,
    size: int | None,
    **picture_options,
) -> tuple[data.Images, data.Images | None]:
    """Return the reference images and the held-out images, or None if `source` has none or they are not needed.

    If bits per dimension need labels, they are loaded with the held-out images, else with the reference images.
    """
    classes = None
    with_labels = bits_per_dim and model.num_classes is not None
    if with_labels:
        classes = model.unet.class_names or model.num_classes
    held_out = None
    if bits_per_dim:
        held_out = data.load_test(source, labels=with_labels, classes=classes, size=size)
    reference_labels = with_labels and held_out is None
    reference = data.load(source, labels=reference_labels, classes=classes, size=size, **picture_options)
    reference = _padded_to_model(reference, shape)
    return reference, None if held_out is None else _padded_to_model(held_out, shape)


def _padded_to_model(images: data.Images, shape: tuple[int, int, int]) -> data.Images:
    """Pad the images as in training and append that to `source`; raise ValueError if their shape is not the model's."""
    unpadded = images.shape
    padded = images.pad_to(shape[1]) if shape[1] == shape[2] else images
    if padded.shape != shape:
        raise ValueError(
            f"data: {images.source}: {len(images)} images of {'x'.join(map(str, unpadded))}; "
            f"expected the model's {'x'.join(map(str, shape))}, or smaller ones of as many channels; size (--size) resizes them"
        )
    if unpadded != shape:
        padded.source += f", padded from {unpadded[1]}x{unpadded[2]} to {shape[1]}x{shape[2]}"
    return padded
