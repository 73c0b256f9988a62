"""Which model the files of an evaluation belong to: its weights and options, and what it returns for some noise."""

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
# Share of an output's magnitude: three times the error of bfloat16. TF32's is far smaller, two networks' difference far larger.
PROBE_TOLERANCE = 0.02
FIELDS_ADDED_LATER = list(itertools.dropwhile(lambda field: field.name != "norm_eps", dataclasses.fields(UNetConfig)))


# ----------------------------------------------------------------------------------------------------- settings


def model_identity(model: ResolvedModel, dtype: torch.dtype | None) -> dict:
    """Return what identifies a model, for JSON. A bare callable has no weights: only its probe tells it from another."""
    network = model.network
    is_module = isinstance(network, nn.Module)
    own_dtype = next((p.dtype for p in network.parameters()), torch.float32) if is_module else torch.float32
    config = {} if model.unet is None else dataclasses.asdict(model.unet.config)
    for field in FIELDS_ADDED_LATER:  # defaults are left out, so that folders from before these fields stay valid
        if config.get(field.name) == field.default:
            config.pop(field.name, None)
    # Folders are named after a hash of these entries, so that they keep the names that fields had before.
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
    """Print numbers for a checksum, rounded: their last digits may differ between machines."""
    return " ".join(f"{value:.5e}" for value in values.flatten().tolist())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- probe


def labels_in_turn(model: ResolvedModel, label: int | None, span: range) -> torch.Tensor | int | None:
    """Return the labels of the images of `span`: `label`, or for a network with classes image number mod classes."""
    if label is not None or model.num_classes is None:
        return label
    return torch.arange(span.start, span.stop) % model.num_classes


def probe_outputs(model: ResolvedModel, shape, device, dtype, label: int | None = None) -> np.ndarray:
    """Return the model's outputs for noise at two of its T timesteps, [values, channels].

    T - 1 is not one of them: every good network returns the noise itself there.
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
    return np.nan_to_num(torch.cat(outputs).T.cpu().numpy())  # a NaN for noise needn't mean that the chain has one


class Probe:
    """A network's outputs for some noise, stored beside what was computed with it.

    They tell two networks apart whose names and weights are the same, or which have none.

    Args:
        folder: the folder of the file.
        outputs: [values, groups]; each group has a magnitude of its own.
        message: the error's message if the folder holds another network's outputs.
    """

    def __init__(self, folder: Path, outputs: np.ndarray, message: str) -> None:
        self.path, self.outputs, self.message = folder / PROBE, outputs, message

    def check(self) -> None:
        """Raise EvaluationError if the folder holds another network's outputs."""
        if not self.path.is_file():
            return
        (stored,) = load_arrays(self.path, ...)
        scale = np.abs(self.outputs).max(0)
        # A group that is nearly 0 has the rounding errors of the others that it is computed from.
        scale = np.maximum(scale, np.quantile(scale, 0.5, method="lower") / 10)
        if stored.shape != self.outputs.shape or not (np.abs(stored - self.outputs) <= PROBE_TOLERANCE * scale).all():
            raise EvaluationError(self.message)

    def save(self) -> None:
        """Write the outputs unless the folder has some; raise EvaluationError if those are another network's."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_if_missing(self.path, lambda temporary: np.save(temporary, self.outputs))
        self.check()
