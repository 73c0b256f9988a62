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
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import data, ops
from .arguments import (
    bound_of,
    check_count,
    device_of,
    labels_of,
    output_fault,
    schedule_of,
    shape_of,
    trained_for,
)
from .coding import likelihood
from .engine import network
from .features import SUBSET, SUBSETS, Features, Statistics, checksum, frechet, inception, kernel_distance, statistics
from .files import whole
from .foreign import adopted
from .images import to_uint8
from .ops._library import check_seed
from .ops.philox_normal import Stream
from .sampling import PLANNED, plan, sample
from .shards import LOT, EvaluationError, Shards
from .unet import UNet, UNetConfig

METRICS = ("fid", "kid", "bpd")
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
        self.model, self.folder, self.n = model, Path(folder), check_count("n", n, 1)
        self.label = options.get("class_labels")
        if self.label is not None:
            self.label = check_count("class_labels", self.label, 0)
        self.settings = drawn(model, seed, dtype, options)
        self.shard = check_count("shard", lot_on(device_of(model, device)) if shard is None else shard, 1)
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size, 1)
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
        label = check_count("class_labels", label, 0)
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
        "clip": bound_of(chosen.clip),
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
            limit = check_count("likelihood_images", limit, 1)
        self.model, self.images, self.what, self.options = model, images, what, {"device": device, **options}
        self.n = min(limit or len(images), len(images))
        self.shard = lot_on(device_of(model, device))
        schedule, prediction, variance, clip = trained_for(
            model, *(options[name] for name in ("schedule", "prediction", "variance", "clip"))
        )
        if options["subsample"] is not None:
            self.options["subsample"] = options["subsample"] = check_count("subsample", options["subsample"], 1)
        self.settings = {
            **_told_by(model, options["dtype"]),
            "images": images.digest(),
            "labels": None if images.labels is None else _hash(str(images.labels.tolist())),
            "schedule": _hash(_rounded(schedule.betas)),
            "prediction": prediction,
            "variance": variance,
            "clip": bound_of(clip),
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


def _rounded(values: torch.Tensor) -> str:
    """For checksums: a last digit may differ from machine to machine, and means nothing."""
    return " ".join(f"{value:.5e}" for value in values.flatten().tolist())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
