"""How good a model is: FID, KID and bits per dimension, by the paper's protocol (Ho et al. 2020, section 4).

An evaluation is a folder: settings.json (what was drawn), samples/ (uint8 images), likelihood-*/ and result.json. All of it,
and the cache of features beside it, is written in shards, each whole or not at all, and image i is image i of the seed's
sequence: what an interrupted run left is kept, the rest is made, and no image is drawn or counted twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import data
from .arguments import check_count, device_of, shape_of, trained_for, variance_of
from .coding import likelihood
from .features import SUBSET, SUBSETS, Features, Statistics, checksum, frechet, inception, kernel_distance, statistics
from .files import whole
from .images import to_uint8
from .ops._library import check_seed
from .sampling import PLANNED, plan, sample
from .shards import LOT, EvaluationError, Shards
from .unet import UNet

METRICS = ("fid", "kid", "bpd")
SAMPLES, SETTINGS, RESULT, CACHE, PROBE = "samples", "settings.json", "result.json", "evaluation-cache", "probe.npy"
CPU_LOT = 100  # images in one shard on a CPU, where a thousand take hours
OPTIONS = (*PLANNED, "shape", "clip", "class_labels")


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
    return _Drawing(model, folder, n, seed, shard, batch_size, device, dtype, options).run(progress)


class _Drawing:
    """`draw` in two parts: made, everything is checked and nothing written; run, it draws."""

    def __init__(self, model, folder, n, seed, shard, batch_size, device, dtype, options) -> None:
        check_count("n", n, 1)
        self.model, self.folder, self.n = model, Path(folder), n
        options = {name: value for name, value in options.items() if value is not None}
        self.settings = drawn(model, seed=seed, dtype=dtype, **options)
        self.shard = lot_on(device_of(model, device)) if shard is None else shard
        check_count("shard", self.shard, 1)
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        self.label = options.pop("class_labels", None)
        self.options = {"seed": seed, "batch_size": batch_size, "device": device, "dtype": dtype, **options}
        self.kept = (self.folder / SETTINGS).is_file()
        if self.kept:
            _same(self.folder, self.settings)
        elif (self.folder / SAMPLES).exists():
            raise EvaluationError(
                f"{self.folder}: holds {SAMPLES}, but no {SETTINGS} to say what they are; name another folder, or delete this"
            )
        self.shards = Shards(self.folder / SAMPLES, self.settings["shape"], np.uint8)

    def run(self, progress: bool | None) -> Shards:
        if not self.kept:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / SETTINGS, self.settings)
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


def drawn(model: object, *, seed: int = 0, dtype: torch.dtype | None = None, **options: object) -> dict:
    """What settings.json says: all that the images depend on, for JSON.

    A bare callable has no weights to tell it by: "weights" is then None, and a folder for each is the caller's business.
    """
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such option; expected some of {', '.join(OPTIONS)}")
    options = {name: value for name, value in options.items() if value is not None}
    label = options.get("class_labels")
    if label is not None:
        check_count("class_labels", label, 0)
    chosen = plan(model, **{name: options[name] for name in PLANNED if name in options})
    table = chosen.table
    chain = _rounded(table.rows) + str(table.timesteps.tolist())
    own = next((p.dtype for p in model.parameters()), torch.float32) if isinstance(model, nn.Module) else torch.float32
    return {
        "weights": checksum(model) if isinstance(model, nn.Module) else None,
        "shape": list(shape_of(model, options.get("shape"))),
        "seed": check_seed(seed),
        "sampler": chosen.sampler,
        "steps": len(table.timesteps),
        "spacing": chosen.spacing,
        "eta": float(chosen.eta),
        "variance": chosen.variance,
        "chain": hashlib.sha256(chain.encode()).hexdigest(),
        "clip": options.get("clip", True),
        "class_labels": "each in turn" if isinstance(_labels(model, label, range(1)), torch.Tensor) else label,
        "dtype": str(dtype or own).removeprefix("torch."),
    }


def _same(folder: Path, wanted: dict) -> None:
    """Raise EvaluationError where the folder's samples are other ones than these."""
    path = folder / SETTINGS
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: not a JSON object ({error}); name another folder, or delete this") from error
    differing = [name for name, value in wanted.items() if name not in found or found[name] != value]
    if found.get("chain") == wanted["chain"]:  # the same numbers by another name, as a default that was spelled out
        differing = [name for name in differing if name not in ("sampler", "steps", "spacing", "eta", "variance")]
    elif len(differing) > 1:  # its checksum tells nobody anything, unless nothing else differs
        differing.remove("chain")
    if differing:
        said = "; ".join(f"{name} {_short(found.get(name))}, now {_short(wanted[name])}" for name in differing)
        raise EvaluationError(
            f"{folder}: its samples were drawn otherwise ({said}); name another folder, or delete this"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write_json(path: Path, content: dict) -> None:
    with whole(path) as aside:
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- evaluate


class _Kept:
    """The features of one set of images, in shards: folder/NETWORK/name, where NETWORK tells its weights, too.

    A callable's name may stay while it changes, so its answer to some noise, the probe, lies there too and is to be the same.
    """

    def __init__(self, features: Features, shape: tuple[int, ...], probe: np.ndarray, folder: Path, name: str) -> None:
        network = re.sub(r"[^\w.-]", "_", features.name)
        network = f"{network}-{'x'.join(map(str, shape))}-{(features.checksum or 'callable')[:12]}"
        self.features, self.probe, self.folder, self.name = features, probe, folder / network, name
        if (self.folder / PROBE).is_file():
            kept = _load(self.folder / PROBE)
            # A hundredth: TF32 on a GPU and float32 on a CPU differ by far less, two networks by far more.
            if kept.shape != probe.shape or not np.allclose(kept, probe, rtol=0, atol=np.abs(kept).max() / 100):
                raise EvaluationError(
                    f"{self.folder}: these are the features of another {features.name}; delete it, or name another cache"
                )
        self.shards = Shards(self.folder / name, probe.shape[1:], probe.dtype)

    def fill(self, n: int, pixels: Callable[[range], np.ndarray], progress: bool | None, what: str) -> Shards:
        """Images 0..n-1, of which `pixels` gives a range as uint8 [N, C, H, W]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PROBE).is_file():
            with whole(self.folder / PROBE) as aside:
                np.save(aside, self.probe)
        lot = lot_on(self.features.device)
        self.shards.fill(n, lot, lambda span: self.features(torch.from_numpy(pixels(span))).numpy(), progress, what)
        return self.shards


def _load(path: Path) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(path)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{path}: not readable ({error}); delete it, and it is made anew") from error


class _Comparison:
    """Distances between samples and a reference on some features."""

    def __init__(self, features: Features, reference: data.ArrayImages, drawing: _Drawing, cache: Path) -> None:
        self.features, self.reference, self.drawing = features, reference, drawing
        for what, count in (("samples", drawing.n), ("reference images", len(reference))):
            if count < 2:
                raise ValueError(f"{what}: got {count}; a distance needs at least 2")
        shape = tuple(drawing.settings["shape"])
        noise = torch.randint(0, 256, (8, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        probe = features(noise).numpy()
        self.dim = probe.shape[1]
        self.of_reference = _Kept(features, shape, probe, cache, f"reference-{_digest(reference)[:12]}")
        self.of_samples = _Kept(features, shape, probe, drawing.folder / "features", SAMPLES)

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
            return self.reference.pixels[span.start : span.stop].numpy()

        return self.of_reference.fill(len(self.reference), pixels, progress, "features of the reference")

    def _statistics(self, progress: bool | None) -> Statistics:
        """The reference's, kept as count, mean and covariance in a .npz."""
        path = self.of_reference.folder / f"{self.of_reference.name}.npz"
        if path.is_file():
            with _load(path) as kept:
                return Statistics(
                    int(kept["count"]), torch.from_numpy(kept["mean"]), torch.from_numpy(kept["covariance"])
                )
        features = self._reference(progress)
        made = statistics(map(torch.from_numpy, features.lots(len(self.reference))))
        with whole(path) as aside:
            np.savez(aside, count=made.count, mean=made.mean.numpy(), covariance=made.covariance.numpy())
        return made


class _Bits:
    """The bound of given images, each image's own number kept."""

    def __init__(
        self, model, images: data.ArrayImages, what: str, limit: int | None, folder: Path, device, **options
    ) -> None:
        """what: which images they are. options: `likelihood`'s, but for the images and their labels."""
        if limit is not None:
            check_count("likelihood_images", limit, 1)
        self.model, self.images, self.what, self.options = model, images, what, {"device": device, **options}
        self.n = min(limit or len(images), len(images))
        self.shard = lot_on(device_of(model, device))
        schedule, prediction = trained_for(model, options["schedule"], options["prediction"])
        known = [checksum(model) if isinstance(model, nn.Module) else None, _digest(images), _rounded(schedule.betas)]
        known += [prediction, options["variance"] or variance_of(model), options["clip"]]
        known += [str(options[name]) for name in ("subsample", "seed", "dtype")]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        self.shards = Shards(folder / f"likelihood-{key[:12]}", (), np.float64)

    def row(self, progress: bool | None) -> Row:
        self.shards.fill(self.n, self.shard, lambda span: self._bounds(span, progress), progress, "likelihood")
        bounds = self.shards.rows(range(self.n))
        mean, uncertainty, meaning = float(bounds.mean()), None, ""
        if self.n > 1:
            half = 1.96 * float(bounds.std(ddof=1)) / math.sqrt(self.n)
            uncertainty, meaning = (mean - half, mean + half), "95 % interval"
        subsample = self.options["subsample"]
        timesteps = "all timesteps" if subsample is None else f"{subsample} timesteps drawn for each"
        variance = self.options["variance"] or variance_of(self.model)
        protocol = f"{self.n} images: {self.what}; {timesteps}, {variance}, seed {self.options['seed']}"
        return Row("bits per dimension", mean, uncertainty, meaning, protocol)

    def _bounds(self, span: range, progress: bool | None) -> np.ndarray:
        chosen = slice(span.start, span.stop)
        return likelihood(
            self.model,
            self.images.pixels[chosen],
            class_labels=None if self.images.labels is None else self.images.labels[chosen],
            first=span.start,
            progress=None if progress else progress,
            **self.options,
        ).per_image.numpy()


def _rounded(values: torch.Tensor) -> str:
    """For checksums: a last digit may differ from machine to machine, and means nothing."""
    return " ".join(f"{value:.5e}" for value in values.flatten().tolist())


def _digest(images: data.ArrayImages) -> str:
    total = hashlib.sha256(str(list(images.pixels.shape)).encode())
    total.update(images.pixels.numpy())
    return total.hexdigest()


def _fitting(images: data.ArrayImages, shape: tuple[int, int, int]) -> data.ArrayImages:
    """The images, padded as for training; ValueError where they are not the model's."""
    own = tuple(images.pixels.shape[1:])
    images = images.pad_to(shape[1]) if shape[1] == shape[2] else images
    if tuple(images.pixels.shape[1:]) != shape or not len(images):
        raise ValueError(
            f"data: {images.source}: {len(images)} images of {'x'.join(map(str, own))}; "
            f"expected the model's {'x'.join(map(str, shape))}, or smaller ones of as many channels"
        )
    return images


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
    subsample: timesteps drawn for each image's bits per dimension; default all T. likelihood_images: how many of the images.
    shard, options: see `draw`. The other arguments are `fastddpm.sample`'s.

    Defaults are the paper's: 50,000 samples of the whole chain with the averaged weights, which are what a run's folder holds.
    An interrupted call, called again, goes on where it was. All that can be checked is checked before anything is drawn.
    """
    metrics = list(metrics)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics: got {', '.join(unknown) or 'none'}; expected some of {', '.join(METRICS)}")
    folder, shape = Path(folder), shape_of(model, options.get("shape"))
    labels = "bpd" in metrics and isinstance(model, UNet) and model.config.classes is not None
    reference = _fitting(data.load(source, labels=labels), shape)
    settings = {"versions": {name: version(name) for name in ("fastddpm", "torch", "numpy")}}
    settings["reference"] = {"source": reference.source, "images": len(reference), "sha256": _digest(reference)}

    comparison = bits = None
    if "fid" in metrics or "kid" in metrics:
        drawing = _Drawing(model, folder, n, seed, shard, batch_size, device, dtype, options)
        if features is None:
            features = inception(device=device_of(model, device))
        comparison = _Comparison(features, reference, drawing, Path(cache or folder.parent / CACHE))
        settings["samples"] = {"n": n, **drawing.settings}
        settings["features"] = {"name": features.name, "dim": comparison.dim, "sha256": features.checksum}
    if "bpd" in metrics:
        held_out = data.load_test(source, labels=labels)
        images = reference if held_out is None else _fitting(held_out, shape)
        what = f"the {'training images' if held_out is None else 'x_test'} of {images.source}"
        of_both = {name: options.get(name) for name in ("schedule", "prediction", "variance")}
        bits = _Bits(
            model, images, what, likelihood_images, folder, device, clip=options.get("clip", True), subsample=subsample,
            seed=seed, dtype=dtype, **of_both,
        )  # fmt: skip

    rows = []
    if comparison is not None:
        comparison.warn(metrics)
    if bits is not None:  # first, as the rest of its arguments is checked when it begins
        rows.append(bits.row(progress))
    if comparison is not None:
        rows[:0] = comparison.rows(metrics, progress)
    result = Result(rows, settings)
    _write_json(folder / RESULT, {"metrics": [dataclasses.asdict(row) for row in rows], **settings})
    return result
