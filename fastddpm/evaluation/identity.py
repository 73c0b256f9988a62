"""Identification of the model that an evaluation's files belong to, by its weights, its options and its output for noise."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import ops
from ..engine.cache import acquire_runner
from ..errors import EvaluationError
from ..inputs.arguments import class_labels_of, device_of, output_fault
from ..inputs.resolve import ResolvedModel
from ..models.config import OLD_NAMES, UNetConfig
from ..ops.rng import Stream
from ..utils.files import write_if_missing
from .features import checksum
from .shards import load_arrays

PROBE = "probe.npy"
PROBE_IMAGES = 8  # images of noise
# Relative to an output's magnitude: three times bfloat16's error. TF32's error is far smaller; two networks differ far more.
PROBE_TOLERANCE = 0.02
FIELDS_ADDED_LATER = list(itertools.dropwhile(lambda field: field.name != "norm_eps", dataclasses.fields(UNetConfig)))


# ----------------------------------------------------------------------------------------------------- settings


def model_identity(model: ResolvedModel, dtype: torch.dtype | None) -> dict:
    """Return the entries that identify a model, for JSON. A bare callable has no weights and is identified by its probe."""
    network = model.network
    is_module = isinstance(network, nn.Module)
    own_dtype = next((p.dtype for p in network.parameters()), torch.float32) if is_module else torch.float32
    config = {} if model.unet is None else dataclasses.asdict(model.unet.config)
    for field in FIELDS_ADDED_LATER:  # omit defaults, so that folders written before these fields existed stay valid
        if config.get(field.name) == field.default:
            config.pop(field.name, None)
    # Folders are named after a hash of these entries, so the entries use the fields' old names.
    old_names = {new: old for old, new in OLD_NAMES.items()}
    config = {old_names.get(name, name): value for name, value in config.items()}
    return {
        "weights": checksum(network) if is_module else None,
        **{f"config.{k}": list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "dtype": str(dtype or own_dtype).removeprefix("torch."),
    }


def to_json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def to_digits(values: torch.Tensor) -> str:
    """Return numbers as text for a checksum, rounded, because their last digits may differ between machines."""
    return " ".join(f"{value:.5e}" for value in values.flatten().tolist())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- probe


def labels_in_turn(model: ResolvedModel, label: int | None, span: range) -> torch.Tensor | int | None:
    """Return `label`, or if it is None and the network has classes, the labels i mod classes of the images i of `span`."""
    if label is not None or model.num_classes is None:
        return label
    return torch.arange(span.start, span.stop) % model.num_classes


def probe_outputs(model: ResolvedModel, shape, device, dtype, label: int | None = None) -> np.ndarray:
    """Return the model's outputs for noise at two of its T timesteps, [values, channels].

    The timesteps are 0 and T // 2. T - 1 is not used because every good network returns the noise itself there.
    """
    device, T = device_of(model.network, device), len(model.settings.schedule)
    labels = class_labels_of(model, labels_in_turn(model, label, range(PROBE_IMAGES)), PROBE_IMAGES)
    labels = None if labels is None else labels.to(device)
    x = ops.philox_normal((PROBE_IMAGES, *shape), seed=0, t=0, stream=Stream.X_T, device=device)
    outputs = []
    with torch.inference_mode(False), torch.no_grad(), acquire_runner(model, device, dtype, tuple(x.shape)) as entry:
        runner = entry.runner
        for t in (0, T // 2):
            time_input = runner.time_inputs_per_image(torch.full((PROBE_IMAGES,), t, device=device))
            with runner.execution_context():
                o = runner.predict(x.to(runner.dtype, memory_format=runner.memory_format), time_input, labels)
            fault = output_fault(o, list(x.shape), learned=False)
            if fault is not None:
                raise EvaluationError(f"model: {fault}")
            outputs.append(o.float().transpose(0, 1).flatten(1))
    return np.nan_to_num(torch.cat(outputs).T.cpu().numpy())  # a NaN for this noise does not imply one in the chain


class Probe:
    """A network's outputs for fixed noise, stored with the files that were computed with the network.

    The outputs distinguish networks with the same name and weights, or without weights.

    Args:
        folder: folder of the file.
        outputs: [values, groups]; each group is compared on its own scale.
        message: message of the error if the folder holds another network's outputs.
    """

    def __init__(self, folder: Path, outputs: np.ndarray, message: str) -> None:
        self.path, self.outputs, self.message = folder / PROBE, outputs, message

    def check(self) -> None:
        """Raise EvaluationError if the folder holds another network's outputs."""
        if not self.path.is_file():
            return
        (stored,) = load_arrays(self.path, ...)
        scale = np.abs(self.outputs).max(0)
        # A group of values near 0 has rounding errors of the scale of the groups that it is computed from.
        scale = np.maximum(scale, np.quantile(scale, 0.5, method="lower") / 10)
        if stored.shape != self.outputs.shape or not (np.abs(stored - self.outputs) <= PROBE_TOLERANCE * scale).all():
            raise EvaluationError(self.message)

    def save(self) -> None:
        """Write the outputs if the folder has none, then `check`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_if_missing(self.path, lambda temporary: np.save(temporary, self.outputs))
        self.check()
