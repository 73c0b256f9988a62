"""fastddpm's own folder: config.json (architecture, schedule, what was trained) and model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ..files import whole
from ..samplers import PREDICTIONS, VARIANCES
from ..schedule import Schedule
from ..unet import UNet, UNetConfig

BUNDLED = Path(__file__).parent.parent / "pretrained"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong, and with which file."""


def bundled() -> list[str]:
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / WEIGHTS).is_file())


def find(name: str | Path) -> Path:
    """The folder of a bundled model's name or of a path."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in bundled():
        return BUNDLED / str(name)
    raise CheckpointError(
        f"model: {str(name)!r} is neither a folder nor a bundled model ({', '.join(bundled()) or 'none is bundled'})"
    )


def save(
    model: UNet, folder: str | Path, *, state: dict[str, torch.Tensor] | None = None, extra: dict | None = None
) -> None:
    """Write `model` (with the weights of `state`, where given) and config.json with the entries of `extra` beside its own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    config = {
        "architecture": "fastddpm.UNet",
        "unet": dataclasses.asdict(model.config),
        "schedule": _describe(model.schedule),
        "prediction": model.prediction,
        "variance": model.variance,
        **(extra or {}),
    }
    with whole(folder / WEIGHTS) as path:
        dense = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        path.write_bytes(safetensors.torch.save(dense))  # save_file would leave a file that only its owner can read
    with whole(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(name: str | Path) -> UNet:
    folder = find(name)
    config = read_config(folder)
    model = UNet(
        _unet_config(config, folder / CONFIG),
        schedule=_schedule(config, folder / CONFIG),
        prediction=_choice(config, "prediction", PREDICTIONS, folder / CONFIG),
        variance=_choice(config, "variance", VARIANCES, folder / CONFIG),
    )
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated: copy it again"
        ) from error
    load_state(model, state, path)
    return model.eval()


def load_state(model: UNet, state: dict[str, torch.Tensor], path: Path) -> None:
    """model.load_state_dict(state), with an error that says what differs."""
    own = model.state_dict()
    missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or foreign:
        parts = [
            f"{len(names)} {what} (first: {min(names)})"
            for what, names in (("missing", missing), ("unknown", foreign))
            if names
        ]
        raise CheckpointError(f"{path}: its tensors are not those of this network: {', '.join(parts)}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(state[key].shape)}; the config asks for {list(value.shape)}"
            )
    model.load_state_dict(state)


def read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("architecture") != "fastddpm.UNet":
        raise CheckpointError(f'{path}: no "architecture": "fastddpm.UNet" in it; is it another library\'s checkpoint?')
    return config


def _describe(schedule: Schedule) -> dict:
    """The paper's schedule by its name, any other by its numbers."""
    linear = {"kind": "linear", "T": len(schedule), "start": float(schedule.betas[0]), "end": float(schedule.betas[-1])}
    if Schedule.linear(linear["T"], linear["start"], linear["end"]) == schedule:
        return linear
    return {"kind": "betas", "betas": schedule.betas.tolist()}


def _schedule(config: dict, path: Path) -> Schedule:
    try:
        kind, values = config["schedule"]["kind"], config["schedule"]
        if kind == "linear":
            return Schedule.linear(values["T"], values["start"], values["end"])
        if kind == "betas":
            return Schedule(values["betas"])
        raise ValueError(f"unknown kind {kind!r}; expected linear or betas")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: schedule: {error}") from error


def _unet_config(config: dict, path: Path) -> UNetConfig:
    try:
        return UNetConfig(**config["unet"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: unet: {error}") from error


def _choice(config: dict, name: str, choices: tuple[str, ...], path: Path) -> str:
    if config.get(name) not in choices:
        raise CheckpointError(f"{path}: {name}: got {config.get(name)!r}; expected one of {', '.join(choices)}")
    return config[name]
