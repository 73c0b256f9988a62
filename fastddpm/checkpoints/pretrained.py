"""Read checkpoints of any format, and write one of two formats."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path

import torch

from ..diffusion.coefficients import check_prediction
from ..errors import CheckpointError
from ..models.unet import UNet
from . import diffusers, fastddpm_folder, hub, openai, pytorch_diffusion, tensors
from .base import Checkpoint, build_unet, garbage_collector_disabled

FORMATS = {"fastddpm": fastddpm_folder.write_folder, "diffusers": diffusers.write_folder}
# Files of OpenAI's training scripts: averaged weights, named by rate and step, and raw weights, named by step.
EMA_FILE, RAW_FILE = re.compile(r"ema_(?P<rate>[\d.]+)_(?P<step>\d+)\.pt"), re.compile(r"model(?P<step>\d+)\.pt")
# Unsupported networks, by a part of the names of their tensors.
UNSUPPORTED_FORMATS = {
    "init_conv.": "denoising-diffusion-pytorch's",
    "transformer_blocks.": "cross-attention to text or other conditions",
    "x_embedder.": "a diffusion transformer",
    "map_layer0.": "EDM's",
    "all_modules.": "score_sde's",
}


def load(name: str | Path, *, revision: str | None = None, flags: str | None = None) -> UNet:
    with torch.inference_mode(False):  # tensors created in inference mode cannot be trained or changed
        checkpoint = read_checkpoint(name, revision=revision, flags=flags)
        model = build_unet(checkpoint)
    for note in checkpoint.notes:
        warnings.warn(f"fastddpm: {note}", stacklevel=3)
    return model


def save(model: UNet, folder: str | Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; expected one of {', '.join(FORMATS)}")
    folder = Path(folder)
    if format == "fastddpm":
        rivals = {"a model of diffusers, which diffusers would continue to read": (folder / diffusers.INDEX).exists()}
    else:
        first = "which would be read instead of the new files"
        rivals = {
            f"a model of fastddpm, {first}": fastddpm_folder.is_own(folder),
            f"unet_ema, {first}": (folder / "unet_ema").exists(),
            f"weights in parts, {first}": (folder / "unet" / diffusers.WEIGHTS[0]).exists(),
        }
    for what, there in rivals.items():
        if there:
            raise ValueError(f"folder: {folder} already has {what}; pass another folder")
    check_prediction(model.schedule, model.prediction)
    FORMATS[format](model, folder)


def read_checkpoint(name: str | Path, *, revision: str | None = None, flags: str | None = None) -> Checkpoint:
    """Return the checkpoint from which `UNet.from_pretrained` builds a network."""
    on_hub = hub.is_id(str(name)) and not Path(name).exists()
    if revision is not None and not on_hub:
        raise ValueError(f"revision: got {revision!r}, but {str(name)!r} is not a model on the Hub; expected None")
    if on_hub:
        path, name_hints = hub.fetch(str(name), revision, _needed_files), [str(name).split("/")[1]]
    else:
        path = Path(name) if Path(name).is_file() else fastddpm_folder.find_folder(name)
        name_hints = list(path.absolute().parts[-1 if path.is_dir() else -2 :])
    with garbage_collector_disabled():
        checkpoint = _read_folder(path, flags) if path.is_dir() else _read_file(path, flags)
    if flags is not None and checkpoint.format != "openai":
        raise ValueError(f"flags: got {flags!r}, but {name} is not a checkpoint of OpenAI's; expected None")
    if checkpoint.format != "fastddpm":
        checkpoint.averaged = bool(checkpoint.averaged or tensors.averaged_by_name(*name_hints, checkpoint.path.name))
    wanted, outputs = 2 * checkpoint.config.in_channels, checkpoint.config.out_channels
    if checkpoint.variance == "learned_range" and outputs != wanted:
        checkpoint.notes.append(
            f"{checkpoint.path}: its variance is learned_range, which requires {wanted} output channels, but it has "
            f"{outputs}; pass another variance to sample"
        )
    if checkpoint.averaged is False:
        checkpoint.notes.append(_raw_weights_note(checkpoint.path))
    return checkpoint


def _needed_files(files: Collection[str]) -> list[str] | None:
    """Return the files of a repository to download; None if it has no model."""
    model_files = diffusers.find_model_files(files)
    if model_files is not None and model_files.weights is not None:
        return model_files.files
    own = [fastddpm_folder.CONFIG, fastddpm_folder.WEIGHTS]
    return own if set(own) <= set(files) else None


def _read_folder(folder: Path, flags: str | None) -> Checkpoint:
    within = [path for pattern in ("*", "unet/*", "unet_ema/*", "scheduler/*") for path in folder.glob(pattern)]
    files = {path.relative_to(folder).as_posix() for path in within if path.is_file()}
    model_files = diffusers.find_model_files(files)
    if fastddpm_folder.is_own(folder) or (
        fastddpm_folder.WEIGHTS in files and (model_files is None or model_files.weights is None)
    ):
        return fastddpm_folder.read_folder(folder)
    if model_files is not None:
        return diffusers.read_folder(folder, model_files)
    checkpoints = _newest_first(files)
    if checkpoints:
        return _read_file(folder / checkpoints[0], flags)
    raise CheckpointError(
        f"{folder}: has no model; expected config.json with its weights (fastddpm and diffusers), "
        "unet/config.json (diffusers), or ema_RATE_STEP.pt or modelSTEP.pt (OpenAI). For a checkpoint with another name, pass "
        "the file instead of its folder"
    )


def _newest_first(files: Collection[str]) -> list[str]:
    """Return the names of OpenAI's training checkpoints: averaged ones by descending step and rate, then raw ones."""
    averaged = [(int(m["step"]), float(m["rate"]), m[0]) for m in map(EMA_FILE.fullmatch, files) if m]
    raw = [(int(m["step"]), 0.0, m[0]) for m in map(RAW_FILE.fullmatch, files) if m]
    return [name for *_, name in sorted(averaged, reverse=True) + sorted(raw, reverse=True)]


def _read_file(path: Path, flags: str | None) -> Checkpoint:
    marker_keys = (diffusers.MARKER_KEY, pytorch_diffusion.MARKER_KEY, openai.MARKER_KEY)
    state, averaged = tensors.find_state_dict(tensors.load_file(path), path, marker_keys)
    if pytorch_diffusion.MARKER_KEY in state:
        return pytorch_diffusion.read_state_dict(path, state, averaged)
    if openai.MARKER_KEY in state:
        return openai.read_state_dict(path, state, averaged, flags)
    if diffusers.MARKER_KEY in state:
        folder = path.absolute().parent
        folder = folder.parent if folder.name.startswith("unet") else folder
        raise CheckpointError(
            f"{path}: these are the weights of a diffusers or fastddpm network, whose architecture is in config.json; "
            f"pass the folder instead, {folder}"
        )
    other = next((kind for part, kind in UNSUPPORTED_FORMATS.items() if any(part in name for name in state)), "unknown")
    raise CheckpointError(
        f"{path}: unsupported architecture ({other}); its tensors are {', '.join(list(state)[:3])}, ... Expected a network "
        "of diffusers' UNet2DModel, of pytorch_diffusion, or of OpenAI's improved-diffusion or guided-diffusion"
    )


def _raw_weights_note(path: Path) -> str:
    note = (
        f"{path}: its weights are not known to be averages over training (EMA), and raw weights draw visibly worse images "
        "(the paper's CIFAR-10 network: FID 12 instead of 3)"
    )
    beside = [name for name in _newest_first([p.name for p in path.parent.iterdir()]) if EMA_FILE.fullmatch(name)]
    return f"{note}; {beside[0]} in the same folder has averages" if RAW_FILE.fullmatch(path.name) and beside else note
