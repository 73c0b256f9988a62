"""Exceptions that callers of this package may receive.

An invalid argument raises ValueError or TypeError, as elsewhere in Python.
"""

from __future__ import annotations


class FastddpmError(Exception):
    """Base class of the exceptions below."""


class BackendError(FastddpmError, RuntimeError):
    """The chosen backend does not support this call."""


class CheckpointError(FastddpmError, ValueError):
    """A checkpoint cannot be read. The message names the file and the reason."""


class DataError(FastddpmError, ValueError):
    """Images cannot be used. The message names the file and the reason."""


class EvaluationError(FastddpmError, ValueError):
    """An evaluation cannot start or continue. The message gives the reason and a remedy."""


class LikelihoodError(FastddpmError, RuntimeError):
    """The model's output cannot be used. The message gives the timestep and the reason."""


class SamplingError(FastddpmError, RuntimeError):
    """The chain cannot continue. The message gives the step, the timestep and the model's output."""


class TrainingError(FastddpmError, ValueError):
    """A run cannot start or continue. The message gives the reason and a remedy."""
