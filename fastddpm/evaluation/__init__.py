"""Evaluation of models: the variational bound, FID and KID."""

import importlib
from typing import TYPE_CHECKING

from ..errors import EvaluationError, LikelihoodError
from .likelihood import Likelihood, RateDistortion

if TYPE_CHECKING:
    from .api import Result, evaluate
    from .features import Features, inception
    from .samples import draw

_MODULES = {"Features": "features", "Result": "api", "draw": "samples", "evaluate": "api", "inception": "features"}
__all__ = [
    "EvaluationError",
    "Features",
    "Likelihood",
    "LikelihoodError",
    "RateDistortion",
    "Result",
    "draw",
    "evaluate",
    "inception",
]


def __getattr__(name: str) -> object:
    """Import the modules that measure samples on first use: `import fastddpm` needs only the likelihood."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
