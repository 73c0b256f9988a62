"""Networks whose features represent images in FID and KID: Inception, or the caller's own."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..errors import EvaluationError
from ..inputs.arguments import device_of

BATCH_SIZE = 50  # images in one pass of the network


class Features:
    """A network whose features represent images in FID and KID. Calling it maps uint8 [N, C, H, W] to floats [N, D] on the
    CPU.

    Args:
        network: a module in eval mode, or any callable, that returns floats [N, D] for uint8 images [N, C, H, W]. A
            module receives images on its parameters' device, and a callable receives them on the CPU.
        name: name of the network, shown in the name of a metric. Only `inception` gives metrics named FID and KID.

    Raises:
        ValueError: `network` is not callable, or is a module in training mode.
    """

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
        if not callable(network) or isinstance(network, type):
            raise ValueError(f"features: got {network!r}; expected a callable, uint8 [N, C, H, W] -> float [N, D]")
        module = isinstance(network, nn.Module)
        if module and network.training:
            raise ValueError(f"features: {name} is in training mode; call its eval() first")
        self.network, self.name = network, name
        self.device = device_of(network, None)
        self.checksum = checksum(network) if module else None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of uint8 images [N, C, H, W]: float64 [N, D] if the network returns float64, else float32."""
        with torch.inference_mode():
            return torch.cat([self._batch(batch) for batch in pixels.split(BATCH_SIZE)])

    def _batch(self, pixels: torch.Tensor) -> torch.Tensor:
        out = self.network(pixels.to(self.device))
        if (
            not isinstance(out, torch.Tensor)
            or not out.is_floating_point()
            or out.dim() != 2
            or len(out) != len(pixels)
        ):
            what = f"{out.dtype} {list(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"features: {self.name} returned {what} for uint8 {list(pixels.shape)}; expected floats [{len(pixels)}, D]"
            )
        if not out.isfinite().all():
            raise ValueError(f"features: {self.name} returned a NaN or an infinity")
        return out.cpu() if out.dtype == torch.float64 else out.float().cpu()

    def title(self, metric: str) -> str:
        """Return the name of the metric "fid" or "kid" with these features."""
        return f"{'Fréchet' if metric == 'fid' else 'kernel'} distance ({self.name} features)"


class _Inception(Features):
    def title(self, metric: str) -> str:
        return metric.upper()


class _Pooled(nn.Module):
    """torch-fidelity's network, for grey images too, with a tensor instead of a tuple as output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"features: got images of {pixels.shape[1]} channels; expected 1 or 3, as Inception requires"
            )
        return self.network(pixels.expand(-1, 3, -1, -1))[0]


def inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Features:
    """Return the 2048 pooled features of the Inception-v3 network of FID, as implemented by torch-fidelity.

    The weights and the resizing are TensorFlow's.

    Args:
        weights: path of a local copy of the weights' file. Default: torch-fidelity downloads it once.
        device: device of the computation.

    Returns:
        A `Features`.

    Raises:
        EvaluationError: torch-fidelity is not installed, or the weights cannot be downloaded or read.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library
    except ImportError as error:
        raise EvaluationError(
            f'features: Inception needs torch-fidelity ({error}): pip install "fastddpm[evaluate]", or pass a network of your own'
        ) from error
    except RuntimeError as error:  # raised by a torchvision built for another torch
        raise EvaluationError(
            f"features: torchvision, which torch-fidelity needs, doesn't fit this torch ({error}); install the two "
            "from one index, or pass a network of your own"
        ) from error
    source = library.URL_INCEPTION_V3
    if weights is not None:
        try:  # torch-fidelity would unpickle arbitrary objects
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except OSError as error:
            raise EvaluationError(f"inception weights: {weights}: not readable ({error}); expected {source}") from error
        except (RuntimeError, EOFError, pickle.UnpicklingError):  # their messages suggest weights_only=False
            state = None
        if not isinstance(state, dict):
            raise EvaluationError(f"inception weights: {weights}: not a file of weights; expected {source}")
        weights = str(weights)
    try:
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
        )
    except OSError as error:  # the base class of urllib's errors
        raise EvaluationError(
            f"features: Inception's weights could not be downloaded ({error}); download {source} elsewhere, and pass "
            "the file as --inception-weights or, in Python, inception(weights=...)"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        what, do = f"{weights}: not this network's", f"expected {source}"
        if weights is None:
            what = f"{Path(torch.hub.get_dir(), 'checkpoints', Path(source).name)}: damaged"
            do = f"delete it; the next call downloads it again from {source}"
        raise EvaluationError(f"inception weights: {what} ({str(error).partition(chr(10))[0]}); {do}") from error
    return _Inception(_Pooled(network).to(device).eval(), "Inception")


def import_features(spec: str, device: torch.device | str = "cpu") -> Features:
    """Import "PACKAGE.MODULE:NAME", a callable, an nn.Module or a subclass; the working directory is searched too."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(f"features: got {spec!r}; expected PACKAGE.MODULE:NAME")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; not removed, as the module may import others later
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"features: {module} cannot be imported from here ({error})") from error
    if not hasattr(imported, name):
        raise ValueError(f"features: {module} has no {name}")
    network = getattr(imported, name)
    if isinstance(network, type):
        try:
            network = network()
        except TypeError as error:
            raise ValueError(
                f"features: {spec} cannot be constructed without arguments ({error}); name an instance"
            ) from error
    if isinstance(network, nn.Module):
        network = network.to(device).eval()
    return Features(network, spec)


def checksum(module: nn.Module) -> str:
    """Return the SHA-256 of the module's state dict: names, dtypes, shapes and values, and the repr of any extra state."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            # Remove addresses, which differ between processes.
            total.update(f"{name} {re.sub(' at 0x[0-9a-fA-F]+', '', repr(value))}".encode())
            continue
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
