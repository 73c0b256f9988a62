"""Folders of diffusers: UNet2DModel's config and weights, and a scheduler's config. Never imports diffusers."""

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
from .base import Checkpoint
from .diffusers_options import DIFFUSERS_OPTION_OF, UNET2D_DEFAULTS, unet_config, unet_options

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
MARKER_KEY = "time_embedding.linear_1.weight"  # no other format has this name
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS = tuple(  # the first that exists is read
    WEIGHTS_STEM + ending
    for ending in (
        ".safetensors.index.json",
        ".safetensors",
        ".bin.index.json",
        ".bin",
        ".fp16.safetensors",
        ".fp16.bin",
    )
)

# Entries that diffusers' EMAModel adds to a network's config.
EMA_OPTIONS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip

# Names of attention layers up to diffusers 0.12, and their present names. Layers of both may be 1x1 convolutions.
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION_KEY = re.compile(
    r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)"
)


class ModelFiles(NamedTuple):
    """The names of a network's files within a folder or repository; None for a missing file."""

    config: str
    weights: str | None
    weight_parts: list[str]  # files of split weights
    scheduler: str | None
    pipeline_index: str | None

    @property
    def files(self) -> list[str]:
        return [
            name
            for name in (self.config, self.weights, *self.weight_parts, self.scheduler, self.pipeline_index)
            if name
        ]


def find_model_files(files: Collection[str]) -> ModelFiles | None:
    """Return the files of a network, given all names in a folder or repository. Averaged weights are preferred to raw ones."""
    folder = next((folder for folder in ("unet_ema/", "unet/", "") if folder + CONFIG in files), None)
    if folder is None:
        return None
    return ModelFiles(
        folder + CONFIG,
        next((folder + name for name in WEIGHTS if folder + name in files), None),
        sorted(name for name in files if re.fullmatch(re.escape(folder + WEIGHTS_STEM) + r"-\d+-of-\d+\..*", name)),
        next((name for name in (f"scheduler/{SCHEDULER}", SCHEDULER) if name in files), None),
        INDEX if INDEX in files else None,
    )


def read_folder(folder: Path, files: ModelFiles) -> Checkpoint:
    if files.pipeline_index is not None:
        index = _read_json(folder / files.pipeline_index)
        foreign = [
            name
            for name, value in index.items()
            if name not in ("unet", "scheduler") and isinstance(value, list) and value[:1] != [None]
        ]
        if foreign:
            raise CheckpointError(
                f"{folder / files.pipeline_index}: the pipeline has {', '.join(foreign)} besides a unet and a scheduler; a UNet "
                "alone cannot draw its images"
            )
    path = folder / files.config
    notes: list[str] = []
    options = _read_json(path)
    config = _unet_config(options, path, notes)
    if files.weights is None:
        raise CheckpointError(f"{path.parent}: has no weights; expected next to {CONFIG} one of {', '.join(WEIGHTS)}")
    state, averaged, read_tensors = _open_state_dict(folder / files.weights)
    # If diffusers saves a network that it has loaded, and perhaps trained, it copies _averaged and adds its version.
    if files.config.startswith("unet_ema/") or (
        options.get("_averaged") is True and "_diffusers_version" not in options
    ):
        averaged = True
    scheduler_path = None if files.scheduler is None else folder / files.scheduler
    if scheduler_path is None and folder.name in ("unet", "unet_ema"):
        scheduler_path = folder.parent / "scheduler" / SCHEDULER  # `folder` is the unet folder of a pipeline
    if scheduler_path is not None and scheduler_path.is_file():
        try:
            settings = scheduler.settings_from_config(_read_json(scheduler_path), f"{scheduler_path}:")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    else:
        variance = "learned_range" if config.out_channels == 2 * config.in_channels else "fixed_large"
        settings = (Schedule.linear(), "epsilon", variance, True)
        notes.append(
            f"{folder}: has no {SCHEDULER}; assuming the paper's linear schedule of 1000 steps, epsilon, {variance} and clipping"
        )
    return Checkpoint(
        "diffusers", folder / files.weights, config, rename_attention(state), *settings, averaged, notes, read_tensors
    )


def write_folder(model: UNet, folder: Path, extra: dict | None = None) -> None:
    """Write a folder that DDPMPipeline.from_pretrained opens.

    Args:
        model: the network.
        folder: folder to write.
        extra: additional entries of the network's config. Their names get the prefix "_", because diffusers ignores such entries.

    Raises:
        ValueError: the model cannot be written in this format. No file has been written.
    """
    if model.class_names is not None:
        warn_once(model, "class_names: not written, because diffusers' format has no names of classes")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    configs = {
        f"unet/{CONFIG}": unet_options(model.config) | {f"_{name}": value for name, value in (extra or {}).items()},
        f"scheduler/{SCHEDULER}": scheduler.config_from_settings(
            model.schedule, model.prediction, model.variance, model.clip
        ),
        INDEX: index,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # All files are written before the first one is renamed. The weights are renamed first, then the configs.
    with contextlib.ExitStack() as stack:
        for name in ("unet", "scheduler"):
            stack.enter_context(created_folder(folder / name))
        paths = {name: stack.enter_context(atomic_write(folder / name)) for name in configs}
        weights = stack.enter_context(atomic_write(folder / "unet" / f"{WEIGHTS_STEM}.safetensors"))
        weights.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
        for name, config in configs.items():
            paths[name].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def rename_attention(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict of any version of diffusers with the names and shapes of UNet's attention layers."""
    result = {}
    for name, value in state.items():
        if match := ATTENTION_KEY.fullmatch(name):
            block, layer, kind = match.groups()
            name = f"{block}.{LEGACY_ATTENTION.get(layer, layer)}.{kind}"
            if kind == "weight" and set(value.shape[2:]) == {1}:
                value = value.flatten(1)
        result[name] = value
    return result


def _open_state_dict(path: Path) -> tuple[dict[str, torch.Tensor], bool | None, Callable[[], None] | None]:
    """Return (tensors by name, True if they are averages or None, Checkpoint.read_tensors)."""
    parts = [path]
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(_read_json(path)["weight_map"].values()))
            inside = all(name == Path(name).name for name in names)
        except (KeyError, AttributeError, TypeError):
            inside = False
        if not inside:
            raise CheckpointError(f"{path}: weight_map: expected names of files in its folder, by names of tensors")
        parts = [path.parent / name for name in names]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise CheckpointError(f"{path}: {', '.join(missing)} missing in its folder")
    contents, read_tensors = tensors.open_tensors(parts)
    return *tensors.find_state_dict(contents, path, (MARKER_KEY,)), read_tensors


def _unet_config(config: dict, path: Path, notes: list[str]) -> UNetConfig:
    """Return `unet_config(config)`. Errors name the file and diffusers' option."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(
            f"{path}: _class_name: got {kind!r}; expected 'UNet2DModel', the only class that UNet supports"
        )
    known = {*UNET2D_DEFAULTS, *EMA_OPTIONS}
    unknown = [name for name, value in config.items() if name not in known and not name.startswith("_") and value]
    if unknown:
        notes.append(f"{path}: {', '.join(unknown)}: not an option of UNet2DModel; ignored")
    try:
        network_config = unet_config(config)
        if network_config.attention_channels and "attention_head_dim" not in config:
            notes.append(
                f"{path}: no attention_head_dim, so heads are {UNET2D_DEFAULTS['attention_head_dim']} channels wide, as in "
                "diffusers; the paper's networks have one head, for which the entry must be null"
            )
        return network_config
    except ValueError as error:
        option, colon, message = str(error).partition(":")
        raise CheckpointError(f"{path}: {DIFFUSERS_OPTION_OF.get(option, option)}{colon}{message}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: an option has another type than UNet2DModel's ({error})") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a {type(content).__name__}; expected an object of options")
    return content
