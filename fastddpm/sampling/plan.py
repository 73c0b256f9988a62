"""The plan of a chain: the arguments of `sample` with their defaults filled in."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..diffusion import coefficients
from ..inputs.resolve import ResolvedModel, TrainingSettings, resolve
from ..utils.validation import as_python_number, check_choice, is_int

SAMPLERS = tuple(coefficients.DEFAULT_STEPS)


class ChainArguments(NamedTuple):
    """The arguments of `sample` that define the chain. None selects the default."""

    schedule: Any = None
    prediction: str | None = None
    sampler: str = "ddpm"
    steps: int | None = None
    spacing: str | None = None
    eta: float = 0.0
    variance: str | None = None
    clip: bool | float | None = None


class Plan(NamedTuple):
    """A chain: the model and its table of step coefficients.

    Attributes:
        model: The resolved model.
        table: Timesteps and step coefficients.
        sampler: "ddpm", "ddim" or "dpm++2m".
        spacing: How the timesteps were selected.
        eta: Noise of ddim.
        variance: Noise of ddpm; None for the other samplers.
    """

    model: ResolvedModel
    table: coefficients.Table
    sampler: str
    spacing: str
    eta: float
    variance: str | None


def resolve_for(model: object, arguments: ChainArguments) -> ResolvedModel:
    """Resolve the model and the training settings that the sampler uses."""
    check_choice("sampler", arguments.sampler, SAMPLERS)
    needs = [name for name in TrainingSettings._fields if name != "variance" or arguments.sampler == "ddpm"]
    settings = {name: getattr(arguments, name) for name in TrainingSettings._fields}
    return resolve(model, **settings, needs=needs)


def make_plan(model: ResolvedModel, arguments: ChainArguments, start: int | None = None) -> Plan:
    """Check the arguments and return the chain's plan. start: the timestep at which the chain starts, default T - 1."""
    sampler, eta = check_choice("sampler", arguments.sampler, SAMPLERS), as_python_number(arguments.eta)
    schedule, prediction, variance, _ = model.settings
    check_choice("variance", variance, coefficients.VARIANCES)
    most = len(schedule) if start is None else start + 1
    steps = as_python_number(arguments.steps)
    if steps is None:
        steps = min(coefficients.DEFAULT_STEPS[sampler] or most, most)
    if not is_int(steps) or not 1 <= steps <= most:
        raise ValueError(f"steps: got {steps!r}; expected an int in 1..{most}, as the chain has {most} timesteps")
    spacing = coefficients.DEFAULT_SPACING[sampler] if arguments.spacing is None else arguments.spacing
    check_choice("spacing", spacing, coefficients.SPACINGS)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta!r}; expected a number in [0, 1]")
    if eta and sampler != "ddim":
        raise ValueError(f'eta: got {eta}, which only sampler="ddim" has; {sampler!r} has none: leave it out')
    if arguments.variance is not None and sampler != "ddpm":
        raise ValueError(
            f'variance: got {arguments.variance!r}, which only sampler="ddpm" has; '
            + ("ddim's noise is eta" if sampler == "ddim" else f"{sampler!r} adds no noise")
        )
    if sampler == "ddpm" and variance == "fixed_large" and steps < most:
        advice, way_out = "consider fixed_small in place of fixed_large", ""
        if arguments.variance is None:
            variance = "fixed_small"
            advice = "fixed_small in place of the default fixed_large"
            way_out = "; pass variance='fixed_large' to keep it"
        model.warn(f"variance: {advice}, which ruins images if steps are skipped{way_out}")
    timesteps = coefficients.select_timesteps(schedule, steps, spacing, start)
    table = coefficients.table(
        schedule, sampler=sampler, prediction=prediction, variance=variance, eta=eta, timesteps=timesteps
    )
    if table.uses_learned_variance and model.unet is not None:
        config = model.unet.config
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"variance: learned_range needs a network with {2 * config.in_channels} output channels; "
                f"this one has {config.out_channels}"
            )
    return Plan(model, table, sampler, spacing, eta, variance if sampler == "ddpm" else None)
