"""Training by the paper's recipe (Ho et al. 2020, algorithm 1 and appendix B), with bitwise reproducible resumption.

A run's folder has config.json and model.safetensors (the averaged weights, which `UNet.from_pretrained` loads), checkpoint.pt
(everything needed to resume), log.csv and samples/. Random numbers follow the RNG contract. The timestep, noise and flip of
example number d of the run depend only on (seed, d). Its image is given by the permutation of epoch d // N. A resumed run is
therefore bitwise identical to an uninterrupted one, on a GPU only in torch's deterministic mode.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .. import backend, images
from ..checkpoints import fastddpm_folder
from ..data import Images, load_in_workers
from ..diffusion.coefficients import PREDICTIONS
from ..errors import DataError, TrainingError
from ..models.config import PRESETS, UNetConfig, with_current_names
from ..models.unet import UNet
from ..ops.philox_normal import first_words
from ..ops.rng import Stream
from ..sampling.api import sample
from ..utils.files import atomic_write
from ..utils.progress import bar as progress_bar
from ..utils.validation import check_choice, check_range
from ..utils.warn import warn_once
from .loss import training_loss
from .recipe import Recipe

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"
FIXED_VARIANCES = ("fixed_large", "fixed_small")  # the variances that are not learned
GRID, MAX_CLASS_ROWS = (4, 4), 10  # (rows, columns) of a grid of samples; maximum number of rows if each row is a class
COLUMNS = ("step", "images", "loss", "grad_norm", "lr", "images_per_second", "seconds")


class SeededBatchSampler(Sampler[list[int]]):
    """An endless batch sampler that draws one seeded permutation of the images after another.

    Args:
        examples: number of images.
        size: number of images in a batch.
        seed: seed of the run.
        start: number of the first example. Example d is an image of permutation d // examples.
    """

    def __init__(self, examples: int, size: int, seed: int, start: int) -> None:
        self.examples, self.size, self.seed, self.start = examples, size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permutation, batch = -1, [], []
        position = self.start
        while True:
            if position // self.examples != epoch:
                epoch = position // self.examples
                generator = torch.Generator().manual_seed((self.seed + epoch) % (1 << 63))
                permutation = torch.randperm(self.examples, generator=generator).tolist()
            batch.append(permutation[position % self.examples])
            position += 1
            if len(batch) == self.size:
                yield batch
                batch = []


def network_for(preset: str, dataset: Dataset, *, classes: int | None = None) -> UNetConfig:
    """Return a preset's network, with the channels and size of a data set's images.

    The size is rounded up so that every level can halve it. Attention stays at the same depth.

    Args:
        preset: name of the preset, "digits" or "cifar10".
        dataset: the images, a map-style Dataset. Items are images [C, H, W], or pairs (image, label).
        classes: number of classes, for a class-conditional network.

    Returns:
        A `UNetConfig`.
    """
    image = _image_of(dataset[0])
    channels, height, width = image.shape
    config = PRESETS[preset]
    multiple = 1 << (len(config.channel_mult) - 1)
    side = math.ceil(max(height, width) / multiple) * multiple
    # Attention stays at the same depth when the side differs from the preset's.
    attention = tuple(a * side // config.sample_size for a in config.attention_resolutions)
    return dataclasses.replace(
        config,
        in_channels=channels,
        out_channels=channels,
        sample_size=side,
        attention_resolutions=attention,
        num_classes=classes,
    )


def _digest(dataset: Images) -> str:
    """Return a checksum of the images and their labels."""
    labels = b"" if dataset.labels is None else dataset.labels.numpy().tobytes()
    return hashlib.sha256(dataset.digest().encode() + labels).hexdigest()


def _image_of(item: object) -> torch.Tensor:
    return item[0] if isinstance(item, (tuple, list)) else item


def _fitted(dataset: Dataset, config: UNetConfig) -> Dataset:
    """Return the data set with images padded to the network's size; raise TrainingError if they do not fit the network."""
    if isinstance(dataset, IterableDataset):
        raise TrainingError(
            f"data: {type(dataset).__name__} is an IterableDataset; expected a map-style Dataset with __len__ and __getitem__, "
            "because the seed determines the order of the images"
        )
    if len(dataset) == 0:
        raise TrainingError("data: the data set is empty")
    if isinstance(dataset, Images):
        dataset = dataset.pad_to(config.sample_size)
    expected = [config.in_channels, config.sample_size, config.sample_size]
    shape = list(_image_of(dataset[0]).shape)
    if shape != expected:
        raise TrainingError(f"data: got images of shape {shape}; expected {expected}, the network's")
    if not isinstance(dataset, Images):
        check_range("data: image 0", torch.as_tensor(_image_of(dataset[0])))
    if config.num_classes is not None and not isinstance(dataset[0], (tuple, list)):
        raise TrainingError(
            f"data: has no labels, but the network has {config.num_classes} classes; pass labels=True (--labels) to read them"
        )
    return dataset


class Trainer:
    """A training run: a network, its averaged weights (EMA), the optimizer and the number of completed steps.

    Args:
        dataset: the images, a map-style Dataset. Items are images [C, H, W] in [-1, 1], or pairs (image, label).
        out: folder of the run.
        config: configuration of the network.
        recipe: hyperparameters of the run.
        device: device of the training.
        prediction: what the network learns to predict: "epsilon", "sample", "v_prediction" or "mean".
        variance: variance of the reverse steps, in the bound and for sampling: "fixed_large" or "fixed_small".

    Raises:
        TrainingError: the arguments do not fit together. The message names the argument.
    """

    def __init__(
        self,
        dataset: Dataset,
        out: str | Path,
        config: UNetConfig,
        recipe: Recipe,
        device: torch.device,
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_large",
    ) -> None:
        check_choice("prediction", prediction, PREDICTIONS, TrainingError)
        check_choice("variance", variance, FIXED_VARIANCES, TrainingError)
        self.dataset, self.out, self.recipe, self.device = _fitted(dataset, config), Path(out), recipe, device
        if recipe.dtype == "bfloat16" and (reason := backend.emulated_reason(device, torch.bfloat16)):
            warn_once(self, f"{reason}, so training is many times slower than with dtype float32")
        torch.manual_seed(recipe.seed)
        names = getattr(self.dataset, "class_names", None) if config.num_classes is not None else None
        model = UNet(config, prediction=prediction, variance=variance, class_names=names)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr, eps=1e-8)
        self.digest = _digest(self.dataset) if isinstance(self.dataset, Images) else None
        self.step = 0
        self.total = recipe.total_steps(len(self.dataset))
        if self.total < recipe.cooldown:
            warn_once(
                self,
                f"cooldown: the learning rate falls to 0 over {recipe.cooldown} steps, and the run has {self.total}, so that it "
                f"never exceeds {self.total / recipe.cooldown:.0%} of lr; pass more steps (--steps, --epochs), or a shorter "
                "cooldown (--cooldown)",
            )
        self.log: list[dict[str, object]] = []
        self._stop_requested = False

    # ---------------------------------------------------------------------------------- a run's folder

    @classmethod
    def resume(cls, dataset: Dataset, out: str | Path, device: torch.device, **changes: object) -> Trainer:
        """Return the run in `out`, continued from its checkpoint.

        Args:
            dataset: the data that the run began with.
            out: folder of the run.
            device: device of the training.
            **changes: `steps` or `epochs`, the new length of the run. Other fields of the recipe must not change.

        Raises:
            TrainingError: `out` has no complete checkpoint, or the data differ from those that the run began with.
        """
        path = Path(out) / CHECKPOINT
        if not path.is_file():
            raise TrainingError(f"out: {path} does not exist; there is nothing to resume")
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            recipe = Recipe(**{**saved["recipe"], **changes})
            config = UNetConfig(**with_current_names(saved["unet"]))
            # Checkpoints of earlier versions have neither.
            model_options = {name: saved[name] for name in ("prediction", "variance") if name in saved}
        except TrainingError:
            raise
        except Exception as error:  # torch.load raises many kinds
            raise TrainingError(f"out: {path} is not a complete training checkpoint ({error})") from error
        if saved["examples"] != len(dataset):
            raise TrainingError(
                f"data: got {len(dataset)} images; expected {saved['examples']}, as at the start of the run in {out}"
            )
        # Checkpoints of earlier versions have no digest, nor has a Dataset that is not an `Images`.
        digest = saved.get("digest")
        if digest is not None and isinstance(dataset, Images) and _digest(dataset.pad_to(config.sample_size)) != digest:
            raise TrainingError(
                f"data: got {len(dataset)} images, as many as at the start of the run in {out}, but their content, labels or "
                "reading options differ; pass the same data and options, or start another run"
            )
        self = cls(dataset, out, config, recipe, device, **model_options)
        fastddpm_folder.load_state(self.model, saved["model"], path)
        self.ema = saved["ema"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.log = _read_log(self.out / LOG, self.step)
        return self

    def save(self) -> None:
        """Write the run to its folder. Each file is written atomically."""
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.out / CHECKPOINT) as path:
            torch.save(
                {
                    "step": self.step,
                    "examples": len(self.dataset),
                    "digest": self.digest,
                    "unet": dataclasses.asdict(self.model.config),
                    "prediction": self.model.prediction,
                    "variance": self.model.variance,
                    "recipe": dataclasses.asdict(self.recipe),
                    "model": self.model.state_dict(),
                    "ema": self.ema,
                    "optimizer": self.optimizer.state_dict(),
                },
                path,
            )
        training = {
            "recipe": dataclasses.asdict(self.recipe),
            "data": {
                "source": getattr(self.dataset, "source", type(self.dataset).__name__),
                "examples": len(self.dataset),
            },
            "step": self.step,
            "weights": "exponential moving average",
        }
        fastddpm_folder.write_folder(self.model, self.out, state=self.ema, extra={"training": training})
        with atomic_write(self.out / LOG) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.log)

    def averaged(self) -> UNet:
        """Return a copy of the network with the averaged weights, in eval mode."""
        trained = self.model
        model = UNet(
            trained.config, prediction=trained.prediction, variance=trained.variance, class_names=trained.class_names
        )
        model = model.to(self.device, memory_format=torch.channels_last)
        model.load_state_dict(self.ema)
        return model.eval()

    def draw_grid(self, progress: bool | None) -> None:
        """Write a grid of samples of the averaged network to samples/.

        If the network has classes, each row is one class. If it has more than MAX_CLASS_ROWS, the rows are evenly spaced classes.
        """
        (rows, columns), classes, labels = GRID, self.model.config.num_classes, None
        if classes is not None:
            rows = min(classes, MAX_CLASS_ROWS)
            labels = torch.linspace(0, classes - 1, rows).round().long().repeat_interleave(columns)
        samples = sample(self.averaged(), rows * columns, class_labels=labels, seed=0, progress=progress)
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        images.save(images.grid(samples, columns), folder / f"{self.step:07d}.png")

    # ------------------------------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
        """Yield (x0, class labels or None, the number of the first example) for each forward pass, from the next step on."""
        part = self.recipe.batch_size // self.recipe.accumulate
        first = self.step * self.recipe.batch_size
        sampler = SeededBatchSampler(len(self.dataset), part, self.recipe.seed, first)
        load = load_in_workers if getattr(self.dataset, "on_disk", False) else DataLoader
        for item in load(self.dataset, batch_sampler=sampler):
            x0, *labels = item if isinstance(item, (tuple, list)) else (item,)
            x0 = x0.to(self.device, torch.float32)
            if self.recipe.flips:
                examples = torch.arange(first, first + part, device=self.device)
                flip = first_words(examples, seed=self.recipe.seed, stream=Stream.FLIP) >> 31 == 1
                x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
            yield x0, None if self.model.config.num_classes is None else labels[0].to(self.device), first
            first += part

    def _optimizer_step(self, batches: Iterator) -> tuple[float, float]:
        """Take one optimizer step; return the loss and the gradient's norm before clipping."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step, self.total)
        mean_loss = 0.0
        for _ in range(recipe.accumulate):
            x0, labels, first = next(batches)
            if self.model.config.dropout:
                word = first_words(torch.tensor([first]), seed=recipe.seed, stream=Stream.DROPOUT)
                torch.manual_seed(int(word))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                loss = training_loss(
                    self.model, x0, objective=recipe.objective, class_labels=labels, seed=recipe.seed, first=first
                )
            (loss / recipe.accumulate).backward()
            mean_loss += loss.item() / recipe.accumulate
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip).item()
        if not math.isfinite(mean_loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step}: loss {mean_loss}, gradient norm {norm}; the checkpoint in {self.out} is from an earlier "
                "step. Try a lower lr or float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages, values = list(self.ema.values()), list(self.model.state_dict().values())
            torch._foreach_lerp_(averages, values, 1 - recipe.ema_decay(self.step))
        self.step += 1
        return mean_loss, norm

    def stop(self) -> None:
        """Make `run` save and return after the current step, as Ctrl-C does. Any thread may call it."""
        self._stop_requested = True

    def run(self, progress: bool | None = None) -> bool:
        """Train to the last step; write checkpoints, logs and sample grids to the run's folder.

        Args:
            progress: whether to show a progress bar. Default: on a terminal or in a notebook.

        Returns:
            True after the last step; False if Ctrl-C or `stop` ended the run early. The run is saved in both cases.

        Raises:
            TrainingError: the loss or the gradient's norm is not finite.
            DataError: an image cannot be read. The run is saved.
        """
        recipe, batches = self.recipe, self.batches()
        self.out.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(progress, total=self.total, initial=self.step, unit="step", smoothing=0.05)
        losses, norms, began = [], [], time.perf_counter()
        with _StopOnSignal(self), bar, contextlib.closing(batches):  # closing ends the worker processes
            while self.step < self.total and not self._stop_requested:
                try:
                    loss, norm = self._optimizer_step(batches)
                except DataError as error:
                    self.save()  # the step has not changed the network yet
                    raise DataError(f"data: {error} (the run is saved at step {self.step})") from None
                except RuntimeError:
                    if self._stop_requested:  # the signal has also ended the worker processes
                        break
                    raise
                losses.append(loss)
                norms.append(norm)
                bar.update()
                if self._is_due(recipe.log_every):
                    seconds = time.perf_counter() - began
                    loss, rate = sum(losses) / len(losses), len(losses) * recipe.batch_size / seconds
                    self.log.append(self._log_entry(loss, sum(norms) / len(norms), rate, seconds))
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.0f}")
                    losses, norms, began = [], [], time.perf_counter()
                if self._is_due(recipe.save_every):
                    self.save()
                if self._is_due(recipe.sample_every):
                    paused = time.perf_counter()
                    self.draw_grid(progress)
                    began += time.perf_counter() - paused
        if self._stop_requested:
            self.save()
        return not self._stop_requested

    def _is_due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`, or the last step; `every` = 0 means never."""
        return every > 0 and (self.step % every == 0 or self.step == self.total)

    def _log_entry(self, loss: float, norm: float, rate: float, seconds: float) -> dict[str, object]:
        return {
            "step": self.step,
            "images": self.step * self.recipe.batch_size,
            "loss": f"{loss:.9g}",
            "grad_norm": f"{norm:.9g}",
            "lr": f"{self.optimizer.param_groups[0]['lr']:.6g}",
            "images_per_second": f"{rate:.1f}",
            "seconds": f"{seconds:.2f}",
        }


def _read_log(path: Path, step: int) -> list[dict[str, object]]:
    """Return the entries of the log up to `step`; a missing log is empty."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            log = list(csv.DictReader(file))
        faulty = next(
            (i for i, entry in enumerate(log) if entry.keys() != set(COLUMNS) or None in entry.values()), None
        )
        if faulty is not None:
            raise ValueError(f"row {faulty + 1} does not have the columns {', '.join(COLUMNS)}")
        return [entry for entry in log if int(entry["step"]) <= step]
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise TrainingError(f"out: {path} is damaged ({error}); move it away to continue with a new log") from error


class _StopOnSignal:
    """A context in which Ctrl-C and SIGTERM stop and save the run after the current step. A second signal stops at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous_handlers: dict[int, object] = {}

    def _handle(self, number: int, _: object) -> None:
        if self.trainer._stop_requested:
            raise KeyboardInterrupt
        self.trainer.stop()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only in this thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous_handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
