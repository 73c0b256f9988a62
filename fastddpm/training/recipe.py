"""Hyperparameters of training runs, including those of the paper (Ho et al. 2020, appendix B)."""

from __future__ import annotations

import dataclasses

from ..errors import TrainingError
from ..utils.validation import check_choice
from .loss import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run. Defaults are the paper's for CIFAR-10 (Ho et al. 2020, appendix B).

    Args:
        steps: number of optimizer steps; None means int(epochs * examples) // batch_size, at least 1.
        epochs: passes over the data, instead of `steps`.
        batch_size: examples per optimizer step.
        accumulate: number of equal parts that each batch is computed in.
        lr: learning rate after the warm-up.
        warmup: steps of linear growth of the learning rate at the start.
        cooldown: steps of linear decay of the learning rate to 0 at the end; 0 means no decay, as in the paper.
        ema: decay of the averaged weights, in [0, 1).
        ema_warmup: whether the decay at step k is min(ema, (1 + k) / (10 + k)), for short runs.
        grad_clip: upper bound on the gradient's norm.
        flips: whether to mirror each image with probability 1/2.
        dtype: "float32", or "bfloat16" for autocast.
        seed: seed of weights, data order, timesteps and noise.
        log_every: steps between rows of log.csv.
        sample_every: steps between sample grids; 0 means no grids.
        save_every: steps between checkpoints.
        objective: "simple" for L_simple (eq. 14), the mean squared error of the prediction, or "bound" for the
            variational bound L (eq. 5).

    Raises:
        TrainingError: an argument is out of range.
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
        check_choice("objective", self.objective, OBJECTIVES, TrainingError)
        for name in ("batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}: got {getattr(self, name)}; expected at least 1")
        if self.batch_size % self.accumulate:
            raise TrainingError(
                f"accumulate: got {self.accumulate}; batch_size {self.batch_size} cannot be split into so many equal parts"
            )
        if (self.steps is None) == (self.epochs is None):
            raise TrainingError(f"steps, epochs: got {self.steps} and {self.epochs}; expected exactly one of them")
        if (self.steps or self.epochs) <= 0:
            raise TrainingError(f"steps, epochs: got {self.steps or self.epochs}; expected a positive number")
        if not self.lr > 0 or not 0 <= self.ema < 1 or not self.grad_clip > 0 or min(self.warmup, self.cooldown) < 0:
            raise TrainingError(
                f"lr {self.lr}, ema {self.ema}, grad_clip {self.grad_clip}, warmup {self.warmup}, cooldown {self.cooldown}: "
                "expected lr > 0, 0 <= ema < 1, grad_clip > 0, warmup >= 0 and cooldown >= 0"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise TrainingError(f"dtype: got {self.dtype!r}; expected float32 or bfloat16")

    def total_steps(self, examples: int) -> int:
        """Return the number of optimizer steps of a run on this many examples."""
        return self.steps if self.steps is not None else max(1, int(self.epochs * examples) // self.batch_size)

    def learning_rate(self, step: int, total: int) -> float:
        """Return the learning rate of `step` in 0..total-1."""
        return self.lr * min(1.0, (step + 1) / max(self.warmup, 1), (total - step) / max(self.cooldown, 1))

    def ema_decay(self, step: int) -> float:
        """Return the decay of the averaged weights after `step`."""
        return min(self.ema, (1 + step) / (10 + step)) if self.ema_warmup else self.ema


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
