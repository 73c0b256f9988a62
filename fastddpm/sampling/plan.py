"""The chain that the arguments of `sample` describe, with defaults filled in."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..diffusion import coefficients
from ..diffusion.schedule import Schedule
from ..inputs.resolve import Trained, trained_for
from ..models.unet import UNet
from ..utils.validation import as_python_number, check_choice, is_int
from ..utils.warn import warn_once

# What `plan` takes of sample's.
PLANNED = ("schedule", "prediction", "sampler", "steps", "spacing", "eta", "variance", "clip")


class Plan(NamedTuple):
    """What a chain takes, its defaults filled in. variance: of ddpm, else None."""

    table: coefficients.Table
    schedule: Schedule
    prediction: str
    sampler: str
    spacing: str
    eta: float
    variance: str | None
    clip: bool | float


def plan(
    model: object,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str | None = None,
    clip: bool | float | None = None,
    start: int | None = None,
) -> Plan:
    """The chain that `sample`'s arguments ask for. start: the timestep of the noise that it begins with, default T - 1."""
    check_choice("sampler", sampler, tuple(coefficients.DEFAULT_STEPS))
    asked = variance
    needs = [name for name in Trained._fields if name != "variance" or sampler == "ddpm"]
    schedule, prediction, variance, clip = trained_for(model, schedule, prediction, variance, clip, needs=needs)
    check_choice("variance", variance, coefficients.VARIANCES)
    most = len(schedule) if start is None else start + 1
    if steps is None:
        steps = min(coefficients.DEFAULT_STEPS[sampler] or most, most)
    steps, eta = as_python_number(steps), as_python_number(eta)
    if not is_int(steps) or not 1 <= steps <= most:
        raise ValueError(f"steps: got {steps!r}; expected an int in 1..{most}, as the chain has {most} timesteps")
    spacing = check_choice(
        "spacing", coefficients.DEFAULT_SPACING[sampler] if spacing is None else spacing, coefficients.SPACINGS
    )
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta!r}; expected a number in [0, 1]")
    if eta and sampler != "ddim":
        raise ValueError(f'eta: got {eta}, which only sampler="ddim" has; {sampler!r} has none: leave it out')
    if asked is not None and sampler != "ddpm":
        raise ValueError(
            f'variance: got {asked!r}, which only sampler="ddpm" has; '
            + ("ddim's noise is eta" if sampler == "ddim" else f"{sampler!r} adds no noise")
        )
    timesteps = coefficients.select_timesteps(schedule, steps, spacing, start)
    if sampler == "ddpm" and variance == "fixed_large" and steps < most:
        if asked is None:
            variance = "fixed_small"
            said, way_out = "fixed_small in place of the default fixed_large", " (passing fixed_large keeps it)"
        else:
            said, way_out = "consider fixed_small in place of fixed_large", ""
        warn_once(model, f"variance: {said}, which ruins images where steps are left out{way_out}")
    table = coefficients.table(
        schedule, sampler=sampler, prediction=prediction, variance=variance, eta=eta, timesteps=timesteps
    )
    if (
        table.uses_learned_variance
        and isinstance(model, UNet)
        and model.config.out_channels != 2 * model.config.in_channels
    ):
        raise ValueError(
            f"variance: learned_range needs a network with {2 * model.config.in_channels} output channels; "
            f"this one has {model.config.out_channels}"
        )
    return Plan(table, schedule, prediction, sampler, spacing, eta, variance if sampler == "ddpm" else None, clip)
