"""fastddpm: denoising diffusion (Ho, Jain & Abbeel 2020), as fast as the hardware allows, exactly."""

from . import backend, ops
from .chains import encode, interpolate, progressive
from .coding import likelihood, rate_distortion
from .diffusion import training_loss
from .fused_norms import fuse_norms
from .images import to_pil, to_uint8
from .sampling import sample
from .schedule import Schedule
from .unet import UNet, UNetConfig

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
