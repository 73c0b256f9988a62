"""What a diffusers scheduler's config says a network was trained for, and such a config for what one was trained for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ..diffusion.coefficients import PREDICTIONS, VARIANCES
from ..diffusion.schedule import Schedule

# How an option that a config leaves out stands in the classes that read all of them.
DEFAULTS = {
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
HAVE_DEFAULTS = (None, "DDPMScheduler", "DDIMScheduler")  # those of other classes differ
NUMBERS = ("num_train_timesteps", "beta_start", "beta_end")
# fixed_small_log is fixed_small computed through the logarithm.
VARIANCE = {name: name for name in VARIANCES if name != "none"} | {"fixed_small_log": "fixed_small"}
PREDICTION = tuple(name for name in PREDICTIONS if name != "mean")


def read(config: Mapping, whose: str) -> tuple[Schedule, str, str, bool | float]:
    """(schedule, prediction, variance, clip) of a scheduler's config, whatever its class, as long as it has betas.

    Betas are computed in float64 from the config's numbers. What a class doesn't have (DDIMScheduler no variance_type,
    PNDMScheduler no clip_sample) is DDPMScheduler's default. How a scheduler spaces its timesteps isn't read.
    whose: begins the messages, f"{whose} beta_schedule: got ..."; they are ValueErrors.
    """
    found = DEFAULTS | config
    if found.get("thresholding"):
        raise ValueError(
            f"{whose} thresholding: got {found['thresholding']}; expected False: it bounds x0 by a quantile of each image, which "
            "no sampler here does"
        )
    if config.get("_class_name") not in HAVE_DEFAULTS and config.get("trained_betas") is None:
        missing = [name for name in (*NUMBERS, "beta_schedule") if name not in config]
        if missing:
            raise ValueError(
                f"{whose} {', '.join(missing)}: missing; a {config['_class_name']} doesn't say which betas the network was "
                "trained with; expected e.g. a DDPMScheduler"
            )
    if found["variance_type"] is None:  # as some classes without one have it
        found["variance_type"] = DEFAULTS["variance_type"]
    variance = VARIANCE[_one_of(found, "variance_type", VARIANCE, whose)]
    prediction = _one_of(found, "prediction_type", PREDICTION, whose)
    bound = found["clip_sample_range"]
    if not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
        raise ValueError(f"{whose} clip_sample_range: got {bound!r}; expected a positive number")
    clip = (True if bound == 1 else bound) if found["clip_sample"] else False
    return _schedule(found, whose), prediction, variance, clip


def write(schedule: Schedule, prediction: str, variance: str, clip: bool | float) -> dict:
    """The config of a DDPMScheduler. Raises ValueError, naming the option, for what it doesn't have."""
    if prediction not in PREDICTION:
        raise ValueError(f"prediction: {prediction!r} isn't one of DDPMScheduler's ({', '.join(PREDICTION)})")
    if variance not in VARIANCE:
        raise ValueError(f"variance: {variance!r} isn't one of DDPMScheduler's ({', '.join(VARIANCE)})")
    return {
        "_class_name": "DDPMScheduler",
        **_betas(schedule),
        "prediction_type": prediction,
        "variance_type": variance,
        "clip_sample": clip is not False,
        "clip_sample_range": 1.0 if clip is False else float(clip),
    }


def _line(T: int, start: float, end: float) -> torch.Tensor:
    return torch.linspace(start, end, T, dtype=torch.float64, device="cpu")


def _scaled_linear(T: int, start: float, end: float) -> torch.Tensor:
    return _line(T, math.sqrt(start), math.sqrt(end)).square()


def _squaredcos(T: int, start: float, end: float) -> torch.Tensor:
    return Schedule.cosine(T).betas


def _sigmoid(T: int, start: float, end: float) -> torch.Tensor:
    return _line(T, -6, 6).sigmoid() * (end - start) + start


KINDS: dict[str, Callable[[int, float, float], torch.Tensor]] = {
    "linear": _line,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squaredcos,
    "sigmoid": _sigmoid,
}


def _schedule(found: Mapping, whose: str) -> Schedule:
    trained, option = found["trained_betas"], "trained_betas"
    if trained is None:
        kind, option = _one_of(found, "beta_schedule", KINDS, whose), ", ".join(NUMBERS)
    try:
        if trained is None:
            betas = KINDS[kind](*(found[name] for name in NUMBERS))
        else:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        schedule = Schedule(betas)
        return _rescaled(schedule) if found["rescale_betas_zero_snr"] else schedule
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{whose} {option}: {error}") from error


def _rescaled(schedule: Schedule) -> Schedule:
    """With sqrt(alphas_cumprod) shifted and scaled to end at 0 and begin where it was (Lin et al. 2023, algorithm 1)."""
    signal = schedule.alphas_cumprod.sqrt()
    if float(signal[-1]) == 0:  # as `write` leaves it, which is read back to the bit
        return schedule
    if len(signal) == 1:
        raise ValueError(
            "rescale_betas_zero_snr has the first beta stay and the last be 1; expected at least 2 timesteps"
        )
    bar = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()
    return Schedule(torch.cat((schedule.betas[:1], 1 - bar[1:] / bar[:-1])))


def _betas(schedule: Schedule) -> dict:
    """The kind of schedule by its name, if one gives the very same betas; any other by its numbers."""
    if float(schedule.alphas_cumprod[-1]) == 0:
        # Rescaling leaves such betas as they are, and tells schedulers that divide by alphas_cumprod (DPM-Solver) of the 0.
        return {
            "num_train_timesteps": len(schedule), "trained_betas": schedule.betas.tolist(), "rescale_betas_zero_snr": True,
        }  # fmt: skip
    T, start, end = len(schedule), float(schedule.betas[0]), float(schedule.betas[-1])
    for kind, build in KINDS.items():
        if torch.equal(build(T, start, end), schedule.betas):
            return {"num_train_timesteps": T, "beta_schedule": kind, "beta_start": start, "beta_end": end}
    return {"num_train_timesteps": T, "trained_betas": schedule.betas.tolist()}


def _one_of(found: Mapping, option: str, choices: object, whose: str) -> str:
    if not isinstance(found[option], str) or found[option] not in choices:
        raise ValueError(f"{whose} {option}: got {found[option]!r}; expected one of {', '.join(choices)}")
    return found[option]
