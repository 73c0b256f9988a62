"""Checks whether user code has changed a module: hooks, another forward, attributes set on the instance."""

from __future__ import annotations

import torch
from torch import nn


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of the module, or its gradient, runs hooks."""
    return has_forward_hooks(module) or bool(module._backward_hooks or module._backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a forward has been set on the instance, which replaces the class's forward."""
    return "forward" in module.__dict__  # torch 2.6 doesn't compile vars(module)


def forward_is_unmodified(module: nn.Module) -> bool:
    """Return whether a call of the module runs its class's forward and nothing else.

    `is_unmodified` is stricter. This check is for every call: it takes a tenth of the time, and torch.compile traces it.
    """
    return not has_own_forward(module) and not has_hooks(module)


def is_unmodified(module: nn.Module, ignored: frozenset[str] = frozenset()) -> bool:
    """Return whether the module has no hooks of any kind, and no functions or tensors but its parameters and buffers.

    A function set on the instance may replace a method, and may refer to the model itself; a tensor may change unnoticed.

    Args:
        ignored: Names of attributes to skip. `_compiled_call_impl`, set by `module.compile()`, is always skipped: copies lack it.
    """
    for name, value in module.__dict__.items():
        changed = callable(value) or isinstance(value, torch.Tensor) or ("_hooks" in name and value)
        if changed and name != "_compiled_call_impl" and name not in ignored:
            return False
    return True
