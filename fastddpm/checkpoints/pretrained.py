"""Which format a checkpoint has: reading any, writing two."""

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
from .base import Read, build

FORMATS = {"fastddpm": fastddpm_folder.save, "diffusers": diffusers.write}
# What OpenAI's training scripts write: averaged weights with their rate and step, and raw ones with their step.
EMA, RAW = re.compile(r"ema_(?P<rate>[\d.]+)_(?P<step>\d+)\.pt"), re.compile(r"model(?P<step>\d+)\.pt")
# By the names of their tensors, other people's networks.
OTHERS = {
    "init_conv.": "denoising-diffusion-pytorch's",
    "transformer_blocks.": "one that attends to text or the like",
    "x_embedder.": "a diffusion transformer",
    "map_layer0.": "EDM's",
    "all_modules.": "score_sde's",
}


def load(name: str | Path, *, revision: str | None = None, flags: str | None = None) -> UNet:
    with torch.inference_mode(False):  # under which tensors are made that cannot be trained or changed
        found = read(name, revision=revision, flags=flags)
        model = build(found)
    for note in found.notes:
        warnings.warn(f"fastddpm: {note}", stacklevel=3)
    return model


def save(model: UNet, folder: str | Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; expected one of {', '.join(FORMATS)}")
    folder = Path(folder)
    if format == "fastddpm":
        rivals = {"a model of diffusers, which diffusers would go on reading": (folder / diffusers.INDEX).exists()}
    else:
        first = "which would be read in place of what is written"
        rivals = {
            f"a model of fastddpm, {first}": fastddpm_folder.is_own(folder),
            f"unet_ema, {first}": (folder / "unet_ema").exists(),
            f"weights in parts, {first}": (folder / "unet" / diffusers.WEIGHTS[0]).exists(),
        }
    for what, there in rivals.items():
        if there:
            raise ValueError(f"folder: {folder} already has {what}; name another folder")
    check_prediction(model.schedule, model.prediction)
    FORMATS[format](model, folder)


def read(name: str | Path, *, revision: str | None = None, flags: str | None = None) -> Read:
    """What `UNet.from_pretrained` makes a network of."""
    on_hub = hub.is_id(str(name)) and not Path(name).exists()
    if revision is not None and not on_hub:
        raise ValueError(f"revision: got {revision!r}, but {str(name)!r} is no model on the Hub; expected None")
    if on_hub:
        path, called = hub.fetch(str(name), revision, _needed), [str(name).split("/")[1]]
    else:
        path = Path(name) if Path(name).is_file() else fastddpm_folder.find(name)
        called = list(path.absolute().parts[-1 if path.is_dir() else -2 :])
    found = _read_folder(path, flags) if path.is_dir() else _read_file(path, flags)
    if flags is not None and found.format != "openai":
        raise ValueError(f"flags: given, but {name} is no file of OpenAI's; expected None")
    if found.format != "fastddpm":
        found.averaged = bool(found.averaged or tensors.says_averaged(*called, found.path.name))
    wanted, outputs = 2 * found.config.in_channels, found.config.out_channels
    if found.variance == "learned_range" and outputs != wanted:
        found.notes.append(
            f"{found.path}: learned_range, as its variance is said to be, takes {wanted} output channels, and it has {outputs}; "
            "pass sample another variance"
        )
    if found.averaged is False:
        found.notes.append(_raw(found.path))
    return found


def _needed(files: Collection[str]) -> list[str] | None:
    """Of the files of a repository those that are read."""
    found = diffusers.layout(files)
    if found is not None and found.weights is not None:
        return found.files
    own = [fastddpm_folder.CONFIG, fastddpm_folder.WEIGHTS]
    return own if set(own) <= set(files) else None


def _read_folder(folder: Path, flags: str | None) -> Read:
    within = [path for pattern in ("*", "unet/*", "unet_ema/*", "scheduler/*") for path in folder.glob(pattern)]
    files = {path.relative_to(folder).as_posix() for path in within if path.is_file()}
    found = diffusers.layout(files)
    if fastddpm_folder.is_own(folder) or (
        fastddpm_folder.WEIGHTS in files and (found is None or found.weights is None)
    ):
        return fastddpm_folder.read(folder)
    if found is not None:
        return diffusers.read(folder, found)
    checkpoints = _newest(files)
    if checkpoints:
        return _read_file(folder / checkpoints[0], flags)
    raise CheckpointError(
        f"{folder}: a folder without a model; looked for config.json with its weights (fastddpm's and diffusers'), "
        "unet/config.json (diffusers') and ema_RATE_STEP.pt or modelSTEP.pt (OpenAI's); a checkpoint with another name is "
        "named itself, not its folder"
    )


def _newest(files: Collection[str]) -> list[str]:
    """Of OpenAI's training checkpoints the averaged ones, newest and slowest first; the raw ones behind them."""
    averaged = [(int(m["step"]), float(m["rate"]), m[0]) for m in map(EMA.fullmatch, files) if m]
    raw = [(int(m["step"]), 0.0, m[0]) for m in map(RAW.fullmatch, files) if m]
    return [name for *_, name in sorted(averaged, reverse=True) + sorted(raw, reverse=True)]


def _read_file(path: Path, flags: str | None) -> Read:
    anchors = (diffusers.ANCHOR, pytorch_diffusion.ANCHOR, openai.ANCHOR)
    state, averaged = tensors.network_in(tensors.read(path), path, anchors)
    if pytorch_diffusion.ANCHOR in state:
        return pytorch_diffusion.read(path, state, averaged)
    if openai.ANCHOR in state:
        return openai.read(path, state, averaged, flags)
    if diffusers.ANCHOR in state:
        folder = path.absolute().parent
        folder = folder.parent if folder.name.startswith("unet") else folder
        raise CheckpointError(
            f"{path}: the weights of a diffusers or fastddpm network, whose architecture is in the config.json beside them; "
            f"name the folder instead, {folder}"
        )
    other = next((kind for part, kind in OTHERS.items() if any(part in name for name in state)), "an unknown one")
    raise CheckpointError(
        f"{path}: not a network that UNet can be, but {other}; its tensors are {', '.join(list(state)[:3])}, ... Expected "
        "those of diffusers' UNet2DModel, of pytorch_diffusion, or of OpenAI's improved- or guided-diffusion"
    )


def _raw(path: Path) -> str:
    note = (
        f"{path}: nothing says that its weights are averages over training (EMA), and raw ones draw visibly worse images (the "
        "paper's CIFAR-10 network: FID 12 for 3)"
    )
    beside = [name for name in _newest([p.name for p in path.parent.iterdir()]) if EMA.fullmatch(name)]
    return f"{note}; {beside[0]}, beside it, has averaged ones" if RAW.fullmatch(path.name) and beside else note
