"""fastddpm: denoising diffusion (Ho, Jain & Abbeel 2020), as fast as the hardware allows, exactly."""

from . import backend, ops
from .diffusion.schedule import Schedule
from .evaluation.likelihood import likelihood, rate_distortion
from .images import to_pil, to_uint8
from .integrations.fuse_norms import fuse_norms
from .models.config import UNetConfig
from .models.unet import UNet
from .sampling.api import sample
from .sampling.trajectories import encode, interpolate, progressive
from .training.loss import training_loss

__version__ = "0.1.0"
__all__ = [
    "Schedule",
    "UNet",
    "UNetConfig",
    "backend",
    "encode",
    "fuse_norms",
    "interpolate",
    "likelihood",
    "ops",
    "progressive",
    "rate_distortion",
    "sample",
    "to_pil",
    "to_uint8",
    "training_loss",
]
