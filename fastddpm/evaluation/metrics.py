"""The metrics of an evaluation: distances between samples and reference images, and bits per dimension of given images."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from .. import data
from ..inputs.arguments import device_of
from ..inputs.resolve import ResolvedModel
from ..ops.rng import check_seed
from ..utils.files import atomic_write
from ..utils.validation import check_int, clip_bound
from .distances import SUBSET_SIZE, SUBSETS, Statistics, frechet, kernel_distance, statistics
from .features import Features
from .identity import PROBE_IMAGES, Probe, model_identity, probe_outputs, sha256, to_digits, to_json
from .likelihood import likelihood_of
from .samples import SAMPLES, Drawing, shard_size
from .shards import Shards, load_arrays


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured value.

    Attributes:
        metric: name of the metric.
        value: the measured value.
        uncertainty: a standard deviation, an interval (low, high), or None.
        meaning: description of the uncertainty.
        protocol: description of the measurement.
    """

    metric: str
    value: float
    uncertainty: float | tuple[float, float] | None
    meaning: str
    protocol: str

    def cells(self) -> tuple[str, str, str, str]:
        """Return the name, the value, the uncertainty and the protocol as text."""
        if self.uncertainty is None:
            uncertainty = ""
        elif isinstance(self.uncertainty, tuple):
            uncertainty = "{:.5g} .. {:.5g} ({})".format(*self.uncertainty, self.meaning)
        else:
            uncertainty = f"± {self.uncertainty:.2g} ({self.meaning})"
        return self.metric, f"{self.value:.5g}", uncertainty, self.protocol


class _FeatureStore:
    """The features of one set of images, in shards. The folder is named after the network, its weights and the shape.

    Args:
        features: the network.
        outputs: the network's features for fixed noise.
        shape: the shape of an image, (C, H, W).
        folder: the parent of the network's folder.
        name: name of the set of images.
        argument: argument of `evaluate` to change if the folder belongs to another network with this name.
    """

    def __init__(
        self, features: Features, outputs: np.ndarray, shape: tuple[int, ...], folder: Path, name: str, argument: str
    ) -> None:
        network = re.sub(r"[^\w.-]", "_", features.name)
        network = f"{network}-{'x'.join(map(str, shape))}-{(features.checksum or 'callable')[:12]}"
        self.features, self.folder, self.name = features, folder / network, name
        message = (
            f"{self.folder}: these are the features of another {features.name}; delete it, or pass another {argument}"
        )
        self.probe = Probe(self.folder, outputs, message)
        self.probe.check()
        self.shards = Shards(self.folder / name, outputs.shape[1:], outputs.dtype)

    def fill(self, n: int, load: Callable[[range], torch.Tensor], progress: bool | None, description: str) -> Shards:
        """Compute the missing features of images 0..n-1. `load` returns the images of a span as uint8 [N, C, H, W]."""
        self.probe.save()
        size = shard_size(self.features.device)
        self.shards.fill(n, size, lambda span: self.features(load(span)).numpy(), progress, description)
        return self.shards


class DistanceMetrics:
    """Fréchet and kernel distance between drawn samples and reference images, in a network's features."""

    def __init__(self, features: Features, reference: data.Images, drawing: Drawing, cache: Path) -> None:
        self.features, self.reference, self.drawing = features, reference, drawing
        for images, count in self._counts():
            if count < 2:
                raise ValueError(f"{images}: got {count}; a distance needs at least 2")
        shape = tuple(drawing.settings["shape"])
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (PROBE_IMAGES, *shape), dtype=torch.uint8, generator=generator)
        outputs = features(noise).numpy()
        self.dim = outputs.shape[1]
        name = f"reference-{reference.digest()[:12]}"
        self.reference_features = _FeatureStore(features, outputs, shape, cache, name, "cache")
        name = f"{SAMPLES}-{sha256(to_json(drawing.settings))[:12]}"
        self.sample_features = _FeatureStore(features, outputs, shape, drawing.folder / "features", name, "folder")

    def _counts(self) -> list[tuple[str, int]]:
        return [("samples", self.drawing.n), ("reference images", len(self.reference))]

    def warn(self, metrics: list[str]) -> None:
        """Warn if there are too few images for a metric."""
        fewest = min(count for _, count in self._counts())
        for images, count in self._counts():
            if "fid" in metrics and count <= self.dim:
                title = self.features.title("fid")
                warnings.warn(
                    f"{title}: {count} {images} for {self.dim} features: their covariance is singular and the distance biased "
                    f"upwards; compare it only with distances of as many images, or use more than {self.dim}",
                    stacklevel=3,
                )
            if "kid" in metrics and count <= min(SUBSET_SIZE, fewest):
                title = self.features.title("kid")
                warnings.warn(
                    f"{title}: {count} {images}: every subset is all of them, so that the standard deviation is too small; "
                    f"use more than {SUBSET_SIZE}",
                    stacklevel=3,
                )

    def measure(self, metrics: list[str], progress: bool | None) -> Iterator[Metric]:
        """Yield those of `metrics` that are distances.

        The reference is processed first, so that its errors are raised before hours of sampling.
        """
        n, reference_count = self.drawing.n, len(self.reference)
        reference_statistics = self._reference_statistics(progress) if "fid" in metrics else None
        reference_shards = self._fill_reference(progress) if "kid" in metrics else None
        samples = self.drawing.run(progress)

        def load(span: range) -> torch.Tensor:
            return torch.from_numpy(samples.load(span))

        sample_shards = self.sample_features.fill(n, load, progress, "features of samples")
        if reference_statistics is not None:
            sample_statistics = statistics(map(torch.from_numpy, sample_shards.batches(n)))
            yield self._metric("fid", frechet(reference_statistics, sample_statistics), None, "")
        if reference_shards is not None:
            p = torch.from_numpy(reference_shards.load(range(reference_count)))
            q = torch.from_numpy(sample_shards.load(range(n)))
            mean, deviation = kernel_distance(p, q)
            size = min(SUBSET_SIZE, n, reference_count)
            yield self._metric("kid", mean, deviation, f"s.d. over {SUBSETS} subsets of {size}")

    def _metric(self, name: str, value: float, uncertainty: float | None, meaning: str) -> Metric:
        settings, n = self.drawing.settings, self.drawing.n
        noise = {"ddpm": settings["variance"], "ddim": f"eta {settings['eta']:g}"}.get(settings["sampler"], "no noise")
        protocol = (
            f"{n} samples ({settings['sampler']}, {settings['steps']} steps, {noise}, seed {settings['seed']}) against "
            f"{len(self.reference)} training images of {self.reference.source}; {self.dim} features of {self.features.name}"
        )
        return Metric(self.features.title(name), value, uncertainty, meaning, protocol)

    def _fill_reference(self, progress: bool | None) -> Shards:
        return self.reference_features.fill(
            len(self.reference), self.reference.read, progress, "features of the reference"
        )

    def _reference_statistics(self, progress: bool | None) -> Statistics:
        """Return the statistics of the reference's features, cached in a .npz file."""
        path = self.reference_features.folder / f"{self.reference_features.name}.npz"
        if path.is_file():
            count, mean, covariance = load_arrays(path, "count", "mean", "covariance")
            return Statistics(int(count), torch.from_numpy(mean), torch.from_numpy(covariance))
        shards = self._fill_reference(progress)
        computed = statistics(map(torch.from_numpy, shards.batches(len(self.reference))))
        with atomic_write(path) as temporary:
            mean, covariance = computed.mean.numpy(), computed.covariance.numpy()
            np.savez(temporary, count=computed.count, mean=mean, covariance=covariance)
        return computed


class LikelihoodMetric:
    """Bits per dimension of given images. The bound of each image is stored.

    Args:
        model: the model.
        images: the images.
        description: description of the images, for `Metric.protocol`.
        limit: number of images to measure; None means all.
        folder: the evaluation's folder.
        options: the options that are the same for all images.
    """

    def __init__(
        self,
        model: ResolvedModel,
        images: data.Images,
        description: str,
        limit: int | None,
        folder: Path,
        options: dict,
    ) -> None:
        if limit is not None:
            limit = check_int("likelihood_images", limit, 1)
        if options.subsample is not None:
            options = dataclasses.replace(options, subsample=check_int("subsample", options.subsample, 1))
        self.model, self.images, self.description, self.options = model, images, description, options
        self.n = min(limit or len(images), len(images))
        device, dtype = options.device, options.dtype
        self.shard = shard_size(device_of(model.network, device))
        schedule, prediction, variance, clip = model.settings
        self.settings = {
            **model_identity(model, dtype),
            "images": images.digest(),
            "labels": None if images.labels is None else sha256(str(images.labels.tolist())),
            "schedule": sha256(to_digits(schedule.betas)),
            "prediction": prediction,
            "variance": variance,
            "clip": clip_bound(clip),
            "subsample": options.subsample,
            "seed": check_seed(options.seed),
        }
        folder = folder / f"likelihood-{sha256(to_json(self.settings))[:12]}"
        outputs = probe_outputs(model, images.shape, device, dtype)
        message = f"{folder}: these are the bounds of another model; delete it, or pass another folder"
        self.probe = Probe(folder, outputs, message)
        self.probe.check()
        self.shards = Shards(folder / "bounds", (), np.float64)

    def measure(self, progress: bool | None) -> Metric:
        """Compute the missing bounds and return the mean of all bounds."""
        self.shards.fill(self.n, self.shard, lambda span: self._bounds(span, progress), progress, "likelihood")
        bounds = self.shards.load(range(self.n))
        mean, uncertainty, meaning = float(bounds.mean()), None, ""
        if self.n > 1:
            half = 1.96 * float(bounds.std(ddof=1)) / math.sqrt(self.n)
            uncertainty, meaning = (mean - half, mean + half), "95 % interval"
        subsample, variance, seed = (self.settings[name] for name in ("subsample", "variance", "seed"))
        timesteps = "all timesteps" if subsample is None else f"{subsample} timesteps drawn for each"
        protocol = f"{self.n} images: {self.description}; {timesteps}, {variance}, seed {seed}"
        return Metric("bits per dimension", mean, uncertainty, meaning, protocol)

    def _bounds(self, span: range, progress: bool | None) -> np.ndarray:
        labels = self.images.labels
        options = dataclasses.replace(
            self.options,
            class_labels=None if labels is None else labels[span.start : span.stop],
            first=span.start,
            progress=None if progress else progress,
        )
        bounds = likelihood_of(self.model, self.images.read(span), options).per_image.numpy()
        self.probe.save()  # only now, because `likelihood_of` checks the remaining arguments
        return bounds
