"""`sample` draws images with the reverse process; `run` executes any plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..diffusion.schedule import Schedule
from ..engine import memory
from ..engine.cache import acquire_runner
from ..inputs.arguments import class_labels_of, default_batch_size, device_of, image_shape
from ..inputs.resolve import ResolvedModel, warn_signal_left
from ..ops.rng import check_first, seed_of
from ..utils.progress import bar as progress_bar
from ..utils.validation import check_int, clip_bound
from .loop import Batch, ChainShape, StepState, chain_for
from .plan import ChainArguments, Plan, make_plan, resolve_for

__all__ = ["sample"]


def sample(
    model: nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    n: int,
    *,
    shape: tuple[int, int, int] | None = None,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str | None = None,
    clip: bool | float | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    callback: Callable[[StepState], None] | None = None,
) -> torch.Tensor:
    """Draw n images with the reverse process (Ho et al. 2020, algorithm 2).

    The chain starts at x_T ~ N(0, I). Each step converts the network's output for (x_t, t) to x0, clips x0, and draws

        x_{t-1} = c0 x0 + c1 x_t + sigma_t z,    z ~ N(0, I)

    with the coefficients of the posterior mean (equation 7) for `sampler="ddpm"`. The last step adds no noise.

    Args:
        model: A `UNet`; a diffusers UNet2DModel, which runs as the `UNet` with the same parameters; or any callable
            model(x, t) -> prediction, with x [B, C, H, W] and t int64 [B] in 0..T-1. A bare callable requires `shape` and
            receives x in float32. A module receives x in the dtype of its parameters. Shape, schedule, prediction, variance
            and clip default to the model's attributes of these names. A wrapper (a module, an object, a functools.partial or
            a bound method) without such attributes has those of the model inside it.
        n: Number of images, an int >= 0.
        shape: (C, H, W) of one image. Default: the model's own.
        schedule: A `Schedule`, or a diffusers scheduler, whose betas, prediction_type, variance_type and clip range then
            become the defaults. Default: the model's own, else the paper's linear schedule.
        prediction: What the network predicts: "epsilon", "sample" (x0), "v_prediction" or "mean" (of x_{t-1}). Default: the
            model's own, else "epsilon".
        sampler: "ddpm" (the paper's), "ddim" (Song et al. 2021) or "dpm++2m" (DPM-Solver++, Lu et al. 2022).
        steps: Network calls per image, in 1..T. Default: T for ddpm; min(50, T) for ddim; min(20, T) for dpm++2m.
        spacing: How the steps are selected from the T timesteps: "trailing", "linspace", "leading" or "logsnr". Default:
            "logsnr" for dpm++2m, else "trailing".
        eta: Noise of ddim, in [0, 1]: sigma_t as a multiple of that of ddpm with "fixed_small". 0 is deterministic.
        variance: Noise of ddpm, sigma_t^2: "fixed_large" (beta_t), "fixed_small" (the posterior variance), "learned_range"
            (between the two, predicted by the second half of an output with 2C channels) or "none" (0, an ablation).
            Default: the model's own, else "fixed_large". If steps < T, "fixed_small" replaces a default of "fixed_large",
            which would ruin the images.
        clip: Bound on |x0| in each step: a positive number, True for 1.0 or False for no bound. Default: the model's own,
            else True. With `prediction="mean"` and steps = T the output is used unmodified. With fewer steps it is converted
            to x0, which loses precision, so that the network should then return float32.
        class_labels: An int, or n integers (a tensor, list or array), for a network with classes. A callable is then called
            as model(x, t, class_labels), with int64 [B]. With torch.arange(n), a callable that holds one condition per image
            receives the index of each image in x.
        noise: x_T, float32 [n, C, H, W]. Default: drawn from the seed.
        seed: An int in [0, 2^64), or a torch.Generator. None draws 64 bits from torch's default generator. Each seed has an
            endless sequence of images.
        first: Number of the first image in the seed's sequence, an int in [0, 2^56). The noise of image i depends only on
            (seed, first + i, timestep).
        batch_size: Images per network call. Default: as many as fit in a quarter of the device's memory, at 4 KiB per pixel.
            The last batch is padded to this size, and the padding is discarded.
        device: Device to run on. Default: that of the model's parameters, or the CPU for a bare function. On any other device
            a copy of the model runs.
        dtype: Arithmetic of the network: float32, bfloat16 or float16. Default: the model's own. In any other dtype a copy of
            the model runs. The chain's state is always float32.
        progress: True or False shows or hides a progress bar. None shows one on a terminal or in a notebook.
        callback: Called with a `StepState` after every step.

    Returns:
        The images x_0, float32 [n, C, H, W] on the model's device (or `device`), in [-1, 1] if `clip` is True.

    Raises:
        ValueError: An argument is invalid. The message names the argument, and nothing has been drawn.
        SamplingError: The model's output has the wrong shape, or holds a NaN or an infinity. The message names the step.
    """
    arguments = ChainArguments(
        schedule=schedule,
        prediction=prediction,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        variance=variance,
        clip=clip,
    )
    options = RunOptions(
        shape=shape,
        class_labels=class_labels,
        noise=noise,
        seed=seed,
        first=first,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
        callback=callback,
    )
    plan = make_plan(resolve_for(model, arguments), arguments)
    warn_signal_left(plan.model.network, plan.model.settings.schedule)
    return run(plan, n, options)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The arguments of `sample` that do not change the chain."""

    shape: tuple[int, int, int] | None = None
    class_labels: torch.Tensor | Sequence[int] | int | None = None
    noise: torch.Tensor | None = None
    seed: int | torch.Generator | None = None
    first: int = 0
    batch_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    progress: bool | None = None
    callback: Callable[[StepState], None] | None = None


def run(plan: Plan, n: int, options: RunOptions) -> torch.Tensor:
    """Run the plan's chain and return n images, float32 [n, C, H, W]."""
    model, table = plan.model, plan.table
    n = check_int("n", n, 0)
    shape = image_shape(model, options.shape)
    clip = clip_bound(model.settings.clip)
    seed, first = seed_of(options.seed), check_first(options.first)
    device = device_of(model.network, options.device)
    labels = class_labels_of(model, options.class_labels, n)
    noise = _checked_noise(options.noise, (n, *shape))
    batch_size = _batch_size(model, n, shape, device, options)
    if n == 0:
        with torch.inference_mode(False):
            return torch.empty(0, *shape, dtype=torch.float32, device=device)
    starts, progress, callback = range(0, n, batch_size), options.progress, options.callback
    x_shape = (batch_size, *shape)
    chain_shape = ChainShape.of(table, x_shape, clip, has_labels=labels is not None, has_callback=callback is not None)
    with (
        torch.inference_mode(False),  # the result is an ordinary tensor even if the caller is in inference mode
        torch.no_grad(),
        memory.retain_freed_memory(device),
        acquire_runner(model, device, options.dtype, x_shape) as entry,
        progress_bar(progress, total=len(table.timesteps) * len(starts), unit="step", leave=progress is True) as bar,
    ):
        out = torch.empty(n, *shape, dtype=torch.float32, device=device)
        chain = chain_for(entry, table, chain_shape)
        for warning in (*entry.runner.warnings, chain.warning):
            if warning is not None:
                model.warn(warning)
        for start in starts:
            part = slice(start, start + batch_size)
            x_T, batch_labels = (None if v is None else _padded(v[part], batch_size) for v in (noise, labels))
            chain.run(Batch(out[part], seed, first + start, x_T, batch_labels), bar, callback)
    return out


def _checked_noise(noise: object, shape: tuple[int, ...]) -> torch.Tensor | None:
    if noise is None:
        return None
    if not isinstance(noise, torch.Tensor):
        raise ValueError(f"noise: got {type(noise).__name__}; expected float32 {list(shape)}")
    if tuple(noise.shape) != shape or noise.dtype != torch.float32:
        raise ValueError(f"noise: got {noise.dtype} {list(noise.shape)}; expected float32 {list(shape)}")
    return noise


def _batch_size(model: ResolvedModel, n: int, shape: tuple, device: torch.device, options: RunOptions) -> int:
    if options.batch_size is not None:
        return min(check_int("batch_size", options.batch_size, 1), max(n, 1))
    batch_size = default_batch_size(n, shape, device)
    if batch_size < n and options.class_labels is None and model.is_function:
        model.warn(
            f"batch_size: the {n} images are drawn {batch_size} at a time, as many as fit. If the function holds one "
            f"condition per image, pass class_labels=torch.arange({n}): it is then called as model(x, t, index), with the index "
            "of each image in x"
        )
    return batch_size


def _padded(v: torch.Tensor, size: int) -> torch.Tensor:
    """Return v [n, ...] with its last entry repeated, [size, ...]: a new batch size would need packing and tuning again."""
    return v if len(v) == size else torch.cat((v, v[-1:].expand(size - len(v), *v.shape[1:])))
