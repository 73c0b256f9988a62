"""fastddpm: exact denoising diffusion (Ho, Jain & Abbeel 2020), as fast as the hardware allows."""

import importlib
from typing import TYPE_CHECKING

from . import backend, ops
from .diffusion.schedule import Schedule
from .evaluation.likelihood import likelihood, rate_distortion
from .integrations.fuse_norms import fuse_norms
from .models.config import UNetConfig
from .models.unet import UNet
from .sampling.api import sample
from .sampling.trajectories import encode, interpolate, progressive
from .training.loss import training_loss

if TYPE_CHECKING:
    from .images import to_pil, to_uint8

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


def __getattr__(name: str) -> object:
    """Import Pillow on first use: it would take a quarter of the time of `import fastddpm`."""
    if name in ("images", "to_pil", "to_uint8"):
        images = importlib.import_module(".images", __name__)
        return images if name == "images" else getattr(images, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
