"""Sampling, and other uses of a chain: encoding, interpolation and progressive generation."""

from ..errors import SamplingError
from .api import sample
from .loop import StepState
from .trajectories import encode, interpolate, progressive

__all__ = ["SamplingError", "StepState", "encode", "interpolate", "progressive", "sample"]
