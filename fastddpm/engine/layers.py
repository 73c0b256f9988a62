"""Fused forms of a UNet's layers: the same functions of x, with constant weights and in fewer products and passes."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..models.unet import (
    Attention,
    Downsample,
    GroupNormSiLU,
    Level,
    Middle,
    ResBlock,
    TimestepEmbedding,
    UNet,
    Upsample,
    conditions,
    resampled,
)
from ..ops import winograd
from ..utils.modules import is_unmodified
from .convolution import Convolution


class FusedResBlock(nn.Module):
    """`ResBlock` with fused biases and residual.

    The second norm adds the first convolution's bias, with the embedding. The second convolution adds the shortcut. If the
    shortcut is a convolution, its bias contains that of the second one. This removes most bias kernels on a GPU.
    """

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.scale_shift, self.resample, self.divisor = block.scale_shift, block.resample, block.divisor
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1 = (
            Convolution.from_upsample(block.conv1) if self.resample == "up" else Convolution.from_conv(block.conv1)
        )
        self.conv2 = Convolution.from_conv(block.conv2)
        self.conv_shortcut = None if block.conv_shortcut is None else Convolution.from_conv(block.conv_shortcut)
        self.time_emb_proj = copy.copy(block.time_emb_proj)
        self.register_buffer("added", None)
        if self.scale_shift:
            self.added = self.conv1.bias
        else:
            self.time_emb_proj._parameters = {
                "weight": block.time_emb_proj.weight,
                "bias": nn.Parameter(block.time_emb_proj.bias.detach() + self.conv1.bias, requires_grad=False),
            }
        self.conv1.bias = None
        if self.conv_shortcut is not None:
            self.conv_shortcut.bias, self.conv2.bias = self.conv_shortcut.bias + self.conv2.bias, None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        # The tensor between the convolutions is not rounded if both accept float32.
        keep_float32 = self.conv2.may_cache_winograd
        if self.resample == "down":
            h = self.conv1(resampled(self.norm1(x), self.resample))
        else:
            h = self.conv1.norm_conv(self.norm1, x, keep_float32=keep_float32)
        x = resampled(x, self.resample)
        norm_conditions = conditions(embedding, self.scale_shift)
        if self.added is not None:
            norm_conditions["add"] = self.added
        if self.conv_shortcut is None:
            h = self.conv2.norm_conv(self.norm2, h, x, **norm_conditions)
        else:
            h = self.conv2.norm_conv(self.norm2, h, self.conv_shortcut(x), inplace=True, **norm_conditions)
        return h if self.divisor == 1 else h / self.divisor


class FusedAttention(nn.Module):
    """`Attention` with one head, in two projections instead of four.

    The head is as wide as x. With h, the normalised x:
      q_i . k_j = (Wk^T Wq h_i + Wk^T bq) . h_j + terms equal for all j, which do not affect the softmax
      Wo sum_j p_ij (Wv h_j + bv) + bo = sum_j p_ij (Wo Wv h_j + Wo bv + bo), as the p_ij sum to 1
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
        wq, bq, wk, wv, bv, wo, bo = (
            p.detach().double() for p in (q.weight, q.bias, k.weight, v.weight, v.bias, out.weight, out.bias)
        )
        weight, bias = torch.cat((wk.T @ wq, wo @ wv)), torch.cat((wk.T @ bq, wo @ bv + bo))
        self.group_norm, self.divisor = attention.group_norm, attention.divisor
        self.projections = Convolution(weight[..., None, None], bias, stride=1, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = x.shape[1]
        h = x if self.group_norm is None else self.group_norm(x)
        q, v = self.projections(h).flatten(2).transpose(1, 2).split(c, dim=-1)  # [N, H*W, C] each, views
        # Allocated as an image: torch.cat would not detect the reshaped result of a single image as channels_last.
        y = torch.empty_like(x, memory_format=torch.channels_last)
        k, residual, out = (image.flatten(2).transpose(1, 2) for image in (h, x, y))  # [N, H*W, C]; out is a view
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # At 256 channels, torch's flash attention on a CPU takes 1.7 times as long as these explicit products.
            scores = torch.baddbmm(x.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=c**-0.5)
            torch.baddbmm(residual, scores.softmax(-1), v, out=out)
        else:
            attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
            torch.add(residual, attended, out=out)
        return y if self.divisor == 1 else y / self.divisor


class FusedHeads(nn.Module):
    """`Attention` with several heads, its first three projections in one.

    The fusion of `FusedAttention` would make each head's projection as wide as x.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        parts = attention.to_q, attention.to_k, attention.to_v
        weight, bias = (torch.cat([getattr(part, name).detach() for part in parts]) for name in ("weight", "bias"))
        out = attention.to_out[0]
        self.group_norm, self.heads, self.divisor = attention.group_norm, attention.heads, attention.divisor
        self.projections = Convolution(weight[..., None, None], bias, stride=1, padding=0)
        self.out = Convolution(out.weight.detach()[..., None, None], out.bias.detach(), stride=1, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        q, k, v = self.projections(h).reshape(n, 3, self.heads, c // self.heads, -1).transpose(-1, -2).unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)  # [N, heads, H*W, C / heads]
        y = y.permute(0, 2, 1, 3).reshape(n, height, width, c).permute(0, 3, 1, 2)  # channels_last
        y = self.out(y, x)
        return y if self.divisor == 1 else y / self.divisor


def fused_attention(attention: Attention) -> nn.Module:
    return FusedAttention(attention) if attention.heads == 1 else FusedHeads(attention)


def fused_upsample(upsample: Upsample) -> Convolution:
    return Convolution.from_upsample(upsample.conv)


FUSED_LAYERS = {
    ResBlock: FusedResBlock,
    Attention: fused_attention,
    Upsample: fused_upsample,
    nn.Conv2d: Convolution.from_conv,
}


# (kernel, stride, padding) of the convolutions in unet.py
SUPPORTED_CONVS = {
    ((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((1, 1), (1, 1), (0, 0)),
}  # fmt: skip


def _has_supported_shape(part: nn.Module) -> bool:
    if isinstance(part, nn.Conv2d):
        usual = (part.padding_mode, part.dilation, part.groups) == ("zeros", (1, 1), 1) and part.bias is not None
        return usual and (part.kernel_size, part.stride, part.padding) in SUPPORTED_CONVS
    if isinstance(part, nn.Linear):
        return part.bias is not None
    if isinstance(part, Upsample):
        return (part.conv.kernel_size, part.conv.stride) == ((3, 3), (1, 1))
    if isinstance(part, ResBlock):
        return part.resample is None or (part.conv1.kernel_size, part.conv1.stride) == ((3, 3), (1, 1))
    if isinstance(part, Attention):
        return all(v.in_features == v.out_features for v in (part.to_q, part.to_k, part.to_v, part.to_out[0]))
    return True


def _is_supported(layer: nn.Module) -> bool:
    """Return whether a layer and all its parts are unmodified, and have the sizes that the fused form assumes."""
    known = (*FUSED_LAYERS, GroupNormSiLU, nn.Linear, nn.Dropout, nn.ModuleList)
    parts = list(layer.modules())
    return all(type(part) in known and is_unmodified(part) for part in parts) and all(map(_has_supported_shape, parts))


# Layers without a fused form. TimestepEmbedding runs outside the loop.
UNFUSED_LAYERS = (GroupNormSiLU, TimestepEmbedding, nn.Linear, nn.Embedding)


def fuse_layers(network: nn.Module, prefix: str = "") -> list[str]:
    """Replace, in place, all unmodified layers that have a fused form. Return the names of modified layers, left unfused.

    The parts of a modified layer are not fused either: it may read their weights, which fused layers free after packing.
    """
    unfused = []
    for name, layer in network.named_children():
        if type(layer) in FUSED_LAYERS and _is_supported(layer):
            setattr(network, name, FUSED_LAYERS[type(layer)](layer))
        elif type(layer) in (Level, Middle, Downsample, nn.ModuleList) and is_unmodified(layer):
            unfused += fuse_layers(layer, f"{prefix}{name}.")
        elif not all(type(part) in UNFUSED_LAYERS and is_unmodified(part) for part in layer.modules()):
            unfused.append(prefix + name)
    return unfused


def assign_winograd(network: UNet, dtype: torch.dtype, byte_budget: float) -> None:
    """Let convolutions cache their weights as transformed for Winograd's method, those on the largest images first.

    Transformed weights are larger. All weights together stay below `byte_budget` bytes.
    """
    last = len(network.down_blocks) - 1
    levels = [*enumerate(network.down_blocks), (last, network.mid_block)]
    levels += [(last - i, level) for i, level in enumerate(network.up_blocks)]
    layers = [layer for layer in network.modules() if isinstance(layer, Convolution)]
    byte_budget -= sum(layer.weight.numel() for layer in layers) * dtype.itemsize
    for _, level in sorted(levels, key=lambda entry: entry[0]):
        for layer in level.modules():
            if isinstance(layer, Convolution) and winograd.shaped(layer.weight, layer.stride, layer.padding):
                growth = 0 if layer.upsample else (winograd.GROWTH - 1) * layer.weight.numel() * dtype.itemsize
                if growth <= byte_budget:
                    layer.may_cache_winograd = True
                    byte_budget -= growth
