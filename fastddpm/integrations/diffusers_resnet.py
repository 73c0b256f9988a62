"""diffusers' ResnetBlock2D with each norm and its SiLU in one kernel. `fastddpm.fuse_norms` installs it."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..ops import winograd
from .fused_layers import can_fuse, computes, conditions_broadcast, expand_conditions, has_affine, norm_silu

MIN_PIXELS = 256  # pixels of a batch from which transforming a convolution's weights in every call is worth its time


class FusedResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D computed with `ops.group_norm_silu`. A block with hooks or replaced parts runs unfused.

    On a CPU the convolution after a norm computes the norm and SiLU itself if it can, so that their result is never stored.
    """

    @staticmethod
    def unsupported_reason(block: ResnetBlock2D) -> str | None:
        """Return why the fused forward does not support the block's norms or nonlinearity; None if it does."""
        for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
            if not (computes(norm, nn.GroupNorm) and has_affine(norm)):
                return f"its {name} has hooks, or is no GroupNorm with weights and a bias"
        if not computes(block.nonlinearity, nn.SiLU):
            return "its nonlinearity has hooks, or is no SiLU"
        if block.time_emb_proj is not None and block.time_embedding_norm not in ("default", "scale_shift"):
            return f"its time_embedding_norm is {block.time_embedding_norm!r}"
        return None

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args, **kwargs) -> torch.Tensor:
        usual = (temb is None) == (self.time_emb_proj is None) and (
            temb is not None or self.time_embedding_norm != "scale_shift"
        )
        if args or kwargs or not usual or self.unsupported_reason(self):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, conditions = input_tensor, {}
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "default":
                conditions["add"] = temb
            else:
                conditions["scale"], conditions["shift"] = temb.chunk(2, dim=1)
        resample = self.upsample or self.downsample
        if resample is None and self._can_fuse_convolutions(x, conditions):
            h = self._fused_convolutions(x, expand_conditions(x, conditions))
            return h.contiguous() if x.is_contiguous() else h
        h = norm_silu(self.norm1, x)
        if resample is not None:
            if self.upsample is not None and len(x) >= 64:  # as diffusers does, for torch's upsampling kernel
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = self.conv2(self.dropout(norm_silu(self.norm2, self.conv1(h), **conditions)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return (x + h) / self.output_scale_factor

    def _can_fuse_convolutions(self, x: torch.Tensor, conditions: dict[str, torch.Tensor]) -> bool:
        """Return whether the convolutions can compute the norms before them, and faster (CPU, float32, no gradients)."""
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # a trace may later run with other sizes or with gradients
            and x.dim() == 4
            and winograd.suits(x, torch.float32)
            and len(x) * x.shape[2] * x.shape[3] >= MIN_PIXELS
            and not torch.is_autocast_enabled("cpu")
            and computes(self.dropout, nn.Dropout)
            and not (self.dropout.training and self.dropout.p)
            and can_fuse(self.norm1, x)
            and conditions_broadcast(x, conditions)
            and _is_winograd_convolution(self.conv1, x.shape[1])
            and _is_winograd_convolution(self.conv2, self.conv1.out_channels)
            and self._keeps_size(x)
            and all(_float32(layer) for layer in (self.norm1, self.conv1, self.norm2, self.conv2))
        )

    def _keeps_size(self, x: torch.Tensor) -> bool:
        """Return whether the shortcut's result has the shape of conv2's result."""
        if self.conv_shortcut is None:
            return self.conv2.out_channels == x.shape[1]
        conv = self.conv_shortcut
        return (
            computes(conv, nn.Conv2d)
            and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
            and conv.out_channels == self.conv2.out_channels
        )

    def _fused_convolutions(self, x: torch.Tensor, conditions: dict[str, torch.Tensor | None]) -> torch.Tensor:
        def convolved(norm, conv, x, residual=None, add=None, scale=None, shift=None):
            return torch.ops.fastddpm.norm_silu_convolution(
                x,
                norm.num_groups,
                norm.weight,
                norm.bias,
                norm.eps,
                add,
                scale,
                shift,
                conv.weight,
                conv.bias,
                residual,
            )

        x = x.contiguous(memory_format=torch.channels_last)
        h = convolved(self.norm1, self.conv1, x)
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        h = convolved(self.norm2, self.conv2, h, residual, **conditions)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _float32(layer: nn.Module) -> bool:
    weight, bias = layer.weight, layer.bias
    return weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)


def _is_winograd_convolution(conv: nn.Module, channels: int) -> bool:
    return (
        computes(conv, nn.Conv2d)
        and "_conv_forward" not in conv.__dict__  # user code replaces this method for other paddings
        and winograd.shaped(conv.weight, list(conv.stride), list(conv.padding))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and conv.in_channels == channels
    )
