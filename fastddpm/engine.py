"""The network as the machine wants it, for inference: same weights, another layout and dtype, t taken out of the loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .unet import Attention, GroupNormSiLU, UNet, Upsample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plain:
    """Any model called as model(x, t) or model(x, t, class_labels)."""

    memory_format = torch.contiguous_format

    def __init__(self, model: Callable, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        return self.model(x, t) if class_labels is None else self.model(x, t, class_labels)


class MergedAttention(nn.Module):
    """`Attention` with two projections instead of four: the same function of x, in other numbers.

    With one head as wide as x, and h the normalised x:
      q_i . k_j = (Wk^T Wq h_i + Wk^T bq) . h_j + what is the same for all j, and leaves the softmax alone
      Wo sum_j p_ij (Wv h_j + bv) + bo = sum_j p_ij (Wo Wv h_j + Wo bv + bo), as the p_ij sum to 1
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        q, k, v, out = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
        wq, bq, wk, wv, bv, wo, bo = (
            p.detach().double() for p in (q.weight, q.bias, k.weight, v.weight, v.bias, out.weight, out.bias)
        )
        self.group_norm = attention.group_norm
        self.register_buffer("weight", torch.cat((wk.T @ wq, wo @ wv))[..., None, None])
        self.register_buffer("bias", torch.cat((wk.T @ bq, wo @ bv + bo)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        h = self.group_norm(x)
        q, v = (
            F.conv2d(h, self.weight, self.bias).flatten(2).transpose(1, 2).split(c, dim=-1)
        )  # [N, H*W, C] each, views
        k, residual = h.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            # torch's flash attention on a CPU takes 1.7 times as long as the products written out, at 256 channels
            scores = torch.baddbmm(x.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=c**-0.5)
            y = torch.baddbmm(residual, scores.softmax(-1), v)
        else:
            y = residual + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
        return y.transpose(1, 2).reshape(n, c, height, width)


class MergedUpsample(nn.Module):
    """`Upsample` as one transposed convolution, with 4 products for each output pixel instead of 9.

    Nearest upsampling is a transposed convolution with a 2x2 block of ones, stride 2; a 3x3 convolution behind it makes
    the 4x4 kernel that is the sum of the 3x3 one (mirrored, as transposed convolutions have it) at the block's 4 places.
    """

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        taps = upsample.conv.weight.detach().double().flip(2, 3).transpose(0, 1)
        self.register_buffer("weight", sum(F.pad(taps, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)))
        self.register_buffer("bias", upsample.conv.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


MERGED = {Attention: MergedAttention, Upsample: MergedUpsample}


def _as_made(layer: nn.Module) -> bool:
    """Whether a layer computes what its class says: nothing replaced, hooked, patched or padded otherwise."""
    known = (*MERGED, GroupNormSiLU, nn.Linear, nn.Conv2d, nn.ModuleList)
    return all(
        type(part) in known
        and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
        and getattr(part, "padding_mode", "zeros") == "zeros"
        for part in layer.modules()
    )


class Engine(Plain):
    """A copy of a UNet with merged layers and channels_last weights, its timestep part computed for all steps at once."""

    memory_format = torch.channels_last

    def __init__(self, model: UNet, device: torch.device, dtype: torch.dtype) -> None:
        # deepcopy and not state_dict: the module may carry hooks or replaced layers of its owner.
        network = copy.deepcopy(model).eval()
        for parent in list(network.modules()):
            for name, layer in parent.named_children():
                if type(layer) in MERGED and _as_made(layer):
                    setattr(parent, name, MERGED[type(layer)](layer))
        network.to(device, dtype, memory_format=torch.channels_last)
        super().__init__(network, dtype)

    def body(self, x: torch.Tensor, embedding: list[torch.Tensor]) -> torch.Tensor:
        return self.model.body(x, embedding)


def table_embedding(net: Plain, timesteps: torch.Tensor) -> list[torch.Tensor] | None:
    """What every residual block adds at every step, [S, width] each, where that depends on t alone; else None."""
    if not isinstance(net, Engine) or net.model.config.classes is not None:
        return None
    return [part.float() for part in net.model.embed(timesteps)]


@contextlib.contextmanager
def network(model: nn.Module | Callable, device: torch.device, dtype: torch.dtype | None) -> Iterator[Plain]:
    """The model ready for the loop on `device` in `dtype`; the caller's module is never changed, its mode restored."""
    if not isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(
                f"dtype: {dtype} was asked for, but a bare callable cannot be cast; cast it yourself and leave dtype"
            )
        yield Plain(model, torch.float32)
        return
    parameter = next(model.parameters(), None)
    own = torch.float32 if parameter is None else parameter.dtype
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; expected float32, bfloat16 or float16")
    if isinstance(model, UNet):
        yield Engine(model, device, dtype)
        return
    moved = dtype != own or (parameter is not None and parameter.device.type != device.type)
    used = copy.deepcopy(model).to(device, dtype) if moved else model
    modes = [(module, module.training) for module in used.modules()]
    used.eval()
    try:
        yield Plain(used, dtype)
    finally:
        for module, training in modes:
            module.training = training
