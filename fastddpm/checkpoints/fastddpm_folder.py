"""Folders of fastddpm: config.json (architecture, schedule and training settings) and model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch

from ..diffusion.coefficients import PREDICTIONS, VARIANCES
from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig, with_current_names
from ..models.unet import UNet
from ..utils.files import atomic_write, created_folder
from ..utils.validation import check_choice, clip_bound
from . import tensors
from .base import Checkpoint, check_state_dict

ARCHITECTURE = "fastddpm.UNet"
BUNDLED = Path(__file__).parent.parent / "pretrained"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def bundled_models() -> list[str]:
    return sorted(folder.name for folder in BUNDLED.iterdir() if (folder / WEIGHTS).is_file())


def find_folder(name: str | Path) -> Path:
    """Return the folder with this path, or the folder of the bundled model with this name."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in bundled_models():
        return BUNDLED / str(name)
    raise CheckpointError(
        f"model: {str(name)!r} is neither a folder nor a bundled model ({', '.join(bundled_models()) or 'none is bundled'}), "
        "nor a file, nor a model on the Hugging Face Hub, whose names have the form owner/name"
    )


def write_folder(
    model: UNet, folder: str | Path, *, state: dict[str, torch.Tensor] | None = None, extra: dict | None = None
) -> None:
    """Write the model to a folder.

    Args:
        model: the network.
        folder: folder to write.
        state: weights to write instead of the model's own.
        extra: additional entries of config.json.
    """
    folder = Path(folder)
    state = model.state_dict() if state is None else state
    config = {
        "architecture": ARCHITECTURE,
        "unet": dataclasses.asdict(model.config),
        "schedule": _schedule_entry(model.schedule),
        "prediction": check_choice("prediction", model.prediction, PREDICTIONS),
        "variance": check_choice("variance", model.variance, VARIANCES),
        "clip": model.clip,
        **({} if model.class_names is None else {"class_names": model.class_names}),
        **(extra or {}),
    }
    clip_bound(model.clip)
    if (folder / CONFIG).exists() and not is_own(folder):
        raise ValueError(f"folder: {folder} has the {CONFIG} of another model; pass another folder")
    dense = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with (
        created_folder(folder),
        atomic_write(folder / CONFIG) as config_file,
        atomic_write(folder / WEIGHTS) as weights_file,
    ):  # the weights are renamed first
        weights_file.write_bytes(safetensors.torch.save(dense))  # save_file creates a file that only its owner can read
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_own(folder: Path) -> bool:
    """Return whether the folder's config.json has this format."""
    path = folder / CONFIG
    return path.is_file() and f'"{ARCHITECTURE}"' in path.read_text(encoding="utf-8", errors="replace")


def read_folder(folder: Path) -> Checkpoint:
    config = read_config(folder)
    path, weights = folder / CONFIG, folder / WEIGHTS
    network_config, schedule = _unet_config(config, path), _schedule(config, path)
    prediction, variance = (
        _choice(config, name, choices, path) for name, choices in (("prediction", PREDICTIONS), ("variance", VARIANCES))
    )
    clip = config.get("clip", True)  # older folders lack this entry
    try:
        clip_bound(clip)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    averaged = config.get("averaged", True if "training" in config else None)  # training saves averaged weights
    state, read_tensors = tensors.open_tensors([weights])
    names = _class_names(config, network_config, path)
    return Checkpoint(
        "fastddpm",
        weights,
        network_config,
        state,
        schedule,
        prediction,
        variance,
        clip,
        averaged,
        read_tensors=read_tensors,
        class_names=names,
    )


def load_state(model: UNet, state: dict[str, torch.Tensor], path: Path) -> None:
    """Call model.load_state_dict(state); the error for another network names the differences."""
    check_state_dict(model.state_dict(), state, path)
    model.load_state_dict(state)


def read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        raise CheckpointError(
            f'{path}: has no "architecture": "{ARCHITECTURE}"; it may be the checkpoint of another library'
        )
    return config


def _schedule_entry(schedule: Schedule) -> dict:
    """Return config.json's entry for the schedule: the ends of a linear one, the betas of any other."""
    linear = {"kind": "linear", "T": len(schedule), "start": float(schedule.betas[0]), "end": float(schedule.betas[-1])}
    line = torch.linspace(linear["start"], linear["end"], linear["T"], dtype=torch.float64, device="cpu")
    if torch.equal(line, schedule.betas):
        return linear
    return {"kind": "betas", "betas": schedule.betas.tolist()}


def _schedule(config: dict, path: Path) -> Schedule:
    try:
        kind, values = config["schedule"]["kind"], config["schedule"]
        if kind == "linear":
            # float() refuses None, which Schedule.linear would replace by its default.
            start, end = float(values["start"]), float(values["end"])
            return Schedule.linear(values["T"], start, end)
        if kind == "betas":
            return Schedule(values["betas"])
        raise ValueError(f"unknown kind {kind!r}; expected linear or betas")
    except KeyError as error:
        raise CheckpointError(f"{path}: schedule: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: schedule: {error}") from error


def _unet_config(config: dict, path: Path) -> UNetConfig:
    try:
        return UNetConfig(**with_current_names(config["unet"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: unet: {error}") from error


def _class_names(config: dict, network_config: UNetConfig, path: Path) -> list[str] | None:
    names = config.get("class_names")
    if names is not None and not (
        isinstance(names, list)
        and len(names) == network_config.num_classes
        and all(isinstance(name, str) for name in names)
    ):
        raise CheckpointError(
            f"{path}: class_names: got {names!r}; expected {network_config.num_classes or 'no'} names"
        )
    return names


def _choice(config: dict, name: str, choices: tuple[str, ...], path: Path) -> str:
    if config.get(name) not in choices:
        raise CheckpointError(f"{path}: {name}: got {config.get(name)!r}; expected one of {', '.join(choices)}")
    return config[name]
