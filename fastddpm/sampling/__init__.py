"""`sample` and what else a chain can do."""

from ..errors import SamplingError
from .api import sample
from .loop import StepState
from .trajectories import encode, interpolate, progressive

__all__ = ["SamplingError", "StepState", "encode", "interpolate", "progressive", "sample"]
