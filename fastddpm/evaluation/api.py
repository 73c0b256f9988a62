"""`evaluate`: FID, KID and bits per dimension of a model, by the paper's protocol (Ho et al. 2020, section 4)."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import data
from ..inputs.adopt import adopted
from ..inputs.arguments import device_of, shape_of
from ..inputs.resolve import trained_for
from ..models.unet import UNet
from ..ops.rng import check_seed
from ..utils.files import whole
from ..utils.validation import check_int, clip_bound
from .distances import SUBSET, SUBSETS, Statistics, frechet, kernel_distance, statistics
from .features import Features, inception
from .likelihood import likelihood
from .samples import (
    CACHE,
    NOISE,
    RESULT,
    SAMPLES,
    _answer,
    _Drawing,
    _given,
    _hash,
    _json,
    _load,
    _Probe,
    _rounded,
    _told_by,
    lot_on,
)
from .shards import Shards

METRICS = ("fid", "kid", "bpd")


class _Kept:
    """The features of one set of images, in shards: folder/NETWORK/name, where NETWORK tells its weights, too."""

    def __init__(
        self, features: Features, shape: tuple[int, ...], answer: np.ndarray, folder: Path, name: str, other: str
    ) -> None:
        """answer: the network's, to noise. other: what is to be another one where it is another network's."""
        own = re.sub(r"[^\w.-]", "_", features.name)
        own = f"{own}-{'x'.join(map(str, shape))}-{(features.checksum or 'callable')[:12]}"
        self.features, self.folder, self.name = features, folder / own, name
        said = f"{self.folder}: these are the features of another {features.name}; delete it, or name another {other}"
        self.probe = _Probe(self.folder, answer, said)
        self.probe.check()
        self.shards = Shards(self.folder / name, answer.shape[1:], answer.dtype)

    def fill(self, n: int, pixels: Callable[[range], np.ndarray], progress: bool | None, what: str) -> Shards:
        """Images 0..n-1, of which `pixels` gives a range as uint8 [N, C, H, W]."""
        self.probe.keep()
        lot = lot_on(self.features.device)
        self.shards.fill(n, lot, lambda span: self.features(torch.from_numpy(pixels(span))).numpy(), progress, what)
        return self.shards


class _Comparison:
    """Distances between samples and a reference on some features."""

    def __init__(self, features: Features, reference: data.Images, drawing: _Drawing, cache: Path) -> None:
        self.features, self.reference, self.drawing = features, reference, drawing
        for what, count in (("samples", drawing.n), ("reference images", len(reference))):
            if count < 2:
                raise ValueError(f"{what}: got {count}; a distance needs at least 2")
        shape = tuple(drawing.settings["shape"])
        noise = torch.randint(0, 256, (NOISE, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        answer = features(noise).numpy()
        self.dim = answer.shape[1]
        name = f"reference-{reference.digest()[:12]}"
        self.of_reference = _Kept(features, shape, answer, cache, name, "cache")
        name = f"{SAMPLES}-{_hash(_json(drawing.settings))[:12]}"
        self.of_samples = _Kept(features, shape, answer, drawing.folder / "features", name, "folder")

    def warn(self, metrics: list[str]) -> None:
        """Say what the numbers of images don't allow."""
        counts = {"samples": self.drawing.n, "reference images": len(self.reference)}
        for what, count in counts.items():
            said = []
            if "fid" in metrics and count <= self.dim:
                said.append(
                    f"{self.features.title('fid')}: {count} {what} for {self.dim} features: their covariance is singular and the "
                    f"distance biased upwards; compare it with such of as many images only, or take more than {self.dim}"
                )
            if "kid" in metrics and count <= min(SUBSET, *counts.values()):
                said.append(
                    f"{self.features.title('kid')}: {count} {what}: every subset is all of them, and the standard deviation "
                    f"over subsets too small; take more than {SUBSET}"
                )
            for text in said:
                warnings.warn(text, stacklevel=3)

    def rows(self, metrics: list[str], progress: bool | None) -> Iterator[Row]:
        """The reference first: what is wrong with it shows before hours of sampling."""
        n, count = self.drawing.n, len(self.reference)
        of_reference = self._statistics(progress) if "fid" in metrics else None
        real = self._reference(progress) if "kid" in metrics else None
        samples = self.drawing.run(progress)
        drawn = self.of_samples.fill(n, samples.rows, progress, "features of samples")
        if of_reference is not None:
            distance = frechet(of_reference, statistics(map(torch.from_numpy, drawn.lots(n))))
            yield self._row("fid", distance, None, "")
        if real is not None:
            p, q = (torch.from_numpy(shards.rows(range(m))) for shards, m in ((real, count), (drawn, n)))
            mean, deviation = kernel_distance(p, q)
            yield self._row("kid", mean, deviation, f"s.d. over {SUBSETS} subsets of {min(SUBSET, n, count)}")

    def _row(self, metric: str, value: float, uncertainty: float | None, meaning: str) -> Row:
        said, n = self.drawing.settings, self.drawing.n
        noise = {"ddpm": said["variance"], "ddim": f"eta {said['eta']:g}"}.get(said["sampler"], "no noise")
        protocol = (
            f"{n} samples ({said['sampler']}, {said['steps']} steps, {noise}, seed {said['seed']}) against {len(self.reference)} "
            f"training images of {self.reference.source}; {self.dim} features of {self.features.name}"
        )
        return Row(self.features.title(metric), value, uncertainty, meaning, protocol)

    def _reference(self, progress: bool | None) -> Shards:
        def pixels(span: range) -> np.ndarray:
            return self.reference.read(span).numpy()

        return self.of_reference.fill(len(self.reference), pixels, progress, "features of the reference")

    def _statistics(self, progress: bool | None) -> Statistics:
        """The reference's, kept as count, mean and covariance in a .npz."""
        path = self.of_reference.folder / f"{self.of_reference.name}.npz"
        if path.is_file():
            count, mean, covariance = _load(path, "count", "mean", "covariance")
            return Statistics(int(count), torch.from_numpy(mean), torch.from_numpy(covariance))
        features = self._reference(progress)
        made = statistics(map(torch.from_numpy, features.lots(len(self.reference))))
        with whole(path) as aside:
            np.savez(aside, count=made.count, mean=made.mean.numpy(), covariance=made.covariance.numpy())
        return made


class _Bits:
    """The bound of given images, each image's own number kept."""

    def __init__(
        self, model, images: data.Images, what: str, limit: int | None, folder: Path, device, **options
    ) -> None:
        """what: which images they are. options: `likelihood`'s, but for the images and their labels."""
        if limit is not None:
            limit = check_int("likelihood_images", limit, 1)
        self.model, self.images, self.what, self.options = model, images, what, {"device": device, **options}
        self.n = min(limit or len(images), len(images))
        self.shard = lot_on(device_of(model, device))
        schedule, prediction, variance, clip = trained_for(
            model, *(options[name] for name in ("schedule", "prediction", "variance", "clip"))
        )
        if options["subsample"] is not None:
            self.options["subsample"] = options["subsample"] = check_int("subsample", options["subsample"], 1)
        self.settings = {
            **_told_by(model, options["dtype"]),
            "images": images.digest(),
            "labels": None if images.labels is None else _hash(str(images.labels.tolist())),
            "schedule": _hash(_rounded(schedule.betas)),
            "prediction": prediction,
            "variance": variance,
            "clip": clip_bound(clip),
            "subsample": options["subsample"],
            "seed": check_seed(options["seed"]),
        }
        folder = folder / f"likelihood-{_hash(_json(self.settings))[:12]}"
        answer = _answer(model, images.shape, len(schedule), device, options["dtype"])
        said = f"{folder}: these are the bounds of another model; delete it, or name another folder"
        self.probe = _Probe(folder, answer, said)
        self.probe.check()
        self.shards = Shards(folder / "bounds", (), np.float64)

    def row(self, progress: bool | None) -> Row:
        self.shards.fill(self.n, self.shard, lambda span: self._bounds(span, progress), progress, "likelihood")
        bounds = self.shards.rows(range(self.n))
        mean, uncertainty, meaning = float(bounds.mean()), None, ""
        if self.n > 1:
            half = 1.96 * float(bounds.std(ddof=1)) / math.sqrt(self.n)
            uncertainty, meaning = (mean - half, mean + half), "95 % interval"
        subsample = self.options["subsample"]
        timesteps = "all timesteps" if subsample is None else f"{subsample} timesteps drawn for each"
        variance, seed = self.settings["variance"], self.settings["seed"]
        protocol = f"{self.n} images: {self.what}; {timesteps}, {variance}, seed {seed}"
        return Row("bits per dimension", mean, uncertainty, meaning, protocol)

    def _bounds(self, span: range, progress: bool | None) -> np.ndarray:
        chosen = slice(span.start, span.stop)
        bounds = likelihood(
            self.model,
            self.images.read(span),
            class_labels=None if self.images.labels is None else self.images.labels[chosen],
            first=span.start,
            progress=None if progress else progress,
            **self.options,
        ).per_image.numpy()
        self.probe.keep()  # not before, as `likelihood` checks the rest of its arguments
        return bounds


def _fitting(images: data.Images, shape: tuple[int, int, int]) -> data.Images:
    """The images, padded as for training, which their source then says; ValueError where they are not the model's."""
    own = images.shape
    padded = images.pad_to(shape[1]) if shape[1] == shape[2] else images
    if padded.shape != shape:
        raise ValueError(
            f"data: {images.source}: {len(images)} images of {'x'.join(map(str, own))}; "
            f"expected the model's {'x'.join(map(str, shape))}, or smaller ones of as many channels; size (--size) resizes them"
        )
    if own != shape:
        padded.source += f", padded from {own[1]}x{own[2]} to {shape[1]}x{shape[2]}"
    return padded


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure. uncertainty: a standard deviation, an interval, or None; meaning: what it is. protocol: how it was measured."""

    metric: str
    value: float
    uncertainty: float | tuple[float, float] | None
    meaning: str
    protocol: str

    def cells(self) -> tuple[str, str, str, str]:
        if self.uncertainty is None:
            said = ""
        elif isinstance(self.uncertainty, tuple):
            said = "{:.5g} .. {:.5g}".format(*self.uncertainty)
        else:
            said = f"± {self.uncertainty:.2g}"
        return self.metric, f"{self.value:.5g}", f"{said} ({self.meaning})" if said else "", self.protocol


@dataclasses.dataclass(frozen=True)
class Result:
    """What `evaluate` found; str() is a table. settings: for JSON, what the figures depend on."""

    rows: list[Row]
    settings: dict

    def __str__(self) -> str:
        lines = [("metric", "value", "uncertainty", "protocol"), *(row.cells() for row in self.rows)]
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
    """Measure `model` against the images at `source`, which `fastddpm.data.load` reads; the result is in folder/result.json too.

    metrics: some of "fid" and "kid", of the seed's first n images, as 8-bit pictures, against all training images, and "bpd",
        of the .npz's x_test, or where there is none of the training images.
    features: default `inception()`; FID and KID are called so on those alone.
    cache: folder for the reference's features and statistics; default evaluation-cache, beside `folder`.
    size, alpha, skip_damaged: how the images are read, as in `fastddpm.data.load`.
    subsample: timesteps drawn for each image's bits per dimension; default all T. likelihood_images: how many of the images.
    shard, options: see `draw`. The other arguments are `fastddpm.sample`'s.

    Defaults are the paper's: 50,000 samples of the whole chain with the averaged weights, which are what a run's folder holds.
    An interrupted call, called again, goes on where it was. All that can be checked is checked before anything is drawn.
    """
    metrics = list(metrics)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics: got {', '.join(unknown) or 'none'}; expected some of {', '.join(METRICS)}")
    model, options = adopted(model), _given(options)
    folder, shape = Path(folder), shape_of(model, options.get("shape"))
    labels = "bpd" in metrics and isinstance(model, UNet) and model.config.classes is not None
    read_as = {"classes": (model.class_names or model.config.classes) if labels else None, "size": size}
    held_out = data.load_test(source, labels=labels, **read_as) if "bpd" in metrics else None
    of_reference = labels and held_out is None
    reference = data.load(source, labels=of_reference, alpha=alpha, skip_damaged=skip_damaged, **read_as)
    reference = _fitting(reference, shape)
    settings = {"versions": {name: version(name) for name in ("fastddpm", "torch", "numpy")}}
    settings["reference"] = {"source": reference.source, "images": len(reference), "sha256": reference.digest()}

    comparison = bits = None
    if "fid" in metrics or "kid" in metrics:
        drawing = _Drawing(model, folder, n, seed, shard, batch_size, device, dtype, options)
        if features is None:
            features = inception(device=device_of(model, device))
        comparison = _Comparison(features, reference, drawing, Path(cache or folder.parent / CACHE))
        settings["samples"] = {"n": drawing.n, **drawing.settings}
        settings["features"] = {"name": features.name, "dim": comparison.dim, "sha256": features.checksum}
    if "bpd" in metrics:
        images = reference if held_out is None else _fitting(held_out, shape)
        what = f"the {'training images' if held_out is None else 'x_test'} of {images.source}"
        of_both = {name: options.get(name) for name in ("schedule", "prediction", "variance", "clip")}
        bits = _Bits(
            model, images, what, likelihood_images, folder, device, subsample=subsample, seed=seed, batch_size=batch_size,
            dtype=dtype, **of_both,
        )  # fmt: skip
        settings["likelihood"] = {"n": bits.n, **bits.settings}

    rows = []
    if comparison is not None:
        comparison.warn(metrics)
    if bits is not None:  # first, as the rest of its arguments is checked when it begins
        rows.append(bits.row(progress))
    if comparison is not None:
        rows[:0] = comparison.rows(metrics, progress)
    result = Result(rows, settings)
    with whole(folder / RESULT) as aside:
        content = {"metrics": [dataclasses.asdict(row) for row in rows], **settings}
        aside.write_text(_json(content), encoding="utf-8")
    return result
