"""`sample`: the reverse process (Ho et al. 2020, algorithm 2) and the one loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..diffusion import coefficients
from ..diffusion.schedule import Schedule
from ..engine import memory
from ..engine.cache import network
from ..inputs.adopt import adopted, called
from ..inputs.arguments import device_of, fitting_batch, labels_of, shape_of
from ..inputs.resolve import tell_left
from ..ops.rng import check_first, seed_of
from ..utils.progress import bar as progress_bar
from ..utils.validation import check_int, clip_bound
from ..utils.warn import warn_once
from .loop import StepState, prepared
from .plan import plan

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
    model = adopted(model)
    chosen = plan(model, schedule, prediction, sampler, steps, spacing, eta, variance, clip)
    tell_left(model, chosen.schedule)
    return run(
        model, n, chosen.table, shape=shape, clip=chosen.clip, class_labels=class_labels, noise=noise, seed=seed, first=first,
        batch_size=batch_size, device=device, dtype=dtype, progress=progress, callback=callback,
    )  # fmt: skip


def run(
    model: nn.Module | Callable,
    n: int,
    table: coefficients.Table,
    *,
    shape: tuple[int, int, int] | None = None,
    clip: bool | float = True,
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
    """Where the table takes n images. model: none of diffusers' that `foreign.adopted` takes. All else as in `sample`."""
    n = check_int("n", n, 0)
    shape = shape_of(model, shape)
    bound = clip_bound(clip)
    seed, first = seed_of(seed), check_first(first)
    device = device_of(model, device)
    class_labels = labels_of(class_labels, n, model)
    if noise is not None and not isinstance(noise, torch.Tensor):
        raise ValueError(f"noise: got {type(noise).__name__}; expected float32 {[n, *shape]}")
    if noise is not None and (tuple(noise.shape) != (n, *shape) or noise.dtype != torch.float32):
        raise ValueError(f"noise: got {noise.dtype} {list(noise.shape)}; expected float32 {[n, *shape]}")
    if batch_size is None:
        batch_size = fitting_batch(n, shape, device)
        if batch_size < n and class_labels is None and not isinstance(called(model), nn.Module):
            warn_once(
                model,
                f"batch_size: the {n} images are drawn {batch_size} at a time, as many as fit. If the function holds a condition "
                f"for each image, pass class_labels=torch.arange({n}): it is then called as model(x, t, index), with the index "
                "of each image in x",
            )
    batch_size = check_int("batch_size", batch_size, 1)
    if n == 0:
        with torch.inference_mode(False):
            return torch.empty(0, *shape, dtype=torch.float32, device=device)
    batch_size = min(batch_size, n)
    chunks = range(0, n, batch_size)
    with (
        torch.inference_mode(False),  # the result is an ordinary tensor even where the caller is in inference mode
        torch.no_grad(),
        memory.kept(device),
        network(model, device, dtype, (batch_size, *shape)) as net,
        progress_bar(progress, total=len(table.timesteps) * len(chunks), unit="step", leave=progress is True) as bar,
    ):
        out = torch.empty(n, *shape, dtype=torch.float32, device=device)
        chain = prepared(net, table, (batch_size, *shape), bound, class_labels is not None, callback is not None)
        for notice in net.notices:
            warn_once(model, notice)
        for start in chunks:
            count = min(batch_size, n - start)
            x_T = None if noise is None else _padded(noise[start : start + count], batch_size)
            labels = None if class_labels is None else _padded(class_labels[start : start + count], batch_size)
            chain.run(net, out[start : start + count], seed, first + start, x_T, labels, bar, callback)
    return out


def _padded(v: torch.Tensor, size: int) -> torch.Tensor:
    return v if len(v) == size else torch.cat((v, v[-1:].expand(size - len(v), *v.shape[1:])))
