"""The files of OpenAI's improved-diffusion and guided-diffusion, which hold tensors alone.

Shapes say most of the network. What they leave open is in the flags that the scripts of those libraries are called with: the
side of the images, attention's heads and their order, the schedule, and how t is given to the network.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from .base import Read, multiples

ANCHOR = "input_blocks.0.0.weight"

# What a flag is where it isn't given; the libraries agree but for rescale_timesteps, of which they must be asked.
DEFAULTS = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False, "learn_sigma": False,
    "sigma_small": False, "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
    "rescale_timesteps": None, "clip_denoised": True,
}  # fmt: skip
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
BOOLS = {name for name, value in DEFAULTS.items() if isinstance(value, bool)} | {"rescale_timesteps"}
# How it was trained, computed or drawn from; not what it is. timestep_respacing is sample's `steps`.
IGNORED = (
    "use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing", "batch_size", "num_samples",
    "use_ddim", "model_path", "data_dir", "lr", "weight_decay", "lr_anneal_steps", "microbatch", "ema_rate", "log_interval",
    "save_interval", "resume_checkpoint", "fp16_scale_growth", "schedule_sampler", "classifier_path", "classifier_scale",
    "classifier_depth", "classifier_width", "classifier_attention_resolutions", "classifier_pool", "classifier_use_fp16",
    "classifier_resblock_updown", "classifier_use_scale_shift_norm",
)  # fmt: skip
MULTIPLIERS = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2),
}  # fmt: skip

_GUIDED = "--attention_resolutions 32,16,8 --learn_sigma True --resblock_updown True"
_GUIDED_256 = f"{_GUIDED} --image_size 256 --num_channels 256 --num_head_channels 64"
_IMPROVED = "--num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_IMPROVED_LSUN = (
    "--image_size 256 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16"
)
# The files that OpenAI published, by their names, with the flags of its READMEs; all are averaged weights.
PUBLISHED = {
    "64x64_diffusion.pt": f"{_GUIDED} --class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine "
    "--num_channels 192 --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True",
    "128x128_diffusion.pt": f"{_GUIDED} --class_cond True --image_size 128 --num_channels 256 --num_heads 4",
    "256x256_diffusion.pt": f"{_GUIDED_256} --class_cond True",
    "256x256_diffusion_uncond.pt": _GUIDED_256,
    "512x512_diffusion.pt": f"{_GUIDED} --class_cond True --image_size 512 --num_channels 256 --num_head_channels 64",
    "lsun_bedroom.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_cat.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_horse.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_horse_nodropout.pt": _GUIDED_256,
    "imagenet64_uncond_100M_1500K.pt": f"{_IMPROVED} --rescale_timesteps True",
    "imagenet64_uncond_vlb_100M_1500K.pt": f"{_IMPROVED} --rescale_timesteps True",
    "imagenet64_cond_270M_250K.pt": f"{_IMPROVED} --num_channels 192 --class_cond True --rescale_timesteps False",
    "cifar10_uncond_50M_500K.pt": f"{_IMPROVED} --image_size 32 --dropout 0.3 --rescale_timesteps True",
    "cifar10_uncond_vlb_50M_500K.pt": f"{_IMPROVED} --image_size 32 --dropout 0.3 --rescale_timesteps True",
    "lsun_uncond_100M_1200K_bs128.pt": _IMPROVED_LSUN,
    "lsun_uncond_100M_2400K_bs64.pt": _IMPROVED_LSUN,
}

LAYERS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
WITHIN = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "qkv": "qkv",
    "proj_out": "to_out.0", "op": "conv", "conv": "conv",
}  # fmt: skip


def read(path: Path, state: Mapping[str, torch.Tensor], averaged: bool | None, flags: str | None) -> Read:
    """flags: as the scripts of those libraries take them; None: those of the published file of this name."""
    if "output_blocks.0.0.in_layers.0.weight" not in state:
        raise CheckpointError(f"{path}: a classifier, as it has no way up; expected a network that draws images")
    if state[ANCHOR].shape[1] == 6:
        raise CheckpointError(
            f"{path}: an upsampler, as it is given two images; expected a network that draws from noise"
        )
    published = path.name in PUBLISHED
    if flags is None and not published:
        raise CheckpointError(
            f"{path}: OpenAI's files don't say how their network was made; pass what its publisher passes to the sampling "
            'script: flags="--image_size 64 --num_channels 128 ..." (on the command line, fastddpm convert --flags)'
        )
    source = f"flags of the published {path.name}" if flags is None else "flags"
    try:
        given = parse(PUBLISHED[path.name] if flags is None else flags)
        network = _Network(state)
        config, schedule = network.config(given), _schedule(DEFAULTS | given)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: not a whole network of OpenAI's: {error} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {source}: {error}") from error
    found = DEFAULTS | given
    return Read(
        "openai",
        path,
        config,
        network.renamed(config, found["use_new_attention_order"]),
        schedule,
        "sample" if found["predict_xstart"] else "epsilon",
        "learned_range" if found["learn_sigma"] else "fixed_small" if found["sigma_small"] else "fixed_large",
        found["clip_denoised"],
        True if published else averaged,
    )


def parse(flags: str) -> dict[str, object]:
    """The flags that say something of the network or its schedule, by name."""
    words = _words(flags)
    given: dict[str, object] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or words):
            raise ValueError(f"got {word!r}; expected --name value --name value ...")
        value = value if equals else words.pop(0)
        if name in ("large_size", "small_size"):
            raise ValueError(f"{name} is an upsampler's; expected the flags of a network that draws from noise")
        if name in IGNORED:
            continue
        if name not in DEFAULTS:
            raise ValueError(f"unknown --{name}; expected some of {', '.join(DEFAULTS)}")
        value = _value(name, value)
        if given.setdefault(name, value) != value:
            raise ValueError(f"--{name} stands there twice, as {given[name]} and as {value}")
    return given


def _words(flags: str) -> list[str]:
    """As a shell splits them; "--image_size ..." and MODEL_FLAGS="--image_size ...", as READMEs have it, stand for what is in
    the quotes."""
    words = []
    for word in shlex.split(re.sub(r"\\(\s*\n|\s*$|\s+(?=--))", " ", flags)):
        quoted = re.fullmatch(r"[A-Z_]+=(\s*--.*)?|(\s*--\w+(?:\s|=.*\s--\w).*)", word, re.DOTALL)
        words += [word] if quoted is None else _words(quoted[1] or quoted[2] or "")
    return words


def _value(name: str, text: str) -> object:
    if name in BOOLS:
        if text.lower() not in TRUE + FALSE:
            raise ValueError(f"--{name}: got {text!r}; expected True or False")
        return text.lower() in TRUE
    try:
        return type(DEFAULTS[name])(text)
    except ValueError as error:
        raise ValueError(f"--{name}: got {text!r}; expected a number") from error


def _schedule(found: Mapping) -> Schedule:
    T, kind = found["diffusion_steps"], found["noise_schedule"]
    if kind == "linear":
        return Schedule.linear(T, 1000 / T * 1e-4, 1000 / T * 0.02)  # as noisy in T steps as the paper's in 1000
    if kind == "cosine":
        return Schedule.cosine(T)
    raise ValueError(f"--noise_schedule: got {kind!r}; expected linear or cosine")


class _Network:
    """What a state dict says of its network: each level has `blocks` residual blocks going down and one more going up."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state
        outputs = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("output_blocks."))
        ups = [i for i in range(outputs) if self._resampler(i)]
        self.blocks = ups[0] if ups else outputs - 1
        self.levels = outputs // (self.blocks + 1)
        self.updown = bool(ups) and "in_layers" in self._resampler(ups[0])

    def _resampler(self, i: int) -> str | None:
        """The name of a tensor that changes the resolution behind the block, if there is one."""
        names = (f"output_blocks.{i}.{j}.{layer}.weight" for j in (1, 2) for layer in ("conv", "in_layers.0"))
        return next((name for name in names if name in self.state), None)

    def config(self, given: Mapping) -> UNetConfig:
        """Raises ValueError where the flags contradict the shapes, or leave something open."""
        state, flags = self.state, DEFAULTS | given
        firsts = [f"input_blocks.{1 + level * (self.blocks + 1)}" for level in range(self.levels)]
        widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
        channels = state["time_embed.0.weight"].shape[1]
        stem, inputs = state[ANCHOR].shape[:2]
        outputs = state["out.2.weight"].shape[0]
        size, T, rescale = flags["image_size"], flags["diffusion_steps"], flags["rescale_timesteps"]
        attention = tuple(size >> i for i in range(self.levels) if f"{firsts[i]}.1.qkv.weight" in state)
        steps = [size // int(side) for side in flags["attention_resolutions"].split(",")]  # as the scripts round it
        multipliers = multiples(widths, channels)
        wanted = flags["channel_mult"].split(",") if flags["channel_mult"] else MULTIPLIERS.get(size, multipliers)
        self._agree(
            given,
            num_channels=(flags["num_channels"], channels),
            num_res_blocks=(flags["num_res_blocks"], self.blocks),
            channel_mult=(tuple(map(float, wanted)), tuple(map(float, multipliers))),
            attention_resolutions=(tuple(size >> i for i in range(self.levels) if 1 << i in steps), attention),
            class_cond=(flags["class_cond"], "label_emb.weight" in state),
            use_scale_shift_norm=(
                flags["use_scale_shift_norm"],
                state[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
            ),
            resblock_updown=(flags["resblock_updown"] and self.levels > 1, self.updown),
            learn_sigma=(flags["learn_sigma"], outputs == 2 * inputs),
        )
        wide = flags["num_head_channels"] != -1
        if not wide and flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
            raise ValueError(
                f"--num_heads_upsample: got {flags['num_heads_upsample']}, and --num_heads {flags['num_heads']}; UNet has as "
                "many heads going up as going down"
            )
        if T != 1000 and rescale is None:
            raise ValueError(
                f"rescale_timesteps: missing; with --diffusion_steps {T} the network is given other timesteps if they are "
                "rescaled, which improved-diffusion does unless told otherwise and guided-diffusion doesn't: add "
                "--rescale_timesteps True or False"
            )
        return UNetConfig(
            sample_size=size,
            in_channels=inputs,
            out_channels=outputs,
            channels=channels,
            channel_mult=multipliers,
            num_res_blocks=self.blocks,
            attention_resolutions=attention,
            dropout=flags["dropout"],
            num_classes=state["label_emb.weight"].shape[0] if flags["class_cond"] else None,
            norm_eps=1e-5,
            stem_channels=None if stem == channels else stem,
            num_heads=None if wide else flags["num_heads"],
            num_head_channels=flags["num_head_channels"] if wide else None,
            scale_shift=flags["use_scale_shift_norm"],
            resample="resnet" if self.updown else "conv",
            downsample_padding="both",
            flip_sin_to_cos=True,
            freq_shift=0,
            time_scale=1000 / T if rescale else 1.0,
        )

    @staticmethod
    def _agree(given: Mapping, **options: tuple[object, object]) -> None:
        contradictions = [
            f"--{name} {'' if name in given else 'by default '}means {wanted}, and the file has {found}"
            for name, (wanted, found) in options.items()
            if wanted != found
        ]
        if contradictions:
            raise ValueError("; ".join(contradictions))

    def renamed(self, config: UNetConfig, new_order: bool) -> dict[str, torch.Tensor]:
        """The tensors by UNet's names, in its shapes."""
        result = {}
        for name, value in self.state.items():
            layer, _, kind = name.rpartition(".")
            layer = self._layer(layer)
            if ".attentions." in layer and value.dim() == 3:  # a convolution of size 1
                value = value.squeeze(2)
            if not layer.endswith(".qkv"):
                result[f"{layer}.{kind}" if layer else kind] = value
                continue
            heads = config.num_heads or len(value) // 3 // config.num_head_channels
            # Rows: of q, then k, then v; or in the old order of one head after another, each with its q, k and v.
            parts = value.unflatten(0, (3, -1) if new_order else (heads, 3, -1))
            for part, row in zip("qkv", parts if new_order else parts.transpose(0, 1).flatten(1, 2), strict=True):
                result[f"{layer.removesuffix('qkv')}to_{part}.{kind}"] = row
        return result

    def _layer(self, layer: str) -> str:
        """UNet's name of a layer; an unknown one as it is."""
        if layer in LAYERS:
            return LAYERS[layer]
        match = re.fullmatch(rf"(.*?)\.({'|'.join(map(re.escape, WITHIN))})", layer)
        if match is None:
            return layer
        block, within = match[1], match[2]
        if block in LAYERS:
            return f"{LAYERS[block]}.{WITHIN[within]}"
        match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)", block)
        if match is None:
            return layer
        way, i, place = match[1], int(match[2]), int(match[3])
        level, j = divmod(i - (way == "input"), self.blocks + 1)
        if within in ("norm", "qkv", "proj_out"):
            part = f"attentions.{j}"
        elif way == "input" and j == self.blocks:
            part = "downsamplers.0"
        else:
            part = "upsamplers.0" if place else f"resnets.{j}"
        return f"{'down' if way == 'input' else 'up'}_blocks.{level}.{part}.{WITHIN[within]}"
