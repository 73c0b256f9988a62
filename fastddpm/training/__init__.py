"""Training: the loss, and whole runs."""

import importlib
from typing import TYPE_CHECKING

from ..errors import TrainingError
from .loss import training_loss

if TYPE_CHECKING:
    from .trainer import RECIPES, Recipe, Trainer, network_for

_TRAINER = ("RECIPES", "Recipe", "Trainer", "network_for")
__all__ = ["RECIPES", "Recipe", "Trainer", "TrainingError", "network_for", "training_loss"]


def __getattr__(name: str) -> object:
    """Import a run's classes when they are first used: `import fastddpm` needs the loss alone."""
    if name in _TRAINER:
        return getattr(importlib.import_module(".trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
