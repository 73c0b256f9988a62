"""Tensors and options that travel together to the kernels, the compiled ones and Triton's."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """What a norm does with x. weight and bias are [C]; add, scale and shift [C], [N, C] or None."""

    num_groups: int
    weight: torch.Tensor
    bias: torch.Tensor
    add: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    silu: bool


class StepOperands(NamedTuple):
    """The tensors that a step's kernel reads and writes: x, x_prev, x0_last, x0 and noise share one of the kernels' layouts."""

    x: torch.Tensor
    x_prev: torch.Tensor
    o: torch.Tensor
    x0_last: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    next_input: torch.Tensor | None = None
    noise: torch.Tensor | None = None
