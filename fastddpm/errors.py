"""Exceptions that reach a caller of this package.

An argument that does not fit raises ValueError or TypeError, as everywhere in Python.
"""

from __future__ import annotations


class FastddpmError(Exception):
    """Base class of the exceptions below."""


class BackendError(FastddpmError, RuntimeError):
    """An explicitly chosen backend cannot serve this call."""


class CheckpointError(FastddpmError, ValueError):
    """A checkpoint cannot be read. The message names the file and says what is wrong with it."""


class DataError(FastddpmError, ValueError):
    """Images cannot be used. The message names the file and says what is wrong with it."""


class EvaluationError(FastddpmError, ValueError):
    """An evaluation cannot start or go on. The message says why, and what to do."""


class LikelihoodError(FastddpmError, RuntimeError):
    """The model's output cannot be used. The message says at which timestep, and why."""


class SamplingError(FastddpmError, RuntimeError):
    """The chain cannot go on. The message names the step and the timestep, and says what the model returned."""


class TrainingError(FastddpmError, ValueError):
    """A run cannot start or go on. The message says why, and what to do."""
