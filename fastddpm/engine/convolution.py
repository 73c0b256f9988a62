"""Convolutions with constant weights: oneDNN's packed weights, Winograd's method, upsampling as one product."""

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


# Winograd's method is the faster one for batches of at least so many pixels, even if each call transforms the weights.
MIN_REPACKED_PIXELS = 256


def _onednn_accepts(x: torch.Tensor) -> bool:
    """Whether oneDNN multiplies x by weights in its own layout, through torch's private operators."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")  # which these operators would not heed
        and x.shape[2:].numel() > 1  # torch 2.6 cannot add a residual to a single pixel
        and all(hasattr(torch.ops.mkldnn, name) for name in ONEDNN)
        and x.dtype in (torch.float32, torch.bfloat16)
        and backend.emulated_reason(x.device, x.dtype) is None
    )


class Convolution(nn.Module):
    """conv(x), or residual + conv(x), with constant weights [O, I, K, K]; with upsample, conv of x with doubled sides.

    On a CPU the first call puts the weights into the layout that oneDNN wants, which would otherwise happen in every
    call, and keeps no others: x must then keep its height and width. There a residual is added before the one
    rounding, without a pass of its own. 3x3 convolutions use Winograd's method: their transformed weights are cached
    where `assign_winograd` allows it, and otherwise each call transforms them, if x is large enough for that to pay.
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
        """As module.to, for a network in this dtype."""
        self.dtype = dtype
        cpu = device.type == "cpu"
        if cpu and self.may_cache_winograd:  # Winograd's weights are rounded once, behind their transformation
            self.weight, self.bias = self.weight.to(device), None if self.bias is None else self.bias.to(device)
            return
        if self.upsample:
            self.weight = upsampling_weight(self.weight)
        layout = torch.contiguous_format if cpu else torch.channels_last
        self.weight = self.weight.to(device, dtype).contiguous(memory_format=layout)
        self.bias = None if self.bias is None else self.bias.to(device, dtype).contiguous()

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, inplace: bool = False) -> torch.Tensor:
        """inplace: the result may take the residual's memory."""
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
        """self(norm(x, **conditions), residual, inplace).

        keep_float32: the result may be float32 in a network of another dtype.
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
        """Choose the method by the first x. Another batch size works too, but may be slower than with a choice of its own."""
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
    """Nearest upsampling and a 3x3 convolution behind it as one transposed convolution, stride 2, padding 1: 4 products
    for each output pixel instead of 9. [O, I, 3, 3] -> [I, O, 4, 4].

    Nearest upsampling is a transposed convolution with a 2x2 block of ones, stride 2; a 3x3 convolution behind it makes
    the 4x4 kernel that is the sum of the 3x3 one (mirrored, as transposed convolutions have it) at the block's 4 places.
    """
    taps = weight.double().flip(2, 3).transpose(0, 1)
    return sum(F.pad(taps, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1))
