"""Tuples of tensors and options that the ops pass to the compiled kernels and to the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """The operands of group_norm_silu besides x. weight and bias are [C]; add, scale and shift are [C], [N, C] or None."""

    num_groups: int
    weight: torch.Tensor
    bias: torch.Tensor
    add: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    silu: bool


class StepOperands(NamedTuple):
    """The tensors that the step kernel reads and writes. x, x_prev, x0_last, x0 and noise have the same memory layout."""

    x: torch.Tensor
    x_prev: torch.Tensor
    o: torch.Tensor
    x0_last: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    next_input: torch.Tensor | None = None
    noise: torch.Tensor | None = None
