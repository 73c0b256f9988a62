"""Conversion between the config of a diffusers scheduler and training settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ..diffusion.coefficients import PREDICTIONS, VARIANCES
from ..diffusion.schedule import Schedule

# Options that a config may omit, with their defaults in the classes that have all options.
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}
CLASSES_WITH_DEFAULTS = (None, "DDPMScheduler", "DDIMScheduler")  # other classes have other defaults
BETA_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end")
# fixed_small_log is fixed_small computed through the logarithm.
VARIANCE_TYPES = {name: name for name in VARIANCES if name != "none"} | {"fixed_small_log": "fixed_small"}
PREDICTION_TYPES = tuple(name for name in PREDICTIONS if name != "mean")


def settings_from_config(config: Mapping, prefix: str) -> tuple[Schedule, str, str, bool | float]:
    """Return (schedule, prediction, variance, clip) of the config of a scheduler of any class that has betas.

    Betas are computed in float64 from the config's numbers. If the class lacks an option, the default of DDPMScheduler is
    used: DDIMScheduler has no variance_type, and PNDMScheduler has no clip_sample. The spacing of timesteps is ignored.

    Args:
        config: the scheduler's config.
        prefix: start of the messages of ValueErrors, as in f"{prefix} beta_schedule: got ...".
    """
    options = SCHEDULER_DEFAULTS | config
    if options.get("thresholding"):
        raise ValueError(
            f"{prefix} thresholding: got {options['thresholding']}; expected False, because no sampler supports "
            "a bound on x0 by a quantile of each image"
        )
    if config.get("_class_name") not in CLASSES_WITH_DEFAULTS and config.get("trained_betas") is None:
        missing = [name for name in (*BETA_OPTIONS, "beta_schedule") if name not in config]
        if missing:
            raise ValueError(
                f"{prefix} {', '.join(missing)}: missing; {config['_class_name']} doesn't specify the betas that the "
                "network was trained with; expected for example a DDPMScheduler"
            )
    if options["variance_type"] is None:  # as in some classes without this option
        options["variance_type"] = SCHEDULER_DEFAULTS["variance_type"]
    variance = VARIANCE_TYPES[_choice(options, "variance_type", VARIANCE_TYPES, prefix)]
    prediction = _choice(options, "prediction_type", PREDICTION_TYPES, prefix)
    bound = options["clip_sample_range"]
    if not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
        raise ValueError(f"{prefix} clip_sample_range: got {bound!r}; expected a positive number")
    clip = (True if bound == 1 else bound) if options["clip_sample"] else False
    return _schedule(options, prefix), prediction, variance, clip


def config_from_settings(schedule: Schedule, prediction: str, variance: str, clip: bool | float) -> dict:
    """Return the config of a DDPMScheduler; raise ValueError, naming the option, if it does not support a setting."""
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"prediction: {prediction!r} isn't one of DDPMScheduler's ({', '.join(PREDICTION_TYPES)})")
    if variance not in VARIANCE_TYPES:
        raise ValueError(f"variance: {variance!r} isn't one of DDPMScheduler's ({', '.join(VARIANCE_TYPES)})")
    return {
        "_class_name": "DDPMScheduler",
        **_beta_options(schedule),
        "prediction_type": prediction,
        "variance_type": variance,
        "clip_sample": clip is not False,
        "clip_sample_range": 1.0 if clip is False else float(clip),
    }


def _linear(T: int, start: float, end: float) -> torch.Tensor:
    return torch.linspace(start, end, T, dtype=torch.float64, device="cpu")


def _scaled_linear(T: int, start: float, end: float) -> torch.Tensor:
    return _linear(T, math.sqrt(start), math.sqrt(end)).square()


def _squaredcos(T: int, start: float, end: float) -> torch.Tensor:
    return Schedule.cosine(T).betas


def _sigmoid(T: int, start: float, end: float) -> torch.Tensor:
    return _linear(T, -6, 6).sigmoid() * (end - start) + start


BETA_SCHEDULES: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos,
    "sigmoid": _sigmoid,
}


def _schedule(options: Mapping, prefix: str) -> Schedule:
    trained, named = options["trained_betas"], "trained_betas"
    if trained is None:
        kind, named = _choice(options, "beta_schedule", BETA_SCHEDULES, prefix), ", ".join(BETA_OPTIONS)
    try:
        if trained is None:
            betas = BETA_SCHEDULES[kind](*(options[name] for name in BETA_OPTIONS))
        else:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        schedule = Schedule(betas)
        return _with_zero_terminal_snr(schedule) if options["rescale_betas_zero_snr"] else schedule
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{prefix} {named}: {error}") from error


def _with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Return the schedule with sqrt(alphas_cumprod) shifted and scaled to end at 0 (Lin et al. 2023, algorithm 1)."""
    signal = schedule.alphas_cumprod.sqrt()
    if float(signal[-1]) == 0:  # as written by `config_from_settings`; reading it is then exact
        return schedule
    if len(signal) == 1:
        raise ValueError(
            "rescale_betas_zero_snr keeps the first beta and sets the last to 1; expected at least 2 timesteps"
        )
    bar = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()
    return Schedule(torch.cat((schedule.betas[:1], 1 - bar[1:] / bar[:-1])))


def _beta_options(schedule: Schedule) -> dict:
    """Return the options of these betas: the name of a beta_schedule if its betas are identical, else the betas."""
    if float(schedule.alphas_cumprod[-1]) == 0:
        # Rescaling doesn't change such betas. Schedulers that divide by alphas_cumprod, such as DPM-Solver, need the option to
        # avoid a division by 0.
        return {
            "num_train_timesteps": len(schedule), "trained_betas": schedule.betas.tolist(), "rescale_betas_zero_snr": True,
        }  # fmt: skip
    T, start, end = len(schedule), float(schedule.betas[0]), float(schedule.betas[-1])
    for kind, betas in BETA_SCHEDULES.items():
        if torch.equal(betas(T, start, end), schedule.betas):
            return {"num_train_timesteps": T, "beta_schedule": kind, "beta_start": start, "beta_end": end}
    return {"num_train_timesteps": T, "trained_betas": schedule.betas.tolist()}


def _choice(options: Mapping, option: str, choices: object, prefix: str) -> str:
    if not isinstance(options[option], str) or options[option] not in choices:
        raise ValueError(f"{prefix} {option}: got {options[option]!r}; expected one of {', '.join(choices)}")
    return options[option]
