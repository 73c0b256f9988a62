"""Training by the paper's recipe (Ho et al. 2020, algorithm 1 and appendix B), resumable to the bit.

A run is a folder: config.json and model.safetensors (the EMA weights, what `fastddpm.sample` loads), checkpoint.pt (all that
is needed to go on), log.csv and samples/. Every draw follows the RNG contract: example number d of the run has its timestep,
noise and flip from (seed, d) alone, and its image from epoch d // N's permutation, so an interrupted run goes on as if unbroken:
on a GPU to the bit only in torch's deterministic mode.
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
from ..data import Images, decoded
from ..diffusion.coefficients import PREDICTIONS
from ..errors import DataError, TrainingError
from ..models.config import PRESETS, UNetConfig
from ..models.unet import UNet
from ..ops.philox_normal import first_words
from ..ops.rng import Stream
from ..sampling.api import sample
from ..utils.files import whole
from ..utils.progress import bar as progress_bar
from ..utils.validation import check_range
from ..utils.warn import warn_once
from .loss import OBJECTIVES, training_loss

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"
VARIANCES = ("fixed_large", "fixed_small")  # those that need no training
GRID, MOST_ROWS = (4, 4), 10  # of a run's grids: rows and columns, and the most rows where each is a class
COLUMNS = ("step", "images", "loss", "grad_norm", "lr", "images_per_second", "seconds")


def _check(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainingError(f"{name}: got {value!r}; expected one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's for CIFAR-10.

    steps: optimizer steps; None: epochs * examples // batch_size. batch_size: examples per optimizer step, taken in
    `accumulate` equal parts. warmup: steps of linear learning-rate growth at the start; cooldown: of linear decay to 0 at the
    end (0: none, as in the paper). ema: decay of the averaged weights; with ema_warmup
    min(ema, (1 + k) / (10 + k)) at step k, for short runs. dtype: "float32", or "bfloat16" for autocast arithmetic.
    log_every, sample_every, save_every: in steps; sample_every 0 draws no grids. objective: "simple", the mean squared error
    of the prediction (for epsilon L_simple, eq. 14), or "bound", the variational bound (L, eq. 5).
    """

    steps: int | None = 800_000
    epochs: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 5000
    cooldown: int = 0
    ema: float = 0.9999
    ema_warmup: bool = False
    grad_clip: float = 1.0
    flips: bool = True
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 100
    sample_every: int = 20_000
    save_every: int = 1000
    objective: str = "simple"

    def __post_init__(self) -> None:
        _check("objective", self.objective, OBJECTIVES)
        for name in ("batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.batch_size % self.accumulate:
            raise TrainingError(
                f"accumulate: batch_size {self.batch_size} cannot be taken in {self.accumulate} equal parts"
            )
        if (self.steps is None) == (self.epochs is None):
            raise TrainingError(f"steps, epochs: got {self.steps} and {self.epochs}; expected exactly one of them")
        if (self.steps or self.epochs) <= 0:
            raise TrainingError(f"steps, epochs: got {self.steps or self.epochs}; expected a positive number")
        if not self.lr > 0 or not 0 <= self.ema < 1 or not self.grad_clip > 0 or min(self.warmup, self.cooldown) < 0:
            raise TrainingError(
                f"lr {self.lr}, ema {self.ema}, grad_clip {self.grad_clip}, warmup {self.warmup}, cooldown {self.cooldown}: "
                "expected lr > 0, 0 <= ema < 1, grad_clip > 0 and the others >= 0"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise TrainingError(f"dtype: got {self.dtype!r}; expected float32 or bfloat16")

    def total_steps(self, examples: int) -> int:
        return self.steps if self.steps is not None else max(1, int(self.epochs * examples) // self.batch_size)


RECIPES = {
    "digits": Recipe(
        steps=None,
        epochs=20,
        batch_size=64,
        lr=1e-3,
        warmup=200,
        cooldown=9000,
        ema=0.9995,
        ema_warmup=True,
        flips=False,
        log_every=50,
        sample_every=3000,
        save_every=250,
    ),
    "cifar10": Recipe(),
}


class Draws(Sampler[list[int]]):
    """Image indices of draws start, start+1, ... in lists of `size`: consecutive seeded permutations, without end."""

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
    """The preset's network for the data set's channels and size (sides rounded up to what the levels can halve)."""
    image = _image_of(dataset[0])
    channels, height, width = image.shape
    config = PRESETS[preset]
    multiple = 1 << (len(config.multipliers) - 1)
    side = math.ceil(max(height, width) / multiple) * multiple
    # Attention stays at the same depth when the side differs from the preset's.
    attention = tuple(a * side // config.sample_size for a in config.attention)
    return dataclasses.replace(
        config, in_channels=channels, out_channels=channels, sample_size=side, attention=attention, classes=classes
    )


def _digest(dataset: Images) -> str:
    labels = b"" if dataset.labels is None else dataset.labels.numpy().tobytes()
    return hashlib.sha256(dataset.digest().encode() + labels).hexdigest()


def _image_of(item: object) -> torch.Tensor:
    return item[0] if isinstance(item, (tuple, list)) else item


class Trainer:
    """One run: a network, its average, the optimizer and the number of steps taken.

    prediction: what the network learns to answer, "epsilon", "sample", "v_prediction" or "mean". variance: what the bound is
    of and what the network will sample with, "fixed_large" or "fixed_small". Raises TrainingError on what does not fit.
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
        _check("prediction", prediction, PREDICTIONS)
        _check("variance", variance, VARIANCES)
        if isinstance(dataset, IterableDataset):
            raise TrainingError(
                f"data: {type(dataset).__name__} is an IterableDataset; a run draws its images by number, in an order that "
                "follows from the seed: expected a map-style Dataset, with __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise TrainingError("data: the data set is empty")
        if isinstance(dataset, Images):
            dataset = dataset.pad_to(config.sample_size)
        self.dataset, self.out, self.recipe, self.device = dataset, Path(out), recipe, device
        expected = [config.in_channels, config.sample_size, config.sample_size]
        got = list(_image_of(dataset[0]).shape)
        if got != expected:
            raise TrainingError(f"data: images of shape {got}; the network takes {expected}")
        if not isinstance(dataset, Images):
            check_range("data: image 0", torch.as_tensor(_image_of(dataset[0])))
        if config.classes is not None and not isinstance(dataset[0], (tuple, list)):
            raise TrainingError(
                f"data: no labels in it, and the network has {config.classes} classes (--labels reads them)"
            )
        if recipe.dtype == "bfloat16" and (reason := backend.emulated_reason(device, torch.bfloat16)):
            warn_once(self, f"{reason}, so training is many times slower than with dtype float32")
        torch.manual_seed(recipe.seed)
        names = getattr(dataset, "class_names", None) if config.classes is not None else None
        model = UNet(config, prediction=prediction, variance=variance, class_names=names)
        model = model.to(device, memory_format=torch.channels_last)
        self.model = model.train()
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, eps=1e-8)
        self.digest = _digest(dataset) if isinstance(dataset, Images) else None
        self.step = 0
        self.total = recipe.total_steps(len(dataset))
        self.rows: list[dict[str, object]] = []
        self._interrupted = False

    # ---------------------------------------------------------------------------------- a run's folder

    @classmethod
    def resume(cls, dataset: Dataset, out: str | Path, device: torch.device, **changes: object) -> Trainer:
        """The run in `out`, where its checkpoint left it. changes: of the recipe's length only (steps, epochs)."""
        path = Path(out) / CHECKPOINT
        if not path.is_file():
            raise TrainingError(f"out: {path} does not exist; there is nothing to resume")
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            recipe = Recipe(**{**saved["recipe"], **changes})
            config = UNetConfig(**saved["unet"])
            # Runs begun before there was a choice have neither.
            trained_for = {name: saved[name] for name in ("prediction", "variance") if name in saved}
        except TrainingError:
            raise
        except Exception as error:  # torch.load raises many kinds
            raise TrainingError(f"out: {path} is not a whole training checkpoint ({error})") from error
        if saved["examples"] != len(dataset):
            raise TrainingError(f"data: {len(dataset)} images, but the run in {out} began with {saved['examples']}")
        # Runs of earlier versions have no digest, nor have data sets that fastddpm.data has not loaded.
        began_with = saved.get("digest")
        if (
            began_with is not None
            and isinstance(dataset, Images)
            and _digest(dataset.pad_to(config.sample_size)) != began_with
        ):
            raise TrainingError(
                f"data: {len(dataset)} images, as many as the run in {out} began with, but other ones, or other labels, or read "
                "with other options; pass what it began with, or start another run"
            )
        self = cls(dataset, out, config, recipe, device, **trained_for)
        fastddpm_folder.load_state(self.model, saved["model"], path)
        self.ema = saved["ema"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.rows = _read_log(self.out / LOG, self.step)
        return self

    def save(self) -> None:
        """The whole run to its folder; each file appears whole or not at all."""
        self.out.mkdir(parents=True, exist_ok=True)
        with whole(self.out / CHECKPOINT) as path:
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
        fastddpm_folder.save(self.model, self.out, state=self.ema, extra={"training": training})
        with whole(self.out / LOG) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def averaged(self) -> UNet:
        """A copy of the network with the EMA weights, in eval mode."""
        own = self.model
        model = UNet(own.config, prediction=own.prediction, variance=own.variance, class_names=own.class_names)
        model = model.to(self.device, memory_format=torch.channels_last)
        model.load_state_dict(self.ema)
        return model.eval()

    def draw_grid(self, progress: bool | None) -> None:
        """Samples of the averaged network to samples/; of one with classes, each row is a class, of many a part of them."""
        (rows, columns), classes, labels = GRID, self.model.config.classes, None
        if classes is not None:
            rows = min(classes, MOST_ROWS)
            labels = torch.linspace(0, classes - 1, rows).round().long().repeat_interleave(columns)
        drawn = sample(self.averaged(), rows * columns, class_labels=labels, seed=0, progress=progress)
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        images.save(images.grid(drawn, columns), folder / f"{self.step:07d}.png")

    # ------------------------------------------------------------------------------------------ the loop

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
        """(x0, class labels, number of the first draw) from the next draw on, one item per forward pass."""
        part = self.recipe.batch_size // self.recipe.accumulate
        first = self.step * self.recipe.batch_size
        draws = Draws(len(self.dataset), part, self.recipe.seed, first)
        load = decoded if getattr(self.dataset, "on_disk", False) else DataLoader
        for item in load(self.dataset, batch_sampler=draws):
            x0, *labels = item if isinstance(item, (tuple, list)) else (item,)
            x0 = x0.to(self.device, torch.float32)
            if self.recipe.flips:
                draws = torch.arange(first, first + part, device=self.device)
                flip = first_words(draws, seed=self.recipe.seed, stream=Stream.FLIP) >> 31 == 1
                x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
            yield x0, None if self.model.config.classes is None else labels[0].to(self.device), first
            first += part

    def _optimize(self, batches: Iterator) -> tuple[float, float]:
        """One optimizer step: (loss, gradient norm before clipping)."""
        recipe = self.recipe
        rate = recipe.lr * min(
            1.0, (self.step + 1) / max(recipe.warmup, 1), (self.total - self.step) / max(recipe.cooldown, 1)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
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
            total += loss.item() / recipe.accumulate
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step}: loss {total}, gradient norm {norm}; the checkpoint in {self.out} is from before. "
                "Try a lower lr or float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = recipe.ema
        if recipe.ema_warmup:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            average, current = list(self.ema.values()), list(self.model.state_dict().values())
            torch._foreach_lerp_(average, current, 1 - decay)
        self.step += 1
        return total, norm

    def stop(self) -> None:
        """Ask `run` to end after the current step, as Ctrl-C does; from any thread."""
        self._interrupted = True

    def run(self, progress: bool | None = None) -> bool:
        """Train to the last step, saving as it goes; False if Ctrl-C or `stop` ended it early (the state is saved then too)."""
        recipe, batches = self.recipe, self.batches()
        self.out.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(progress, total=self.total, initial=self.step, unit="step", smoothing=0.05)
        losses, norms, since = [], [], time.perf_counter()
        with _stop_signals(self), bar, contextlib.closing(batches):  # which ends its worker processes
            while self.step < self.total and not self._interrupted:
                try:
                    loss, norm = self._optimize(batches)
                except DataError as error:
                    self.save()  # the step has changed nothing yet
                    raise DataError(f"data: {error} (the run is saved at step {self.step})") from None
                except RuntimeError:
                    if self._interrupted:  # what stopped this process has ended its worker processes
                        break
                    raise
                losses.append(loss)
                norms.append(norm)
                bar.update()
                if self.step % recipe.log_every == 0 or self.step == self.total:
                    seconds = time.perf_counter() - since
                    rate = len(losses) * recipe.batch_size / seconds
                    mean = sum(losses) / len(losses)
                    self._log(mean, sum(norms) / len(norms), rate, seconds)
                    bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.0f}")
                    losses, norms, since = [], [], time.perf_counter()
                if self.step % recipe.save_every == 0 or self.step == self.total:
                    self.save()
                if recipe.sample_every and (self.step % recipe.sample_every == 0 or self.step == self.total):
                    paused = time.perf_counter()
                    self.draw_grid(progress)
                    since += time.perf_counter() - paused
        if self._interrupted:
            self.save()
        return not self._interrupted

    def _log(self, loss: float, norm: float, rate: float, seconds: float) -> None:
        self.rows.append(
            {
                "step": self.step,
                "images": self.step * self.recipe.batch_size,
                "loss": f"{loss:.9g}",
                "grad_norm": f"{norm:.9g}",
                "lr": f"{self.optimizer.param_groups[0]['lr']:.6g}",
                "images_per_second": f"{rate:.1f}",
                "seconds": f"{seconds:.2f}",
            }
        )


def _read_log(path: Path, step: int) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        faulty = next((i for i, row in enumerate(rows) if row.keys() != set(COLUMNS) or None in row.values()), None)
        if faulty is not None:
            raise ValueError(f"row {faulty + 1} does not have the columns {', '.join(COLUMNS)}")
        return [row for row in rows if int(row["step"]) <= step]
    except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise TrainingError(f"out: {path} is damaged ({error}); move it away to go on with a new log") from error


class _stop_signals:
    """Ctrl-C asks the run to stop after the current step, so that what is saved is whole; a second one stops at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.previous: dict[int, object] = {}

    def _ask(self, number: int, _: object) -> None:
        if self.trainer._interrupted:
            raise KeyboardInterrupt
        self.trainer.stop()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
