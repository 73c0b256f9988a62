"""`sample`: images by the reverse process, and `run`, which draws them by any plan."""

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
    """Draw n images: float32 [n, C, H, W] on the model's device, in [-1, 1] where clipped.

    model: a `UNet`; a diffusers UNet2DModel, which runs as the `UNet` with its parameters; or any callable
        model(x, t) -> prediction with x [B, C, H, W] and t int64 [B] in 0..T-1. A bare callable needs `shape` and gets
        float32 x; a module gets x in its parameters' dtype. A wrapper without attributes of these names (a module, an object, a
        functools.partial, a bound method) is taken to be trained for what the model in it is.
    shape: (C, H, W); default the model's own.
    schedule: a `Schedule`, or a diffusers scheduler, whose betas, prediction_type, variance_type and clip range are then
        the defaults; default the model's own, else the paper's linear one. prediction: "epsilon", "sample",
        "v_prediction" or "mean"; default the model's own, else "epsilon".
    sampler: "ddpm", the paper's, "ddim" (Song et al. 2021) or "dpm++2m" (DPM-Solver++, Lu et al. 2022).
    steps: calls of the network for each image, 1..T; default T for ddpm, 50 for ddim, 20 for dpm++2m (T where T is less).
    spacing: which of the T timesteps they are: "trailing" (the default), "linspace", "leading", or "logsnr" (dpm++2m's default).
    eta: ddim's noise, from 0 (none) to 1 (as much as ddpm's "fixed_small").
    variance: ddpm's noise: "fixed_large" (sigma^2 = beta), "fixed_small" (the posterior variance), "learned_range" (in between,
        as the second half of an output with 2C channels says) or "none" (an ablation). Default the model's own, else
        "fixed_large"; where steps are left out "fixed_small" takes the place of a default "fixed_large", which would ruin images.
    clip: bound on each step's x0; True is 1.0, False none; default the model's own, else True. A predicted mean is taken as it
        is, unless steps are left out: then it goes through x0, which costs precision, so that the network should answer in
        float32.
    class_labels: an int, or n integers (a tensor, a list, an array), for a network with classes. A callable gets each image's as
        model(x, t, class_labels), int64 [B]: torch.arange(n) tells one that holds a condition for each image which these are.
    noise: x_T, float32 [n, C, H, W], in place of the seed's.
    seed: an int in [0, 2^64), a torch.Generator, or None: 64 bits from torch's default generator. Image i is image
        first + i of the seed's endless sequence: its noise depends on (seed, first + i, timestep) alone.
    batch_size: images per forward; default what fits. A short last batch is padded and cut.
    device: default the model's; otherwise a copy is moved. dtype: arithmetic of the network (float32, bfloat16 or float16),
        through a cast copy; the chain's state is float32 always.
    progress: True or False; None shows a bar on a terminal. callback: called with a `StepState` after every step.

    Raises ValueError naming the argument that does not fit, before anything is drawn, and SamplingError where the
    model's output has the wrong shape or is not finite, naming the step.
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
    """Those of `sample`'s arguments that do not change the chain."""

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
    """Run the plan's chain for n images: float32 [n, C, H, W]."""
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
        torch.inference_mode(False),  # the result is an ordinary tensor even where the caller is in inference mode
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
            f"batch_size: the {n} images are drawn {batch_size} at a time, as many as fit. If the function holds a condition "
            f"for each image, pass class_labels=torch.arange({n}): it is then called as model(x, t, index), with the index "
            "of each image in x"
        )
    return batch_size


def _padded(v: torch.Tensor, size: int) -> torch.Tensor:
    """v [n, ...] with its last entry repeated, [size, ...]: a batch of another size would be packed and tuned for anew."""
    return v if len(v) == size else torch.cat((v, v[-1:].expand(size - len(v), *v.shape[1:])))
