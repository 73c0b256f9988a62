"""Training: the loss, and complete runs."""

import importlib
from typing import TYPE_CHECKING

from ..errors import TrainingError
from .loss import training_loss

if TYPE_CHECKING:
    from .recipe import RECIPES, Recipe
    from .trainer import Trainer, network_for

_MODULES = {"RECIPES": "recipe", "Recipe": "recipe", "Trainer": "trainer", "network_for": "trainer"}
__all__ = ["RECIPES", "Recipe", "Trainer", "TrainingError", "network_for", "training_loss"]


def __getattr__(name: str) -> object:
    """Import the classes of a run on first use: `import fastddpm` needs only the loss."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
