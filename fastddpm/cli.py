"""The command line: fastddpm sample | train | evaluate | convert | check | info."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from . import __version__, backend, data, images, pictures
from .checkpoints import base, fastddpm_folder, pretrained
from .diffusion import coefficients
from .diffusion.schedule import Schedule
from .errors import DataError, FastddpmError
from .evaluation.api import RESULT, evaluate
from .evaluation.features import import_features, inception
from .models.config import UNetConfig
from .models.unet import UNet
from .ops import philox_normal
from .ops.rng import Stream, random_seed
from .sampling.api import sample
from .sampling.plan import ChainArguments, make_plan, resolve_for
from .sampling.trajectories import FrameRecorder
from .training.loss import OBJECTIVES
from .training.recipe import RECIPES
from .training.trainer import CHECKPOINT, FIXED_VARIANCES, Trainer, network_for
from .utils.files import atomic_write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARRAY_SUFFIXES = (".npy", ".npz")
FILM_FRAMES = 60
FORWARD_COLUMNS = STRIP_COLUMNS = 10


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Fast, exact denoising diffusion (DDPM)."""


def main() -> None:
    """Run the command line. Errors that the user can correct are printed as one line, without a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: click.echo(message, err=True)  # without file and line
            cli()
    except (FastddpmError, ValueError, OSError) as error:
        click.echo(f"fastddpm: {error}", err=True)
        sys.exit(1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}; expected auto, cpu or cuda[:N]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch finds no CUDA device")
    return device


def _writable(path: Path, suffixes: tuple[str, ...]) -> Path:
    """Return the output path; raise ValueError if it cannot be written to."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"output: {path} ends in {path.suffix!r}; expected {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ValueError(f"output: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"output: {path} is a folder; expected a file name")
    return path


def _sampler_options(command):
    """Add the options of a chain to a command that draws images. None means the default."""
    for option in (
        click.option(
            "--variance",
            type=click.Choice(coefficients.VARIANCES),
            help="Variance of ddpm's noise. Default: the model's own, but fixed_small instead of fixed_large if --steps is less "
            "than all.",
        ),
        click.option("--eta", type=float, help="Amount of ddim's noise, from 0 (none, the default) to 1."),
        click.option(
            "--spacing",
            type=click.Choice(coefficients.SPACINGS),
            help="Choice of timesteps. Default: trailing, or logsnr for dpm++2m.",
        ),
        click.option("--steps", type=int, help="Number of steps. Default: all for ddpm, 50 for ddim, 20 for dpm++2m."),
        click.option(
            "--sampler",
            type=click.Choice(list(coefficients.DEFAULT_STEPS)),
            help="Sampler of the chain. Default: ddpm.",
        ),
    ):
        command = option(command)
    return command


@cli.command("sample")
@click.argument("model", default="digits")
@click.option("-n", default=16, show_default=True, help="Number of images.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="samples.png", show_default=True,
              help="File to write: .png for a grid, .npy or .npz for the raw float32 [n, C, H, W].")  # fmt: skip
@click.option("--seed", type=int, help="Seed in [0, 2^64). Default: a random seed. The seed is printed.")
@click.option("--first", default=0, show_default=True, help="Number of the first image in the seed's sequence.")
@_sampler_options
@click.option("--batch-size", type=int, help="Images per forward pass. Default: what fits in memory.")
@click.option(
    "--device", default="auto", show_default=True, help="Device of the computation: auto, cpu, cuda or cuda:N."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Arithmetic of the network. Default: the model's own.")
@click.option("--label", help="Class to draw, for a network with classes: its number, or its name if it has one.")
@click.option("--gif", type=click.Path(path_type=Path), help="Also write a film of the denoising to this .gif.")
@click.option("--strip", type=click.Path(path_type=Path),
              help="Also write to this .png the chain's predictions of x_0, ten in a row for each image.")  # fmt: skip
@click.option("--forward", type=click.Path(path_type=Path),
              help="Draw no images. Write instead how the forward process destroys this picture.")  # fmt: skip
def sample_command(
    model, n, output, seed, first, batch_size, device, dtype, label, gif, strip, forward, **chain
) -> None:
    """Draw images with MODEL and write them to a file.

    MODEL is the name of a bundled model (default: digits), the folder of a run or of a diffusers model, a checkpoint of
    pytorch_diffusion, or the id of a model on the Hugging Face Hub (owner/name).
    """
    seed = random_seed() if seed is None else seed
    if forward is not None:
        _writable(output, (".png",))
        images.save(_forward_strip(forward, UNet.from_pretrained(model).schedule, seed), output)
        click.echo(f"{output}: {forward} from x_0 to x_T (seed {seed})")
        return
    _writable(output, (".png", *ARRAY_SUFFIXES))
    for path, suffix in ((gif, ".gif"), (strip, ".png")):
        if path is not None:
            _writable(path, (suffix,))
    if n < 1 and (output.suffix.lower() not in ARRAY_SUFFIXES or gif or strip):
        raise ValueError(f"n: got {n}; expected at least 1 image for a picture")
    network = UNet.from_pretrained(model).to(_device(device))
    chain = {name: value for name, value in chain.items() if value is not None}
    label = None if label is None else _class_number(label, network)
    arguments = ChainArguments(**chain)
    steps = len(make_plan(resolve_for(network, arguments), arguments).table.timesteps)
    if output.suffix.lower() not in ARRAY_SUFFIXES:
        images.check_grid_size("output", output, images.grid_layout(n, network.shape))
    if gif is not None:
        images.check_grid_size("gif", gif, images.grid_layout(n, network.shape))
    if strip is not None:
        columns = min(STRIP_COLUMNS, steps)
        images.check_grid_size("strip", strip, images.grid_layout(n * columns, network.shape, columns))
    film = FrameRecorder(steps, min(FILM_FRAMES, steps), lambda state: state.x.clamp(-1, 1).cpu())
    predictions = FrameRecorder(steps, min(STRIP_COLUMNS, steps), lambda state: state.x0.cpu())
    recorders = [frames for frames, path in ((film, gif), (predictions, strip)) if path is not None]
    began = time.perf_counter()
    samples = sample(
        network, n, seed=seed, first=first, batch_size=batch_size,
        dtype=None if dtype is None else DTYPES[dtype], class_labels=label,
        callback=(lambda state: [frames(state) for frames in recorders]) if recorders else None, **chain,
    ).cpu()  # fmt: skip
    seconds = time.perf_counter() - began
    _write(samples, output)
    if gif is not None:
        _write_film([images.grid(frame) for frame in film.frames], gif)
    if strip is not None:
        columns = predictions.frames
        images.save(images.grid(torch.stack(columns, dim=1).flatten(0, 1), columns=len(columns)), strip)
    shape = "x".join(map(str, network.shape))
    click.echo(f"{output}: {n} images {shape}, {steps} steps in {seconds:.1f} s (seed {seed})")


def _class_number(label: str, network: UNet) -> int:
    """Return the number of the class given by --label."""
    names = network.class_names or []
    if label in names:
        return names.index(label)
    try:
        if any(name.isdecimal() for name in names):
            raise ValueError  # --label 3 could mean class 3 or a name that is a number
        return int(label)
    except ValueError:
        known = f"one of {', '.join(names)}" if names else "a number, because this network's classes have no names"
        raise ValueError(f"label: got {label!r}; expected {known}") from None


def _write(samples: torch.Tensor, path: Path) -> None:
    """Write the samples as a grid, or as an array if `path` is a .npy or .npz."""
    if path.suffix.lower() not in ARRAY_SUFFIXES:
        images.save(images.grid(samples), path)
        return
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".npy":
            np.save(temporary, samples.numpy())
        else:
            np.savez(temporary, images=samples.numpy())


def _write_film(frames: list[Image.Image], path: Path) -> None:
    durations = [80] * (len(frames) - 1) + [2000]  # the last frame stays longer
    images.save(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _forward_strip(path: Path, schedule: Schedule, seed: int) -> Image.Image:
    """Return x_0 and x_t at evenly spaced t, in one row. Each x_t has its own noise, of the forward stream."""
    try:
        picture, _ = pictures.read(path)
    except DataError as error:
        raise ValueError(f"forward: {error}") from error
    x0 = torch.from_numpy(pictures.channels_first(pictures.composed_on_black(picture)))[None].float() / 127.5 - 1
    last = len(schedule) - 1
    steps = torch.linspace(0, last, FORWARD_COLUMNS).round().long()
    repeated = x0.expand(len(steps), *x0.shape[1:])
    noise = philox_normal(repeated.shape, seed=seed, t=steps, stream=Stream.FORWARD)
    strip = torch.cat((x0, schedule.add_noise(repeated, noise, steps)))
    return images.grid(strip, columns=len(strip))


def _recipe_options(command):
    """Add an option for each field of the recipe that a user may change. None means the preset's value."""
    for name, kind, text in reversed(
        [
            (
                "--prediction",
                click.Choice(coefficients.PREDICTIONS),
                "What the network learns to predict. Default: epsilon.",
            ),
            (
                "--objective",
                click.Choice(OBJECTIVES),
                "simple, the squared error (default), or bound, the variational bound.",
            ),
            ("--variance", click.Choice(FIXED_VARIANCES), "Variance of the reverse steps. Default: fixed_large."),
            ("--steps", int, "Total number of optimizer steps."),
            ("--epochs", float, "Total number of passes over the data, instead of --steps."),
            ("--batch-size", int, "Examples per optimizer step."),
            ("--accumulate", int, "Number of parts that each batch is computed in."),
            ("--lr", float, "Learning rate after the warm-up."),
            ("--warmup", int, "Steps of linear growth of the learning rate at the start."),
            ("--cooldown", int, "Steps of linear decay of the learning rate at the end."),
            ("--ema", float, "Decay of the averaged weights."),
            ("--grad-clip", float, "Upper bound on the gradient's norm."),
            ("--flips/--no-flips", bool, "Mirror each image with probability 1/2."),
            ("--seed", int, "Seed of weights, data order, timesteps and noise."),
            ("--log-every", int, "Steps between rows of log.csv."),
            ("--sample-every", int, "Steps between sample grids; 0 means no grids."),
            ("--save-every", int, "Steps between checkpoints."),
        ]
    ):
        command = click.option(name, default=None, help=text, type=None if kind is bool else kind)(command)
    return command


def _data_options(command):
    """Add the options of data.load to a command that takes data."""
    alpha = "Compose transparent pictures on black, or keep transparency as a channel."
    source = "A .npz or .npy file of images, or a folder of pictures."
    for option in (
        click.option("--skip-damaged", is_flag=True, help="Omit pictures that cannot be read, and list them."),
        click.option("--alpha", type=click.Choice(data.ALPHAS), default="black", show_default=True, help=alpha),
        click.option("--size", type=int, help="Resize the smaller side to this, and crop to a centred square."),
        click.option("--data", "source", type=click.Path(path_type=Path), required=True, help=source),
    ):
        command = option(command)
    return command


@cli.command("train")
@_data_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--preset", type=click.Choice(list(RECIPES)),
              help="Network and recipe: digits (default), or cifar10, as in the paper.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
@click.option(
    "--labels",
    is_flag=True,
    help="Train a class-conditional network. The classes are the labels of a .npz, or the subfolders of a folder.",
)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Arithmetic of the network; auto means bfloat16 if it is faster.")  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, help="Device of the computation: auto, cpu, cuda or cuda:N."
)
@_recipe_options
def train_command(source, size, alpha, skip_damaged, out, preset, resume, labels, dtype, device, **options) -> None:
    """Train a network on images with the paper's objective and recipe. Ctrl-C saves the run; --resume continues it."""
    device = _device(device)
    changes = {name: value for name, value in options.items() if value is not None}
    if "steps" in changes and "epochs" in changes:
        raise ValueError("steps, epochs: got both; expected one of them")
    if "steps" in changes or "epochs" in changes:
        changes = {"steps": None, "epochs": None, **changes}
    dataset = data.load(source, labels=labels, size=size, alpha=alpha, skip_damaged=skip_damaged)
    if resume:
        passed = {**changes, "preset": preset, "dtype": None if dtype == "auto" else dtype}
        fixed = {name for name, value in passed.items() if value is not None} - {"steps", "epochs"}
        if fixed:
            raise ValueError(
                f"{', '.join(sorted(fixed))}: a resumed run uses its own recipe; only --steps or --epochs may change"
            )
        trainer = Trainer.resume(dataset, out, device, **changes)
    else:
        if (out / CHECKPOINT).exists():
            raise ValueError(f"out: {out} already has a run; pass --resume to continue it, or another folder")
        preset = preset or "digits"
        config = network_for(preset, dataset, classes=dataset.classes)
        if dtype == "auto":
            dtype = "bfloat16" if backend.emulated_reason(device, torch.bfloat16) is None else "float32"
        model_options = {name: changes.pop(name) for name in ("prediction", "variance") if name in changes}
        recipe = dataclasses.replace(RECIPES[preset], dtype=dtype, **changes)
        trainer = Trainer(dataset, out, config, recipe, device, **model_options)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    click.echo(
        f"{len(dataset)} images of {'x'.join(map(str, trainer.model.shape))}; {parameters:,} parameters; "
        f"steps {trainer.step} to {trainer.total} of batch {trainer.recipe.batch_size} in {trainer.recipe.dtype} on {device}"
    )
    if trainer.run():
        click.echo(f"{out}: trained; draw images with  fastddpm sample {out}")
    else:
        command = ["fastddpm", "train", "--data", str(source), "--out", str(out), "--resume"]
        command += ["--labels"] * labels + ["--skip-damaged"] * skip_damaged
        command += [] if size is None else ["--size", str(size)]
        command += [] if alpha == "black" else ["--alpha", alpha]
        click.echo(
            f"{out}: stopped and saved at step {trainer.step} of {trainer.total}; continue with  {shlex.join(command)}"
        )


@cli.command("evaluate")
@click.argument("model")
@_data_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the samples and the result.")
@click.option("--metrics", default="fid,kid,bpd", show_default=True, help="Metrics to measure, separated by commas.")
@click.option("-n", default=50_000, show_default=True, help="Number of samples for fid and kid.")
@click.option("--seed", default=0, show_default=True, help="Seed in [0, 2^64).")
@_sampler_options
@click.option("--batch-size", type=int, help="Images per forward pass. Default: what fits in memory.")
@click.option(
    "--device", default="auto", show_default=True, help="Device of the computation: auto, cpu, cuda or cuda:N."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Arithmetic of the network. Default: the model's own.")
@click.option("--features", metavar="MODULE:NAME",
              help="Features for fid and kid, uint8 [N, C, H, W] -> float [N, D]. Default: Inception.")  # fmt: skip
@click.option(
    "--inception-weights", type=click.Path(path_type=Path), help="File of Inception's weights. Default: downloaded."
)
@click.option(
    "--subsample",
    type=int,
    help="Timesteps drawn for each image's bpd. Default: all, which takes T evaluations per image.",
)
@click.option("--likelihood-images", type=int, help="Number of images that bpd is measured on. Default: all.")
@click.option(
    "--shard",
    type=int,
    help="Samples in one file. An interruption loses at most one file. Default: 1000, or 100 on a CPU.",
)
@click.option("--cache", type=click.Path(path_type=Path),
              help="Folder for the reference's features. Default: evaluation-cache, next to --out.")  # fmt: skip
def evaluate_command(model, source, out, metrics, seed, device, dtype, features, inception_weights, **options) -> None:
    """Measure FID, KID and bits per dimension of MODEL.

    MODEL is as for fastddpm sample. After Ctrl-C, the same command continues.
    """
    device = _device(device)
    metrics = [metric.strip() for metric in metrics.split(",") if metric.strip()]
    network = UNet.from_pretrained(model).to(device)
    if features is not None and inception_weights is not None:
        raise ValueError("features, inception_weights: got both; expected one of them")
    if features is not None:
        features = import_features(features, device)
    elif inception_weights is not None:
        features = inception(inception_weights, device)
    try:
        result = evaluate(
            network, source, out, metrics=metrics, seed=seed, features=features,
            dtype=None if dtype is None else DTYPES[dtype], **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"{out}: stopped; the same command continues", err=True)
        sys.exit(130)
    click.echo(f"{result}\n{out / RESULT}: the same as JSON")


@cli.command("convert")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "format", type=click.Choice(list(pretrained.FORMATS)), required=True,
              help="Format of OUT: that of this package, or of diffusers' DDPMPipeline.from_pretrained.")  # fmt: skip
@click.option("--revision", help="Branch, tag or commit, if IN is a model on the Hub.")
@click.option(
    "--flags",
    help="Flags of the sampling script, in quotes, if IN is a checkpoint of OpenAI's code. Not needed for published files.",
)
def convert_command(source, out, format, revision, flags) -> None:
    """Write the model IN to the new folder OUT, and print what was found in IN.

    IN is a MODEL as for fastddpm sample, a checkpoint of OpenAI's improved-diffusion or guided-diffusion, or a folder of such
    checkpoints.
    """
    folder = out.absolute()
    if not folder.parent.is_dir():
        raise ValueError(f"out: the folder {folder.parent} does not exist; create it first")
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ValueError(f"out: {out} exists; expected a new or an empty folder")
    checkpoint = pretrained.read_checkpoint(source, revision=revision, flags=flags)
    for name, value in _described(checkpoint):
        click.echo(f"{name:<12} {value}")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        network = base.build_unet(checkpoint)
        # The new folder records it too.
        extra = {} if checkpoint.averaged is None else {"averaged": checkpoint.averaged}
        pretrained.FORMATS[format](network, temporary, extra=extra)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    click.echo(f"{out}: written, for {format}")


def _described(checkpoint: base.Checkpoint) -> list[tuple[str, str]]:
    default, always = (
        UNetConfig(),
        ("sample_size", "channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    )
    options = [
        f"{name} {value}"
        for name, value in dataclasses.asdict(checkpoint.config).items()
        if name in always or value != getattr(default, name)
    ]
    return [
        ("format", f"{checkpoint.format}, {checkpoint.path}"),
        ("network", ", ".join(options)),
        ("parameters", f"{sum(value.numel() for value in checkpoint.state.values()):,}"),
        ("schedule", str(checkpoint.schedule)),
        ("prediction", checkpoint.prediction),
        ("variance", checkpoint.variance),
        ("clip", str(checkpoint.clip)),
        ("averaged", "yes (EMA)" if checkpoint.averaged else "not stated"),
        *([("classes", ", ".join(checkpoint.class_names))] if checkpoint.class_names else []),
        *(("note", note) for note in checkpoint.notes),
    ]


@cli.command("check")
@click.option(
    "--device", default="auto", show_default=True, help="Device of the computation: auto, cpu, cuda or cuda:N."
)
def check_command(device) -> None:
    """Compare every op on this machine's backends with float64, and print the table of errors."""
    from . import parity

    results = parity.run(_device(device))
    click.echo(parity.as_text(results))
    if any(not result.share <= 1 for result in results):  # a NaN share fails too
        raise ValueError("check: an error is larger than its bound; please report this table")


@cli.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(as_json) -> None:
    """Print versions, the backend of each op, and why a backend is missing."""
    facts = {
        "fastddpm": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "models": fastddpm_folder.bundled_models(),
        **backend.describe(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            click.echo(f"{name}")
            for key, entry in value.items():
                click.echo(f"  {key:<12} {entry}")
        else:
            click.echo(f"{name:<14} {', '.join(value) if isinstance(value, list) else value}")
