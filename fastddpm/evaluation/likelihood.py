"""`likelihood` and `rate_distortion`: the variational bound of given images in bits per dimension.

The equations are those of Ho et al. 2020: eq. 5, section 4.3 and table 4. The bound takes one network evaluation for each
image and timestep, on the engine that `sample` uses. The evaluations are independent, so a batch may mix any (image, timestep)
pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from .. import ops
from ..diffusion.bound import Bound
from ..diffusion.coefficients import to_x0
from ..diffusion.schedule import Schedule
from ..engine import memory
from ..engine.cache import acquire_runner
from ..engine.runner import Runner
from ..errors import LikelihoodError
from ..inputs.arguments import check_image_shape, class_labels_of, default_batch_size, device_of, output_fault
from ..inputs.resolve import ResolvedModel, resolve
from ..ops.philox_normal import first_words
from ..ops.rng import Stream, check_first, seed_of
from ..utils.files import atomic_write
from ..utils.progress import bar as progress_bar
from ..utils.validation import as_python_number, check_int, clip_bound, dtype_name, is_int

__all__ = ["Likelihood", "LikelihoodError", "RateDistortion", "likelihood", "rate_distortion"]
MAX_BATCH = 256  # default number of pairs in a batch; larger batches are not faster
BATCHES_PER_LOOK = 32  # batches between two reads from the device, which update the bar and find bad outputs
OFF_GRID = 1e-3  # grey levels; far above float32's rounding of k/127.5 - 1, far below the step of the grid


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """The variational bound on -log2 p(image) per dimension, averaged over N images.

    `likelihood` returns it. Tensors are on the CPU.

    Attributes:
        bits_per_dim: the bound L = L_T + L_{T-1} + ... + L_0 (eq. 5) in bits per dimension, or an unbiased estimate of
            it if timesteps were subsampled.
        standard_error: standard error of `bits_per_dim`, computed from the spread over images; NaN for a single image.
            Each image has its own noise and timesteps, so the error includes their variance.
        prior: L_T in bits per dimension.
        terms: float64 [T]. terms[t] is the mean of L_t in bits per dimension, over the images that it was evaluated
            for; NaN for a timestep that was not drawn.
        terms_error: float64 [T], the standard errors of `terms`; NaN for a timestep with fewer than two images.
        mse: float64 [T]. mse[t] is the mean of (x_0 - x0_hat)^2, with x0_hat clipped to [-1, 1]; NaN for a timestep
            that was not drawn.
        per_image: float64 [N], the bound of each image in bits per dimension.
        evaluations: number of network evaluations; one image at one timestep is one evaluation.
    """

    bits_per_dim: float
    standard_error: float
    prior: float
    terms: torch.Tensor
    terms_error: torch.Tensor
    mse: torch.Tensor
    per_image: torch.Tensor
    evaluations: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return the normal 95 % confidence interval (low, high) of `bits_per_dim`; both are NaN for a single image."""
        return self.bits_per_dim - 1.96 * self.standard_error, self.bits_per_dim + 1.96 * self.standard_error

    def __str__(self) -> str:
        n = len(self.per_image)
        low, high = self.interval
        spread = "no interval from a single image" if n == 1 else f"95 % interval {low:.4f} to {high:.4f}"
        first = float(self.terms[0])
        last = len(self.terms) - 1
        between = f"L_1..L_{last} {self.bits_per_dim - self.prior - first:.4f} + " if last else ""
        return (
            f"{self.bits_per_dim:.4f} bits/dim ({spread}; {n} image{'s' if n > 1 else ''}, {self.evaluations} evaluations)\n"
            f"= L_T {self.prior:.3g} + {between}L_0 {first:.4f}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RateDistortion:
    """Rate and distortion of progressive coding, after each number of reverse steps (section 4.3, figure 5).

    `rate_distortion` returns it. Tensors are float64 [T] on the CPU. Index k - 1 is the value after k = 1..T reverse
    steps; reverse step k evaluates the network at t = T - k.

    Attributes:
        rate: bits per dimension to send an image through the first k reverse steps, L_T + L_{T-1} + ... + L_{T-k+1}.
            rate[T - 1] + L_0 is the bound.
        distortion: root mean square of x_0 - x0_hat, in pixel values from 0 to 255.
        rate_error: standard error of `rate` over images; NaN for a single image.
        distortion_error: standard error of `distortion` over images; NaN for a single image.
        likelihood: the variational bound.
    """

    rate: torch.Tensor
    distortion: torch.Tensor
    rate_error: torch.Tensor
    distortion_error: torch.Tensor
    likelihood: Likelihood

    def __str__(self) -> str:
        """Return the rows of the paper's table 4."""
        T = len(self.rate)
        lines = ["reverse steps  rate (bits/dim)  distortion (RMSE 0-255)"]
        for k in sorted({-(-T * tenth // 10) for tenth in range(1, 11)}, reverse=True):
            lines.append(f"{k:13d}  {float(self.rate[k - 1]):15.5f}  {float(self.distortion[k - 1]):23.5f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Plot figure 5 of the paper: distortion and rate by reverse step, and distortion by rate.

        Args:
            path: file to write; its suffix specifies the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('the plot needs matplotlib: pip install "fastddpm[plot]"') from error
        steps = range(1, len(self.rate) + 1)
        panels = [
            ("reverse steps", steps, "distortion (RMSE, 0 to 255)", self.distortion),
            ("reverse steps", steps, "rate (bits/dim)", self.rate),
            ("rate (bits/dim)", self.rate, "distortion (RMSE, 0 to 255)", self.distortion),
        ]
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axis, (x_name, x, y_name, y) in zip(figure.subplots(1, 3), panels, strict=True):
            axis.plot(x, y)
            axis.set(xlabel=x_name, ylabel=y_name, ylim=(0, None), xlim=(0, None))
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=150)


def likelihood(
    model: nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    *,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    subsample: int | None = None,
    quantize: bool = False,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Likelihood:
    """Return the variational bound on -log2 p(image) in bits per dimension (Ho et al. 2020, eq. 5).

    The bound is L = L_T + L_{T-1} + ... + L_0, the sum of

        L_T     = KL(q(x_T | x_0) || p(x_T))
        L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
        L_0     = -log p(x_0 | x_1)

    with the discretized decoder p(x_0 | x_1) of eq. 13. The network's timesteps count from 0: L_t, t = 0..T-1,
    evaluates the network at t.

    Args:
        model: a `UNet`, a diffusers UNet2DModel, or any callable model(x, t) -> prediction, as for `sample`.
        images: [N, C, H, W] with N >= 1: uint8, or floating point in [-1, 1] on the 8-bit grid k / 127.5 - 1.
        schedule: noise schedule that the model was trained with, as for `sample`. Default: the model's own, else the
            paper's linear schedule.
        prediction: what the model predicts, as for `sample`. Default: the model's own, else "epsilon".
        variance: variance of the reverse steps: "fixed_large", "fixed_small" or "learned_range" (the output has 2C
            channels). Default: the model's own, else "fixed_large". "none" is refused because it has no density.
        clip: bound on |x0_hat|; True means 1.0, False means none. Default: the model's own, else True. Predictions of
            the mean are not clipped.
        class_labels: an int, or N integers (a tensor, a list or an array), for a network with classes. A callable
            receives the labels of each batch as model(x, t, class_labels). A batch mixes (image, timestep) pairs. For
            a callable with one condition per image, pass torch.arange(N) to identify the image of each pair.
        subsample: K in 1..T-1 timesteps to draw for each image. L_T and L_0 are computed exactly. The sum of the other
            terms is estimated from one uniform t in each of K parts of 1..T-1, weighted by the size of the part (see
            `fastddpm.evaluation.likelihood.strata`). The estimate is unbiased. Every image draws its own timesteps, so
            the standard error over images covers both images and timesteps. With few images and few parts, the estimate
            may miss large terms, and its interval is then too narrow. Default: all T timesteps.
        quantize: whether to round images to the 8-bit grid. Default: images off the grid are refused, because the bound
            is on the probability of 8-bit images.
        seed: seed of noise and timesteps: an int in [0, 2^64), or a torch.Generator to draw one from. Default: drawn
            from torch's generator.
        first: number of the first image; image i has number first + i. Its noise at t depends only on (seed, first + i,
            t), and its drawn timesteps only on (seed, first + i, K).
        batch_size: (image, timestep) pairs per forward. Default: what fits in memory, at most 256.
        device: device of the computation, as for `sample`. Default: the model's device.
        dtype: dtype of the network's arithmetic, as for `sample`. Default: the model's own.
        progress: whether to show a progress bar. Default: on a terminal or in a notebook.

    Returns:
        A `Likelihood`.

    Raises:
        ValueError: an argument is invalid. The message names it; the network has not run.
        LikelihoodError: the network's output has the wrong shape or is not finite.
    """
    pixels = _pixels(images, quantize)
    options = LikelihoodOptions(class_labels, subsample, seed, first, batch_size, device, dtype, progress)
    return likelihood_of(resolve(model, schedule, prediction, variance, clip), pixels, options)


def rate_distortion(
    model: nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    *,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    quantize: bool = False,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> RateDistortion:
    """Return rate and distortion of progressive coding by number of reverse steps (Ho et al. 2020, section 4.3).

    Evaluates the network at all T timesteps of each image.

    Args:
        model: a `UNet`, a diffusers UNet2DModel, or any callable model(x, t) -> prediction, as for `sample`.
        images: [N, C, H, W] with N >= 1: uint8, or floating point in [-1, 1] on the 8-bit grid k / 127.5 - 1.
        schedule: noise schedule that the model was trained with, as for `sample`. Default: the model's own, else the
            paper's linear schedule.
        prediction: what the model predicts, as for `sample`. Default: the model's own, else "epsilon".
        variance: variance of the reverse steps: "fixed_large", "fixed_small" or "learned_range" (the output has 2C
            channels). Default: the model's own, else "fixed_large". "none" is refused because it has no density.
        clip: bound on |x0_hat|; True means 1.0, False means none. Default: the model's own, else True. Predictions of
            the mean are not clipped.
        class_labels: an int, or N integers (a tensor, a list or an array), for a network with classes. A callable
            receives the labels of each batch as model(x, t, class_labels). A batch mixes (image, timestep) pairs. For
            a callable with one condition per image, pass torch.arange(N) to identify the image of each pair.
        quantize: whether to round images to the 8-bit grid. Default: images off the grid are refused, because the bound
            is on the probability of 8-bit images.
        seed: seed of noise: an int in [0, 2^64), or a torch.Generator to draw one from. Default: drawn from torch's
            generator.
        first: number of the first image; image i has number first + i. Its noise at t depends only on (seed, first + i,
            t).
        batch_size: (image, timestep) pairs per forward. Default: what fits in memory, at most 256.
        device: device of the computation, as for `sample`. Default: the model's device.
        dtype: dtype of the network's arithmetic, as for `sample`. Default: the model's own.
        progress: whether to show a progress bar. Default: on a terminal or in a notebook.

    Returns:
        A `RateDistortion`.

    Raises:
        ValueError: an argument is invalid. The message names it; the network has not run.
        LikelihoodError: the network's output has the wrong shape or is not finite.
    """
    pixels = _pixels(images, quantize)
    options = LikelihoodOptions(class_labels, None, seed, first, batch_size, device, dtype, progress)
    measured = _measure(resolve(model, schedule, prediction, variance, clip), pixels, options)
    with torch.inference_mode(False):
        rate, rate_error = _mean(torch.cat((measured.prior[:, None], measured.terms[:, 1:].flip(1)), dim=1).cumsum_(1))
        mean_square, error = _mean(measured.mse.flip(1))
        distortion = 127.5 * mean_square.sqrt()
        # The error of a square root, to first order; 0 if every image is reproduced exactly.
        distortion_error = torch.where(mean_square > 0, 127.5 * error / (2 * mean_square.sqrt()), error)
        return RateDistortion(rate, distortion, rate_error, distortion_error, _summary(measured))


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions:
    """The arguments of `likelihood` except the images, the model and its settings."""

    class_labels: torch.Tensor | Sequence[int] | int | None = None
    subsample: int | None = None
    seed: int | torch.Generator | None = None
    first: int = 0
    batch_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    progress: bool | None = None


def likelihood_of(model: ResolvedModel, pixels: torch.Tensor, options: LikelihoodOptions) -> Likelihood:
    """Return the `likelihood` of pixels, uint8 [N, C, H, W], for a model that `resolve` has returned."""
    measured = _measure(model, pixels, options)
    with torch.inference_mode(False):
        return _summary(measured)


class _Measured(NamedTuple):
    """The M terms of each image, on the CPU: M is T, or K + 1 if K timesteps were drawn."""

    T: int
    timesteps: torch.Tensor  # int64 [N, M]; timesteps[:, 0] is 0
    sizes: torch.Tensor  # float64 [M], the number of timesteps that each one represents
    terms: torch.Tensor  # float64 [N, M], L_t in bits per dimension
    mse: torch.Tensor  # float64 [N, M]
    prior: torch.Tensor  # float64 [N]


def _measure(model: ResolvedModel, pixels: torch.Tensor, options: LikelihoodOptions) -> _Measured:
    """Check the options and evaluate the terms of the bound."""
    n, *shape = pixels.shape
    check_image_shape("images", model.sized_network, shape)
    seed, first = seed_of(options.seed), check_first(options.first)
    device = device_of(model.network, options.device)
    terms = _Terms(model, device, seed, first)
    labels = class_labels_of(model, options.class_labels, n)
    timesteps, sizes = _timesteps(n, len(model.settings.schedule), options.subsample, seed, first)
    pairs, batch_size = timesteps.numel(), options.batch_size
    if batch_size is None:
        batch_size = min(MAX_BATCH, default_batch_size(pairs, shape, device))
    batch_size = min(check_int("batch_size", batch_size, 1), pairs)
    progress = options.progress
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        memory.retain_freed_memory(device),
        acquire_runner(model, device, options.dtype, (batch_size, *shape)) as entry,
        progress_bar(progress, total=pairs, unit="evaluation", leave=progress is True) as bar,
    ):
        for warning in entry.runner.warnings:
            model.warn(warning)
        pixels, labels = pixels.to(device), None if labels is None else labels.to(device)
        values, mse = terms.of_pairs(entry.runner, pixels, timesteps.to(device), labels, batch_size, bar)
        prior = torch.cat([terms.bound.prior(_scaled(part)) for part in pixels.split(batch_size)])
        return _Measured(len(model.settings.schedule), timesteps, sizes, values.cpu(), mse.cpu(), prior.cpu())


class _Terms:
    """The terms of the bound for (image, timestep) pairs, which a batch may mix in any way.

    Arithmetic outside the network is float64. It takes a few percent of the time for the bundled digits.
    """

    def __init__(self, model: ResolvedModel, device: torch.device, seed: int, first: int) -> None:
        schedule, self.prediction, variance, clip = model.settings
        self.bound, self.clip = Bound(schedule, variance, device), clip_bound(clip)
        self.learned = self.bound.log_variance is None
        self.seed, self.first = seed, first
        signal, scale = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
        self.coefficients = torch.stack((signal, scale, *to_x0(schedule, self.prediction))).to(device)

    def of_pairs(
        self,
        runner: Runner,
        pixels: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None,
        batch_size: int,
        bar: tqdm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (L_t, the mean of (x_0 - x0_hat)^2), both float64 [N, M] on the device of `pixels`.

        Args:
            runner: the network.
            pixels: uint8 [N, C, H, W].
            timesteps: int64 [N, M].
            labels: int64 [N], or None.
            batch_size: number of (image, timestep) pairs per forward.
            bar: progress bar, updated by the number of evaluations.

        Raises:
            LikelihoodError: an output has the wrong shape or is not finite.
        """
        (n, m), device = timesteps.shape, pixels.device
        pairs = n * m
        terms, mse = (torch.empty(pairs, dtype=torch.float64, device=device) for _ in range(2))
        bad = torch.full((), pairs, device=device)  # the first pair whose output is not finite
        evaluated = 0
        interval = BATCHES_PER_LOOK if device.type == "cuda" else 1
        for number, start in enumerate(range(0, pairs, batch_size)):
            stop = min(start + batch_size, pairs)
            # Pad the last batch with the last pair: another batch size would be packed and tuned again.
            pair = torch.arange(start, start + batch_size, device=device).clamp_(max=pairs - 1)
            image = pair // m
            at_zero = slice(-start % m, None, m) if -start % m < batch_size else None  # known without reading t
            t, batch_labels = timesteps[image, pair % m], None if labels is None else labels[image]
            value, square, finite = self._evaluate(runner, _scaled(pixels[image]), image, t, batch_labels, at_zero)
            terms[start:stop], mse[start:stop] = value[: stop - start], square[: stop - start]
            bad = torch.minimum(bad, torch.where(finite, pairs, pair).min())
            evaluated += stop - start
            if (number + 1) % interval == 0 or stop == pairs:
                _raise_if_bad(int(bad), timesteps)
                bar.update(evaluated)
                evaluated = 0
        return terms.reshape(n, m), mse.reshape(n, m)

    def _evaluate(
        self,
        runner: Runner,
        x0: torch.Tensor,
        image: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        at_zero: slice | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (L_t, the mean of (x_0 - x0_hat)^2, whether both are finite), [B] each. at_zero: the positions with t = 0."""
        noise = ops.philox_normal(
            x0.shape, seed=self.seed, t=t, stream=Stream.FORWARD, sample=self.first + image, device=x0.device
        )
        signal, scale, a, b = self.coefficients[:, t].reshape(4, -1, 1, 1, 1)
        x_t = signal * x0 + scale * noise
        o, v = self._predict(runner, x_t, t, labels)
        x0_hat = a * x_t + b * o
        clips = self.clip is not None and self.prediction != "mean"
        error = x0 - (x0_hat.clamp(-self.clip, self.clip) if clips else x0_hat)
        in_range = error if clips and self.clip <= 1 else x0 - x0_hat.clamp(-1, 1)
        value = self.bound.kl(t, error, v)
        if at_zero is not None:
            value[at_zero] = self.bound.decoder(x0[at_zero], error[at_zero], None if v is None else v[at_zero])
        # A learned variance far outside its range also gives a value that is not finite.
        finite = o.flatten(1).sum(1).isfinite() & value.isfinite()
        return value, in_range.square().flatten(1).mean(1), finite

    def _predict(
        self, runner: Runner, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (the network's prediction, the learned variance or None), in float64."""
        x = x_t.to(runner.dtype, memory_format=runner.memory_format)
        with runner.execution_context():
            o = runner.predict(x, runner.time_inputs_per_image(t), labels)
        fault = output_fault(o, list(x_t.shape), self.learned)
        if fault is not None:
            raise LikelihoodError(f"model: {fault}")
        o = (o if self.learned else o[:, : x_t.shape[1]]).to(torch.float64, memory_format=torch.contiguous_format)
        return o.chunk(2, dim=1) if self.learned else (o, None)


def _raise_if_bad(pair: int, timesteps: torch.Tensor) -> None:
    """Raise LikelihoodError unless `pair`, the first pair with a non-finite output, is the number of pairs."""
    if pair < timesteps.numel():
        image, column = divmod(pair, timesteps.shape[1])
        raise LikelihoodError(
            f"model: its output for image {image} at timestep {int(timesteps[image, column])} contains a NaN or an "
            "infinity, or leads to one; try dtype=torch.float32, and check the weights"
        )


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.double() / 127.5 - 1


def _pixels(images: torch.Tensor, quantize: bool) -> torch.Tensor:
    """Return the images as uint8 [N, C, H, W], on their device; raise ValueError if they are not on the 8-bit grid."""
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images: got {type(images).__name__}; expected a tensor [N, C, H, W], uint8 or in [-1, 1]")
    if images.dim() != 4 or images.numel() == 0 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(
            f"images: got {dtype_name(images.dtype)} {list(images.shape)}; expected uint8, or floating point in [-1, 1], "
            "[N, C, H, W] with at least one image"
        )
    if images.dtype == torch.uint8:
        return images
    level = (images.detach().double() + 1) * 127.5
    low, high = float(level.min()), float(level.max())
    if not (low >= -OFF_GRID and high <= 255 + OFF_GRID):  # also true for NaN
        raise ValueError(
            f"images: got values from {low / 127.5 - 1:.4g} to {high / 127.5 - 1:.4g}; expected [-1, 1], or uint8 from 0 to 255"
        )
    nearest = level.round()
    off = float((level - nearest).abs().max())
    if off > OFF_GRID and not quantize:
        raise ValueError(
            f"images: not on the 8-bit grid k/127.5 - 1 (off by up to {off:.2g} grey levels); the bound is on the "
            "probability of 8-bit images: pass uint8, or quantize=True to round"
        )
    return nearest.clamp_(0, 255).to(torch.uint8)


def strata(T: int, parts: int) -> list[int]:
    """Return the edges, from 1 to T, of `parts` consecutive parts of the timesteps 1..T-1.

    Each edge is about T^(1/parts) times the edge before it, rounded so that no part is empty. L_t falls about as 1/t, so each
    part contributes a similar share of the bound, and L_t varies little within a part.
    """
    edges = [round(T ** (j / parts)) for j in range(parts + 1)]
    for j in range(1, parts + 1):
        edges[j] = max(edges[j], edges[j - 1] + 1)
    for j in range(parts + 1):
        edges[-1 - j] = min(edges[-1 - j], T - j)
    return edges


def _timesteps(n: int, T: int, subsample: int | None, seed: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (timesteps, sizes) of `_Measured`. Drawn timesteps are t_j = lo_j + (w0 size_j >> 32), w0 of stream 3."""
    if subsample is None:
        return torch.arange(T, device="cpu").expand(n, T), torch.ones(T, dtype=torch.float64, device="cpu")
    subsample = as_python_number(subsample)
    if not is_int(subsample) or not 1 <= subsample < T:
        raise ValueError(
            f"subsample: got {subsample!r}; expected None or an int in 1..{T - 1}, as there are {T} timesteps"
        )
    edges = torch.tensor([0, *strata(T, subsample)], device="cpu")
    sizes = edges.diff()  # the first part is t = 0 alone
    index = torch.arange(first, first + n, device="cpu")
    words = [torch.zeros_like(index)]
    words += [first_words(index, seed=seed, stream=Stream.TIMESTEP, t=j) for j in range(subsample)]
    return edges[:-1] + (torch.stack(words, dim=1) * sizes >> 32), sizes.double()


def _mean(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, standard error) over the first dimension; the error is NaN if its size is 1."""
    n = len(values)
    error = values.std(0) / math.sqrt(n) if n > 1 else torch.full_like(values[0], math.nan)
    return values.mean(0), error


def _by_timestep(measured: _Measured, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, standard error) of values [N, M] by timestep, float64 [T]; NaN at timesteps with too few values."""
    t, values = measured.timesteps.flatten(), values.flatten()

    def total(v: torch.Tensor) -> torch.Tensor:
        return v.new_zeros(measured.T).index_add_(0, t, v)

    count = total(torch.ones_like(values))
    mean = total(values) / count
    return mean, (total((values - mean[t]).square()) / (count - 1) / count).sqrt()


def _summary(measured: _Measured) -> Likelihood:
    per_image = measured.prior + (measured.terms * measured.sizes).sum(1)
    mean, error = _mean(per_image)
    terms, terms_error = _by_timestep(measured, measured.terms)
    return Likelihood(
        bits_per_dim=float(mean),
        standard_error=float(error),
        prior=float(measured.prior.mean()),
        terms=terms,
        terms_error=terms_error,
        mse=_by_timestep(measured, measured.mse)[0],
        per_image=per_image,
        evaluations=measured.terms.numel(),
    )
