"""Convolutions with constant weights: oneDNN's packed weights, Winograd's method, fused upsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import backend
from ..models.unet import (
    GroupNormSiLU,
)
from ..ops import winograd

ONEDNN = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_transpose_weight",
)


# From this number of pixels in a batch on, Winograd's method is faster even if each call transforms the weights.
MIN_REPACKED_PIXELS = 256


def _onednn_accepts(x: torch.Tensor) -> bool:
    """Return whether oneDNN can convolve x with weights in its own layout, through torch's private operators."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")  # these operators ignore autocast
        and x.shape[2:].numel() > 1  # torch 2.6 cannot add a residual to a single pixel
        and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)
        and x.dtype in (torch.float32, torch.bfloat16)
        and backend.emulated_reason(x.device, x.dtype) is None
    )


class Convolution(nn.Module):
    """conv(x) or residual + conv(x), with constant weights [O, I, K, K]. With upsample, the sides of x are doubled first.

    On a CPU the first call converts the weights to oneDNN's layout, which would otherwise happen in every call, and frees the
    original ones: all later x must have the same height and width. The residual is then added before the only rounding, and
    without a pass of its own. 3x3 convolutions use Winograd's method. Their transformed weights are cached if `assign_winograd`
    allows it. Otherwise each call transforms them, if x is large enough for this to be faster.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int, upsample: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.upsample = [stride, stride], [padding, padding], upsample
        self.may_cache_winograd = False  # whether transformed weights may be cached
        self.is_prepared, self.packed_weight, self.uses_winograd = False, None, False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Convolution:
        return cls(conv.weight.detach(), conv.bias.detach(), conv.stride[0], conv.padding[0])

    @classmethod
    def from_upsample(cls, conv: nn.Conv2d) -> Convolution:
        return cls(conv.weight.detach(), conv.bias.detach(), stride=1, padding=1, upsample=True)

    def to_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast the weights, in place, for a network in this dtype."""
        self.dtype = dtype
        cpu = device.type == "cpu"
        if cpu and self.may_cache_winograd:  # Winograd's weights are rounded once, after their transformation
            self.weight, self.bias = self.weight.to(device), None if self.bias is None else self.bias.to(device)
            return
        if self.upsample:
            self.weight = upsampling_weight(self.weight)
        layout = torch.contiguous_format if cpu else torch.channels_last
        self.weight = self.weight.to(device, dtype).contiguous(memory_format=layout)
        self.bias = None if self.bias is None else self.bias.to(device, dtype).contiguous()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, inplace: bool = False) -> torch.Tensor:
        """Return the convolution. inplace: the result may overwrite the residual."""
        self._prepare(x)
        if self.uses_winograd:
            out = residual if inplace else None
            return winograd.convolve(x, self._transformed(), self.bias, residual, out, upsample=self.upsample)
        if self.packed_weight is None:
            if self.upsample:
                return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
            return y if residual is None else residual + y
        if self.upsample:
            return torch.ops.mkldnn._convolution_transpose_pointwise(
                x, self.packed_weight, self.bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
            )
        operands = self.packed_weight, self.bias, self.padding, self.stride, [1, 1], 1
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *operands, "none", [], "")
        add = "add", 1.0, None, [], None
        if inplace:
            return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *operands, *add)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *operands, *add)

    def norm_conv(
        self,
        norm: GroupNormSiLU,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        inplace: bool = False,
        keep_float32: bool = False,
        **conditions: torch.Tensor,
    ) -> torch.Tensor:
        """Return self(norm(x, **conditions), residual, inplace).

        keep_float32: whether the result may be float32 in a network of another dtype.
        """
        self._prepare(x)
        if not (self.uses_winograd and x.is_contiguous(memory_format=torch.channels_last)):
            return self(norm(x, **conditions), residual, inplace)
        coefficients = winograd.norm_coefficients(x, norm.groups, norm.weight, norm.bias, norm.eps, **conditions)
        packed, out, dtype = self._transformed(), residual if inplace else None, torch.float32 if keep_float32 else None
        return winograd.convolve(
            x, packed, self.bias, residual, out, coefficients=coefficients, upsample=self.upsample, dtype=dtype
        )

    def _transformed(self) -> torch.Tensor:
        return (
            winograd.pack(self.weight, self.dtype, self.upsample) if self.packed_weight is None else self.packed_weight
        )

    def _prepare(self, x: torch.Tensor) -> None:
        """Choose the method for the first x. Another batch size also works, but its fastest method may differ."""
        if self.is_prepared:
            return
        self.is_prepared = True
        large = x.shape[0] * x.shape[2:].numel() >= MIN_REPACKED_PIXELS and winograd.shaped(
            self.weight, self.stride, self.padding
        )
        if (self.may_cache_winograd or large) and winograd.suits(x, self.dtype, self.upsample):
            self.uses_winograd, self.bias = True, None if self.bias is None else self.bias.float().contiguous()
            if self.may_cache_winograd:
                self.packed_weight, self.weight = winograd.pack(self.weight, self.dtype, self.upsample), None
            return
        if self.may_cache_winograd:
            self.may_cache_winograd = False
            self.to_device(x.device, self.dtype)
        if not _onednn_accepts(x):
            return
        weight, self.weight = self.weight, None
        if self.upsample:
            self.packed_weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight.contiguous(), [1, 1], [0, 0], [2, 2], [1, 1], 1, x.shape
            )
            return
        settings = self.padding, self.stride, [1, 1], 1, x.shape
        self.packed_weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *settings)


def upsampling_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return the weights [I, O, 4, 4] that fuse nearest-neighbour upsampling and a 3x3 convolution [O, I, 3, 3].

    The result is a transposed convolution with stride 2 and padding 1, with 4 products per output pixel instead of 9.
    Nearest-neighbour upsampling is itself a transposed convolution of stride 2 with a 2x2 kernel of ones. A 3x3 convolution after
    it yields a 4x4 kernel: the sum of the 3x3 kernel, mirrored for the transposed convolution, at the 4 positions of the ones.
    """
    taps = weight.double().flip(2, 3).transpose(0, 1)
    return sum(F.pad(taps, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))
