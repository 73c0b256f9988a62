"""diffusers' folders: UNet2DModel's config and weights, a scheduler's config beside them. Imports nothing of diffusers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from ..models.unet import UNet
from ..utils.files import atomic_write, created_folder
from ..utils.warn import warn_once
from . import scheduler, tensors
from .base import Read
from .diffusers_options import DEFAULTS, TOLD_BY, unet_config, unet_options

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
ANCHOR = "time_embedding.linear_1.weight"  # a name that no other format has
STEM = "diffusion_pytorch_model"
WEIGHTS = tuple(  # in the order in which one is chosen
    STEM + ending
    for ending in (
        ".safetensors.index.json",
        ".safetensors",
        ".bin.index.json",
        ".bin",
        ".fp16.safetensors",
        ".fp16.bin",
    )
)


# What diffusers' EMAModel writes among them.
EMA_OPTIONS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip


# Attention as diffusers wrote it up to version 0.12; then as today. Either may be 1x1 convolutions.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


class Layout(NamedTuple):
    """The files of a network by their names within a folder or a repository; None for what isn't there."""

    config: str
    weights: str | None
    parts: list[str]  # that the weights are split into
    scheduler: str | None
    index: str | None

    @property
    def files(self) -> list[str]:
        return [name for name in (self.config, self.weights, *self.parts, self.scheduler, self.index) if name]


def layout(files: Collection[str]) -> Layout | None:
    """Of all the names in a folder or repository those that matter; averaged weights before raw ones."""
    folder = next((folder for folder in ("unet_ema/", "unet/", "") if folder + CONFIG in files), None)
    if folder is None:
        return None
    return Layout(
        folder + CONFIG,
        next((folder + name for name in WEIGHTS if folder + name in files), None),
        sorted(name for name in files if re.fullmatch(re.escape(folder + STEM) + r"-\d+-of-\d+\..*", name)),
        next((name for name in (f"scheduler/{SCHEDULER}", SCHEDULER) if name in files), None),
        INDEX if INDEX in files else None,
    )


def read(folder: Path, found: Layout) -> Read:
    if found.index is not None:
        index = _json(folder / found.index)
        foreign = [
            name
            for name, value in index.items()
            if name not in ("unet", "scheduler") and isinstance(value, list) and value[:1] != [None]
        ]
        if foreign:
            raise CheckpointError(
                f"{folder / found.index}: the pipeline has {', '.join(foreign)} beside its unet and scheduler; a UNet alone "
                "wouldn't draw its images"
            )
    path = folder / found.config
    notes: list[str] = []
    options = _json(path)
    config = _wrapped(options, path, notes)
    if found.weights is None:
        raise CheckpointError(f"{path.parent}: no weights beside {CONFIG}; expected one of {', '.join(WEIGHTS)}")
    state, averaged, fill = _state(folder / found.weights)
    # diffusers keeps _averaged when it saves what it has loaded, and perhaps trained, but adds its version.
    if found.config.startswith("unet_ema/") or (
        options.get("_averaged") is True and "_diffusers_version" not in options
    ):
        averaged = True
    described = None if found.scheduler is None else folder / found.scheduler
    if described is None and folder.name in ("unet", "unet_ema"):
        described = folder.parent / "scheduler" / SCHEDULER  # a part of a pipeline's folder was named
    if described is not None and described.is_file():
        try:
            trained = scheduler.read(_json(described), f"{described}:")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    else:
        variance = "learned_range" if config.out_channels == 2 * config.in_channels else "fixed_large"
        trained = (Schedule.linear(), "epsilon", variance, True)
        notes.append(
            f"{folder}: no {SCHEDULER}; assumed the paper's linear schedule of 1000 steps, epsilon, {variance} and clipping"
        )
    return Read("diffusers", folder / found.weights, config, renamed(state), *trained, averaged, notes, fill)


def write(model: UNet, folder: Path, extra: dict | None = None) -> None:
    """A folder that DDPMPipeline.from_pretrained opens. Raises ValueError before the first file is written.

    extra: entries for the network's config, there with a "_" in front, as diffusers then ignores them.
    """
    if model.class_names is not None:
        warn_once(model, "class_names: left out, as diffusers' format has no place for names of classes")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    configs = {
        f"unet/{CONFIG}": unet_options(model.config) | {f"_{name}": value for name, value in (extra or {}).items()},
        f"scheduler/{SCHEDULER}": scheduler.write(model.schedule, model.prediction, model.variance, model.clip),
        INDEX: index,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # All are written before the first is renamed; the weights are, and configs follow.
    with contextlib.ExitStack() as stack:
        for name in ("unet", "scheduler"):
            stack.enter_context(created_folder(folder / name))
        paths = {name: stack.enter_context(atomic_write(folder / name)) for name in configs}
        weights = stack.enter_context(atomic_write(folder / "unet" / f"{STEM}.safetensors"))
        weights.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
        for name, config in configs.items():
            paths[name].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with attention's layers as UNet has them, whichever version of diffusers wrote it."""
    result = {}
    for name, value in state.items():
        if match := ATTENTION.fullmatch(name):
            block, layer, kind = match.groups()
            name = f"{block}.{OLD.get(layer, layer)}.{kind}"
            if kind == "weight" and set(value.shape[2:]) == {1}:
                value = value.flatten(1)
        result[name] = value
    return result


def _state(path: Path) -> tuple[dict[str, torch.Tensor], bool | None, Callable[[], None] | None]:
    parts = [path]
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(_json(path)["weight_map"].values()))
            inside = all(name == Path(name).name for name in names)
        except (KeyError, AttributeError, TypeError):
            inside = False
        if not inside:
            raise CheckpointError(f"{path}: weight_map: expected the names of files beside it, by those of tensors")
        parts = [path.parent / name for name in names]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise CheckpointError(f"{path}: of its parts {', '.join(missing)} aren't beside it")
    held, fill = tensors.begin(parts)
    return *tensors.network_in(held, path, (ANCHOR,)), fill


def _wrapped(config: dict, path: Path, notes: list[str]) -> UNetConfig:
    """unet_config, with errors that name the file and diffusers' option."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{path}: _class_name: got {kind!r}; expected 'UNet2DModel', the one that UNet can be")
    known = {*DEFAULTS, *EMA_OPTIONS}
    unknown = [name for name, value in config.items() if name not in known and not name.startswith("_") and value]
    if unknown:
        notes.append(f"{path}: {', '.join(unknown)}: unknown to UNet2DModel, and ignored")
    try:
        found = unet_config(config)
        if found.attention_channels and "attention_head_dim" not in config:
            notes.append(
                f"{path}: no attention_head_dim, so heads are {DEFAULTS['attention_head_dim']} channels wide, as in diffusers; "
                "the paper's networks have one head, for which null has to stand there"
            )
        return found
    except ValueError as error:
        option, colon, said = str(error).partition(":")
        raise CheckpointError(f"{path}: {TOLD_BY.get(option, option)}{colon}{said}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: an option is of another kind than UNet2DModel's ({error})") from error


def _json(path: Path) -> dict:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: got a {type(held).__name__}; expected an object of options")
    return held
