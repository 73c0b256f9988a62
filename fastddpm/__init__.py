"""fastddpm: denoising diffusion (Ho, Jain & Abbeel 2020), as fast as the hardware allows, exactly."""

from . import backend, ops
from .chains import encode, interpolate, progressive
from .diffusion import training_loss
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
    "interpolate",
    "ops",
    "progressive",
    "sample",
    "to_pil",
    "to_uint8",
    "training_loss",
]
